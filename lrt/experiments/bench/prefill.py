"""What a parallel prefill costs: in plain forwards of the same model, and against token by token.

Shapes: B prompts, T their tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lrt.eval.scoring import score
from lrt.experiments.bench.rows import Row
from lrt.inference.calibrate import STRIDES
from lrt.inference.certificate import Certificate
from lrt.inference.cost_model import Calibration, block_shares
from lrt.inference.prefill import PrefillMode, prefill
from lrt.inference.prompt import Prompt
from lrt.inference.sweeps import SweepState
from lrt.model.cross_entropy import token_nats
from lrt.model.execution import EAGER, WHOLE, Execution
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.utils.device import double
from lrt.utils.progress import bar
from lrt.utils.timing import alternate

WITHIN = 0.0005
"""Bits per byte from the live score at which a prefill counts as live."""
SCORED_SWEEPS = 6
"""Sweeps after which the score is taken, at most."""


def prefill_rows(
    model: LatentRecurrentTransformer,
    prompts: Tensor,
    token_bytes: Tensor,
    calibration: Calibration,
    rounds: int = 10,
    progress: bool = True,
) -> list[Row]:
    """The figures of prompts (B, T): the first is timed, all are scored.

    A plain forward of the prompt is the unit: of time, and of positions computed.
    """
    device, first, length = prompts.device, prompts[:1], prompts.shape[1]
    live, gaps = gaps_to_live(model, prompts, token_bytes, progress)
    needed = {stride: sweeps_needed(by_sweep) for stride, by_sweep in gaps.items()}
    # The stride that is live at the least cost: a large one needs fewer sweeps, of more calls each.
    shares = block_shares(model.config)
    groups = min(needed, key=lambda stride: needed[stride] * calibration.sweep_cost(length, 1, stride, shares.swept))
    sweeps = needed[groups]
    work = prefill_work(model, first, calibration, groups, sweeps)
    fast, converged = work["fast"](), work["converged"]()
    quick = {name: work[name] for name in ("plain", "fast", "converged", "live", "whole")}
    with torch.no_grad():
        times = alternate(quick, rounds, 1, device, "prefill", progress)
        # Token by token takes far longer: fewer rounds, beside a candidate of its own.
        both = {name: work[name] for name in ("fast", "exact")}
        slow = alternate(both, max(1, rounds // 4), 1, device, "exact", progress)
    about = {"tokens": length, "prompts": len(prompts)}
    # The first n·g positions are exact after n sweeps, and are not swept again. The other blocks run once.
    swept = sum(length - sweep * groups for sweep in range(sweeps)) / length
    computed = shares.below + shares.swept * swept + shares.above
    scored = {**about, "groups": groups, "sweeps": sweeps, "live_bpb": live, "gap_after_each_sweep": gaps}
    name = f"prefill of {length} tokens"
    unit = "plain forwards"
    # Of sweeps that run at most half of the blocks, and of others.
    to_fast, to_live = (4.5, 3.2) if shares.above >= 0.5 else (8, 5)
    return [
        Row(f"{name}, fast: {unit}, time", *times["fast"].ratio(times["plain"]), at_most=to_fast, about=fast.to_dict()),
        Row(f"{name}, fast: {unit}, positions", fast.forwards, at_most=to_fast, about=fast.to_dict()),
        Row(f"{name}, to live BPB: {unit}, time", *times["live"].ratio(times["plain"]), at_most=to_live, about=scored),
        Row(f"{name}, to live BPB: {unit}, positions", computed, at_most=to_live, about=scored),
        Row(f"{name}, fast / with whole sweeps, time", *times["fast"].ratio(times["whole"]), about=about),
        Row(f"{name}, converged: {unit}, time", *times["converged"].ratio(times["plain"]), about=converged.to_dict()),
        Row(
            f"{name}, token by token / fast, time",
            *slow["exact"].ratio(slow["fast"]),
            at_least=10 if device.type == "cuda" else None,
            about=about,
        ),
    ]


def prefill_work(
    model: LatentRecurrentTransformer, tokens: Tensor, calibration: Calibration, groups: int, sweeps: int
) -> dict[str, Callable[[], Any]]:
    """What is timed on a prompt (1, T): a plain forward, each mode of `prefill`, sweeps until the score is live, and
    `fast` with sweeps that run all blocks.

    A mode gives its Certificate.
    """
    length, context = tokens.shape[1], model.config.context

    def run_plain() -> None:
        model(tokens, range(length), model.empty_state(1, context).in_place())

    def sweep_to_live() -> None:
        state = model.empty_state(1, context, tokens=pad_to(tokens, context)).in_place()
        rows = SweepState.of(model, Prompt(tokens, [length], [0]), state)
        for sweep in range(sweeps):
            rows.sweep(model, groups, sweep * groups)
        rows.finish(model, [0])

    def fill(mode: PrefillMode, execution: Execution = EAGER) -> Certificate:
        state = dataclasses.replace(model.empty_state(1, context), execution=execution).in_place()
        return prefill(model, tokens, state, mode, calibration=calibration).report.rows[0]

    modes: tuple[PrefillMode, ...] = ("fast", "converged", "exact")
    whole = partial(fill, "fast", WHOLE)
    return {"plain": run_plain, "live": sweep_to_live, "whole": whole, **{mode: partial(fill, mode) for mode in modes}}


def gaps_to_live(
    model: LatentRecurrentTransformer, prompts: Tensor, token_bytes: Tensor, progress: bool = True
) -> tuple[float, dict[int, list[float]]]:
    """(live BPB of prompts (B, T); stride -> after each of its sweeps, how far the BPB is above that)."""
    batch, length = prompts.shape
    strides = [g for g in STRIDES if 2 * g <= length]
    bits = math.log(2) * int(token_bytes.to(prompts.device)[prompts[:, 1:]].sum())
    gaps: dict[int, list[float]] = {}
    with torch.no_grad(), bar("live score", batch * (length - 1) * (1 + len(strides)), progress) as advance:
        live = float(double(score(model, prompts, advance=advance)).sum()) / bits
        for groups in strides:
            state = model.empty_state(batch, length, tokens=prompts).in_place()
            rows = SweepState.of(model, Prompt(prompts, [length] * batch, [0] * batch), state)
            gaps[groups] = []
            for sweep in range(min(SCORED_SWEEPS, length // groups)):
                rows.sweep(model, groups, sweep * groups)
                rows.finish(model, list(range(batch)))
                nats = token_nats(model, rows.hidden()[:, :-1], prompts[:, 1:])
                gaps[groups].append(float(double(nats).sum()) / bits - live)
            advance(batch * (length - 1), f"stride {groups}")
    return live, gaps


def sweeps_needed(gaps: Sequence[float]) -> int:
    """Sweeps from which on the BPB stays within 0.0005 of live; one more than were scored where it never does."""
    far = [n for n, gap in enumerate(gaps, start=1) if abs(gap) > WITHIN]
    return (far[-1] if far else 0) + 1


def pad_to(tokens: Tensor, slots: int) -> Tensor:
    """Tokens (B, T) with the unknown behind them, (B, S)."""
    return torch.nn.functional.pad(tokens, (0, slots - tokens.shape[1]), value=-1)
