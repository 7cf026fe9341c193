"""The schedules: each a function from T positions and its arguments to passes.

To add one, write such a function and decorate it with `@schedule`. Costs are in forwards over the sequence, a backward
counting two (spec, section 2): `plain` costs 3.

Source: LRT, arXiv 2605.26797, section 4 (interleaved, multi-refinement, chunked); WhiteMatter, 2608.18486 (settled).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from lrt.schedules.base import Mixture, Pass, Schedule, Simple, Stages, check_passes, count, schedule
from lrt.utils.validation import Limits, shorten

WEIGHT = Limits(0, 1e6)
"""What the weight of a pass may be, and the probability or fraction of a part."""


def loss_weights(weights: Sequence[float] | None, passes: int) -> Sequence[float]:
    """One non-negative weight per pass, not all zero; None counts each pass alike. ValueError for anything else."""
    if weights is None:
        return [1.0] * passes
    numbers = isinstance(weights, tuple | list) and all(map(WEIGHT.allow, weights))
    if not numbers or len(weights) != passes or not any(weights):
        raise ValueError(
            f"weights is {shorten(weights)}; give {passes} numbers >= 0 (one per pass), not all 0, at most 1e6"
        )
    return weights


@schedule
def plain(T: int) -> list[Pass]:
    """One full pass with nothing in memory: how a Transformer is trained. Cost 3."""
    return [Pass(0, T)]


@schedule
def interleaved(T: int, subsets: int, weights: Sequence[float] | None = None) -> list[Pass]:
    """A full pass, then `subsets` strided passes, each seeing what the earlier ones wrote. Cost 6.

    The paper's default, with 2 subsets. By default each of the passes counts alike, the first one included.
    """
    check_passes(1 + count("subsets", subsets, 1), T)
    first, *rest = loss_weights(weights, subsets + 1)
    return [Pass(0, T, 1, first), *(Pass(r, T, subsets, w) for r, w in enumerate(rest))]


@schedule
def multi_refinement(
    T: int, refinements: int, weights: Sequence[float] | None = None, detach: bool = False
) -> list[Pass]:
    """`refinements` + 1 full passes; each reads the last one's memory (Jacobi). Cost 3 (refinements + 1).

    `detach` cuts the gradient through the memory between passes. After n passes the first n positions are exact.
    """
    check_passes(1 + count("refinements", refinements, 0), T)
    if detach not in (True, False):
        raise ValueError(f"detach is {shorten(detach)}; it must be True or False")
    per_pass = loss_weights(weights, refinements + 1)
    # Nobody reads the memory of the last pass.
    return [Pass(0, T, 1, w, True, detach and k < refinements) for k, w in enumerate(per_pass)]


@schedule
def chunked(T: int, length: int) -> list[Pass]:
    """Contiguous chunks in order; memory crosses chunk borders only (the paper's losing baseline). Cost 3."""
    check_passes(-(-T // count("length", length, 1)), T)
    return [Pass(start, min(start + length, T)) for start in range(0, T, length)]


def sweep(T: int, groups: int, weight: float = 1.0, grad: bool = True) -> list[Pass]:
    """One strided Gauss-Seidel sweep: 0::g, 1::g, … g-1::g, each class from what was written before it.

    n sweeps leave the first n·g positions exact, where n Jacobi passes leave n.
    """
    return [Pass(r, T, groups, weight, grad) for r in range(groups)]


@schedule
def strided(T: int, groups: int, sweeps: int) -> list[Pass]:
    """`sweeps` strided sweeps from an empty buffer: a first-sweep position attends only to what is written.

    No full pass goes first: in a prefill it costs a forward and saves less than one (docs/log.md).
    """
    count("groups", groups, 1)
    count("sweeps", sweeps, 1)
    check_passes(groups * sweeps, T)
    return sweep(T, groups) * sweeps


@schedule
def sequential(T: int, backprop: int | None = None) -> list[Pass]:
    """One position at a time: exact, with back-propagation through time. Cost 3 in tokens, T steps in time.

    `backprop` cuts the gradient through the memory after so many positions; keys and values keep theirs.
    """
    check_passes(T, T)
    cut = 0 if backprop is None else count("backprop", backprop, 1)
    return [Pass(t, t + 1, 1, 1.0, True, cut > 0 and (t + 1) % cut == 0) for t in range(T)]


@schedule
def settled(T: int, free: int, groups: int, sweeps: int) -> list[Pass]:
    """A full pass and `free` sweeps without gradient or loss, then `sweeps` sweeps with both (WhiteMatter's recipe).

    Cost 1 + free + 3 sweeps. `groups` = 1 makes a sweep a full pass. The quiet passes bring the memory near to what
    decoding reads; without them the loss may be low on a memory that decoding never has (spec, section 6).
    """
    count("free", free, 0)
    count("groups", groups, 1)
    count("sweeps", sweeps, 1)
    check_passes(1 + groups * (free + sweeps), T)
    quiet = [Pass(0, T, 1, 0.0, False), *sweep(T, groups, 0.0, False) * free]
    return quiet + sweep(T, groups) * sweeps


def _parts(kind: str, unit: str, parts: Sequence[tuple[float, Schedule]]) -> tuple[tuple[float, Schedule], ...]:
    """The parts of a mixture or of stages, checked: schedules, with weights >= 0 that sum to 1."""
    if not isinstance(parts, tuple | list) or not all(isinstance(p, tuple | list) and len(p) == 2 for p in parts):
        raise ValueError(f"the parts of {kind} are {shorten(parts)}; give pairs, for example [(1.0, interleaved(2))]")
    for _, part in parts:
        if not isinstance(part, Simple | Mixture | Stages):
            raise ValueError(
                f"{kind} holds {shorten(part)}, which is no schedule; give pairs such as (0.5, interleaved(2))"
            )
    weights = [weight for weight, _ in parts]
    if not all(map(WEIGHT.allow, weights)) or not abs(math.fsum(weights) - 1) <= 1e-6:
        total = f", in sum {math.fsum(weights):g}" if all(map(WEIGHT.allow, weights)) else ""
        raise ValueError(f"the {unit} of {kind} are {shorten(weights)}{total}; they must sum to 1, each at least 0")
    return tuple((float(p), s) for p, s in parts)


def mixture(parts: Sequence[tuple[float, Schedule]]) -> Mixture:
    """`[(probability, schedule), …]`: one is drawn per optimiser step from (seed, step)."""
    return Mixture(_parts("a mixture", "probabilities", parts))


def stages(parts: Sequence[tuple[float, Schedule]]) -> Stages:
    """`[(fraction, schedule), …]`: each serves its fraction of training, in order."""
    return Stages(_parts("stages", "fractions", parts))


def late(onset: float, schedule: Schedule) -> Stages:
    """`plain()` up to the fraction `onset` of training, then `schedule`: a spelling of `stages`, and written as such.

    >>> import lrt
    >>> lrt.schedules.late(0.75, lrt.schedules.settled(1, 1, 1))
    stages([(0.75, plain()), (0.25, settled(1, 1, 1))])
    """
    if not isinstance(onset, int | float) or isinstance(onset, bool) or not 0 <= onset <= 1:
        raise ValueError(f"onset is {shorten(onset)}; it must be a fraction of training, 0 to 1")
    # Through text, so that 1 - 0.7 is written 0.3.
    return stages([(onset, plain()), (float(f"{1 - onset:.12g}"), schedule)])


DEFAULT = "stages([(0.5, settled(0, 1, 1)), (0.5, settled(1, 1, 1))])"
"""The library's: of the schedules run so far that are stable and cost at most half as much again as `plain()`, the best
live (the study `schedule`, docs/log.md of 2026-11-28). The paper's own is `interleaved(2)`."""
LATE = repr(late(0.9, settled(0, 1, 1)))
"""For text at equal wall-clock, in short runs: the price of the control without recurrence, and its quality. What is
remembered is hardly used (the study `onset`, docs/log.md of 2026-11-30)."""
STATE = "settled(1, 8, 1)"
"""For data with state, which has to be carried exactly over many positions (docs/state-tracking.md)."""
