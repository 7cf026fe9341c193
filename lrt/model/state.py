"""State: what a token may know about earlier positions.

Shapes: B batch, T positions of one call, S slots, G key/value heads, K head size, P remembered sources, D width.

Position p lives in slot p % S. Slots are reused only where every layer slides, so elsewhere the slot is the position.
`held` says which position a slot holds, and everything else (masks, resets at document borders, what counts as
written) follows from it. `filled` is the same knowledge for Python: it lets the common cases run without a mask.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Positions = range | Tensor
"""Positions of one call: a range (known to Python, the fast path) or an int tensor (T,) or (B, T)."""
Slots = slice | Tensor
"""The same positions as slots: a slice, or an index tensor (T,) or (B, T)."""
Writer = Callable[[Tensor, Slots, Tensor, int], Tensor]


@dataclass(frozen=True)
class Visibility:
    """What one layer's queries may attend to, among the slots `view`."""

    view: slice
    causal: bool = False
    """Queries and keys are the same positions, so that plain causal attention is right and needs no mask."""
    mask: Tensor | None = None
    """(T, n) or (B, 1, T, n) bool, True where visible; None where everything is."""


@dataclass(frozen=True)
class Recollection:
    """What `read_memory` found `delay` positions back."""

    tokens: Tensor
    """(B, T) int, -1 where unknown."""
    memory: Tensor
    """(B, T, P, D); arbitrary where not written."""
    written: Tensor
    """(B, T) bool: whether a call has written that position."""
    inside: Tensor
    """(B, T) bool: whether that position exists and belongs to the same document."""


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
    """(B, S, P, D): the remembered layers >= 1 of each position, RMS-normalised."""
    tokens: Tensor
    """(B, S) int, -1 where unknown."""
    documents: Tensor | None
    """(B, S) int, the packed document of each slot; None where a row is one document."""
    held: Tensor
    """(B, S) int, the position that each slot holds; -1 where nothing is written."""
    reusable: bool = False
    """Whether slots may be reused, so that positions may exceed S."""
    filled: int = 0
    """Every position below this one is written, in all rows."""
    pending: tuple[range, ...] = ()
    """Strided classes written since; together they may raise `filled`."""
    write: Writer = dataclasses.field(default_factory=lambda: write_copy)

    # --- facts -------------------------------------------------------------------------------------------------

    @property
    def batch(self) -> int:
        return self.tokens.shape[0]

    @property
    def slots(self) -> int:
        return self.tokens.shape[1]

    @property
    def lengths(self) -> Tensor:
        """(B,) int: one past the last position written, per row."""
        return self.held.amax(1) + 1

    @property
    def length(self) -> int:
        """One past the last position written, over all rows."""
        return int(self.lengths.max())

    # --- forks -------------------------------------------------------------------------------------------------

    def in_place(self) -> State:
        """A copy whose calls overwrite its buffers: no gradients, and a State given to a call is used up by it."""
        return dataclasses.replace(self._map(materialised), write=write_in_place)

    def clone(self) -> State:
        """An independent copy."""
        return self._map(Tensor.clone)

    def detach_memory(self) -> State:
        """The same, with the gradient through the memory cut."""
        return dataclasses.replace(self, memory=self.memory.detach())

    def _map(self, change: Callable[[Tensor], Tensor]) -> State:
        return dataclasses.replace(
            self,
            keys=tuple(change(k) for k in self.keys),
            values=tuple(change(v) for v in self.values),
            memory=change(self.memory),
            tokens=change(self.tokens),
            held=change(self.held),
        )

    # --- where -------------------------------------------------------------------------------------------------

    def where(self, positions: Positions) -> Slots:
        """The slots of these positions."""
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

    def read_memory(self, positions: Positions, delay: int | Tensor) -> Recollection:
        """What stands `delay` positions before each of `positions`; a tensor, (T,) or (B, T), gives each its own."""
        index = self.index(positions)
        before = index - delay
        slots = before % self.slots if self.reusable else before.clamp(min=0)
        inside = (before >= 0).expand(self.batch, -1)
        if self.documents is not None:
            here = self.where(index)
            inside = inside & (gather(self.documents, here, 1) == gather(self.documents, slots, 1))
        return Recollection(
            gather(self.tokens, slots, 1),
            gather(self.memory, slots, 1),
            gather(self.held, slots, 1) == before,
            inside,
        )

    def hold(self, positions: Positions) -> State:
        """Mark the positions of a call as written. Keys, values and memory follow in the same call."""
        index = self.index(positions)
        held = self.write(self.held, self.where(positions), index.to(self.held).expand(self.batch, -1), 1)
        if isinstance(positions, Tensor):
            return dataclasses.replace(self, held=held)
        filled, pending = extend(self.filled, self.pending, positions)
        return dataclasses.replace(self, held=held, filled=filled, pending=pending)

    def write_memory(self, positions: Positions, memory: Tensor) -> State:
        """Replace the memory (B, T, P, D) of these positions."""
        return dataclasses.replace(self, memory=self.write(self.memory, self.where(positions), memory, 1))

    def write_cache(self, keys: tuple[Tensor, ...], values: tuple[Tensor, ...]) -> State:
        """The same State with the layers' buffers that a call has written."""
        return dataclasses.replace(self, keys=keys, values=values)

    # --- attention ---------------------------------------------------------------------------------------------

    def visible(self, positions: Positions, window: int | None) -> Visibility:
        """Position p sees written slots <= p of its own document, within the window. Call after `hold`."""
        if isinstance(positions, range) and positions.stop <= self.slots and self.filled > positions[-1]:
            return self._visible_range(positions, window)
        index = self.index(positions)
        here = index.unsqueeze(-1)  # (T, 1) or (B, T, 1)
        held = self.held.unsqueeze(1)  # (B, 1, S)
        mask = (held >= 0) & (held <= here)
        if window is not None:
            mask = mask & (held > here - window)
        if self.documents is not None:
            mask = mask & (gather(self.documents, self.where(index), 1).unsqueeze(2) == self.documents.unsqueeze(1))
        return Visibility(slice(0, self.slots), mask=mask.unsqueeze(1))

    def _visible_range(self, positions: range, window: int | None) -> Visibility:
        """The case that Python understands: every slot up to the last position is written."""
        first, stop = positions[0], positions[-1] + 1
        begin = 0 if window is None else max(0, first - window + 1)
        view = slice(begin, stop)
        slides = window is not None and stop - window > begin
        if self.documents is None and not slides and positions.step == 1:
            if begin == first:
                return Visibility(view, causal=True)
            if len(positions) == 1:
                return Visibility(view)
        here = self.index(positions).unsqueeze(1)
        there = torch.arange(begin, stop, device=here.device)
        mask = there <= here
        if slides and window is not None:
            mask = mask & (there > here - window)
        if self.documents is not None:
            own = self.documents[:, positions.start : positions.stop : positions.step, None]
            mask = (mask & (own == self.documents[:, None, view])).unsqueeze(1)
        return Visibility(view, mask=mask)


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


def extend(filled: int, pending: tuple[range, ...], new: range) -> tuple[int, tuple[range, ...]]:
    """`filled` and `pending` after writing `new`: contiguous positions count at once, strided classes together."""
    if new.stop <= filled:
        return filled, pending
    if new.start <= filled and new.step == 1:
        return new.stop, pending
    alike = [r for r in pending if (r.step, r.stop) == (new.step, new.stop) and r != new]
    pending = (*alike, new)
    residues = {r.start for r in pending}
    if residues >= set(range(min(new.step, new.stop))):  # 0 … g-1: all classes are there
        return new.stop, ()
    return filled, pending


def materialised(buffer: Tensor) -> Tensor:
    """A copy with memory of its own, also of an expanded tensor."""
    return buffer.clone(memory_format=torch.contiguous_format)


def gather(buffer: Tensor, slots: Slots, dim: int) -> Tensor:
    """Read slots of dimension `dim` (1 or 2): a slice, (T,), or per row (B, T)."""
    if isinstance(slots, slice):
        return buffer[(slice(None),) * dim + (slots,)]
    if slots.dim() == 1:
        return buffer.index_select(dim, slots)
    rows = torch.arange(buffer.shape[0], device=buffer.device).unsqueeze(1)
    return buffer.movedim(dim, 1)[rows, slots].movedim(1, dim)


def write_copy(buffer: Tensor, slots: Slots, new: Tensor, dim: int) -> Tensor:
    """A buffer with these slots of dimension `dim` replaced; the old one is untouched, and gradients flow."""
    if isinstance(slots, slice) and slots.start == 0 and slots.step == 1 and slots.stop == buffer.shape[dim]:
        return new  # all of it: nothing to copy
    # A gradient-free pass writes slots without a gradient; the slots beside them keep theirs.
    with torch.set_grad_enabled(torch.is_grad_enabled() or buffer.requires_grad):
        if isinstance(slots, slice):
            return buffer.slice_scatter(new, dim, slots.start, slots.stop, slots.step)
        if slots.dim() == 1:
            return buffer.index_copy(dim, slots, new)
        return write_in_place(materialised(buffer), slots, new, dim)


def write_in_place(buffer: Tensor, slots: Slots, new: Tensor, dim: int) -> Tensor:
    """The same buffer, overwritten."""
    if isinstance(slots, slice):
        buffer[(slice(None),) * dim + (slots,)] = new
    elif slots.dim() == 1:
        buffer.index_copy_(dim, slots, new)
    else:
        rows = torch.arange(buffer.shape[0], device=buffer.device).unsqueeze(1)
        buffer.movedim(dim, 1)[rows, slots] = new.movedim(dim, 1)
    return buffer


def empty_state(
    layers: int,
    key_shape: tuple[int, int],
    memory_shape: tuple[int, int],
    batch: int,
    slots: int,
    documents: Tensor | None,
    tokens: Tensor | None,
    reusable: bool,
    **place: Any,
) -> State:
    """Zeros, nothing written; buffers take memory only when something is. `key_shape` (G, K), `memory_shape` (P, D)."""
    groups, size = key_shape
    zero = torch.zeros((), **place)
    cache = tuple(zero.expand(batch, groups, slots, size) for _ in range(layers))
    unknown = torch.full((batch, slots), -1, device=zero.device, dtype=torch.long)
    return State(
        keys=cache,
        values=cache,
        memory=zero.expand(batch, slots, *memory_shape),
        tokens=unknown if tokens is None else tokens.to(unknown, copy=True),
        documents=None if documents is None else documents.to(unknown, copy=True),
        held=unknown,
        reusable=reusable,
    )
