"""What a position may see: one rule, for every State and every kernel.

Position p sees the written positions <= p of its own document, within its layer's window. Later positions may hold
values of an earlier pass, and are as invisible as if nothing were there.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def visible_keys(
    queries: Tensor,
    keys: Tensor,
    window: int | None,
    query_documents: Tensor | None = None,
    key_documents: Tensor | None = None,
) -> Tensor:
    """Which keys each query sees: (…, m, n) bool, of query positions (…, m, 1) and key positions (…, 1, n).

    A key position of -1 is a slot in which nothing is written. `window` counts the query itself. Documents have the
    shapes of the positions that they belong to; without them a row is one document.
    """
    mask = (keys >= 0) & (keys <= queries)
    if window is not None:
        mask = mask & (keys > queries - window)
    if query_documents is not None and key_documents is not None:
        mask = mask & (query_documents == key_documents)
    return mask


def additive(mask: Tensor, like: Tensor) -> Tensor:
    """A mask to add to scores: 0 where it is True, -inf elsewhere, of the type and on the device of `like`.

    CPU kernels take a mask of numbers as it is, and turn one of bools into such at every call.
    """
    return torch.zeros(mask.shape, device=like.device, dtype=like.dtype).masked_fill_(~mask, -math.inf)
