"""Attention of one block: queries, keys, values and gates in one product; what it attends to is the State's.

Shapes: B batch, T positions of this call, D width, H query heads, G key/value heads, K head size, V vocabulary.

The memory enters keys and values: k <- g_loc·k + g_mem·U_k m, v likewise (LRT, arXiv 2605.26797, section 3). Queries
see it only through the residual stream.

Gates join the product of queries, keys and values. Their weights stay separate matrices, each with an optimiser's
update (and an adapter) of its own, and are put side by side per call. That copies 10 MB per pass of a model of 6 layers
and width 384, under a hundredth of the pass's time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrt.model.config import ModelConfig
from lrt.model.layers import rms, rotate
from lrt.model.memory import NoMemory, Projected

Cache = tuple[Any, Any]
"""Keys and values of one layer. What they are is the State's own affair: tensors by slots, or classes of positions."""


FEW = 32
"""Rows (B·T) below which joining weights costs more than it saves, as in decoding: a product of so few rows takes the
time of reading its weights, and joining reads them once more."""
EVEN = 16
"""A joined product's width is padded to a multiple of this: odd widths are up to a fifth slower on CPUs."""


class ValueEmbedding(nn.Module):
    """g_ve · VE[token], a token-indexed addition to the values, gated per token and head (spec, section 1).

    Its gate belongs to it, not to the memory: it exists with `injection="none"` too.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = (config.num_kv_heads, config.head_dim)
        self.table = nn.Embedding(config.vocab_size, config.num_kv_heads * config.head_dim)
        self.gate = nn.Linear(config.width, config.num_kv_heads, bias=False)

    def look_up(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """The tokens' rows, one tensor (B, T, G, K); a tuple, so that an absent table gives an empty one."""
        return (self.table(tokens).unflatten(-1, self.heads),)

    def gates(self) -> list[nn.Linear]:
        """Linear layers on the block's normalised input, which join its product of queries, keys and values."""
        return [self.gate]

    def add(self, v: Tensor, gates: Sequence[Tensor], rows: Sequence[Tensor]) -> Tensor:
        """v (B, T, G, K) plus the rows that `look_up` gave, gated by logits `gates` (B, T, G)."""
        (logits,), (own,) = gates, rows
        return v + 2 * torch.sigmoid(logits).unsqueeze(-1) * own  # 2σ: the gate is 1 while its weights are zero


class NoValueEmbedding(nn.Module):
    """Absent value embeddings: no rows, no gate, values as they are."""

    def look_up(self, tokens: Tensor) -> tuple[Tensor, ...]:
        return ()

    def gates(self) -> list[nn.Linear]:
        return []

    def add(self, v: Tensor, gates: Sequence[Tensor], rows: Sequence[Tensor]) -> Tensor:
        return v


def join_weights(u: Tensor, layers: Sequence[nn.Linear]) -> Sequence[Tensor]:
    """What `layers` without biases give for u (B, T, D), each (B, T, its outputs), as one product.

    A layer that is more than its weight (an adapter was put around it) is called instead.
    """
    if u.shape[:-1].numel() < FEW or any(type(layer) is not nn.Linear for layer in layers):
        return [layer(u) for layer in layers]
    rows = [layer.out_features for layer in layers]
    padding = -sum(rows) % EVEN
    weight = torch.cat([*(layer.weight for layer in layers), u.new_zeros(padding, u.shape[-1])])
    return F.linear(u, weight).split([*rows, padding], dim=-1)[:-1]


class Attention(nn.Module):
    """Causal self-attention with rotary positions and QK-norm; the memory enters its keys and values."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.heads, self.groups, self.size = config.heads, config.num_kv_heads, config.head_dim  # H, G, K
        self.query = nn.Linear(config.width, self.heads * self.size, bias=False)
        self.key = nn.Linear(config.width, self.groups * self.size, bias=False)
        self.value = nn.Linear(config.width, self.groups * self.size, bias=False)
        self.out = nn.Linear(self.heads * self.size, config.width, bias=False)
        self.value_embedding = ValueEmbedding(config) if config.has_value_embedding(layer) else NoValueEmbedding()

    def query_key_value(
        self,
        u: Tensor,
        rows: Sequence[Tensor],
        injection: NoMemory,
        projected: Projected,
        angles: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, H, T, K), k and v (B, G, T, K) of u (B, T, D), the block's normalised input.

        rows: what the value embedding looked up. projected: U_k m and U_v m. angles: cosine and sine of `rotary`.
        """
        gates = injection.gates()
        layers = [self.query, self.key, self.value, *gates, *self.value_embedding.gates()]
        q, k, v, *logits = join_weights(u, layers)
        q = q.unflatten(-1, (self.heads, self.size))
        k, v = (x.unflatten(-1, (self.groups, self.size)) for x in (k, v))
        k, v = injection.key_value(logits[: len(gates)], k, v, projected)
        v = self.value_embedding.add(v, logits[len(gates) :], rows)
        # QK-norm (spec, section 1). A rotation keeps the norm, so normalising before it would give the same.
        q, k = rms(rotate(q, angles)), rms(rotate(k, angles))
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
