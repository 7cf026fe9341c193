"""Training schedules as data: which positions are recomputed, in which order, with which loss weight.

A schedule is a frozen value. `schedule.passes(T)` expands it to passes over T positions, `repr(schedule)` writes it
as Python would call it, `parse` reads that back, and `schedule.at(step, steps, seed)` gives the schedule of one
optimiser step. To add a schedule, write a function from T and its arguments to passes and decorate it.

Source: LRT, arXiv 2605.26797, section 4 (interleaved, multi-refinement, chunked); WhiteMatter, 2608.18486 (settled).
"""

from __future__ import annotations

import ast
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, Protocol, cast

import numpy
import torch


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
    """Cut the gradient through the memory as this pass leaves it, all of it; keys and values keep theirs."""

    @property
    def positions(self) -> range:
        return range(self.start, self.stop, self.stride)

    @property
    def slice(self) -> slice:
        """The same positions, to index a dimension of a tensor without a copy."""
        return slice(self.start, self.stop, self.stride)


Passes = tuple[Pass, ...]
P = ParamSpec("P")


class Schedule(Protocol):
    """What every schedule can do."""

    def passes(self, length: int) -> Passes:
        """The passes over `length` positions, in order."""
        ...

    def at(self, step: int, steps: int, seed: int) -> Schedule:
        """The schedule of optimiser step `step` of `steps`: the same on all ranks and micro-batches."""
        ...

    def drawn(self) -> Schedule:
        """Where there is no step: stages give their last, a mixture draws from torch's generator."""
        ...

    def scored(self) -> tuple[tuple[float, Schedule], ...]:
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
        return tuple(p for p in SCHEDULES[self.name](length, *self.arguments) if len(p.positions) > 0)

    def at(self, step: int, steps: int, seed: int) -> Schedule:
        return self

    def drawn(self) -> Schedule:
        return self

    def scored(self) -> tuple[tuple[float, Schedule], ...]:
        return ((1.0, self),)

    def shares(self) -> tuple[tuple[float, Simple], ...]:
        return ((1.0, self),)

    def cost(self, length: int) -> float:
        return sum(len(p.positions) * (3 if p.grad else 1) for p in self.passes(length)) / length

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(repr(a) for a in self.arguments)})"


SCHEDULES: dict[str, Callable[..., list[Pass]]] = {}


def schedule(expand: Callable[Concatenate[int, P], list[Pass]]) -> Callable[P, Simple]:
    """Register `expand(length, …)` under its name; the result makes the schedule from its arguments alone."""
    name: str = expand.__name__
    SCHEDULES[name] = expand

    @functools.wraps(expand)
    def make(*args: P.args, **kwargs: P.kwargs) -> Simple:
        arguments = bind(expand, args, kwargs)
        expand(1, *arguments)  # type: ignore[arg-type]  # a wrong argument is an error here, not hours later
        return Simple(name, arguments)

    return cast("Callable[P, Simple]", make)


def bind(expand: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Positional arguments in order, sequences as tuples, trailing defaults left out: one spelling per schedule."""
    names = expand.__code__.co_varnames[1 : expand.__code__.co_argcount]
    defaults = dict(zip(reversed(names), reversed(expand.__defaults__ or ()), strict=False))
    unknown = sorted((set(kwargs) - set(names)) | (set(kwargs) & set(names[: len(args)])))  # or given twice
    if unknown or len(args) > len(names):
        raise ValueError(f"{expand.__name__} takes ({', '.join(names)}), not {args} {kwargs or ''}")
    given = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
    missing = [n for n in names if n not in given]
    if missing:
        raise ValueError(f"{expand.__name__} needs {', '.join(missing)}; for example {expand.__name__}(2)")
    values = [tuple(given[n]) if isinstance(given[n], list) else given[n] for n in names]
    while values and names[len(values) - 1] in defaults and values[-1] == defaults[names[len(values) - 1]]:
        values.pop()
    return tuple(values)


def count(name: str, value: object, least: int) -> int:
    """Require a whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} is {value!r}; it must be a whole number of at least {least}")
    return value


def loss_weights(weights: Sequence[float] | None, passes: int) -> Sequence[float]:
    """One non-negative weight per pass, not all zero; None counts each pass alike."""
    if weights is None:
        return [1.0] * passes
    numbers = isinstance(weights, tuple | list) and all(isinstance(w, int | float) for w in weights)
    if not numbers or len(weights) != passes or not (min(weights) >= 0 and 0 < sum(weights) < math.inf):
        raise ValueError(f"weights is {weights!r}; give {passes} numbers >= 0 (one per pass), not all 0")
    return weights


@schedule
def plain(T: int) -> list[Pass]:
    """One full pass with nothing in memory: how a Transformer is trained."""
    return [Pass(0, T)]


@schedule
def interleaved(T: int, subsets: int, weights: Sequence[float] | None = None) -> list[Pass]:
    """A full pass, then `subsets` strided passes, each seeing what the earlier ones wrote (the paper's default, 2)."""
    count("subsets", subsets, 1)
    first, *rest = loss_weights(weights, subsets + 1)
    return [Pass(0, T, 1, first), *(Pass(r, T, subsets, w) for r, w in enumerate(rest))]


@schedule
def multi_refinement(
    T: int, refinements: int, weights: Sequence[float] | None = None, detach: bool = False
) -> list[Pass]:
    """`refinements` + 1 full passes; each reads the last one's memory (Jacobi). `detach` cuts its gradient."""
    count("refinements", refinements, 0)
    chosen = loss_weights(weights, refinements + 1)
    return [Pass(0, T, 1, w, True, detach and k < refinements) for k, w in enumerate(chosen)]


@schedule
def chunked(T: int, length: int) -> list[Pass]:
    """Contiguous chunks in order; memory crosses chunk borders only (the paper's losing baseline)."""
    count("length", length, 1)
    return [Pass(start, min(start + length, T)) for start in range(0, T, length)]


def sweep(T: int, groups: int, weight: float = 1.0, grad: bool = True) -> list[Pass]:
    """One strided Gauss-Seidel sweep: 0::g, 1::g, … g-1::g."""
    return [Pass(r, T, groups, weight, grad) for r in range(groups)]


@schedule
def strided(T: int, groups: int, sweeps: int) -> list[Pass]:
    """`sweeps` strided sweeps from an empty buffer: a first-sweep position attends only to what is written."""
    count("groups", groups, 1)
    count("sweeps", sweeps, 1)
    return sweep(T, groups) * sweeps


@schedule
def sequential(T: int, backprop: int | None = None) -> list[Pass]:
    """One position at a time: exact. `backprop` cuts the gradient through the memory after so many positions."""
    cut = 0 if backprop is None else count("backprop", backprop, 1)
    return [Pass(t, t + 1, 1, 1.0, True, cut > 0 and (t + 1) % cut == 0) for t in range(T)]


@schedule
def settled(T: int, free: int, groups: int, sweeps: int) -> list[Pass]:
    """A full pass and `free` sweeps without gradient or loss, then `sweeps` sweeps with both (WhiteMatter's recipe)."""
    count("free", free, 0)
    count("groups", groups, 1)
    count("sweeps", sweeps, 1)
    quiet = [Pass(0, T, 1, 0.0, False), *sweep(T, groups, 0.0, False) * free]
    return quiet + sweep(T, groups) * sweeps


class Composed:
    """What mixture and stages share: weighted parts, and passes that need a step or a draw."""

    parts: tuple[tuple[float, Schedule], ...]

    def passes(self, length: int) -> Passes:
        raise ValueError(f"{self!r} changes over training: take .at(step, steps, seed), or .drawn(), and its passes")

    def shares(self) -> tuple[tuple[float, Simple], ...]:
        return tuple((p * q, s) for p, part in self.parts for q, s in part.shares())

    def cost(self, length: int) -> float:
        return sum(p * s.cost(length) for p, s in self.shares())


@dataclass(frozen=True, repr=False)
class Mixture(Composed):
    """One schedule drawn per optimiser step."""

    parts: tuple[tuple[float, Schedule], ...]

    def at(self, step: int, steps: int, seed: int) -> Schedule:
        # Philox is counter-based: (seed, step) gives the same draw on every rank, and resuming needs no history.
        u = numpy.random.Generator(numpy.random.Philox(key=seed, counter=step)).random()
        return self._pick(u).at(step, steps, seed)

    def drawn(self) -> Schedule:
        return self._pick(float(torch.rand(()))).drawn()

    def _pick(self, u: float) -> Schedule:
        total = 0.0
        for probability, part in self.parts:
            total += probability
            if u < total:
                return part
        return self.parts[-1][1]

    def scored(self) -> tuple[tuple[float, Schedule], ...]:
        return tuple((p * q, s) for p, part in self.parts for q, s in part.scored())

    def __repr__(self) -> str:
        return f"mixture({list(self.parts)!r})"


@dataclass(frozen=True, repr=False)
class Stages(Composed):
    """A curriculum: each schedule serves a fraction of training, in order."""

    parts: tuple[tuple[float, Schedule], ...]

    def at(self, step: int, steps: int, seed: int) -> Schedule:
        done, total = step / max(1, steps), 0.0
        for fraction, part in self.parts:
            total += fraction
            # 1e-9: a stage that ends at 0.1 + 0.2 of training ends at 0.3
            if done < total - 1e-9:
                return part.at(step, steps, seed)
        return self.parts[-1][1].at(step, steps, seed)

    def drawn(self) -> Schedule:
        return self.parts[-1][1].drawn()

    def scored(self) -> tuple[tuple[float, Schedule], ...]:
        return self.parts[-1][1].scored()

    def __repr__(self) -> str:
        return f"stages({list(self.parts)!r})"


def _parts(kind: str, unit: str, parts: Sequence[tuple[float, Schedule]]) -> tuple[tuple[float, Schedule], ...]:
    total = math.fsum(p for p, _ in parts)
    for _, part in parts:
        if not isinstance(part, Simple | Mixture | Stages):
            raise ValueError(f"{kind} holds {part!r}, which is no schedule; write for example (0.5, interleaved(2))")
    if not parts or min(p for p, _ in parts) < 0 or abs(total - 1) > 1e-6:
        raise ValueError(f"the {unit} of {kind} are {[p for p, _ in parts]}, in sum {total:g}; they must sum to 1")
    return tuple((float(p), s) for p, s in parts)


def mixture(parts: Sequence[tuple[float, Schedule]]) -> Mixture:
    """`[(probability, schedule), …]`: one is drawn per optimiser step from (seed, step)."""
    return Mixture(_parts("a mixture", "probabilities", parts))


def stages(parts: Sequence[tuple[float, Schedule]]) -> Stages:
    """`[(fraction, schedule), …]`: each serves its fraction of training, in order."""
    return Stages(_parts("stages", "fractions", parts))


_COMPOSED: dict[str, Callable[..., Schedule]] = {"mixture": mixture, "stages": stages}


DEFAULT = "stages([(0.5, settled(0, 1, 1)), (0.5, settled(1, 1, 1))])"
"""The library's: of the schedules run so far that are stable and cost at most half as much again as `plain()`, the best
live (the study `schedule`, docs/log.md of 2026-11-28). The paper's own is `interleaved(2)`."""


def names() -> Iterator[str]:
    """Every schedule's name."""
    yield from SCHEDULES
    yield from _COMPOSED


def parse(text: str) -> Schedule:
    """Read a schedule as `repr` writes it, for example `settled(0, 1, 1)`; nothing is executed.

    Raises ValueError with the text and the known names.
    """
    try:
        built = _build(ast.parse(text.strip(), mode="eval").body)
        if not isinstance(built, Simple | Mixture | Stages):
            raise ValueError("that is no schedule")
        return built
    except (SyntaxError, KeyError, TypeError, AttributeError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"cannot read the schedule {text!r}: {error}; write for example interleaved(2)") from error


def _build(node: ast.expr) -> Any:
    """A value of the small language of calls, lists, tuples and literals that `repr` writes."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        name = node.func.id
        if name not in set(names()):
            raise ValueError(f"unknown schedule {name!r}; choose one of {', '.join(names())}")
        args = [_build(a) for a in node.args]
        kwargs = {k.arg or "**": _build(k.value) for k in node.keywords}
        return _COMPOSED[name](*args, **kwargs) if name in _COMPOSED else _simple(name, args, kwargs)
    if isinstance(node, ast.List | ast.Tuple):
        return tuple(_build(e) for e in node.elts)
    if isinstance(node, ast.Name):
        return _build(ast.Call(ast.Name(node.id), [], []))  # `plain` alone means plain()
    try:
        return ast.literal_eval(node)
    except ValueError as error:
        raise ValueError("only names, numbers, lists and calls of schedules are read") from error


def _simple(name: str, args: list[Any], kwargs: dict[str, Any]) -> Simple:
    arguments = bind(SCHEDULES[name], tuple(args), kwargs)
    SCHEDULES[name](1, *arguments)
    return Simple(name, arguments)
