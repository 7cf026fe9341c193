"""An injection of one's own: added keys and values go through a low-rank factor, as in LoRA (arXiv 2106.09685).

U_k and U_v of `key_value` are full matrices, 2·G·K·D numbers. Here both are up · down with RANK numbers in between,
RANK·(D + 2·G·K) numbers, one pair for all blocks. The gates are those of `key_value`.

    lrt --plugin examples/low_rank_injection.py train d2 --model.memory.injection low_rank --out runs/low-rank
    lrt --plugin examples/low_rank_injection.py evaluate runs/low-rank

Shapes: C memory channels, B batch, T positions, D width, G key/value heads, K head size.
"""

import math

from torch import Tensor, nn

import lrt
from lrt.model.memory import KeyValue, NoProjection, Projected

__version__ = "1"
RANK = 8
"""Numbers between the two factors."""


class LowRankProjection(NoProjection):
    """(U_k m, U_v m) = up · down · m, before the blocks run: the memory is known by then."""

    def __init__(self, config: lrt.ModelConfig) -> None:
        super().__init__()
        self.heads = (config.num_kv_heads, config.head_dim)
        self.down = nn.Linear(config.width, RANK, bias=False)
        self.up = nn.Linear(RANK, 2 * config.num_kv_heads * config.head_dim, bias=False)

    def reset(self) -> None:
        """Each factor keeps the size of what it reads: uniform, with standard deviation 1/sqrt(inputs)."""
        for factor in (self.down, self.up):
            bound = math.sqrt(3 / factor.in_features)
            nn.init.uniform_(factor.weight, -bound, bound)

    def forward(self, memory: Tensor) -> tuple[Projected, ...]:
        """Memory (C, B, T, D) -> one pair for all blocks, each (C, B, T, G, K)."""
        key, value = self.up(self.down(memory)).unflatten(-1, (2, *self.heads)).unbind(-3)
        return ((key, value),)


class LowRank(KeyValue):
    """g_loc · k + g_mem · (up · down · m), and likewise for v: a `KeyValue` with another projection."""

    @classmethod
    def projection(cls, config: lrt.ModelConfig) -> NoProjection:
        return LowRankProjection(config)


# `down` and `up` are matrices, which Muon trains; the gates are placed by the library's table, as in `key_value`.
lrt.register_injection("low_rank", LowRank, optim={"down": "muon", "up": "muon"})
