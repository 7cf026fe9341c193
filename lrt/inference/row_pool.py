"""The rows of a decoder's State, taken and given back; how many fit into memory; and snapshots of rows, for reuse.

The rows in use are always the first ones, so that a step computes no others: when one is given back, the last takes
its place.

A fork and a reused prefix are one thing: a row copied up to where the texts part. A copy is exact because a State has
the memory of every position, not of the last one alone.

Shapes: B rows, S slots, G key/value heads, K head size, P remembered sources, D width.
"""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lrt.inference.certificate import Certificate
from lrt.inference.decoders import EagerDecoder
from lrt.inference.exactness import error_bound
from lrt.inference.radix_tree import RadixTree
from lrt.model.state import State
from lrt.model.transformer import LatentRecurrentTransformer


def row_bytes(model: LatentRecurrentTransformer, slots: int) -> int:
    """Bytes of one row of a State: keys, values, memory, tokens and positions."""
    config = model.config
    remembered = len(config.stored_sources)
    numbers = 2 * config.kv_layers * config.num_kv_heads * config.head_dim + remembered * config.width
    return (
        slots * config.positions_per_token * (numbers * model.embedding.weight.element_size() + 2 * torch.long.itemsize)
    )  # 2: token and position of each slot


def rows_that_fit(model: LatentRecurrentTransformer, available: int, slots: int) -> int:
    """How many rows of `slots` slots fit into so many bytes, beside the weights. ValueError where none does."""
    row_size = row_bytes(model, slots)
    if available < row_size:
        raise ValueError(
            f"a row of {slots} slots takes {row_size:,} bytes, and {available:,} are given; give more, or fewer slots"
        )
    return available // row_size


class RowPool:
    """The rows of a decoder's State. It changes the State's buffers in place: the decoder owns them."""

    def __init__(self, decoder: EagerDecoder) -> None:
        self.decoder = decoder
        self.used = 0
        """Rows in use: 0 … used - 1."""

    @property
    def state(self) -> State:
        return self.decoder.state

    @property
    def free(self) -> int:
        """Rows not in use."""
        return self.state.batch - self.used

    def take(self) -> int:
        """The number of an empty row, now in use. Ask `free` first."""
        assert self.free > 0
        row, self.used = self.used, self.used + 1
        self._forget()
        empty_row(self.state, row)  # keys, values and memory may stay: nothing reads a slot whose position is -1
        return row

    def give_back(self, row: int) -> int:
        """Free a row. The last row in use takes its number; returns the number that it had."""
        last = self.used - 1
        self.used = last
        if row != last:  # the one copy that keeps the rows in use together
            self.copy(row, self.state, last, int(self.state.slot_positions[last].max()) + 1)
        return last

    def copy(self, row: int, source: State, source_row: int, length: int) -> None:
        """Row `row` becomes the first `length` positions of row `source_row` of another State (or of this one).

        Where slots are reused, those of later positions are left out: what they replaced is lost (`State.intact`).
        """
        self._forget()
        copy_row(self.state, row, source, source_row, length)

    def snapshot(self, row: int, length: int) -> State:
        """The first `length` positions of a row as a State of its own, of so many slots (where reused: of all)."""
        state = self.state
        width = state.slots if state.reusable else max(1, length)
        with torch.no_grad():
            positions = state.slot_positions[row : row + 1, :width].clone()
            later = positions >= length
            return dataclasses.replace(
                state,
                keys=tuple(k[row : row + 1, :, :width].clone() for k in state.keys),
                values=tuple(v[row : row + 1, :, :width].clone() for v in state.values),
                memory=state.memory[row : row + 1, :width].clone(),
                tokens=state.tokens[row : row + 1, :width].masked_fill(later, -1),
                slot_positions=positions.masked_fill(later, -1),
                written_until=0,  # not looked for: it is right, and whoever copies the row does not need more
                pending_strides=(),
            )

    def _forget(self) -> None:
        """What Python knows of all rows (`written_until`) is no longer true: rows now differ."""
        self.decoder.state = dataclasses.replace(self.state, written_until=0, pending_strides=())


def empty_row(state: State, row: int) -> None:
    """Forget all positions and tokens of a row, in place."""
    with torch.no_grad():
        state.slot_positions[row] = -1
        state.tokens[row] = -1


def copy_row(target: State, row: int, source: State, source_row: int, length: int) -> None:
    """`RowPool.copy` into any State whose buffers may be overwritten."""
    width = min(length, source.slots, target.slots)
    with torch.no_grad():
        for buffer, other in zip(buffers_of(target), buffers_of(source), strict=True):
            buffer[row].narrow(-2, 0, width).copy_(other[source_row].narrow(-2, 0, width))
        positions = source.slot_positions[source_row, :width].clone()  # the row may be its own source
        tokens = source.tokens[source_row, :width].clone()
        empty_row(target, row)
        known = (positions >= 0) & (positions < length)
        target.slot_positions[row, :width] = positions.where(known, -1)
        target.tokens[row, :width] = tokens.where(known, -1)


def buffers_of(state: State) -> list[Tensor]:
    """Keys and values (B, G, S, K), and the memory as (B, P, S, D): slots next to last."""
    return [*state.keys, *state.values, state.memory.transpose(1, 2)]


@dataclass(eq=False)
class KeptRow:
    """The snapshot of a row. Compared by identity."""

    tokens: tuple[int, ...]
    """What the row has."""
    state: State
    certificate: Certificate | None
    """Of the least exact part of it; None is exact."""
    owner: str = ""
    """Whose request it was computed for."""

    @property
    def bytes(self) -> int:
        return size(self.state)

    @property
    def error(self) -> float:
        """As `error_bound` has it."""
        return error_bound(self.certificate)


class PrefixCache:
    """Snapshots of rows, the least recently used dropped where they exceed a budget.

    A row serves requests of its owner that ask for no more than its certificate vouches for. Each owner has a radix
    tree for what is exact, for each tolerance that a mode asks for, and for the rest. So the cost of finding one grows
    with the prompt's length, not with how many are kept. The budget is one for all owners.
    """

    def __init__(self, budget: int, steps: Sequence[float] = ()) -> None:
        """`budget` in bytes; 0 keeps nothing. `steps`: the errors that will be asked for, beside 0 and infinity.

        ValueError for a budget below 0.
        """
        if budget < 0:
            raise ValueError(f"the budget of prefixes is {budget} bytes; give 0 (keep none) or more")
        self.budget = budget
        self.steps = sorted({0.0, *steps, math.inf})
        """The largest errors of the trees, in order."""
        self.trees: dict[tuple[str, float], RadixTree[KeptRow]] = {}
        """By owner and largest error; made with their first row."""
        self.bytes = 0
        """What the snapshots take."""
        self.kept: OrderedDict[KeptRow, None] = OrderedDict()
        """The least recently used first."""

    def find(
        self, tokens: Sequence[int], lookback: int, error: float = 0.0, owner: str = ""
    ) -> tuple[int, KeptRow] | None:
        """(n, row) of the owner's kept text that shares most tokens, n of them; None where none shares any.

        At most all but the last token: its hidden state is needed, and is computed anew.
        lookback: where slots are reused, how many positions before n must be intact.
        error: the largest that will do, as `error_bound` has it. Of texts that share as much, the most exact.
        """
        wanted, shared, row = tuple(tokens[:-1]), 0, None
        for tree in self._trees(owner, at_most=error):
            length, other = tree.longest(wanted)
            if length > shared:
                shared, row = length, other
        if row is None:
            return None
        self.kept.move_to_end(row)
        if row.state.reusable and not bool(row.state.intact(ends(row.state, shared), lookback).all()):
            return None
        return shared, row

    def keep(self, row: KeptRow) -> None:
        """Keep a row; its owner's kept texts that it begins with and that are no more exact are dropped.

        One that is larger than the whole budget is not kept.
        """
        if row.bytes > self.budget or not row.tokens:
            return
        step = self._step(row.error)
        inexact = self._trees(row.owner, at_least=step)
        for other in [other for tree in inexact for other in tree.beginnings(row.tokens)]:
            self._drop(other)
        self.trees.setdefault((row.owner, step), RadixTree()).add(row.tokens, row)
        self.kept[row] = None
        self.bytes += row.bytes
        while self.bytes > self.budget:  # ends before the new one, which fits
            self._drop(next(iter(self.kept)))

    def _drop(self, row: KeptRow) -> None:
        place = row.owner, self._step(row.error)
        self.trees[place].remove(row.tokens)
        if self.trees[place].empty:
            del self.trees[place]
        del self.kept[row]
        self.bytes -= row.bytes

    def _step(self, error: float) -> float:
        """The largest error of the tree that a row of this error lies in."""
        return next(step for step in self.steps if error <= step)

    def _trees(self, owner: str, at_least: float = 0.0, at_most: float = math.inf) -> list[RadixTree[KeptRow]]:
        """An owner's trees of these errors, the most exact first."""
        places = [(owner, step) for step in self.steps if at_least <= step <= at_most]
        return [self.trees[place] for place in places if place in self.trees]


def size(state: State) -> int:
    """Bytes of a State's buffers."""
    parts = (*state.keys, *state.values, state.memory, state.tokens, state.slot_positions)
    return sum(part.numel() * part.element_size() for part in parts)


def ends(state: State, length: int) -> Tensor:
    """(1,): a length as `intact` takes it."""
    return state.slot_positions.new_tensor([length])
