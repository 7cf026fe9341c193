"""Strided Gauss-Seidel sweeps over the rows of a prompt until each has converged, shown that it will not, or is exact.

Shapes: B rows, T prompt positions, D width, Q compared states: the final hidden state and the sources below it.
"""

from __future__ import annotations

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
from lrt.model.state import Positions, State
from lrt.model.transformer import LatentRecurrentTransformer

PACKED_FOR = 128
"""Positions of a class that the weights are packed for; others may be given."""
STRIKES = 2
"""A row is computed exactly after so many sweeps in a row that say that this is cheaper than to go on."""


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
        if all(s == first for s in self.starts):
            return range(first + columns.start, first + columns.stop, columns.step)
        index = torch.arange(columns.start, columns.stop, columns.step, device=self.tokens.device)
        return torch.tensor(self.starts, device=index.device).unsqueeze(1) + index

    def select(self, rows: list[int]) -> Prompt:
        """Some of the rows, without the padding that none of them needs."""
        lengths = [self.lengths[i] for i in rows]
        tokens = self.tokens[torch.tensor(rows, device=self.tokens.device), : max(lengths)]
        return Prompt(tokens, lengths, [self.starts[i] for i in rows])

    def part(self, begin: int, end: int) -> Prompt:
        """Columns begin … end-1 of rows that all have some of them."""
        lengths = [min(n, end) - begin for n in self.lengths]
        return Prompt(self.tokens[:, begin:end], lengths, [s + begin for s in self.starts])

    def inside(self, hidden: Tensor) -> Tensor:
        """Hidden (B, T, D) with zeros in the padding."""
        lengths = torch.tensor(self.lengths, device=hidden.device).unsqueeze(1)
        padding = torch.arange(self.length, device=hidden.device) >= lengths
        return hidden.masked_fill(padding.unsqueeze(2), 0)

    def last(self, hidden: Tensor) -> Tensor:
        """Of hidden (B, T, D) each row's last position, (B, 1, D)."""
        rows = torch.arange(self.rows, device=hidden.device)
        return hidden[rows, torch.tensor(self.lengths, device=hidden.device) - 1].unsqueeze(1)


@dataclass
class SweepState:
    """The rows that are still swept, and what their last two values at every position are apart."""

    rows: list[int]
    """Which rows of the prompt these are."""
    prompt: Prompt
    state: State
    products: FusedWeights | None
    """The model's weights as `lrt.inference.fused_step` takes them; None where the model itself computes."""
    values: Tensor
    """(B, T, Q, D): the newest compared states."""
    moved: Tensor
    """(B, T, Q): squared norm of the newest less the one before."""
    size: Tensor
    """(B, T, Q): squared norm of the newest."""
    history: list[list[float]] = field(default_factory=list)
    """Residuals of each row, sweep by sweep, from the second on."""
    strikes: list[int] = field(default_factory=list)
    computed: int = 0
    """Positions computed, per row."""

    @classmethod
    def of(cls, model: LatentRecurrentTransformer, prompt: Prompt, state: State) -> SweepState:
        """`state` is made by `in_place`, and used up."""
        rows, length = prompt.tokens.shape
        compared = 1 + len(below_top(model))
        values = state.memory.new_zeros(rows, length, compared, model.config.width)
        zeros = values.new_zeros(rows, length, compared, dtype=torch.promote_types(values.dtype, torch.float32))
        layout = packed_layout(rows * PACKED_FOR) if packs(model) else transposed_layout
        weights = fuse_weights(model, layout) if can_fuse(model) else None
        return cls(
            list(range(rows)),
            prompt,
            state,
            weights,
            values,
            zeros,
            zeros.clone(),
            [[] for _ in range(rows)],
            [0] * rows,
        )

    def select(self, places: list[int]) -> SweepState:
        """The flight of some rows, by their places in this one."""
        prompt = self.prompt.select(places)
        index, length = torch.tensor(places, device=self.values.device), prompt.length
        return SweepState(
            [self.rows[i] for i in places],
            prompt,
            self.state.select(index),
            self.products,
            self.values[index, :length],
            self.moved[index, :length],
            self.size[index, :length],
            [self.history[i] for i in places],
            [self.strikes[i] for i in places],
            self.computed,
        )

    def sweep(self, model: LatentRecurrentTransformer, groups: int, begin: int) -> None:
        """Recompute the positions from column `begin` on, class by class; those before are exact and stay."""
        length, others = self.prompt.length, below_top(model)
        self.moved[:, :begin] = 0  # computed again they would not move
        for first in range(begin, min(begin + groups, length)):
            columns, where = range(first, length, groups), slice(first, length, groups)
            positions = self.prompt.positions(columns)
            hidden, self.state = forward_fused(
                model, self.products, self.prompt.tokens[:, where], positions, self.state
            )
            memory = gather(self.state.memory, self.state.where(positions), 1)[:, :, others]
            new = torch.cat([hidden.unsqueeze(2), memory], 2)
            self.moved[:, where] = squared_norm(new - self.values[:, where])
            self.size[:, where] = squared_norm(new)
            self.values[:, where] = new
            self.computed += len(columns)

    def measure(self) -> tuple[list[float], list[float], list[int]]:
        """Per row: the residual, and the position that moved most with how far, relative to its own size."""
        lengths = torch.tensor(self.prompt.lengths, device=self.moved.device)
        outside = torch.arange(self.prompt.length, device=lengths.device) >= lengths.unsqueeze(1)
        moved, size = (x.masked_fill(outside.unsqueeze(2), 0) for x in (self.moved, self.size))
        residual = (moved.sum(1) / size.sum(1)).sqrt().amax(1)
        single = (moved / size.clamp(min=torch.finfo(size.dtype).tiny)).amax(2).sqrt()
        worst, place = single.max(1)
        starts = self.prompt.starts
        return residual.tolist(), worst.tolist(), [s + p for s, p in zip(starts, place.tolist(), strict=True)]

    def hidden(self) -> Tensor:
        """(B, T, D): the final hidden states, zeros in padding."""
        return self.prompt.inside(self.values[:, :, 0])


def forward_fused(
    model: LatentRecurrentTransformer, weights: FusedWeights | None, tokens: Tensor, positions: Positions, state: State
) -> tuple[Tensor, State]:
    """What `model(tokens, positions, state)` gives, on the path of decoding: large products, written in place."""
    if weights is None:
        return model(tokens, positions, state)
    memory = model.recall(state, positions, model.embedding).flatten(1, 2)
    state = state.mark_written(positions)
    place = locate_class(weights, state, positions)
    hidden = step(weights, buffers(state), memory, tokens.flatten(), place)
    return hidden.view(*tokens.shape, -1), state


def squared_norm(x: Tensor) -> Tensor:
    """The squared norm over the last dimension, in float32 at least."""
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32)).square()


def below_top(model: LatentRecurrentTransformer) -> list[int]:
    """Places, among the remembered sources, of those that are not the final hidden state itself."""
    depth = model.config.depth
    return [i for i, source in enumerate(model.config.memory.stored_sources(depth)) if source != depth]


def among(state: State, rows: list[int]) -> State:
    """These rows of a state, in order; the state itself where that is all of them."""
    return state if len(rows) == state.batch else state.select(torch.tensor(rows, device=state.tokens.device))


def back(whole: State, rows: list[int], part: State) -> State:
    """`whole` with its rows replaced by what became of them; `part` itself where that is all of them."""
    return part if len(rows) == whole.batch else whole.put(torch.tensor(rows, device=part.tokens.device), part)


def rate(history: list[float]) -> float | None:
    """How much smaller the last residual is than the one before."""
    return history[-1] / history[-2] if len(history) > 1 and history[-2] > 0 else None


def sweeps_to_go(history: list[float], tolerance: float) -> float:
    """How many more a row needs at its present rate; 1 where no rate is known yet."""
    known = rate(history)
    if known is None:
        return 1
    return math.log(tolerance / history[-1]) / math.log(known) if 0 < known < 1 else math.inf


def settle(
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
    flight, whole = SweepState.of(model, prompt, state), state
    hidden = flight.values.new_zeros(prompt.rows, prompt.length, model.config.width)
    certificates: dict[int, Certificate] = {}
    sweeps = 0
    while True:
        flight.sweep(model, groups, min(sweeps * groups, flight.prompt.length))
        sweeps += 1
        leaving = rows_leaving(flight, sweeps, groups, tolerance, calibration)
        certificates |= {flight.rows[place]: certificate for place, certificate in leaving.items()}
        if leaving:
            places = torch.tensor(list(leaving), device=hidden.device)
            rows = torch.tensor([flight.rows[i] for i in leaving], device=hidden.device)
            hidden[rows, : flight.prompt.length] = flight.hidden()[places]
            whole = back(whole, flight.rows, flight.state)
            if len(leaving) == len(flight.rows):
                return hidden, whole, [certificates[row] for row in range(prompt.rows)]
            flight = flight.select([i for i in range(len(flight.rows)) if i not in leaving])


def rows_leaving(
    flight: SweepState, sweeps: int, groups: int, tolerance: float, calibration: Calibration
) -> dict[int, Certificate]:
    """The certificates, by place, of the rows that leave after so many sweeps."""
    leaving: dict[int, Certificate] = {}
    rows, length = flight.prompt.rows, flight.prompt.length
    for place, (residual, worst, position) in enumerate(zip(*flight.measure(), strict=True)):
        history, own = flight.history[place], flight.prompt.lengths[place]
        if sweeps > 1:  # the first has nothing to be compared with
            history.append(residual)
        known = rate(history)
        done = partial(Certificate, tokens=own, groups=groups, sweeps=sweeps, contraction=known)
        cost = flight.computed / own
        if sweeps * groups >= own:
            leaving[place] = done("sweeps", "exact: as many sweeps as a class has positions", forwards=cost)
        elif history and residual <= tolerance:
            reason = f"within {tolerance:g}"
            leaving[place] = done(
                "sweeps", reason, residual=residual, worst=worst, worst_position=position, forwards=cost
            )
        else:
            to_go = sweeps_to_go(history, tolerance)
            dear = to_go * calibration.sweep(length, rows, groups) > calibration.exact(own, rows)
            flight.strikes[place] = flight.strikes[place] + 1 if dear else 0
            if flight.strikes[place] == STRIKES:
                reason = f"{to_go:.0f} more sweeps would cost more than token by token (residual {residual:.1e})"
                leaving[place] = done("fallback", reason, forwards=cost + 1)
    return leaving
