"""A batch of transformers taken apart: rows that hold one text each, without padding between.

Shapes: B rows, T columns of a call (padding included), D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MISCOUNTED = "position_ids do not count the tokens of each text from 0; leave them out. Packed texts have no cache"


@dataclass(frozen=True)
class Unpadded:
    """A batch taken apart into rows that each hold one text from its beginning, padded on the right."""

    index: Tensor
    """(rows, length) int: where in the flattened batch each token stands, -1 for padding."""

    @classmethod
    def of(cls, ids: Tensor, mask: Tensor | None, position_ids: Tensor | None) -> Unpadded:
        """From a batch (B, T). Positions that begin anew start a packed text; what the mask hides is left out."""
        real = real_columns(ids, mask, None)
        begins = torch.zeros_like(real) if position_ids is None else (position_ids == 0).expand_as(ids) & real
        begins[:, 0] = True  # a row never goes on with the text of the row before
        text = begins.flatten().cumsum(0) - 1
        flat = real.flatten().nonzero().squeeze(1)  # where in the flattened batch the real tokens stand
        text = torch.unique(text[flat], return_inverse=True)[1]  # those without any token are none
        lengths = torch.bincount(text)
        within = torch.arange(len(flat), device=ids.device) - (lengths.cumsum(0) - lengths)[text]
        index = torch.full((len(lengths), int(lengths.max())), -1, device=ids.device)
        index[text, within] = flat
        if position_ids is not None:
            positions = position_ids.expand_as(ids).flatten()[flat]
            if not bool((positions == within).all()):
                raise ValueError(MISCOUNTED)
        return cls(index)

    def split(self, columns: Tensor, filler: int) -> Tensor:
        """The rows of columns (B, T)."""
        return columns.flatten()[self.index.clamp(min=0)].masked_fill(self.index < 0, filler)

    def join(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """(B, T, D) of rows (rows, length, D), zeros in padding."""
        inside = self.index >= 0
        flat = rows.new_zeros(shape.numel(), rows.shape[-1]).index_put((self.index[inside],), rows[inside])
        return flat.view(*shape, -1)


def real_columns(ids: Tensor, mask: Tensor | None, known: Tensor | None) -> Tensor:
    """(B, T) bool: which of the new columns are no padding. ValueError where the mask contradicts the cache."""
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    held = 0 if known is None else known.shape[1]
    new = ids.shape[1]
    if not isinstance(mask, Tensor) or mask.dim() != 2 or not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(
            "attention_mask must be (batch, tokens) of 0 for padding and 1: an LRT makes its own causal mask"
        )
    if mask.shape[0] != ids.shape[0] or mask.shape[1] not in (new, held + new):
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}; give (batch, tokens) = ({ids.shape[0]}, {held + new}), 0 "
            "for padding: an LRT makes its own causal mask"
        )
    if known is not None and mask.shape[1] == held + new and not torch.equal(mask[:, :held].bool(), known >= 0):
        raise ValueError(
            "attention_mask hides or shows tokens that the cache was made with otherwise; what a token has read "
            "cannot be changed later: start from an empty cache"
        )
    return mask[:, -new:].bool()


def is_packed(ids: Tensor, mask: Tensor | None, position_ids: Tensor | None) -> bool:
    """Whether positions begin anew within a row, so that it holds several texts."""
    if position_ids is None or ids.shape[1] < 2:
        return False
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask[:, -ids.shape[1] :].bool()
    return bool((((position_ids == 0).expand_as(ids) & real).sum(1) > 1).any())
