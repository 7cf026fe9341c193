"""Attention's pieces, small: plans of them over random queries, keys and values, and all gradients.

B batch, H query heads, G key/value heads, n queries, m keys of a source, K head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lrt.model.attention_pieces import AttentionPiece, Repeat

H, G, K = 4, 2, 8


def random(heads: int, n: int, seed: int) -> Tensor:
    """(B, heads, n, K) in float64, laid out as the model does."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, n, heads, K, dtype=torch.float64, generator=generator).transpose(1, 2).requires_grad_()


def with_gradients(run: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """`run` of inputs (q, keys and values of every source), and the gradients of a fixed function of it."""
    out = run(inputs[0], inputs[1 : 1 + len(inputs) // 2], inputs[1 + len(inputs) // 2 :])
    direction = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    return [out.detach(), *torch.autograd.grad((out * direction.to(out)).sum(), inputs)]


def hiding(rows: list[int], n: int, m: int) -> Callable[[Tensor], Tensor]:
    """A mask (1, 1, n, m) of a triangle, under which `rows` see nothing."""

    def mask(like: Tensor) -> Tensor:
        hidden = torch.ones(n, m).triu(1).bool()
        hidden[rows] = True
        return torch.zeros(1, 1, n, m, dtype=like.dtype, device=like.device).masked_fill(
            hidden.to(like.device), -math.inf
        )

    return mask


PLANS: dict[str, tuple[int, list[int], list[AttentionPiece]]] = {
    "one triangle": (6, [6], [AttentionPiece(slice(0, 6), 0, slice(0, 6), causal=True)]),
    "two sources, one shifted": (
        6,
        [6, 6],
        [
            AttentionPiece(slice(0, 6), 0, slice(0, 6), causal=True),
            AttentionPiece(slice(1, 6), 1, slice(0, 5), causal=True),
        ],
    ),
    "every other key": (
        4,
        [4, 9],
        [
            AttentionPiece(slice(0, 4), 0, slice(0, 4), causal=True),
            AttentionPiece(slice(0, 4), 1, slice(1, 8, 2), causal=True),
        ],
    ),
    "tiles and a rectangle": (
        8,
        [8],
        [
            AttentionPiece(slice(0, 4), 0, slice(0, 4), causal=True),
            AttentionPiece(slice(4, 8), 0, slice(4, 8), causal=True),
            AttentionPiece(slice(4, 8), 0, slice(0, 4)),
        ],
    ),
    "repeated triangles and squares": (
        8,
        [8, 17],
        [
            AttentionPiece(slice(0, 2), 0, slice(0, 2), causal=True, repeat=Repeat(4, 2)),
            AttentionPiece(slice(2, 4), 0, slice(0, 2), repeat=Repeat(2, 4)),
            AttentionPiece(slice(1, 2), 1, slice(1, 2, 2), causal=True, repeat=Repeat(4, 2)),
            AttentionPiece(slice(4, 8), 0, slice(0, 4)),
            AttentionPiece(slice(2, 4), 1, slice(1, 4, 2), repeat=Repeat(2, 4)),
        ],
    ),
    "repeated, then a cut one": (
        7,
        [7],
        [
            AttentionPiece(slice(0, 2), 0, slice(0, 2), causal=True, repeat=Repeat(3, 2)),
            AttentionPiece(slice(6, 7), 0, slice(6, 7), causal=True),
            AttentionPiece(slice(2, 4), 0, slice(0, 2), repeat=Repeat(1, 4)),
            AttentionPiece(slice(6, 7), 0, slice(4, 6)),
            AttentionPiece(slice(4, 7), 0, slice(0, 4)),
        ],
    ),
    "rows without a key in one piece": (
        5,
        [5, 5],
        [
            AttentionPiece(slice(0, 5), 0, slice(0, 5), mask=hiding([0, 3], 5, 5)),
            AttentionPiece(slice(0, 5), 1, slice(0, 5), causal=True),
        ],
    ),
    "a row without any key": (
        5,
        [5, 5],
        [
            AttentionPiece(slice(0, 5), 0, slice(0, 5), mask=hiding([0, 3], 5, 5)),
            AttentionPiece(slice(0, 5), 1, slice(0, 5), mask=hiding([3, 4], 5, 5)),
        ],
    ),
}
