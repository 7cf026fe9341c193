"""What is measured of a run while it trains: live scores and the gap, what the memory weighs, whether it diverges.

Nothing here changes what is trained; every call scores the same windows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lrt.data.prepared import Prepared
from lrt.data.windows import windows
from lrt.eval.memory_stats import layer_stats, longest_inputs
from lrt.eval.scoring import evaluate
from lrt.model.memory import Projection, Residual
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.schedules.base import Schedule
from lrt.training.config import EvalConfig
from lrt.utils.files import replace_atomically

GAP_GROWTH = 0.01
"""A gap that has grown by more than so many bits per byte above the smallest seen is warned of."""
EXPLOSION = 1.0
"""Nats above the loss of knowing nothing (or the first loss, if larger) at which a run has exploded …"""
PATIENCE = 5
"""… when so many steps in a row are there."""
FINAL_TARGETS = 50_000
"""Tokens that a result is scored on, at least (contract, section 4)."""
MEMORY_SAMPLE = (2, 256)
"""Windows and tokens of each, at most, over which gates are averaged while training."""
BATCH_TOKENS = 16384
"""Tokens scored at once, at most."""


def scored_tokens(config: EvalConfig, steps: int, available: int, done: int = 0) -> int:
    """Tokens that a run of `steps` scores from step `done` on, of a validation split of `available` tokens."""
    every = config.interval(steps)
    if every == 0:
        return 0
    last_is_extra = steps % every != 0
    times = steps // every + last_is_extra - done // every
    return times * min(config.targets, available) + min(max(config.targets, FINAL_TARGETS), available)


def live_scores(
    model: LatentRecurrentTransformer, data: Prepared, schedule: Schedule, targets: int, progress: bool
) -> dict[str, float]:
    """live_bpb, parallel_bpb and gap, in bits per byte, on `targets` tokens of validation windows, and their number."""
    context = model.config.context
    token_bytes = data.tokenizer.token_bytes()
    # Without a byte alphabet only the whole split has a size in bytes.
    val = windows(data.split("val"), context, None if token_bytes is None else targets)
    metrics = evaluate(
        model,
        val,
        token_bytes,
        schedule,
        ablations=(),
        batch_size=max(1, BATCH_TOKENS // context),
        progress=progress,
        prefix_bytes=data.tokenizer.prefix_bytes("a"),
    )
    assert metrics.parallel_bpb is not None
    assert metrics.gap is not None
    scores = {"live_bpb": metrics.live_bpb, "parallel_bpb": metrics.parallel_bpb, "gap": metrics.gap}
    return scores | {"targets": metrics.targets}


def memory_by_layer(model: LatentRecurrentTransformer, data: Prepared) -> dict[str, Any]:
    """`memory_layers`: γ, gates and the memory's share by block, over a little validation text."""
    if model.config.memory.injection == "none":
        return {}
    rows, length = MEMORY_SAMPLE
    val = windows(data.split("val"), model.config.context, rows * model.config.context)
    return {"memory_layers": layer_stats(model, longest_inputs(val, rows, model.embedding.weight.device)[:, :length])}


@torch.no_grad()
def memory_weight(model: LatentRecurrentTransformer) -> dict[str, float]:
    """How strongly the memory is wired in: mean |γ| over blocks, and the root mean square of U_k and U_v.

    The memory itself is RMS-normalised, so that its own norm is always sqrt(D) and says nothing.
    """
    weight: dict[str, float] = {}
    gammas = [m.gamma.abs().mean() for m in model.modules() if isinstance(m, Residual)]
    if gammas:
        weight["memory_gamma"] = float(torch.stack(gammas).mean())
    if isinstance(model.projection, Projection):
        weight["memory_projection"] = float(model.projection.weight.square().mean().sqrt())
    return weight


def gap_warning(lines: Sequence[dict[str, Any]]) -> str | None:
    """A warning where the last evaluation's gap has grown, else None. `lines` are the metrics log so far."""
    gaps = [line["gap"] for line in lines if "gap" in line]
    # Live better than parallel (a gap below zero) is no reason to worry later.
    if not gaps or gaps[-1] - max(0.0, min(gaps)) <= GAP_GROWTH:
        return None
    return (
        f"the gap between live and parallel quality has grown to {gaps[-1]:+.4f} bits per byte (smallest so far "
        f"{min(gaps):+.4f}): what is trained is not what is decoded. Settle the memory in training, for example with "
        "--schedule 'settled(1, 1, 1)', or mix such steps in during the warm-down (docs/training.md)"
    )


def has_exploded(lines: Sequence[dict[str, Any]], vocab_size: int) -> bool:
    """Whether the last PATIENCE steps of a metrics log are all worse than knowing nothing, by EXPLOSION nats."""
    last = [line["loss"] for line in lines[-PATIENCE:]]
    # To know nothing is a uniform distribution: ln V nats per token.
    return len(last) == PATIENCE and min(last) > max(math.log(vocab_size), lines[0]["loss"]) + EXPLOSION


def report_divergence(
    out: Path, reason: str, lines: Sequence[dict[str, Any]], snapshot: Path | None, run: dict[str, Any]
) -> str:
    """Write diverged.json (reason, last 50 steps, last good `snapshot`, settings); returns what to tell the user."""
    report = {
        "reason": reason,
        "snapshot": None if snapshot is None else str(snapshot),
        "last": list(lines[-50:]),
        "run": run,
    }
    replace_atomically(out / "diverged.json", json.dumps(report, indent=2) + "\n")
    again = (
        f"go on from the last good snapshot with --resume {snapshot}"
        if snapshot
        else "start again with another --out (there is no snapshot from before; --snapshots.every N makes them)"
    )
    return (
        f"{reason}; {out / 'diverged.json'} has the last steps. Lower the rates (--optim.matrix-lr, …) or limit the "
        f"gradient (--optim.clip 1), and {again}"
    )
