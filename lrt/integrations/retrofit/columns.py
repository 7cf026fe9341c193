"""Which column of a batch comes before which: a memory is that of the token before it in the same text.

Shapes: B rows, T new columns of a call (padding included), P remembered layers, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

HELD, NONE = -1, -2


@dataclass(frozen=True)
class Predecessors:
    """Of each new column the column of the token before it."""

    index: Tensor
    """(B, T) int: a new column, HELD for the last token in the cache, NONE where a text begins and in padding."""
    real: Tensor
    """(B, T) bool: no padding."""

    @classmethod
    def of(cls, real: Tensor, begins: Tensor, held: Tensor) -> Predecessors:
        """From the new columns that are tokens (B, T) bool, those that begin a text (B, T) bool, and which rows have
        tokens in the cache (B,) bool."""
        columns = torch.arange(real.shape[1], device=real.device)
        last = torch.where(real, columns, HELD).cummax(1).values
        before = F.pad(last[:, :-1], (1, 0), value=HELD)
        missing = (before == HELD) & ~held.unsqueeze(1)
        return cls(before.masked_fill(missing | begins | ~real, NONE), real)

    def column(self, number: int) -> Predecessors:
        """Those of one column."""
        return Predecessors(self.index[:, number : number + 1], self.real[:, number : number + 1])

    def read(self, outputs: Tensor, held: Tensor) -> Tensor:
        """The memory (P, B, T, D) that these columns read, of outputs (P, B, T, D) of all new columns and what the
        cache holds last, held (P, B, 1, D)."""
        index = self.index.clamp(min=0)[None, :, :, None].expand(len(outputs), -1, -1, outputs.shape[-1])
        memory = torch.where((self.index == HELD)[None, :, :, None], held, outputs.gather(2, index))
        # Not a product: what a decoder computes in padding may be NaN.
        return torch.where((self.index == NONE)[None, :, :, None], memory.new_zeros(()), memory)


def real_columns(mask: Tensor | None, shape: tuple[int, int], device: torch.device) -> Tensor:
    """(B, T) bool: which new columns are tokens. mask: (B, columns held + T), or None. ValueError for another one."""
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=device)
    if mask.dim() != 2 or mask.shape[0] != shape[0] or mask.shape[1] < shape[1]:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}; give (batch, tokens), 0 for padding: which token stands "
            "before which cannot be read off another one"
        )
    return mask[:, -shape[1] :].bool()


def predecessors(text: dict[str, Any], shape: torch.Size, held: Tensor) -> Predecessors:
    """Which column is read by which, of a text of this shape (B, T); position 0 begins a text."""
    real = real_columns(text["attention_mask"], (shape[0], shape[1]), held.device)
    positions = text["position_ids"]
    begins = torch.zeros_like(real) if positions is None else (positions == 0).expand_as(real)
    return Predecessors.of(real, begins, held)
