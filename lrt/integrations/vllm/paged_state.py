"""A State over a paged cache: vLLM's pages of keys and values, and one more of the memory of every position.

Shapes: N tokens of one run, R requests, H query heads, G key/value heads, K head size, P remembered sources, D width,
W = P·D + DIGITS. A run is one row of N tokens of several requests: B of the protocol is 1.

A page of the memory has, for each of its positions, the remembered sources and the token (`token_digits`). It stands in
the same block table as keys and values. So whatever the engine does with blocks (prefixes that requests share, chunks
of a prompt, eviction, forks) is right for the memory as for them. Nothing here knows vLLM: the engine gives block
tables, slots and what attends.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lrt.integrations.token_digits import DIGITS, decode_digits, encode_digits
from lrt.model.config import ModelConfig
from lrt.model.execution import EAGER, Execution
from lrt.model.state_protocol import MemoryRead, Positions

AttentionLayer = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q (N, H·K), k (N, G·K), v (N, G·K)) -> (N, H·K): writes keys and values into the pages, then attends to all of each
token's request up to it. It knows which tokens they are."""


def memory_width(config: ModelConfig) -> int:
    """W: numbers per position in the pages of the memory."""
    return len(config.stored_sources) * config.width + DIGITS


@dataclass(frozen=True)
class Placement:
    """Where the tokens of one run stand in the pages."""

    blocks: Tensor
    """(R, n) int: the pages of each request, in order."""
    rows: Tensor
    """(N,) int: each token's request, a row of `blocks`."""
    slots: Tensor
    """(N,) int: each token's place, page · page size + offset; negative for padding."""
    begins: Tensor
    """(N,) int: the first position that this step of the engine computes of the token's request. All before it was
    written in earlier steps."""


@dataclass(frozen=True)
class LayerAttention:
    """Attention of the engine, which has been told what each token sees."""

    def attend(self, q: Tensor, keys: tuple[AttentionLayer, Tensor], values: tuple[AttentionLayer, Tensor]) -> Tensor:
        """q (1, H, N, K) and a layer with its new keys and values (1, G, N, K): (1, H, N, K)."""
        (layer, k), (_, v) = keys, values
        y = layer(*(x[0].transpose(0, 1).flatten(1) for x in (q, k, v)))
        return y.view(q.shape[2], q.shape[1], q.shape[3]).transpose(0, 1).unsqueeze(0)


@dataclass(frozen=True)
class PagedState:
    """What the tokens of one run know of earlier positions. Pages are overwritten: each run gets its own State."""

    layers: tuple[AttentionLayer, ...]
    """What attends, one for each block and loop."""
    pages: Tensor
    """(pages, page size, W): the memory and the token of every position."""
    place: Placement
    shape: tuple[int, ...]
    """(layers, G, K, P, D), as the model asks."""
    slots: int
    """The longest that a request may be."""
    swept: bool = False
    """Whether a run of this step has written the step's own positions already; if not, they hold what an evicted
    request has left."""
    memory: Tensor | None = None
    """(1, N, P, D): what this run has written."""
    execution: Execution = EAGER
    documents: None = None
    """A request is one document."""
    reusable: bool = False

    @classmethod
    def of(
        cls, config: ModelConfig, layers: tuple[AttentionLayer, ...], pages: Tensor, place: Placement, swept: bool
    ) -> PagedState:
        """Of a model's configuration."""
        shape = (config.kv_layers, config.num_kv_heads, config.head_dim, len(config.stored_sources), config.width)
        return cls(layers, pages, place, shape, config.context, swept)

    @property
    def batch(self) -> int:
        return 1

    @property
    def keys(self) -> tuple[AttentionLayer, ...]:
        return self.layers

    @property
    def values(self) -> tuple[AttentionLayer, ...]:
        return self.layers

    # --- what the model asks -----------------------------------------------------------------------------------

    def where(self, positions: Positions) -> None:
        """The layers know the places."""

    def write(self, cache: AttentionLayer, slots: None, new: Tensor, dim: int) -> tuple[AttentionLayer, Tensor]:
        """The layer and the keys or values (1, G, N, K) that it will write when it attends."""
        return cache, new

    def write_tokens(self, positions: Positions, tokens: Tensor) -> PagedState:
        """Write tokens (1, N) beside the memory."""
        digits = encode_digits(tokens[0], self.pages.dtype)
        self.pages[(*self._own(), slice(-DIGITS, None))] = digits
        return self

    def read_memory(self, positions: Tensor, delay: int) -> MemoryRead:
        """What stands `delay` positions before each of `positions` (1, N)."""
        size = self.pages.shape[1]
        before = positions[0] - delay
        at = before.clamp(min=0)  # below 0: the request's first position, as not `inside`
        pages = self.place.blocks[self.place.rows, at // size]
        stored = self.pages[pages, at % size]  # (N, W)
        written = before < self.place.begins
        return MemoryRead(
            decode_digits(stored[:, -DIGITS:]).unsqueeze(0),
            stored[:, :-DIGITS].unflatten(1, self.shape[-2:]).unsqueeze(0),
            (torch.ones_like(written) if self.swept else written).unsqueeze(0),
            (before >= 0).unsqueeze(0),
        )

    def mark_written(self, positions: Positions) -> PagedState:
        """Nothing: `swept` says so for the runs that follow."""
        return self

    def visible(self, positions: Positions, window: int | None) -> LayerAttention:
        """The layers' own attention: each knows its window."""
        return LayerAttention()

    def write_cache(
        self, keys: tuple[tuple[AttentionLayer, Tensor], ...], values: tuple[tuple[AttentionLayer, Tensor], ...]
    ) -> PagedState:
        """Nothing: the layers have written when they attended."""
        return self

    def write_memory(self, positions: Positions, memory: Tensor) -> PagedState:
        """Replace the memory (1, N, P, D) of this run's positions."""
        self.pages[(*self._own(), slice(None, -DIGITS))] = memory[0].flatten(1).to(self.pages)
        return dataclasses.replace(self, memory=memory)

    def _own(self) -> tuple[Tensor, Tensor]:
        """(page, offset) of each token's own place. Padding goes to the engine's page 0, which no request has."""
        slots = self.place.slots.clamp(min=0)
        return slots // self.pages.shape[1], slots % self.pages.shape[1]
