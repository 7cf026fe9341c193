"""Paired timings: the candidates run in turn, round after round, so that a busy machine slows them all alike.

Every second round runs in reverse order: what a candidate leaves behind (caches, clock rates) falls on both neighbours.
Ratios are taken within a round and only then summed up (contract, section 6).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from lrt.utils.progress import bar

Work = Callable[[], object]
FEWEST = 3
"""Rounds that are timed however little time there is: of fewer no spread can be told."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one candidate, round by round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def ratio(self, base: Timing) -> tuple[float, float]:
        """This over `base`: the median of the rounds' ratios, and half the distance between their quartiles."""
        ratios = [own / other for own, other in zip(self.seconds, base.seconds, strict=True)]
        if len(ratios) < 2:
            return ratios[0], 0.0
        low, _, high = statistics.quantiles(ratios, n=4)
        return statistics.median(ratios), (high - low) / 2


def weighted(parts: Sequence[tuple[float, Timing]]) -> Timing:
    """The weighted sum of timings of one run, round by round: a mean where the weights add up to 1."""
    weights = [weight for weight, _ in parts]
    rounds = zip(*(timing.seconds for _, timing in parts), strict=True)
    return Timing(tuple(sum(w * s for w, s in zip(weights, seconds, strict=True)) for seconds in rounds))


def alternate(
    candidates: Mapping[str, Work],
    rounds: int = 10,
    warmup: int = 2,
    device: str | torch.device = "cpu",
    title: str = "timing",
    progress: bool = True,
    limit: float = math.inf,
) -> dict[str, Timing]:
    """Time every candidate once per round, after `warmup` untimed rounds. ValueError for no candidate or no round.

    Where `limit` seconds are over, warming up included, no more rounds follow, but for the FEWEST.
    """
    if not candidates or rounds < 1:
        raise ValueError(f"{len(candidates)} candidates over {rounds} rounds; give at least one of each")
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    names, begun = list(candidates), time.perf_counter()
    with bar(title, len(names) * (rounds + warmup), progress) as advance:
        for turn in range(rounds + warmup):
            if turn >= warmup + FEWEST and time.perf_counter() - begun > limit:
                break
            for name in names if turn % 2 == 0 else reversed(names):
                elapsed = time_once(candidates[name], device)
                if turn >= warmup:
                    seconds[name].append(elapsed)
                advance(1, name)
    return {name: Timing(tuple(spent)) for name, spent in seconds.items()}


def time_once(work: Work, device: str | torch.device = "cpu") -> float:
    """Seconds that one call takes, a GPU's queue run dry before and after."""
    synchronise(device)
    begin = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - begin


def synchronise(device: str | torch.device) -> None:
    """Wait until a GPU has done all that was queued. A CPU has done it when a call returns."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def format_duration(seconds: float) -> str:
    """A time for people, in at most two units: `40 s`, `3 min`, `2 h 20 min`, `3 d 4 h`."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if hours else f"{days} d"
