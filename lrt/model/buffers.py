"""Buffers by slots: read some, replace some, in a copy or in place. What a State keeps its keys, values and memory in.

Writing copies, or overwrites, by State: which of the two is a function in the State (`State.write`), not a flag. Copies
let gradients flow and keep older States valid, as training wants; overwriting suits decoding, where a State is used
once.

Shapes: B batch, T positions of one call, S slots; slots are a buffer's dimension `dim` (1 or 2).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

Slots = slice | Tensor
"""Positions of one call as slots: a slice (start, stop and step all given), or an index tensor (T,) or (B, T)."""


class Writer(Protocol):
    """How a State replaces slots of its buffers."""

    def __call__(self, buffer: Tensor, slots: Slots, new: Tensor, dim: int) -> Tensor:
        """The buffer with these slots of dimension `dim` (1 or 2) replaced by `new`."""
        ...

    def owned(self, buffer: Tensor) -> Tensor:
        """The buffer as one that may be overwritten."""
        ...


def materialise(buffer: Tensor) -> Tensor:
    """A copy with memory of its own, also of an expanded tensor."""
    return buffer.clone(memory_format=torch.contiguous_format)


def gather(buffer: Tensor, slots: Slots, dim: int) -> Tensor:
    """Read slots of dimension `dim` (1 or 2): a slice (a view, no copy), (T,), or per row (B, T)."""
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
        return write_in_place(materialise(buffer), slots, new, dim)  # the copy is ours, and autograd follows it


def write_in_place(buffer: Tensor, slots: Slots, new: Tensor, dim: int) -> Tensor:
    """The same buffer, overwritten: no gradients through it, and every State that shares it sees the change."""
    if isinstance(slots, slice):
        buffer[(slice(None),) * dim + (slots,)] = new
    elif slots.dim() == 1:
        buffer.index_copy_(dim, slots, new)
    else:
        rows = torch.arange(buffer.shape[0], device=buffer.device).unsqueeze(1)
        buffer.movedim(dim, 1)[rows, slots] = new.movedim(dim, 1)
    return buffer


class Copying:
    """Writes to a copy: gradients flow, and older States stay valid."""

    def __call__(self, buffer: Tensor, slots: Slots, new: Tensor, dim: int) -> Tensor:
        return write_copy(buffer, slots, new, dim)

    def owned(self, buffer: Tensor) -> Tensor:
        """A copy: other States may read this buffer."""
        return materialise(buffer)


class Overwriting:
    """Writes in place: for decoding, where a State is used once."""

    def __call__(self, buffer: Tensor, slots: Slots, new: Tensor, dim: int) -> Tensor:
        return write_in_place(buffer, slots, new, dim)

    def owned(self, buffer: Tensor) -> Tensor:
        """The buffer itself: `in_place` has copied it before."""
        return buffer


COPYING, OVERWRITING = Copying(), Overwriting()
