"""Training schedules as data: which positions are recomputed, in which order, with which loss weight.

A schedule is a frozen value. `schedule.passes(T)` expands it to passes over T positions, `repr(schedule)` writes it
as Python would call it, `parse` reads that back, and `schedule.at(step, steps, seed)` gives the schedule of one
optimiser step. To add a schedule, write a function from T and its arguments to passes and decorate it.

Exact recurrence is the fixed point of h = F(tokens, shift(h)), T forwards in sequence; every schedule but `sequential`
approximates it (spec, section 2). A pass recomputes a set of positions from the buffer of keys, values and memory, and
writes its own positions back.

numpy and torch are imported where a number is drawn: the command line reads schedules before it loads them.

Source: LRT, arXiv 2605.26797, section 4 (interleaved, multi-refinement, chunked); WhiteMatter, 2608.18486 (settled).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, Protocol, cast

from lrt.utils.plugins import Plugin
from lrt.utils.registry import Registry
from lrt.utils.validation import shorten


@dataclass(frozen=True)
class Pass:
    """Recompute the positions start, start + stride, … below stop, from a buffer that holds all the others."""

    start: int
    stop: int
    stride: int = 1
    loss_weight: float = 1.0
    """Weight of this pass's mean loss in the step's loss; with 0 the head never runs."""
    grad: bool = True
    """Whether gradients flow into what this pass computes and writes."""
    detach_memory: bool = False
    """Cut the gradient through the memory as this pass leaves it, all of it; keys and values keep theirs, as a
    Transformer's do."""

    @property
    def positions(self) -> range:
        """What is recomputed. A range, so that a State knows what is visible without a mask."""
        return range(self.start, self.stop, self.stride)

    @property
    def slice(self) -> slice:
        """The same positions, to index a dimension of a tensor without a copy."""
        return slice(self.start, self.stop, self.stride)


Passes = tuple[Pass, ...]
MOST_PASSES = 2**17
"""How many a schedule may expand to: `sequential()` over 131,072 positions. More would take minutes to write down."""
P = ParamSpec("P")


class Schedule(Protocol):
    """What every schedule can do."""

    def passes(self, length: int) -> Passes:
        """The passes over `length` positions, in order."""
        ...

    def at(self, step: int, steps: int, seed: int) -> Schedule:
        """The schedule of optimiser step `step` of `steps`: the same on all ranks and micro-batches."""
        ...

    def draw(self) -> Schedule:
        """Where there is no step: stages give their last, a mixture draws from torch's generator."""
        ...

    def scoring_parts(self) -> tuple[tuple[float, Schedule], ...]:
        """(probability, schedule) pairs under which `parallel_bpb` is the weighted mean."""
        ...

    def shares(self) -> tuple[tuple[float, Simple], ...]:
        """(share of training, schedule) pairs: of a mixture by probability, of stages by fraction."""
        ...

    def cost(self, length: int) -> float:
        """Forwards and backwards over the whole sequence, forward = 1, backward = 2: plain costs 3."""
        ...


@dataclass(frozen=True, repr=False)
class Simple:
    """A schedule that is the same at every step: one entry of `SCHEDULES` and its arguments."""

    name: str
    arguments: tuple[Any, ...]

    def passes(self, length: int) -> Passes:
        expanded = SCHEDULES[self.name](length, *self.arguments)
        check_passes(len(expanded), length)
        # A short text has no positions in some classes: those passes are left out.
        return tuple(p for p in expanded if len(p.positions) > 0)

    def at(self, step: int, steps: int, seed: int) -> Schedule:
        return self

    def draw(self) -> Schedule:
        return self

    def scoring_parts(self) -> tuple[tuple[float, Schedule], ...]:
        return ((1.0, self),)

    def shares(self) -> tuple[tuple[float, Simple], ...]:
        return ((1.0, self),)

    def cost(self, length: int) -> float:
        # 3: a forward and a backward of twice its cost
        return sum(len(p.positions) * (3 if p.grad else 1) for p in self.passes(length)) / length

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(repr(a) for a in self.arguments)})"


SCHEDULES: Registry[Callable[..., list[Pass]]] = Registry("schedule")


def schedule(expand: Callable[Concatenate[int, P], list[Pass]]) -> Callable[P, Simple]:
    """Register `expand(length, …)` under its name; the result makes the schedule from its arguments alone.

    >>> import lrt
    >>> @lrt.schedule
    ... def halves(T, sweeps):
    ...     first, second = lrt.schedules.Pass(0, T // 2), lrt.schedules.Pass(T // 2, T)
    ...     return [first, second] * sweeps
    >>> lrt.schedules.parse("stages([(0.5, plain()), (0.5, halves(2))])")
    stages([(0.5, plain()), (0.5, halves(2))])
    """
    name: str = expand.__name__
    SCHEDULES.register(name, expand, stacklevel=2)

    @functools.wraps(expand)
    def make(*args: P.args, **kwargs: P.kwargs) -> Simple:
        arguments = bind(expand, args, kwargs)
        expand(1, *arguments)  # type: ignore[arg-type]  # a wrong argument is an error here, not hours later
        return Simple(name, arguments)

    return cast("Callable[P, Simple]", make)


def plugin_uses(schedule: Schedule) -> list[tuple[str, Plugin]]:
    """What plugins have to register before a schedule can be run, as `plugins.describe` takes it."""
    return [use for name in dict.fromkeys(part.name for _, part in schedule.shares()) for use in SCHEDULES.uses(name)]


def bind(expand: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Positional arguments in order, sequences as tuples, trailing defaults left out: one spelling per schedule.

    So equal schedules are equal values, with one `repr`. Raises ValueError on unknown, doubled or missing arguments.
    """
    names = expand.__code__.co_varnames[1 : expand.__code__.co_argcount]
    defaults = dict(zip(reversed(names), reversed(expand.__defaults__ or ()), strict=False))
    unknown = sorted((set(kwargs) - set(names)) | (set(kwargs) & set(names[: len(args)])))  # or given twice
    if unknown or len(args) > len(names):
        raise ValueError(f"{expand.__name__} takes ({', '.join(names)}), not {shorten(args)} {shorten(kwargs)}")
    bound = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
    missing = [n for n in names if n not in bound]
    if missing:
        raise ValueError(f"{expand.__name__} needs {', '.join(missing)}; give all of them")
    values = [tuple(bound[n]) if isinstance(bound[n], list) else bound[n] for n in names]
    while values and names[len(values) - 1] in defaults and values[-1] == defaults[names[len(values) - 1]]:
        values.pop()
    return tuple(values)


def count(name: str, value: object, least: int) -> int:
    """`value`, required to be a whole number of at least `least`; ValueError, naming it, where it is not."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} is {shorten(value)}; it must be a whole number of at least {least}")
    return value


@dataclass(frozen=True)
class Moment:
    """Where a schedule stands at one optimiser step. Schedules inside others see a part of training as their whole."""

    step: int
    seed: int
    done: float
    """How much of its own share of training a schedule has behind it, 0 to 1."""
    draws: int = 0
    """Mixtures that have drawn at this step: those around the schedule."""

    def draw(self) -> tuple[float, Moment]:
        """A number in [0, 1), and the moment after it: the next draw of the same step is another number."""
        import numpy

        # Philox is counter-based: (seed, step) gives the same draw on every rank, and resuming needs no history.
        # The first of its 64-bit words counts steps, the second the draws of one.
        counter = self.step + (self.draws << 64)
        u = numpy.random.Generator(numpy.random.Philox(key=self.seed, counter=counter)).random()
        return u, dataclasses.replace(self, draws=self.draws + 1)


def check_passes(passes: int, length: int) -> None:
    """ValueError where these are too many passes over `length` positions; asked before they are made."""
    if passes > MOST_PASSES:
        raise ValueError(
            f"the schedule makes {passes:,} passes over {length:,} positions; at most {MOST_PASSES:,} can be run: take "
            "fewer subsets, groups, refinements or sweeps, longer chunks, or a shorter context"
        )


class Composed:
    """What mixture and stages share: weighted parts, and passes that need a step or a draw."""

    parts: tuple[tuple[float, Schedule], ...]

    def part_at(self, moment: Moment) -> tuple[Schedule, Moment]:
        """The part that serves at a moment, and the moment as that part sees it."""
        raise NotImplementedError

    def at(self, step: int, steps: int, seed: int) -> Schedule:
        part, moment = self.part_at(Moment(step, seed, step / max(1, steps)))
        while isinstance(part, Composed):
            part, moment = part.part_at(moment)
        return part

    def passes(self, length: int) -> Passes:
        raise ValueError(f"{self!r} changes over training: take .at(step, steps, seed), or .draw(), and its passes")

    def shares(self) -> tuple[tuple[float, Simple], ...]:
        return tuple((p * q, s) for p, part in self.parts for q, s in part.shares())

    def cost(self, length: int) -> float:
        return sum(p * s.cost(length) for p, s in self.shares())


@dataclass(frozen=True, repr=False)
class Mixture(Composed):
    """One schedule drawn per optimiser step. What it holds is served all over training, so that its clock is theirs."""

    parts: tuple[tuple[float, Schedule], ...]

    def part_at(self, moment: Moment) -> tuple[Schedule, Moment]:
        u, moment = moment.draw()
        return self._pick(u), moment

    def draw(self) -> Schedule:
        import torch

        return self._pick(float(torch.rand(()))).draw()

    def _pick(self, u: float) -> Schedule:
        total = 0.0
        for probability, part in self.parts:
            total += probability
            if u < total:
                return part
        return self.parts[-1][1]  # probabilities that sum to just below 1

    def scoring_parts(self) -> tuple[tuple[float, Schedule], ...]:
        return tuple((p * q, s) for p, part in self.parts for q, s in part.scoring_parts())

    def __repr__(self) -> str:
        return f"mixture({list(self.parts)!r})"


@dataclass(frozen=True, repr=False)
class Stages(Composed):
    """A curriculum: each schedule serves a fraction of training, in order, and sees that fraction as its whole."""

    parts: tuple[tuple[float, Schedule], ...]

    def part_at(self, moment: Moment) -> tuple[Schedule, Moment]:
        begin = 0.0
        for fraction, part in self.parts:
            # 1e-9: a stage that ends at 0.1 + 0.2 of training ends at 0.3
            if moment.done < begin + fraction - 1e-9:
                return part, dataclasses.replace(moment, done=(moment.done - begin) / fraction)
            begin += fraction
        return self.parts[-1][1], dataclasses.replace(moment, done=1.0)

    def draw(self) -> Schedule:
        return self.parts[-1][1].draw()

    def scoring_parts(self) -> tuple[tuple[float, Schedule], ...]:
        return self.parts[-1][1].scoring_parts()

    def __repr__(self) -> str:
        return f"stages({list(self.parts)!r})"
