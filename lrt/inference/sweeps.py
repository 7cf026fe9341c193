"""Strided Gauss-Seidel sweeps over the rows of a prompt until each has converged, shown that it will not, or is exact.

Sweeps start from an empty buffer: a full pass first costs a forward and saves less than one (docs/log.md). Every row is
looked at by itself after each sweep, and leaves the batch when it is done. What n sweeps have made exact, the first n·g
positions, is not computed again.

The memory's fixed point lives in some blocks alone: from the first that reads a remembered layer to the highest
remembered layer. Sweeps run these. What lies below follows from the tokens, and runs over all of the prompt once. What
lies above starts from the residual stream that a sweep has left, and runs over all of a row. It gives the final hidden
state, which is measured as well: it runs when the next sweep should be a row's last, and again after that sweep. With
`Execution.blocks` "all", in the State, every sweep runs all blocks: the plain reference.

A class of a sweep is a decoding step with more positions, and computed by the same function. The products of all
layers are put together once per prompt, which costs a fifth of a forward. On a CPU they are in oneDNN's layout, because
products of a hundred rows spend half of their time on arranging the weights. A sweep of stride 8 so costs 1.03 plain
forwards if it runs all blocks; it cost 1.5 as calls of the model.

Shapes: B rows, T prompt positions, D width, Q compared states: the remembered sources, and the final hidden state if it
is none of them and sweeps run all blocks.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lrt.inference.certificate import Certificate
from lrt.inference.cost_model import Calibration, swept_blocks
from lrt.inference.fused_step import buffers, locate_class, step
from lrt.inference.fused_weights import FusedWeights, can_fuse, fuse_weights, packed_layout, packs, transposed_layout
from lrt.inference.moves import Moves, steps_at_rate
from lrt.inference.prompt import Prompt
from lrt.model.buffers import gather
from lrt.model.state import State
from lrt.model.state_protocol import Positions
from lrt.model.transformer import LatentRecurrentTransformer

PACKED_FOR = 128
"""Positions of a class that the weights are packed for; others may be given."""
STRIKES = 2
"""A row is computed exactly after so many sweeps in a row that say that this is cheaper than to go on."""


@dataclass(frozen=True)
class BlockRange:
    """Some blocks of a model, one after another, as they are computed here."""

    blocks: range
    """Counted from 0, loop after loop."""
    weights: FusedWeights | None
    """Theirs, as `lrt.inference.fused_step` takes them; None where the model itself computes."""

    @classmethod
    def of(cls, model: LatentRecurrentTransformer, blocks: range, rows: int) -> BlockRange:
        """Blocks that compute classes of so many rows."""
        layout = packed_layout(rows * PACKED_FOR) if packs(model) else transposed_layout
        return cls(blocks, fuse_weights(model, layout, blocks) if can_fuse(model) else None)

    def __call__(
        self,
        model: LatentRecurrentTransformer,
        tokens: Tensor,
        positions: Positions,
        state: State,
        stream: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """What `model(tokens, positions, state, blocks, stream)` gives."""
        if self.weights is None:
            return model(tokens, positions, state, self.blocks, stream)
        return forward_fused(model, self.weights, tokens, positions, state, stream)


@dataclass
class SweepState:
    """The rows that are still swept, and how far their last two values at every position are apart.

    A *place* is a row's number here, a *row* its number in the whole prompt.
    """

    rows: list[int]
    """By place, which row of the prompt it is."""
    prompt: Prompt
    state: State
    below: BlockRange | None
    """The blocks below, which depend on no memory and run once, before the first sweep; None where there are none."""
    lower: BlockRange
    """What a sweep runs: the blocks that the memory needs and that need it, or all."""
    upper: BlockRange | None
    """The blocks above; None where sweeps run all."""
    inputs: Tensor
    """(B, T, D): the residual stream that the lower blocks start from, of no columns where that is the embedding."""
    stream: Tensor
    """(B, T, D): the residual stream behind the lower blocks, which the upper ones start from; no column without."""
    moves: Moves
    """Of what every sweep computes: Q states, the final hidden state first where sweeps run all blocks."""
    ends: Moves
    """Of the final hidden state (Q is 1) where the upper blocks give it; of no columns else."""
    computed: list[int]
    """By place, blocks run times positions computed."""
    finished: list[int]
    """By place, the columns that were exact when the upper blocks ran last, over which they need not run again."""
    strikes: list[int]
    """By place, sweeps in a row after which going on looked dearer than token by token."""
    sweeps: int = 0
    exact: int = 0
    """Columns that the sweeps so far have made exact: n·g after n."""

    @classmethod
    def of(
        cls, model: LatentRecurrentTransformer, prompt: Prompt, state: State, blocks: range | None = None
    ) -> SweepState:
        """All rows of a prompt, none swept yet. `state` is made by `in_place`, and used up.

        blocks: those that a sweep runs; None: what the State's `Execution` says.
        """
        rows, length = prompt.tokens.shape
        config, memory = model.config, state.memory
        swept = swept_blocks(config, state.execution) if blocks is None else blocks
        above = range(swept.stop, config.kv_layers)
        whole, stored = len(above) == 0, len(config.stored_sources)
        return cls(
            rows=list(range(rows)),
            prompt=prompt,
            state=state,
            below=BlockRange.of(model, range(swept.start), rows) if swept.start else None,
            lower=BlockRange.of(model, swept, rows),
            upper=None if whole else BlockRange.of(model, above, rows),
            inputs=memory.new_zeros(rows, 0, config.width),
            stream=memory.new_zeros(rows, 0 if whole else length, config.width),
            moves=Moves.of(rows, length, 1 + len(lower_sources(model)) if whole else stored, memory),
            ends=Moves.of(rows, 0 if whole else length, 1, memory),
            computed=[0] * rows,
            finished=[0] * rows,
            strikes=[0] * rows,
        )

    def select(self, places: list[int]) -> SweepState:
        """Some of the rows, without the padding that none of them needs."""
        prompt = self.prompt.select(places)
        index, length = torch.tensor(places, device=self.stream.device), prompt.length
        return dataclasses.replace(
            self,
            rows=[self.rows[i] for i in places],
            prompt=prompt,
            state=self.state.select(index),
            inputs=self.inputs[index, :length],
            stream=self.stream[index, :length],
            moves=self.moves.select(places, length),
            ends=self.ends.select(places, length),
            computed=[self.computed[i] for i in places],
            finished=[self.finished[i] for i in places],
            strikes=[self.strikes[i] for i in places],
        )

    def sweep(self, model: LatentRecurrentTransformer, groups: int, begin: int) -> None:
        """Recompute the positions from column `begin` on, class by class; those before are exact and stay."""
        length, others = self.prompt.length, lower_sources(model)
        if self.below is not None and self.sweeps == 0:
            self.begin(model, self.below)
        for first in range(begin, min(begin + groups, length)):
            columns, where = range(first, length, groups), slice(first, length, groups)
            positions = self.prompt.positions(columns)
            inputs = self.inputs[:, where] if self.below is not None else None
            output, self.state = self.lower(model, self.prompt.tokens[:, where], positions, self.state, inputs)
            # What is compared: the final hidden state where it is known, and what memory keeps of the layers below.
            memory = gather(self.state.memory, self.state.where(positions), 1)[:, :, others]
            if self.upper is None:
                memory = torch.cat([output.unsqueeze(2), memory], 2)
            else:
                self.stream[:, where] = output
            self.moves.record(where, memory)
        self.moves.compare(begin, self.prompt.lengths)
        swept = len(self.lower.blocks) * max(0, length - begin)
        self.computed = [n + swept for n in self.computed]
        self.sweeps, self.exact = self.sweeps + 1, begin + groups

    def begin(self, model: LatentRecurrentTransformer, below: BlockRange) -> None:
        """Run what depends on no memory over all of the prompt. Its positions stay unwritten: their memory is."""
        state, positions = self.state, self.prompt.positions(range(self.prompt.length))
        unwritten = state.slot_positions.clone()
        self.inputs, after = below(model, self.prompt.tokens, positions, state)
        after.slot_positions.copy_(unwritten)
        self.state = dataclasses.replace(
            after, written_until=state.written_until, pending_strides=state.pending_strides
        )
        self.computed = [n + len(below.blocks) * self.prompt.length for n in self.computed]

    def finish(self, model: LatentRecurrentTransformer, places: list[int]) -> None:
        """Run the blocks above the memory's over all of some rows, and compare the final hidden states with those
        after the sweep before, where these were computed; of the other rows none are known after this sweep."""
        if self.upper is None:
            return
        for place in set(range(len(self.rows))) - set(places):
            self.ends.pause(place)
        if not places:
            return
        everyone = len(places) == len(self.rows)
        prompt = self.prompt if everyone else self.prompt.select(places)
        ends = self.ends if everyone else self.ends.select(places, prompt.length)
        state, stream = select_rows(self.state, places), self.stream[places, : prompt.length]
        begin = min(self.finished[place] for place in places)
        positions = prompt.positions(range(begin, prompt.length))
        hidden, state = self.upper(model, prompt.tokens[:, begin:], positions, state, stream[:, begin:])
        ends.record(slice(begin, prompt.length), hidden.unsqueeze(2))
        ends.compare(begin, prompt.lengths)
        self.state = put_rows(self.state, places, state)
        if not everyone:
            self.ends.put(places, ends)
        for place in places:
            self.computed[place] += len(self.upper.blocks) * (prompt.length - begin)
            self.finished[place] = self.exact

    def due(self, tolerance: float) -> list[int]:
        """Places of the rows over which the upper blocks are to run: those that leave now or, at their present rate,
        after the next sweep."""
        if self.upper is None:
            return []
        places = []
        for place, (worst, _) in enumerate(self.moves.worst(self.prompt.lengths)):
            exact = self.exact >= self.prompt.lengths[place]
            if exact or min(self.moves.bound(place, worst), self.moves.next_bound(place, worst)) <= tolerance:
                places.append(place)
        return places

    def certificates(self, groups: int, reason: str) -> list[Certificate]:
        """What can be said of each row after the last sweep, by place."""
        lengths = self.prompt.lengths
        compared = [self.moves] if self.upper is None else [self.moves, self.ends]
        worst = [moves.worst(lengths) for moves in compared]
        rows = []
        for place, length in enumerate(lengths):
            residuals = [moves.residual(place) for moves in compared]
            measured = [residual for residual in residuals if residual is not None]
            known = len(measured) == len(compared)
            move, column = max((each[place] for each in worst), key=lambda each: each[0])
            rates = [rate for moves in compared if (rate := moves.contraction(place)) is not None]
            # That of the sources must be known; that of the final hidden state, which follows from them, may be.
            contraction = max(rates) if self.moves.contraction(place) is not None else None
            rows.append(
                Certificate(
                    "sweeps",
                    reason,
                    tokens=length,
                    groups=groups,
                    sweeps=self.sweeps,
                    residual=max(measured) if known else None,
                    worst=move if known else None,
                    worst_position=self.prompt.starts[place] + column if known else None,
                    contraction=contraction,
                    forwards=self.forwards(place),
                )
            )
        return rows

    def forwards(self, place: int) -> float:
        """What a row has cost so far, in plain forwards of its tokens."""
        return self.computed[place] / (self.blocks * self.prompt.lengths[place])

    @property
    def blocks(self) -> int:
        """All of the model's."""
        return sum(len(part.blocks) for part in (self.below, self.lower, self.upper) if part is not None)

    def sweeps_to_go(self, place: int, tolerance: float) -> float:
        """How many more a row needs at its present rate; at least one."""
        length = self.prompt.lengths[place]
        to_go = self.moves.sweeps_to_go(place, float(self.moves.moved[place, length - 1]), tolerance)
        if self.upper is None or self.ends.residual(place) is None:
            return to_go
        # It shrinks as what it is computed from does, until its own rate is known.
        rates = [rate for moves in (self.moves, self.ends) if (rate := moves.contraction(place)) is not None]
        move = float(self.ends.moved[place, length - 1])
        return max(to_go, steps_at_rate(move, max(rates), tolerance)) if rates else to_go

    def cost_to_go(self, place: int, to_go: float, groups: int, calibration: Calibration) -> float:
        """The cost of so many more sweeps, and of the upper blocks after the last two or, once begun, after each."""
        length, rows = self.prompt.length, self.prompt.rows
        swept = to_go * calibration.sweep_cost(length, rows, groups, len(self.lower.blocks) / self.blocks)
        if self.upper is None:
            return swept
        passes = to_go if self.ends.counts[place] else 2
        return swept + passes * calibration.pass_cost(length, rows, len(self.upper.blocks) / self.blocks)

    def hidden(self) -> Tensor:
        """(B, T, D): the newest final hidden states, zeros in padding."""
        return self.prompt.zero_padding((self.moves if self.upper is None else self.ends).values[:, :, 0])


def forward_fused(
    model: LatentRecurrentTransformer,
    weights: FusedWeights,
    tokens: Tensor,
    positions: Positions,
    state: State,
    stream: Tensor | None = None,
) -> tuple[Tensor, State]:
    """What `model(tokens, positions, state)` gives, or those of its blocks that the weights are of, on the path of
    decoding: large products, written in place.

    The state knows all tokens that are swept (`write_tokens`): at a delay of as many classes as there are, the
    embedding that a position reads is that of a token of this very call.
    """
    memory = model.recall(state, positions, model.embedding).flatten(1, 2)
    state = state.mark_written(positions)  # first: `step` writes these slots in place, and then reads them
    place = locate_class(weights, state, positions)
    below = None if stream is None else stream.flatten(0, 1)
    output = step(weights, buffers(state), memory, tokens.flatten(), place, stream=below)
    return output.view(*tokens.shape, -1), state


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
    hidden = active.stream.new_zeros(prompt.rows, prompt.length, model.config.width)
    certificates: dict[int, Certificate] = {}
    while True:
        active.sweep(model, groups, active.exact)
        active.finish(model, active.due(tolerance))
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
    for place, row in enumerate(active.certificates(groups, f"within {tolerance:g}")):
        certify = partial(dataclasses.replace, row, residual=0.0, worst=0.0, worst_position=None)
        if active.exact >= row.tokens:
            leaving[place] = certify(reason="exact: as many sweeps as a class has positions")
        elif row.within(tolerance):
            leaving[place] = row
        else:
            to_go = active.sweeps_to_go(place, tolerance)
            token_by_token = calibration.exact_cost(row.tokens, active.prompt.rows)
            dear = active.cost_to_go(place, to_go, groups, calibration) > token_by_token
            # One slow sweep may be chance; a row leaves when STRIKES in a row agree.
            active.strikes[place] = active.strikes[place] + 1 if dear else 0
            if active.strikes[place] == STRIKES:
                residual = active.moves.residual(place)
                reason = f"{to_go:.0f} more sweeps would cost more than token by token (residual {residual:.1e})"
                leaving[place] = certify(path="fallback", reason=reason, forwards=row.forwards + 1)
    return leaving
