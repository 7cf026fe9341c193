"""Decoding measured: the LRT beside a Transformer of as many parameters, that beside transformers, ragged batches.

Shapes: B rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from lrt.experiments.bench.baselines import transformers_generate
from lrt.experiments.bench.rows import Row
from lrt.inference.cost_model import Calibration
from lrt.inference.decoders import EagerDecoder, decoder, fastest
from lrt.inference.engine import Engine
from lrt.inference.prefill import PrefillMode
from lrt.inference.request import Request
from lrt.inference.sampling import Sampling
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.utils.timing import Work, alternate

BATCHES = (1, 32)
"""Rows decoded at once."""
STEPS = 64
"""Tokens decoded per timing and row."""
RAGGED = 32
"""Prompts of the ragged batch …"""
LENGTHS = range(4, 68, 2)
"""… and their lengths."""
NEW = 24
"""Tokens drawn behind each of them, on average."""


def fastest_decoder(model: LatentRecurrentTransformer, batch: int, candidates: Sequence[str]) -> EagerDecoder:
    """The fastest decoder of `candidates` for so many rows, compiled and warm."""
    state = model.empty_state(batch, STEPS + 1)
    warm = decoder(model, state, fastest(model, state, candidates))
    decode_greedily(warm, batch)()
    return warm


def decode_greedily(step: EagerDecoder, batch: int) -> Work:
    """STEPS tokens for each row, from a one-token prompt, each fed back."""
    first = torch.zeros(batch, dtype=torch.long, device=step.state.tokens.device)

    def work() -> None:
        tokens = first
        for position in range(STEPS):
            tokens = step.logits(step(tokens, [position] * batch)).argmax(-1)
        tokens.cpu()  # waits for what a GPU has queued

    return work


def decode_rows(
    lrt: LatentRecurrentTransformer,
    transformer: LatentRecurrentTransformer,
    rounds: int,
    candidates: Sequence[str] = ("fused", "packed", "compiled"),
    progress: bool = True,
) -> list[Row]:
    """Tokens per second, as ratios of one run: LRT over Transformer, Transformer over transformers' generate."""
    device = lrt.embedding.weight.device
    generate = transformers_generate(transformer.config, device)
    rows = []
    for batch in BATCHES:
        decoders = {
            "lrt": fastest_decoder(lrt, batch, candidates),
            "transformer": fastest_decoder(transformer, batch, candidates),
        }
        prompt = torch.zeros(batch, 1, dtype=torch.long, device=device)
        works: dict[str, Work] = {name: decode_greedily(step, batch) for name, step in decoders.items()}
        works["transformers"] = lambda prompt=prompt: generate(prompt, STEPS)
        timings = alternate(works, rounds, 1, device, f"decoding, batch {batch}", progress)
        speeds = {name: batch * STEPS / timing.median for name, timing in timings.items()}
        about = {"modes": {name: step.name for name, step in decoders.items()}, "tokens_per_second": speeds}
        for (one, other), target in zip(pairwise(("lrt", "transformer", "transformers")), (0.95, 1.5), strict=True):
            value, spread = timings[other].ratio(timings[one])  # speeds: the inverse of the times
            base = "transformers' generate" if other == "transformers" else other
            name = f"decode, batch {batch}: {one} / {base}, tokens/s"
            rows.append(Row(name, value, spread, at_least=target, about=about))
    return rows


def ragged_rows(
    model: LatentRecurrentTransformer,
    text: Sequence[int],
    rounds: int,
    calibration: Calibration,
    progress: bool = True,
    candidates: Sequence[str] = ("fused", "packed"),
) -> list[Row]:
    """32 prompts of different lengths at once over one after another, in tokens per second, prompts included.

    Each side has its fastest decoder of `candidates`. The target is for exact prefill, the engine's default;
    parallel prefill, which helps single prompts most, is reported beside it.
    """
    requests, begin = [], 0
    for i, length in zip(range(RAGGED), LENGTHS, strict=True):
        new = NEW // 2 + i * NEW // (RAGGED - 1)  # from half to one and a half times NEW: rows end at different steps
        length = min(length, model.config.context - new)
        tokens = tuple(text[(begin + t) % len(text)] for t in range(length))
        requests.append(Request(tokens, new, Sampling(temperature=0)))
        begin += length
    slots = max(len(r.tokens) + (r.max_new_tokens or 0) for r in requests)
    sides = {"at once": RAGGED, "one after another": 1}
    modes = {name: fastest(model, model.empty_state(rows, slots), candidates) for name, rows in sides.items()}
    new_tokens = sum(r.max_new_tokens or 0 for r in requests)
    measured = []
    targets: dict[PrefillMode, float | None] = {"exact": 6, "converged": None}
    for prefill, target in targets.items():
        engines = {
            name: Engine(model, rows, slots, modes[name], prefill, calibration=calibration)
            for name, rows in sides.items()
        }
        works: dict[str, Work] = {name: lambda e=engine: e.complete(requests) for name, engine in engines.items()}
        timings = alternate(works, rounds, 1, model.embedding.weight.device, f"ragged, {prefill}", progress)
        value, spread = timings["one after another"].ratio(timings["at once"])
        speeds = {name: new_tokens / timing.median for name, timing in timings.items()}
        about = {"modes": modes, "prompt_tokens": begin, "new_tokens": new_tokens, "tokens_per_second": speeds}
        name = f"{RAGGED} ragged prompts at once / one after another, tokens/s, prefill {prefill}"
        measured.append(Row(name, value, spread, at_least=target, about=about))
    return measured
