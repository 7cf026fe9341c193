"""`lrt bench inference`: what the engine promises, measured in one run on a pair of trained models, as ratios.

The pair (an LRT and a Transformer of as many parameters) and its data are made by benchmarks/inference_models.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lrt.data.prepared import Prepared
from lrt.data.tokenizer import Tokenizer
from lrt.data.windows import windows
from lrt.experiments.bench import decode, equality, limit, prefill
from lrt.experiments.bench.rows import Row
from lrt.inference import cost_model
from lrt.inference.calibrate import LENGTH, calibrate, sample_text
from lrt.inference.cost_model import Calibration
from lrt.model import checkpoint
from lrt.model.config import ModelConfig
from lrt.model.transformer import LatentRecurrentTransformer

PROMPT_TOKENS = 1024
"""Length of the long prompt, with its BOS, where both models' context is that long."""
SCORED_WINDOWS = 4
"""Prompts that the prefill is scored on."""


@dataclass(frozen=True)
class Pair:
    """What is measured, and how."""

    lrt: LatentRecurrentTransformer
    transformer: LatentRecurrentTransformer
    tokenizer: Tokenizer
    calibration: Calibration
    """Of the LRT, on its device. A Transformer is prefilled in one forward: it has nothing to choose."""
    prompts: Tensor
    """(B, T) int: held-out text."""
    rounds: int
    """Timings of each kind, alternated."""
    progress: bool


def ensure_calibration(path: Path, device: str, progress: bool = True) -> Calibration:
    """The calibration beside a checkpoint for this device; where there is none it is measured, and kept there."""
    folder = checkpoint.verify(path)
    model, tokenizer = checkpoint.load(folder, device)
    calibration = cost_model.read_calibration(folder, model)
    if not calibration.device:  # the fallback, which was measured nowhere
        text = sample_text(model, tokenizer.bos, min(LENGTH, model.config.context))
        calibration = calibrate(model, text, progress)
        cost_model.write_calibration(folder, calibration)
    return calibration


def read_pair(folder: Path, data: Path, device: str, rounds: int, progress: bool = True) -> Pair:
    """The models in folder/lrt and folder/transformer, and prompts from the validation split of `data`.

    Raises ValueError where they are no pair, or the text holds too few long prompts.
    """
    lrt, tokenizer = checkpoint.load(folder / "lrt", device)
    transformer, other = checkpoint.load(folder / "transformer", device)
    prepared = Prepared.open(data)
    for name, sha256 in (("transformer's", other.sha256), (f"{data}'s", prepared.tokenizer.sha256)):
        if sha256 != tokenizer.sha256:
            raise ValueError(f"{folder}: the {name} tokenizer is not the LRT's; train both on one data set")
    if len(lrt.config.stored_sources) == 0:
        raise ValueError(
            f"{folder / 'lrt'} holds a model in which nothing recurs; train the pair with "
            "benchmarks/inference_models.py"
        )
    length = min(PROMPT_TOKENS, lrt.config.context, transformer.config.context)
    longest = windows(prepared.split("val"), length, at_least=None).select(slice(SCORED_WINDOWS))  # longest first
    if len(longest) < SCORED_WINDOWS or longest.lengths.min() < length - 1:  # BOS is the one more
        raise ValueError(
            f"{data} has fewer than {SCORED_WINDOWS} validation windows of {length} tokens; prepare more text"
        )
    batch = next(longest.batches(SCORED_WINDOWS))
    calibration = ensure_calibration(folder / "lrt", device, progress)
    return Pair(lrt, transformer, tokenizer, calibration, batch.tokens.to(device), rounds, progress)


def decode_section(pair: Pair) -> list[Row]:
    """Tokens per second of the pair, and of transformers."""
    return decode.decode_rows(pair.lrt, pair.transformer, pair.rounds, progress=pair.progress)


def ragged_section(pair: Pair) -> list[Row]:
    """Tokens per second of a ragged batch over its prompts one by one."""
    text = pair.prompts.flatten().tolist()
    return decode.ragged_rows(pair.lrt, text, max(1, pair.rounds // 3), pair.calibration, pair.progress)


def prefill_section(pair: Pair) -> list[Row]:
    """The time of a prefill, in plain forwards. ValueError for a tokenizer without a byte alphabet."""
    token_bytes = pair.tokenizer.token_bytes()
    if token_bytes is None:
        raise ValueError("this tokenizer has no byte alphabet, so that no bits per byte can be measured")
    return prefill.prefill_rows(pair.lrt, pair.prompts, token_bytes, pair.calibration, pair.rounds, pair.progress)


def equality_section(pair: Pair) -> list[Row]:
    """How many tokens forks, crops, saves, splits and batches change: the target is none."""
    prompts = equality.split_prompts(pair.prompts.flatten().tolist(), pair.lrt.config.context - equality.NEW)
    return equality.equality_rows(pair.lrt, prompts, progress=pair.progress)


def limit_section(pair: Pair) -> list[Row]:
    """A token over what its weights cost: the pair, and an LRT of 12 layers of 768 with random weights."""
    wide = LatentRecurrentTransformer(ModelConfig.from_depth(12, vocab_size=pair.lrt.config.vocab_size)).eval()
    models = [pair.lrt, pair.transformer, wide.to(pair.prompts.device)]
    return limit.limit_rows(models, pair.rounds, progress=pair.progress)


Section = Callable[[Pair], list[Row]]
SECTIONS: dict[str, Section] = {
    "decode": decode_section,
    "ragged": ragged_section,
    "prefill": prefill_section,
    "equality": equality_section,
    "limit": limit_section,
}


def choose_sections(names: Sequence[str]) -> list[Section]:
    """The sections of these names, or all. ValueError for one that is unknown."""
    unknown = sorted(set(names) - set(SECTIONS))
    if unknown:
        raise ValueError(f"unknown section {', '.join(unknown)}; choose of {', '.join(SECTIONS)}")
    return [section for name, section in SECTIONS.items() if name in (names or SECTIONS)]
