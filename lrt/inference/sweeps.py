"""Strided Gauss-Seidel sweeps over the rows of a prompt until each has converged, shown that it will not, or is exact.

Sweeps start from an empty buffer: a full pass first costs a forward and saves less than one (docs/log.md). Every row is
looked at by itself after each sweep, and leaves the batch when it is done. What n sweeps have made exact, the first n·g
positions, is not computed again.

A class of a sweep is a decoding step with more positions, and computed by the same function. The products of all
layers are put together once per prompt, which costs a fifth of a forward. On a CPU they are in oneDNN's layout, because
products of a hundred rows spend half of their time on arranging the weights. A sweep of stride 8 so costs 1.03 plain
forwards; it cost 1.5 as calls of the model.

Shapes: B rows, T prompt positions, D width, Q compared states: the final hidden state and the sources below it.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from lrt.inference.certificate import Certificate
from lrt.inference.cost_model import Calibration
from lrt.inference.fused_step import buffers, locate_class, step
from lrt.inference.fused_weights import FusedWeights, can_fuse, fuse_weights, packed_layout, packs, transposed_layout
from lrt.model.buffers import gather
from lrt.model.state import State
from lrt.model.state_protocol import Positions
from lrt.model.transformer import LatentRecurrentTransformer

PACKED_FOR = 128
"""Positions of a class that the weights are packed for; others may be given."""
STRIKES = 2
"""A row is computed exactly after so many sweeps in a row that say that this is cheaper than to go on."""
ROUNDING = 8
"""A position that moves by at most so many spacings of its type at 1, relative to its size, has not moved: sweeps that
have converged go on to differ by rounding (1.5 spacings at the worst position of a demo model in float32)."""


@dataclass(frozen=True)
class Prompt:
    """Rows that are computed together."""

    tokens: Tensor
    """(B, T) int, padded on the right; T is the longest row's length."""
    lengths: list[int]
    """Tokens of each row, at least one."""
    starts: list[int]
    """Position of each row's first token."""

    @property
    def length(self) -> int:
        return max(self.lengths)

    @property
    def rows(self) -> int:
        return len(self.lengths)

    @property
    def ends(self) -> Tensor:
        """(B,) int: one past each row's last position."""
        return torch.tensor([s + n for s, n in zip(self.starts, self.lengths, strict=True)], device=self.tokens.device)

    def positions(self, columns: range) -> Positions:
        """The positions of these columns: a range where the rows start alike, else (B, n)."""
        first = self.starts[0]
        # Python knows which slots a range sees; ints need masks made of tensors.
        if all(s == first for s in self.starts):
            return range(first + columns.start, first + columns.stop, columns.step)
        index = torch.arange(columns.start, columns.stop, columns.step, device=self.tokens.device)
        return torch.tensor(self.starts, device=index.device).unsqueeze(1) + index

    def select(self, rows: list[int]) -> Prompt:
        """Some of the rows, without the padding that none of them needs."""
        lengths = [self.lengths[i] for i in rows]
        tokens = self.tokens[torch.tensor(rows, device=self.tokens.device), : max(lengths)]
        return Prompt(tokens, lengths, [self.starts[i] for i in rows])

    def columns(self, begin: int, end: int) -> Prompt:
        """Columns begin … end-1 of rows that all have some of them."""
        lengths = [min(n, end) - begin for n in self.lengths]
        return Prompt(self.tokens[:, begin:end], lengths, [s + begin for s in self.starts])

    def zero_padding(self, hidden: Tensor) -> Tensor:
        """Hidden (B, T, D) with zeros in the padding."""
        lengths = torch.tensor(self.lengths, device=hidden.device).unsqueeze(1)
        padding = torch.arange(self.length, device=hidden.device) >= lengths
        return hidden.masked_fill(padding.unsqueeze(2), 0)

    def last_position(self, hidden: Tensor) -> Tensor:
        """Of hidden (B, T, D) each row's last position, (B, 1, D)."""
        rows = torch.arange(self.rows, device=hidden.device)
        return hidden[rows, torch.tensor(self.lengths, device=hidden.device) - 1].unsqueeze(1)


@dataclass
class SweepState:
    """The rows that are still swept, and how far their last two values at every position are apart.

    A *place* is a row's number here, a *row* its number in the whole prompt.
    """

    rows: list[int]
    """By place, which row of the prompt it is."""
    prompt: Prompt
    state: State
    weights: FusedWeights | None
    """The model's, as `lrt.inference.fused_step` takes them; None where the model itself computes."""
    values: Tensor
    """(B, T, Q, D): the newest compared states."""
    change: Tensor
    """(B, T, Q): squared norm of the newest less the one before."""
    size: Tensor
    """(B, T, Q): squared norm of the newest."""
    moved: Tensor
    """(B, T): of positions 0 … t the largest move in the last sweep, relative to its position's size."""
    moved_before: Tensor
    """(B, T): the same of the sweep before."""
    residuals: Tensor
    """(B, n): from the second sweep on, ‖h_n − h_{n−1}‖ / ‖h_n‖ of each row; the largest over the compared states."""
    contractions: Tensor
    """(B, n): from the third sweep on, the largest ratio of a row's `moved` to `moved_before` (see `Certificate`)."""
    strikes: list[int] = field(default_factory=list)
    """Of each row: sweeps in a row after which going on looked dearer than token by token."""
    sweeps: int = 0
    computed: int = 0
    """Positions computed, per row."""

    @classmethod
    def of(cls, model: LatentRecurrentTransformer, prompt: Prompt, state: State) -> SweepState:
        """All rows of a prompt, none swept yet. `state` is made by `in_place`, and used up."""
        rows, length = prompt.tokens.shape
        compared = 1 + len(lower_sources(model))
        values = state.memory.new_zeros(rows, length, compared, model.config.width)
        zeros = values.new_zeros(rows, length, compared, dtype=torch.promote_types(values.dtype, torch.float32))
        layout = packed_layout(rows * PACKED_FOR) if packs(model) else transposed_layout
        weights = fuse_weights(model, layout) if can_fuse(model) else None
        return cls(
            rows=list(range(rows)),
            prompt=prompt,
            state=state,
            weights=weights,
            values=values,
            change=zeros,
            size=zeros.clone(),
            moved=zeros[:, :, 0],
            moved_before=zeros[:, :, 0],
            residuals=zeros[:, :0, 0],
            contractions=zeros[:, :0, 0],
            strikes=[0] * rows,
        )

    def select(self, places: list[int]) -> SweepState:
        """Some of the rows, without the padding that none of them needs."""
        prompt = self.prompt.select(places)
        index, length = torch.tensor(places, device=self.values.device), prompt.length
        return dataclasses.replace(
            self,
            rows=[self.rows[i] for i in places],
            prompt=prompt,
            state=self.state.select(index),
            values=self.values[index, :length],
            change=self.change[index, :length],
            size=self.size[index, :length],
            moved=self.moved[index, :length],
            moved_before=self.moved_before[index, :length],
            residuals=self.residuals[index],
            contractions=self.contractions[index],
            strikes=[self.strikes[i] for i in places],
        )

    def sweep(self, model: LatentRecurrentTransformer, groups: int, begin: int) -> None:
        """Recompute the positions from column `begin` on, class by class; those before are exact and stay."""
        length, others = self.prompt.length, lower_sources(model)
        self.change[:, :begin] = 0  # computed again they would not move
        for first in range(begin, min(begin + groups, length)):
            columns, where = range(first, length, groups), slice(first, length, groups)
            positions = self.prompt.positions(columns)
            hidden, self.state = forward_fused(model, self.weights, self.prompt.tokens[:, where], positions, self.state)
            # What is compared: the final hidden state, and what memory keeps of the layers below.
            memory = gather(self.state.memory, self.state.where(positions), 1)[:, :, others]
            new = torch.cat([hidden.unsqueeze(2), memory], 2)
            self.change[:, where] = squared_norm(new - self.values[:, where])
            self.size[:, where] = squared_norm(new)
            self.values[:, where] = new
            self.computed += len(columns)
        self.sweeps += 1
        self.compare_moves()

    def compare_moves(self) -> None:
        """After a sweep: how far it moved every beginning of each row, and how that compares with the sweep before.

        What a position computes depends on those before it, and a change spreads towards later ones: it may be small
        where it starts, grow on its way, and be hidden by larger ones behind it, or in a mean. A beginning of a row is
        complete in itself. So where the moves of every beginning shrink, those of the whole shrink.
        """
        self.moved_before, self.moved = self.moved, self.relative_moves().cummax(1).values
        if self.sweeps > 1:  # the first sweep has nothing to be compared with
            self.residuals = torch.cat([self.residuals, self.mean_moves()], 1)
        if self.sweeps > 2:
            rounding = ROUNDING * torch.finfo(self.values.dtype).eps
            ratio = (self.moved / self.moved_before.clamp(min=rounding)).masked_fill(self.moved <= rounding, 0)
            largest = ratio.masked_fill(self.padding(), 0).amax(1, keepdim=True)
            self.contractions = torch.cat([self.contractions, largest], 1)

    def padding(self) -> Tensor:
        """(B, T) bool: columns behind a row's end."""
        lengths = torch.tensor(self.prompt.lengths, device=self.change.device)
        return torch.arange(self.prompt.length, device=lengths.device) >= lengths.unsqueeze(1)

    def relative_moves(self) -> Tensor:
        """(B, T): how far the last sweep moved each position, relative to its size; the largest over the states."""
        return (self.change / self.size.clamp(min=torch.finfo(self.size.dtype).tiny)).amax(2).sqrt()

    def mean_moves(self) -> Tensor:
        """(B, 1): ‖h_n − h_{n−1}‖ / ‖h_n‖ over all positions of a row; the largest over the compared states."""
        padding = self.padding().unsqueeze(2)
        change, size = (x.masked_fill(padding, 0).sum(1) for x in (self.change, self.size))
        return (change / size).sqrt().amax(1, keepdim=True)

    def certificates(self, groups: int, reason: str) -> list[Certificate]:
        """What can be said of each row after the last sweep, by place."""
        worst, columns = self.relative_moves().masked_fill(self.padding(), 0).max(1)
        residuals, contractions = self.residuals[:, -1:].tolist(), self.contractions[:, -2:].tolist()
        measured = zip(residuals, contractions, worst.tolist(), columns.tolist(), strict=True)
        return [
            Certificate(
                "sweeps",
                reason,
                tokens=self.prompt.lengths[place],
                groups=groups,
                sweeps=self.sweeps,
                residual=max(residual, default=None),
                worst=move,
                worst_position=self.prompt.starts[place] + column,
                contraction=max(rates, default=None),
                forwards=self.computed / self.prompt.lengths[place],
            )
            for place, (residual, rates, move, column) in enumerate(measured)
        ]

    def sweeps_to_go(self, place: int, tolerance: float) -> float:
        """How many more a row needs at its present rate: until its mean moves, then also its worst, are within."""
        residuals, rates = self.residuals[place, -2:].tolist(), self.contractions[place, -1:].tolist()
        if len(residuals) < 2:
            return 1  # no rate is known yet
        if residuals[1] > tolerance:
            return steps_at_rate(residuals[1], residuals[1] / residuals[0] if residuals[0] else math.inf, tolerance)
        return steps_at_rate(float(self.moved[place, self.prompt.lengths[place] - 1]), rates[0], tolerance)

    def hidden(self) -> Tensor:
        """(B, T, D): the final hidden states, zeros in padding."""
        return self.prompt.zero_padding(self.values[:, :, 0])


def forward_fused(
    model: LatentRecurrentTransformer, weights: FusedWeights | None, tokens: Tensor, positions: Positions, state: State
) -> tuple[Tensor, State]:
    """What `model(tokens, positions, state)` gives, on the path of decoding: large products, written in place."""
    if weights is None:
        return model(tokens, positions, state)
    memory = model.recall(state, positions, model.embedding).flatten(1, 2)
    state = state.mark_written(positions)  # first: `step` writes these slots in place, and then reads them
    place = locate_class(weights, state, positions)
    hidden = step(weights, buffers(state), memory, tokens.flatten(), place)
    return hidden.view(*tokens.shape, -1), state


def squared_norm(x: Tensor) -> Tensor:
    """The squared norm over the last dimension, in float32 at least."""
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32)).square()


def lower_sources(model: LatentRecurrentTransformer) -> list[int]:
    """Places, among the remembered sources, of those that are not the final hidden state itself."""
    depth = model.config.depth
    return [i for i, source in enumerate(model.config.memory.stored_sources(depth)) if source != depth]


def select_rows(state: State, rows: list[int]) -> State:
    """These rows of a state, in order; the state itself where that is all of them."""
    return state if len(rows) == state.batch else state.select(torch.tensor(rows, device=state.tokens.device))


def put_rows(whole: State, rows: list[int], part: State) -> State:
    """`whole` with its rows replaced by what became of them; `part` itself where that is all of them."""
    return part if len(rows) == whole.batch else whole.put(torch.tensor(rows, device=part.tokens.device), part)


def steps_at_rate(move: float, rate: float, tolerance: float) -> float:
    """Sweeps, at least one, until a move is within a tolerance if each is `rate` times the one before."""
    if not rate < 1:
        return math.inf
    return max(1.0, math.log(tolerance / move) / math.log(rate)) if move > 0 and rate > 0 else 1


def sweep_until_settled(
    model: LatentRecurrentTransformer,
    prompt: Prompt,
    state: State,
    groups: int,
    tolerance: float,
    calibration: Calibration,
) -> tuple[Tensor, State, list[Certificate]]:
    """Sweep until every row has converged, is exact, or has given up.

    Returns the hidden states (B, T, D), the state and the certificates. A row whose path is `fallback` has given
    up: it is to be computed exactly, and the other results mean nothing for it.
    """
    active, whole = SweepState.of(model, prompt, state), state
    hidden = active.values.new_zeros(prompt.rows, prompt.length, model.config.width)
    certificates: dict[int, Certificate] = {}
    while True:
        active.sweep(model, groups, min(active.sweeps * groups, active.prompt.length))
        leaving = certify_rows(active, groups, tolerance, calibration)
        certificates |= {active.rows[place]: certificate for place, certificate in leaving.items()}
        if leaving:
            places = torch.tensor(list(leaving), device=hidden.device)
            rows = torch.tensor([active.rows[i] for i in leaving], device=hidden.device)
            hidden[rows, : active.prompt.length] = active.hidden()[places]
            # Rows that go on are put as well, and once more when they leave: one copy for all is simpler.
            whole = put_rows(whole, active.rows, active.state)
            if len(leaving) == len(active.rows):
                return hidden, whole, [certificates[row] for row in range(prompt.rows)]
            active = active.select([i for i in range(len(active.rows)) if i not in leaving])


def certify_rows(active: SweepState, groups: int, tolerance: float, calibration: Calibration) -> dict[int, Certificate]:
    """The certificates, by place, of the rows that leave after the last sweep. Adds to `strikes`."""
    leaving: dict[int, Certificate] = {}
    rows, length = active.prompt.rows, active.prompt.length
    for place, row in enumerate(active.certificates(groups, f"within {tolerance:g}")):
        certify = partial(dataclasses.replace, row, residual=0.0, worst=0.0, worst_position=None)
        # n sweeps leave the first n·g positions exact.
        if active.sweeps * groups >= row.tokens:
            leaving[place] = certify(reason="exact: as many sweeps as a class has positions")
        elif row.within(tolerance):
            leaving[place] = row
        else:
            to_go = active.sweeps_to_go(place, tolerance)
            dear = to_go * calibration.sweep_cost(length, rows, groups) > calibration.exact_cost(row.tokens, rows)
            # One slow sweep may be chance; a row leaves when STRIKES in a row agree.
            active.strikes[place] = active.strikes[place] + 1 if dear else 0
            if active.strikes[place] == STRIKES:
                reason = f"{to_go:.0f} more sweeps would cost more than token by token (residual {row.residual:.1e})"
                leaving[place] = certify(path="fallback", reason=reason, forwards=row.forwards + 1)
    return leaving
