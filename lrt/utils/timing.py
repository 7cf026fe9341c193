"""Paired timings: the candidates run in turn, round after round, so that a busy machine slows them all alike.

Every second round runs in reverse order: what a candidate leaves behind (caches, clock rates) falls on both neighbours.
Ratios are taken within a round and only then summed up (contract, section 6).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from lrt.utils.progress import bar

Work = Callable[[], object]


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


def alternate(
    candidates: Mapping[str, Work],
    rounds: int = 10,
    warmup: int = 2,
    device: str | torch.device = "cpu",
    title: str = "timing",
    progress: bool = True,
) -> dict[str, Timing]:
    """Time every candidate once per round, after `warmup` untimed rounds. ValueError for no candidate or no round."""
    if not candidates or rounds < 1:
        raise ValueError(f"{len(candidates)} candidates over {rounds} rounds; give at least one of each")
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    with bar(title, len(names) * (rounds + warmup), progress) as advance:
        for turn in range(rounds + warmup):
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
