"""Attention of one block over a State's slots.

Shapes: B batch, T positions of this call, S slots, D width, H query heads, G key/value heads, K head size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrt.config import ModelConfig
from lrt.model.injection import NoMemory, Projected
from lrt.model.layers import rms, rotate
from lrt.model.state import Slots, Visibility, Writer

Cache = tuple[Tensor, Tensor]
"""Keys and values of one layer, each (B, G, S, K)."""


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Visibility) -> Tensor:
    """Softmax attention (B, H, T, K) of q (B, H, T, K) over the slots of k, v (B, G, S, K) that `visible` names."""
    k, v = k[:, :, visible.view], v[:, :, visible.view]
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible.mask, is_causal=visible.causal, enable_gqa=grouped)


class ValueEmbedding(nn.Module):
    """g_ve · VE[token], a token-indexed addition to the values, gated per token and head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = (config.groups, config.head_dim)
        self.table = nn.Embedding(config.vocab_size, config.groups * config.head_dim)
        self.gate = nn.Linear(config.width, config.groups, bias=False)

    def forward(self, v: Tensor, u: Tensor, tokens: Tensor) -> Tensor:
        gate = 2 * torch.sigmoid(self.gate(u)).unsqueeze(-1)
        return v + gate * self.table(tokens).unflatten(-1, self.heads)


class NoValueEmbedding(nn.Module):
    """Absent value embeddings."""

    def forward(self, v: Tensor, u: Tensor, tokens: Tensor) -> Tensor:
        return v


class Attention(nn.Module):
    """Causal self-attention with rotary positions and QK-norm; the memory enters its keys and values."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.heads, self.groups, self.size = config.heads, config.groups, config.head_dim
        self.query = nn.Linear(config.width, self.heads * self.size, bias=False)
        self.key = nn.Linear(config.width, self.groups * self.size, bias=False)
        self.value = nn.Linear(config.width, self.groups * self.size, bias=False)
        self.out = nn.Linear(self.heads * self.size, config.width, bias=False)
        self.value_embedding = ValueEmbedding(config) if config.has_value_embedding(layer) else NoValueEmbedding()

    def forward(
        self,
        u: Tensor,
        tokens: Tensor,
        injection: NoMemory,
        projected: Projected,
        angles: tuple[Tensor, Tensor],
        visible: Visibility,
        cache: Cache,
        slots: Slots,
        write: Writer,
    ) -> tuple[Tensor, Cache]:
        """u (B, T, D), the block's normalised input -> (B, T, D), and the cache with these positions replaced."""
        q = self.query(u).unflatten(-1, (self.heads, self.size))
        k = self.key(u).unflatten(-1, (self.groups, self.size))
        v = self.value(u).unflatten(-1, (self.groups, self.size))
        k, v = injection.key_value(u, k, v, projected)
        v = self.value_embedding(v, u, tokens)
        q, k = rms(rotate(q, angles)), rms(rotate(k, angles))
        keys = write(cache[0], slots, k.transpose(1, 2), 2)
        values = write(cache[1], slots, v.transpose(1, 2), 2)
        y = attend(q.transpose(1, 2), keys, values, visible)
        return self.out(y.transpose(1, 2).flatten(2)), (keys, values)
