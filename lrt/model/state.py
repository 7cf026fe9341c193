"""State: what a token may know about earlier positions, in slots.

Shapes: B batch, T positions of one call, S slots, G key/value heads, K head size, P remembered sources, D width.

Position p lives in slot p % S. Slots are reused only where every layer slides, so elsewhere the slot is the position.
`slot_positions` says which position a slot holds, and everything else (masks, resets at document borders, what counts
as written) follows from it. `written_until` is the part of that which Python knows without asking the device: it lets
the common cases run without a mask.

Batches need a State by rows: `select`, `put`, `crop` and `resized` let rows leave, return, fork and go back. Prefill,
sessions and all decoders keep their sequences in this State, so each reads what another wrote.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lrt.model.buffers import COPYING, OVERWRITING, Slots, Writer, gather, materialise
from lrt.model.execution import EAGER, Execution
from lrt.model.state_protocol import MemoryRead, Positions
from lrt.model.visibility import visible_keys


@dataclass(frozen=True)
class Visibility:
    """What one layer's queries may attend to: the slots `view`, and which of them each query sees."""

    view: slice
    """Slots that no query sees are left out: attention takes time for masked keys, too."""
    causal: bool = False
    """Queries and keys are the same positions, so that plain causal attention is right and needs no mask."""
    mask: Tensor | None = None
    """(T, n) or (B, 1, T, n) bool, True where visible; None where everything is."""

    def attend(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Softmax attention (B, H, T, K) of q (B, H, T, K) over the visible slots of keys and values (B, G, S, K)."""
        k, v = keys[:, :, self.view], values[:, :, self.view]
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, is_causal=self.causal, enable_gqa=grouped)


@dataclass(frozen=True)
class State:
    """Keys, values, memory, tokens and documents of S slots, for B sequences. Calls return a new one.

    By default writing copies, so that gradients flow through the buffer and an old State stays valid. `in_place()`
    gives one whose buffers are overwritten: for decoding, where a State is used once; `clone()` forks it.
    """

    keys: tuple[Tensor, ...]
    """One (B, G, S, K) per layer, rotated and normalised."""
    values: tuple[Tensor, ...]
    """One (B, G, S, K) per layer."""
    memory: Tensor
    """(B, S, P, D): the remembered layers >= 1 of each position, RMS-normalised, not combined yet."""
    tokens: Tensor
    """(B, S) int, -1 where unknown. May be known ahead of what is written: source 0 needs nothing else."""
    documents: Tensor | None
    """(B, S) int, the packed document of each slot; None where a row is one document."""
    slot_positions: Tensor
    """(B, S) int, the position that each slot holds; -1 where nothing is written."""
    reusable: bool = False
    """Whether slots may be reused, so that positions may exceed S."""
    written_until: int = 0
    """Every position below this one is written, in all rows. A lower bound: 0 is always right, and slower."""
    pending_strides: tuple[range, ...] = ()
    """Strided classes written since; once together they cover all positions, they raise `written_until`."""
    write: Writer = COPYING
    """How calls replace what the buffers hold."""
    execution: Execution = EAGER
    """How calls compute; decides no numbers."""

    def __repr__(self) -> str:
        return f"State(batch={self.batch}, slots={self.slots}, written until {self.written_until})"

    # --- facts -------------------------------------------------------------------------------------------------

    @property
    def batch(self) -> int:
        return self.tokens.shape[0]

    @property
    def slots(self) -> int:
        return self.tokens.shape[1]

    @property
    def shape(self) -> tuple[int, ...]:
        """(layers, G, K, P, D): what the model that made it must have."""
        return (len(self.keys), *self.keys[0].shape[1::2], *self.memory.shape[2:])  # [1::2] of (B, G, S, K): G, K

    @property
    def lengths(self) -> Tensor:
        """(B,) int: one past the last position written, per row. It does not say that all before it are written."""
        return self.slot_positions.amax(1) + 1

    @property
    def length(self) -> int:
        """One past the last position written, over all rows. Waits for the device."""
        return int(self.lengths.max())

    # --- forks -------------------------------------------------------------------------------------------------

    def in_place(self) -> State:
        """A copy whose calls overwrite its buffers: no gradients, and a State given to a call is used up by it."""
        return dataclasses.replace(self._map(materialise), write=OVERWRITING)

    def writable(self) -> State:
        """A State whose calls overwrite its buffers: on this one's buffers where they do already, else on copies."""
        return dataclasses.replace(self._map(self.write.owned), write=OVERWRITING)

    def clone(self) -> State:
        """An independent copy: a fork, also of a State whose buffers are overwritten."""
        return self._map(Tensor.clone)

    def detach_memory(self) -> State:
        """The same, with the gradient through the memory cut."""
        return dataclasses.replace(self, memory=self.memory.detach())

    def _map(self, change: Callable[[Tensor], Tensor]) -> State:
        """With every buffer changed but documents, which no call writes."""
        return dataclasses.replace(
            self,
            keys=tuple(change(k) for k in self.keys),
            values=tuple(change(v) for v in self.values),
            memory=change(self.memory),
            tokens=change(self.tokens),
            slot_positions=change(self.slot_positions),
        )

    # --- rows and lengths --------------------------------------------------------------------------------------

    def select(self, rows: Tensor) -> State:
        """A State of these rows (n,) int in this order, independent of this one; a row named twice is forked."""
        selected = self._map(lambda buffer: buffer.index_select(0, rows))
        documents = None if self.documents is None else self.documents.index_select(0, rows)
        return dataclasses.replace(selected, documents=documents)

    def put(self, rows: Tensor, other: State) -> State:
        """This State with its rows `rows` (n,) int replaced by those of `other`, which has as many slots.

        Raises ValueError where rows or slots do not match, or `other` has documents.
        """
        if other.slots != self.slots or other.batch != len(rows) or other.documents is not None:
            raise ValueError(
                f"{other.batch} rows of {other.slots} slots cannot replace {len(rows)} rows of {self.slots}; give one "
                "row for each, of as many slots (resized), without documents"
            )

        def replace(buffer: Tensor, new: Tensor) -> Tensor:
            return self.write(buffer, rows, new.to(buffer), 0)

        return dataclasses.replace(
            self,
            keys=tuple(map(replace, self.keys, other.keys)),
            values=tuple(map(replace, self.values, other.values)),
            memory=replace(self.memory, other.memory),
            tokens=replace(self.tokens, other.tokens),
            slot_positions=replace(self.slot_positions, other.slot_positions),
            written_until=min(self.written_until, other.written_until),
            pending_strides=(),
        )

    def crop(self, lengths: int | Tensor) -> State:
        """Forget every position from `lengths` on, an int or one per row (B,): as if it had never been computed.

        Keys, values and memory stay where they are: nothing reads a slot whose position is -1. Tokens are forgotten as
        well, as they would else be known ahead to whatever is computed next.
        Where slots are reused, ask `intact` first: what a forgotten position replaced does not come back.
        """
        ends = torch.as_tensor(lengths, device=self.slot_positions.device).expand(self.batch).unsqueeze(1)
        kept = self.slot_positions.masked_fill(self.slot_positions >= ends, -1)
        everything = slice(0, self.slots, 1)
        return dataclasses.replace(
            self,
            slot_positions=self.write(self.slot_positions, everything, kept, 1),
            tokens=self.write(self.tokens, everything, self.tokens.masked_fill(kept < 0, -1), 1),
            written_until=min(self.written_until, lengths if isinstance(lengths, int) else int(lengths.min())),
            pending_strides=(),
        )

    def intact(self, lengths: Tensor, lookback: int) -> Tensor:
        """(B,) bool: whether the last `lookback` positions before `lengths` (B,) are all still in their slots.

        A position needs these of its past (`ModelConfig.lookback`); where slots are reused they may be overwritten.
        """
        needed = lengths.unsqueeze(1) - 1 - torch.arange(min(lookback, self.slots), device=self.slot_positions.device)
        present = gather(self.slot_positions, needed % self.slots, 1) == needed
        return (present | (needed < 0)).all(1)  # below 0 there is nothing to need

    def resized(self, slots: int) -> State:
        """A copy with another number of slots. ValueError where they cannot hold every position written so far."""
        if self.length > min(slots, self.slots) or self.documents is not None:
            raise ValueError(
                f"a state of {self.slots} slots that holds {self.length} positions cannot have {slots}: it needs one "
                "for each position, none reused, and no documents"
            )

        def resize(buffer: Tensor, dim: int, fill: int = 0) -> Tensor:
            shape = list(buffer.shape)
            shape[dim] = slots
            kept = min(slots, buffer.shape[dim])
            fresh = buffer.new_full(shape, fill)
            fresh.narrow(dim, 0, kept).copy_(buffer.narrow(dim, 0, kept))
            return fresh

        return dataclasses.replace(
            self,
            keys=tuple(resize(k, 2) for k in self.keys),
            values=tuple(resize(v, 2) for v in self.values),
            memory=resize(self.memory, 1),
            tokens=resize(self.tokens, 1, -1),
            slot_positions=resize(self.slot_positions, 1, -1),
        )

    # --- where -------------------------------------------------------------------------------------------------

    def where(self, positions: Positions) -> Slots:
        """The slots of these positions; a slice wherever Python knows them and none is reused."""
        if isinstance(positions, Tensor):
            return positions % self.slots if self.reusable else positions
        if positions.stop <= self.slots:
            return slice(positions.start, positions.stop, positions.step)
        return self.index(positions) % self.slots

    def index(self, positions: Positions) -> Tensor:
        """The positions as an int tensor, (T,) or (B, T)."""
        if isinstance(positions, Tensor):
            return positions
        return torch.arange(positions.start, positions.stop, positions.step, device=self.tokens.device)

    # --- reading and writing -----------------------------------------------------------------------------------

    def write_tokens(self, positions: Positions, tokens: Tensor) -> State:
        """Note the tokens (B, T) of a call: source 0 of their successors is known from now on."""
        tokens = tokens.to(self.tokens, copy=True)  # the caller's tensor may change later
        return dataclasses.replace(self, tokens=self.write(self.tokens, self.where(positions), tokens, 1))

    def read_memory(self, positions: Positions, delay: int | Tensor) -> MemoryRead:
        """What stands `delay` positions before each of `positions`; a tensor, (T,) or (B, T), gives each its own."""
        index = self.index(positions)
        before = index - delay
        slots = before % self.slots if self.reusable else before.clamp(min=0)  # below 0: any slot, as not `inside`
        inside = (before >= 0).expand(self.batch, -1)
        if self.documents is not None:
            here = self.where(index)
            inside = inside & (gather(self.documents, here, 1) == gather(self.documents, slots, 1))
        return MemoryRead(
            gather(self.tokens, slots, 1),
            gather(self.memory, slots, 1),
            gather(self.slot_positions, slots, 1) == before,  # written, and not overwritten by a later position
            inside,
        )

    def mark_written(self, positions: Positions) -> State:
        """Mark the positions of a call as written. Keys, values and memory follow in the same call."""
        index = self.index(positions)
        occupied = self.write(
            self.slot_positions, self.where(positions), index.to(self.slot_positions).expand(self.batch, -1), 1
        )
        if isinstance(positions, Tensor):  # Python does not look into it, which would wait for the device
            return dataclasses.replace(self, slot_positions=occupied)
        written_until, pending = extend(self.written_until, self.pending_strides, positions)
        return dataclasses.replace(self, slot_positions=occupied, written_until=written_until, pending_strides=pending)

    def write_memory(self, positions: Positions, memory: Tensor) -> State:
        """Replace the memory (B, T, P, D) of these positions."""
        return dataclasses.replace(self, memory=self.write(self.memory, self.where(positions), memory, 1))

    def write_cache(self, keys: tuple[Tensor, ...], values: tuple[Tensor, ...]) -> State:
        """The same State with the layers' buffers that a call has written."""
        return dataclasses.replace(self, keys=keys, values=values)

    # --- attention ---------------------------------------------------------------------------------------------

    def visible(self, positions: Positions, window: int | None) -> Visibility:
        """What `visible_keys` says of these positions. Call after `mark_written`."""
        if isinstance(positions, range) and positions.stop <= self.slots and self.written_until > positions[-1]:
            return self._visible_range(positions, window)
        index = self.index(positions)
        documents, own = self.documents, None
        if documents is not None:
            own, documents = gather(documents, self.where(index), 1).unsqueeze(2), documents.unsqueeze(1)
        # (T, 1) or (B, T, 1) against (B, 1, S)
        mask = visible_keys(index.unsqueeze(-1), self.slot_positions.unsqueeze(1), window, own, documents)
        return Visibility(slice(0, self.slots), mask=mask.unsqueeze(1))

    def _visible_range(self, positions: range, window: int | None) -> Visibility:
        """The case that Python understands: every slot up to the last position is written."""
        first, stop = positions[0], positions[-1] + 1
        begin = 0 if window is None else max(0, first - window + 1)  # the first key that the first query sees
        view = slice(begin, stop)
        slides = window is not None and stop - window > begin  # the last query sees fewer than all in view
        if self.documents is None and not slides and positions.step == 1:
            if begin == first:
                return Visibility(view, causal=True)
            if len(positions) == 1:  # a decoded token sees all that is in view
                return Visibility(view)
        here = self.index(positions).unsqueeze(1)
        there = torch.arange(begin, stop, device=here.device)
        if self.documents is None:
            return Visibility(view, mask=visible_keys(here, there, window))
        own = self.documents[:, positions.start : positions.stop : positions.step, None]
        return Visibility(view, mask=visible_keys(here, there, window, own, self.documents[:, None, view]).unsqueeze(1))


def as_positions(positions: Positions) -> Positions:
    """A tensor on the CPU that counts up evenly is a range: the fast path, and the same result."""
    if isinstance(positions, range) or positions.dim() != 1 or positions.device.type != "cpu":
        return positions
    values: list[int] = positions.tolist()
    step = values[1] - values[0] if len(values) > 1 else 1
    if step >= 1 and values:
        counted = range(values[0], values[-1] + 1, step)
        if values == list(counted):
            return counted
    return positions


def extend(written_until: int, pending: tuple[range, ...], new: range) -> tuple[int, tuple[range, ...]]:
    """(written_until, pending_strides) after writing `new`: contiguous positions count at once, strides together."""
    if new.stop <= written_until:
        return written_until, pending
    if new.start <= written_until and new.step == 1:
        return new.stop, pending
    alike = [r for r in pending if (r.step, r.stop) == (new.step, new.stop) and r != new]
    pending = (*alike, new)
    # A class covers its share of written_until … stop - 1 if it starts with the first of them.
    covered = {r.start % r.step for r in pending if r.start < written_until + r.step}
    if covered >= {p % new.step for p in range(written_until, min(written_until + new.step, new.stop))}:
        return new.stop, ()
    return written_until, pending


def empty_state(
    layers: int,
    key_shape: tuple[int, int],
    memory_shape: tuple[int, int],
    batch: int,
    slots: int,
    documents: Tensor | None,
    tokens: Tensor | None,
    reusable: bool,
    **options: Any,
) -> State:
    """A State in which nothing is written. `key_shape` is (G, K), `memory_shape` (P, D); `options`: device and dtype.

    Buffers are one zero, expanded: they take memory only when something is written.
    """
    groups, size = key_shape
    zero = torch.zeros((), **options)
    cache = tuple(zero.expand(batch, groups, slots, size) for _ in range(layers))
    unknown = torch.full((batch, slots), -1, device=zero.device, dtype=torch.long)
    return State(
        keys=cache,
        values=cache,
        memory=zero.expand(batch, slots, *memory_shape),
        tokens=unknown if tokens is None else tokens.to(unknown, copy=True),
        documents=None if documents is None else documents.to(unknown, copy=True),
        slot_positions=unknown,
        reusable=reusable,
    )
