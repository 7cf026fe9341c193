"""How far what is computed at every position moves from one sweep to the next, and by how much less each time.

What a position computes depends on those before it, and a change spreads towards later ones: it may be small where it
starts, grow on its way, and be hidden by larger ones behind it, or in a mean. A beginning of a row is complete in
itself. So where the moves of every beginning shrink, those of the whole shrink.

Shapes: B rows, T prompt positions, Q compared states, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lrt.inference.certificate import largest_estimate

ROUNDING = 8
"""A position that moves by at most so many spacings of its type at 1, relative to its size, has not moved: sweeps that
have converged go on to differ by rounding (1.5 spacings at the worst position of a demo model in float32)."""


@dataclass
class Moves:
    """The newest values of some rows, and how far they are from the ones before. A *place* is a row's number here."""

    values: Tensor
    """(B, T, Q, D): the newest."""
    change: Tensor
    """(B, T, Q): squared norm of the newest less the one before."""
    size: Tensor
    """(B, T, Q): squared norm of the newest."""
    moved: Tensor
    """(B, T): of positions 0 … t the largest move in the last sweep, relative to its position's size."""
    moved_before: Tensor
    """(B, T): the same of the sweep before."""
    counts: list[int]
    """By place, after how many sweeps in a row, up to the last one, the values were computed."""
    residuals: list[list[float]]
    """By place, from the second of these on: ‖h_n − h_{n−1}‖ / ‖h_n‖ of the row, the largest over the states."""
    contractions: list[list[float]]
    """By place, from the third on: the largest ratio of `moved` to `moved_before` (see `Certificate`)."""

    @classmethod
    def of(cls, rows: int, length: int, compared: int, like: Tensor) -> Moves:
        """Of rows of which nothing is computed yet; `like` (…, D) gives width, type and device."""
        values = like.new_zeros(rows, length, compared, like.shape[-1])
        zeros = values.new_zeros(rows, length, compared, dtype=torch.promote_types(values.dtype, torch.float32))
        return cls(
            values=values,
            change=zeros,
            size=zeros.clone(),
            moved=zeros.new_zeros(rows, length),
            moved_before=zeros.new_zeros(rows, length),
            counts=[0] * rows,
            residuals=[[] for _ in range(rows)],
            contractions=[[] for _ in range(rows)],
        )

    def select(self, places: list[int], length: int) -> Moves:
        """Some of the rows, without the columns from `length` on."""
        index = torch.tensor(places, device=self.values.device)
        return Moves(
            *(x[index, :length] for x in self._tensors()),
            counts=[self.counts[i] for i in places],
            residuals=[self.residuals[i] for i in places],
            contractions=[self.contractions[i] for i in places],
        )

    def put(self, places: list[int], part: Moves) -> None:
        """Replace rows by what became of them, as `select` gave them."""
        index = torch.tensor(places, device=self.values.device)
        for whole, new in zip(self._tensors(), part._tensors(), strict=True):
            whole[index, : new.shape[1]] = new
        for i, place in enumerate(places):
            self.counts[place] = part.counts[i]
            self.residuals[place], self.contractions[place] = part.residuals[i], part.contractions[i]

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.values, self.change, self.size, self.moved, self.moved_before

    def record(self, where: slice, new: Tensor) -> None:
        """What some columns compute now, (B, n, Q, D)."""
        self.change[:, where] = squared_norm(new - self.values[:, where])
        self.size[:, where] = squared_norm(new)
        self.values[:, where] = new

    def compare(self, begin: int, lengths: list[int]) -> None:
        """After all columns from `begin` on were recorded: how far every beginning of each row moved, and how that
        compares with the sweep before. Columns before `begin` are exact and have not moved."""
        self.change[:, :begin] = 0
        padding = self.padding(lengths)
        self.moved_before, self.moved = self.moved, self.relative().cummax(1).values
        rounding = ROUNDING * torch.finfo(self.values.dtype).eps
        ratio = (self.moved / self.moved_before.clamp(min=rounding)).masked_fill(self.moved <= rounding, 0)
        change, size = (x.masked_fill(padding.unsqueeze(2), 0).sum(1) for x in (self.change, self.size))
        means: list[float] = (change / size).sqrt().amax(1).tolist()
        largest: list[float] = ratio.masked_fill(padding, 0).amax(1).tolist()
        self.counts = [n + 1 for n in self.counts]
        for place, count in enumerate(self.counts):
            # The first values have nothing to be compared with, and the first moves neither.
            self.residuals[place] = [*self.residuals[place], means[place]] if count > 1 else []
            self.contractions[place] = [*self.contractions[place], largest[place]] if count > 2 else []

    def pause(self, place: int) -> None:
        """A row of which the last sweep left nothing computed: what comes next is compared with nothing."""
        self.counts[place], self.residuals[place], self.contractions[place] = 0, [], []

    def padding(self, lengths: list[int]) -> Tensor:
        """(B, T) bool: columns behind a row's end."""
        ends = torch.tensor(lengths, device=self.change.device).unsqueeze(1)
        return torch.arange(self.change.shape[1], device=ends.device) >= ends

    def relative(self) -> Tensor:
        """(B, T): how far the last sweep moved each position, relative to its size; the largest over the states."""
        return (self.change / self.size.clamp(min=torch.finfo(self.size.dtype).tiny)).amax(2).sqrt()

    def worst(self, lengths: list[int]) -> list[tuple[float, int]]:
        """By place, the largest move of any position, and which column that is."""
        moves, columns = self.relative().masked_fill(self.padding(lengths), 0).max(1)
        return list(zip(moves.tolist(), columns.tolist(), strict=True))

    def contraction(self, place: int) -> float | None:
        """The larger of the last two ratios of a row, None where none is known."""
        return max(self.contractions[place][-2:], default=None)

    def residual(self, place: int) -> float | None:
        """The last move of a row, None where none is known."""
        return self.residuals[place][-1] if self.residuals[place] else None

    def bound(self, place: int, worst: float) -> float:
        """As `Certificate.bound`, of these values alone; `worst` is the row's largest move."""
        return largest_estimate(self.residual(place), worst, self.contraction(place))

    def next_bound(self, place: int, worst: float) -> float:
        """What a row's bound is expected to be after the next sweep, from the last one's.

        Sweeps start from zeros, so that the first one moved everything by its own size: by 1.
        """
        if not self.residuals[place]:
            return math.inf
        before, residual = [1.0, *self.residuals[place]][-2:]
        rate = residual / before if before > 0 else math.inf
        contraction = rate if (known := self.contraction(place)) is None else known
        return largest_estimate(residual * rate, worst * contraction, contraction)

    def sweeps_to_go(self, place: int, worst: float, tolerance: float) -> float:
        """How many more a row needs at its present rate: until its mean moves, then also its worst, are within."""
        residuals, rates = self.residuals[place][-2:], self.contractions[place][-1:]
        if len(residuals) < 2:
            return 1  # no rate is known yet
        if residuals[1] > tolerance:
            return steps_at_rate(residuals[1], residuals[1] / residuals[0] if residuals[0] else math.inf, tolerance)
        return steps_at_rate(worst, rates[0], tolerance)


def squared_norm(x: Tensor) -> Tensor:
    """The squared norm over the last dimension, in float32 at least."""
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32)).square()


def steps_at_rate(move: float, rate: float, tolerance: float) -> float:
    """Sweeps, at least one, until a move is within a tolerance if each is `rate` times the one before."""
    if not rate < 1:
        return math.inf
    return max(1.0, math.log(tolerance / move) / math.log(rate)) if move > 0 and rate > 0 else 1
