"""The sweep curve: what a model scores after n refinements, how far it then is from the live memory, and a verdict.

A schedule approximates the fixed point h = F(tokens, shift(h)), which live decoding reaches exactly. Here the iteration
goes on past what was trained. It settles, swings between two states, or leaves: so the gap between training and live
decoding shows before it costs.

Shapes: B windows, T positions, P remembered sources, D width. A refinement is a sweep over g strided subsets after a
first full pass; g = 1 is a full (Jacobi) pass: n refinements are `multi_refinement(n)` (arXiv 2605.26797, section 3).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrt.data.batch import IGNORED
from lrt.data.windows import Windows
from lrt.eval.ledger import InMemory, LedgerFactory, in_memory
from lrt.eval.scoring import BATCH, batch_size_for, bits_per_byte, schedule_scorer, window_batches
from lrt.model.cross_entropy import token_nats
from lrt.model.state import State
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.schedules.base import Schedule
from lrt.schedules.library import plain, sequential, sweep
from lrt.schedules.refinement import refine
from lrt.utils.device import double
from lrt.utils.progress import Advance, bar

COUNTS = (0, 1, 2, 3, 4, 8, 16, 32, 63, 64)
"""Refinements whose scores are reported; 0 is the first pass alone."""
GROUPS = (1, 2, 4, 8, 16)
"""Strides g; 1 is a full pass."""
TWO_CYCLE = 0.01
"""BPB after 63 and 64 full refinements differ by more than this in a two-cycle (contract, section 4)."""
STABLE = 0.002
"""BPB after 64 full refinements is within this of `parallel_bpb` in a stable model (contract, section 4)."""
CONVERGED = 1e-3
"""‖h_n − h_{n−1}‖ / ‖h_n‖ at which an iteration has come to rest (contract, section 4: fast)."""
FLOOR = 1e-6
"""Changes below this are rounding, and say nothing of the contraction."""


@dataclass(frozen=True)
class Point:
    """The state after some refinements."""

    refinements: int
    bpb: float
    distance: float
    """‖m − m_live‖ / ‖m_live‖ over all valid positions; of the final hidden state where nothing is remembered."""
    largest: float
    """The same of the worst position."""
    change: float
    """‖h_n − h_{n−1}‖ / ‖h_n‖ against one refinement less; 0 for the first pass."""


@dataclass(frozen=True)
class SweepCurve:
    """The curves of one model on one split."""

    schedule: str
    """The schedule of `parallel_bpb`."""
    parallel_bpb: float
    live_bpb: float
    targets: int
    curves: dict[int, tuple[Point, ...]]
    """g -> a point per count."""
    contraction: dict[int, float]
    """g -> the mean factor by which a refinement shrinks the change; above 1 it grows."""
    even_odd: float
    """BPB after 64 full refinements less that after 63."""
    verdict: str
    """stable; two-cycle; settles elsewhere after n; diverges after n."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)


def classify_curve(bpb: Sequence[float], parallel: float, change: float) -> str:
    """The verdict in words, of the BPB after 0, 1, …, n full refinements and the last relative change.

    Two-cycle and stable: contract, section 4. What is neither, has left the trained score after the last refinement
    that still gave it. It *settles elsewhere* where the iteration came to rest, else it *diverges*: an iteration that
    rests at another score than the trained one does not diverge.
    """
    if len(bpb) < 2:
        raise ValueError(f"{len(bpb)} scores; a verdict needs those of at least two refinement counts")
    if not abs(bpb[-1] - bpb[-2]) <= TWO_CYCLE and math.isfinite(bpb[-1]):
        return "two-cycle"
    near = [n for n, score in enumerate(bpb) if abs(score - parallel) <= STABLE]
    after = near[-1] if near else 0
    if near and after == len(bpb) - 1:
        return "stable"
    return f"settles elsewhere after {after}" if change <= CONVERGED else f"diverges after {after}"


def mean_contraction(changes: Sequence[float]) -> float:
    """Mean factor from one change to the next, up to the first that is only rounding; 0 where that is the first."""
    above = next((i for i, change in enumerate(changes) if change <= FLOOR), len(changes))
    if above < 2:
        return 0.0
    return (changes[above - 1] / changes[0]) ** (1 / (above - 1))  # the geometric mean of all factors between


class Sums(NamedTuple):
    """What is added up over batches for one refinement count."""

    nats: float
    gap: float
    """‖m − m_live‖²."""
    moved: float
    """‖h_n − h_{n−1}‖²."""
    size: float
    """‖h_n‖²."""
    largest: float
    """Of all positions, ‖m − m_live‖ / ‖m_live‖."""

    @classmethod
    def over(cls, batches: Sequence[Sequence[float]]) -> Sums:
        """All batches together."""
        nats, gap, moved, size, largest = zip(*batches, strict=True)
        return cls(sum(nats), sum(gap), sum(moved), sum(size), max(largest))


def sweep_curve(
    model: LatentRecurrentTransformer,
    windows: Windows,
    token_bytes: Tensor | None,
    schedule: Schedule,
    groups: Sequence[int] = GROUPS,
    counts: Sequence[int] = COUNTS,
    batch_size: int = BATCH,
    progress: bool = True,
    prefix_bytes: int = 0,
    open_ledger: LedgerFactory = in_memory,
) -> SweepCurve:
    """Score a model after every refinement, up to the largest of `counts`, for each stride of `groups` (1 first).

    `token_bytes` and `prefix_bytes` as for `bits_per_byte`. `open_ledger` gives the ledgers of `parallel` and `sweeps`;
    their ranks share the batches. ValueError where full refinements (1) or two consecutive last counts are missing,
    without which there is no verdict.
    """
    last = max(counts)
    if groups[0] != 1 or last - 1 not in counts:
        raise ValueError(
            f"groups {tuple(groups)} and counts {tuple(counts)} give no verdict; start with 1, and end with n - 1 and n"
        )
    schedule = schedule if model.config.stored_sources else plain()
    ledger = open_ledger("sweeps")
    batch_size = batch_size_for(batch_size, len(windows), ledger.ranks.ranks)
    scorer, parallel_ledger = schedule_scorer(schedule), open_ledger("parallel")
    parallel, size = bits_per_byte(
        model, windows, token_bytes, scorer, batch_size, "parallel", progress, prefix_bytes, parallel_ledger
    )
    unit = math.log(2) * size  # nats / unit is BPB
    batches = window_batches(windows, batch_size)
    _run_sweeps(model, batches, groups, last, batch_size, ledger, progress)
    done = ledger.gather()
    live_nats, live_square = (sum(done[key]["live"][i] for key in batches) for i in range(2))
    sums = {g: [Sums.over([done[key][str(g)][n] for key in batches]) for n in range(last + 1)] for g in groups}
    bpb = {g: [s.nats / unit for s in sums[g]] for g in groups}
    changes = {g: [math.sqrt(s.moved / max(s.size, 1e-30)) for s in sums[g]] for g in groups}
    curves = {
        g: tuple(
            Point(n, bpb[g][n], math.sqrt(sums[g][n].gap / live_square), sums[g][n].largest, changes[g][n])
            for n in sorted(set(counts))
        )
        for g in groups
    }
    return SweepCurve(
        repr(schedule),
        parallel,
        live_nats / unit,
        windows.targets,
        curves,
        {g: mean_contraction(changes[g][1:]) for g in groups},
        bpb[1][last] - bpb[1][last - 1],
        classify_curve(bpb[1], parallel, changes[1][last]),
    )


def _run_sweeps(
    model: LatentRecurrentTransformer,
    batches: Mapping[str, Windows],
    groups: Sequence[int],
    last: int,
    batch_size: int,
    ledger: InMemory,
    progress: bool,
) -> None:
    """Put this rank's share of the batches into the ledger, where they are not there yet."""
    todo = ledger.todo(list(batches))
    was_training = model.training
    model.eval()
    # A step of the bar is a window's live decoding, or one of its refinements.
    total = (1 + len(groups) * (last + 1)) * sum(len(batches[key]) for key in todo)
    with torch.no_grad(), bar("sweeps", total, progress) as advance:
        for key in todo:
            batch = next(batches[key].batches(batch_size))
            ledger.add({key: _batch_sums(model, batch.tokens, batch.targets, groups, last, advance)})
    model.train(was_training)


def _batch_sums(
    model: LatentRecurrentTransformer,
    tokens: Tensor,
    targets: Tensor,
    groups: Sequence[int],
    last: int,
    advance: Advance,
) -> dict[str, list[Any]]:
    """One batch of windows, tokens and targets (B, T), as a ledger's item.

    By stride, as text: the `Sums` after 0, 1, …, `last` refinements. `live`: nats and ‖m_live‖².
    """
    device = model.embedding.weight.device
    inputs, targets = tokens[:, :-1].to(device), targets[:, :-1].to(device)
    valid = (targets != IGNORED).unsqueeze(-1)

    def nats(hidden: Tensor) -> float:
        return float(double(token_nats(model, hidden, targets) * valid.squeeze(-1)).sum())

    state = model.empty_state(len(inputs), inputs.shape[1], tokens=inputs).in_place()
    out = refine(model, inputs, sequential(), state=state)
    exact = comparable_state(out.state, out.hidden)  # what all refinements are compared with
    sums: dict[str, list[Any]] = {"live": [nats(out.hidden), sum_of_squares(exact * valid)]}
    advance(len(inputs), "live")
    for g in groups:
        points = sums[str(g)] = []
        # Whatever the stride, the first pass is a full one that reads no memory.
        empty = model.empty_state(len(inputs), inputs.shape[1], tokens=inputs)
        hidden, state = model(inputs, range(inputs.shape[1]), empty)
        moved, scored = hidden, nats(hidden)
        for n in range(last + 1):
            if n > 0 and bool(moved.any()):  # at a fixed point another refinement is the same computation
                before = hidden
                hidden, state = refine_once(model, inputs, state, g)
                moved, scored = (hidden - before) * valid, nats(hidden)
            apart = (comparable_state(state, hidden) - exact) * valid  # 0 on padding
            far = apart.norm(dim=-1) / exact.norm(dim=-1)
            changed = sum_of_squares(moved) if n > 0 else 0.0
            points.append(
                [*Sums(scored, sum_of_squares(apart), changed, sum_of_squares(hidden * valid), float(far.max()))]
            )
            advance(len(inputs), f"stride {g}, {n} refinements")
    return sums


def refine_once(model: LatentRecurrentTransformer, tokens: Tensor, state: State, groups: int) -> tuple[Tensor, State]:
    """One strided sweep over tokens (B, T) from a state in which all are written: hidden (B, T, D), state."""
    hidden = tokens.new_empty(*tokens.shape, model.config.width, dtype=state.memory.dtype)
    for p in sweep(tokens.shape[1], groups):
        if len(p.positions) > 0:
            hidden[:, p.slice], state = model(tokens[:, p.slice], p.positions, state)
    return hidden, state


def comparable_state(state: State, hidden: Tensor) -> Tensor:
    """(B, T, P·D): the memory of all sources side by side; the final hidden state where nothing is remembered."""
    return state.memory.flatten(2) if state.memory.shape[2] > 0 else hidden


def sum_of_squares(x: Tensor) -> float:
    """‖x‖² in float64."""
    return float(double(x).square().sum())
