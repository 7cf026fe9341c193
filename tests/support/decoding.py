"""Whole texts through a decoder, row by row of a batch.

B rows, T positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lrt.inference.decoders import EagerDecoder


def decoded(way: EagerDecoder, tokens: Tensor) -> Tensor:
    """All rows token by token at one position (B, T, D)."""
    count, length = tokens.shape
    return torch.stack([way(tokens[:, t], [t] * count) for t in range(length)], 1)


def raggedly(way: EagerDecoder, tokens: Tensor, begins: list[int]) -> Tensor:
    """The same (B, T, D), row b starting begins[b] steps late; rows start in the order of the batch."""
    count, length = tokens.shape
    hidden: list[list[Tensor]] = [[] for _ in range(count)]
    assert begins == sorted(begins)
    for now in range(length + begins[-1]):
        # Rows that are done repeat their last token where it stands; those not begun are left out.
        active = [min(now - begin, length - 1) for begin in begins if now >= begin]
        found = way(tokens[range(len(active)), active], active)
        for row, position in enumerate(active):
            if position == len(hidden[row]):
                hidden[row].append(found[row])
    return torch.stack([torch.stack(row) for row in hidden])
