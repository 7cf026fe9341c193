"""`lrt diagnose --probe`: texts with a known state are drawn, and a linear probe is fitted to what a checkpoint keeps.

The texts are fresh ones of the benchmarks; those that are held out come from seeds that no training draws from.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lrt.eval.probe import FILE, Traces, measure_probe, trace_texts, write_probe
from lrt.eval.results import Result
from lrt.experiments.state_data.chess_games import RANDOM_CHESS
from lrt.experiments.state_data.log import LOG
from lrt.experiments.state_data.measure import held_out_rows
from lrt.experiments.state_data.repl import REPL
from lrt.experiments.state_data.rows import Benchmark
from lrt.model import checkpoint
from lrt.utils import files
from lrt.utils.provenance import hardware

Probed = Literal["repl", "log", "chess"]
"""What a probe can be asked for."""
BENCHMARKS: dict[Probed, Benchmark] = {"repl": REPL, "log": LOG, "chess": RANDOM_CHESS}
WORDS = 128
"""Of a text, BOS counted; of a game, moves of 64 plies and less."""
FITTED = 4
"""Times as many tokens are fitted to as are held out."""


@dataclass(frozen=True)
class ProbeSettings:
    """What decides a probe, beside the weights."""

    kind: Probed
    held_out: int = 10_000
    """Words of the texts that it is judged on, at least."""
    batch_size: int = 16
    """Texts that are decoded side by side."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.held_out < 1 or self.batch_size < 1:
            raise ValueError(
                f"at_least is {self.held_out}, batch_size {self.batch_size}; a probe needs 1 or more of both"
            )


def draw_texts(benchmark: Benchmark, purpose: str, words: int, seed: int) -> list[str]:
    """Texts with so many words or a few more, for "train" or "test"."""
    rows = held_out_rows(benchmark, f"probe {purpose}", -(-words // WORDS), WORDS, seed)
    return [benchmark.text(row[:length]) for row, length in zip(rows.tokens, rows.lengths.tolist(), strict=True)]


def probe_checkpoint(path: Path, settings: ProbeSettings, out: Path, device: str) -> tuple[Result, Path]:
    """Fit a probe to a checkpoint, or a run's. Its scores are kept in `out`, the best probe beside the weights.

    Returns the scores and the probe's file.
    """
    start = time.perf_counter()
    folder = checkpoint.verify(path)
    files.check_writable(folder / FILE)
    model, tokenizer = checkpoint.load(folder, device)
    benchmark = BENCHMARKS[settings.kind]

    def traces(purpose: str, words: int) -> Traces:
        texts = draw_texts(benchmark, purpose, words, settings.seed)
        return trace_texts(texts, settings.kind, tokenizer, model.config.context)

    train, held_out = traces("train", FITTED * settings.held_out), traces("test", settings.held_out)
    values, probe = measure_probe(model, settings.kind, train, held_out, settings.batch_size)
    about = {"targets": values["tokens"]["held_out"], "words": WORDS, "seed": settings.seed}
    weights, spent = files.sha256(folder / "model.safetensors"), time.perf_counter() - start
    scores = Result("probe", settings.kind, weights, about, values, spent, hardware(device))
    scores.write(out)
    return scores, write_probe(folder, probe)
