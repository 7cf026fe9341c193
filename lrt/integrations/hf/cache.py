"""A transformers cache that is a State: keys and values per layer, and one more layer for the memory history.

Shapes: B rows, S columns of the cache (padding included), T new columns, C real positions at most, G key/value heads,
K head size, P remembered sources, D width.

The extra layer keeps, per column, the memory (its keys, (B, 1, S, P·D)) and the token (its values, (B, 1, S, DIGITS)).
It is an ordinary layer, so crop, beam reordering and selection of rows work as for the others. The cache itself knows
what was padding, whatever mask a later call brings.

In a State a row's positions lie side by side. So each call takes the padding columns out (`read_cache`), prefills or
decodes the native model, and appends the new columns (`append`). The price is a copy of the cache per call, as
`DynamicCache` itself pays with its concatenation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from lrt.integrations.token_digits import decode_digits, encode_digits
from lrt.model.buffers import OVERWRITING
from lrt.model.config import ModelConfig
from lrt.model.state import State


@dataclass(frozen=True)
class Columns:
    """Which columns of a batch are real, and in which order they become positions."""

    order: Tensor | None
    """(B, T) int: the real columns of each row first, in order; None where all are real."""
    lengths: Tensor
    """(B,) int: how many are real."""

    @classmethod
    def of(cls, real: Tensor) -> Columns:
        """From (B, T) bool, True for real columns."""
        lengths = real.sum(1)
        if bool(real.all()):
            return cls(None, lengths)
        return cls(torch.argsort((~real).to(torch.uint8), dim=1, stable=True), lengths)  # stable: real ones keep order

    def compact(self, columns: Tensor, dim: int) -> Tensor:
        """Bring the real columns of dimension `dim` (rows are dimension 0) to the front of each row."""
        if self.order is None:
            return columns
        shape = [1] * columns.dim()
        shape[0], shape[dim] = self.order.shape
        return columns.gather(dim, self.order.view(shape).expand_as(columns))

    def spread(self, positions: Tensor, dim: int) -> Tensor:
        """The inverse of `compact`, with zeros in the padding."""
        if self.order is None:
            return positions
        shape = [1] * positions.dim()
        shape[0], shape[dim] = self.order.shape
        index = torch.arange(self.order.shape[1], device=positions.device)
        real = (index < self.lengths.unsqueeze(1)).view(shape)
        kept = torch.where(real, positions, torch.zeros((), dtype=positions.dtype, device=positions.device))
        return torch.zeros_like(kept).scatter(dim, self.order.view(shape).expand_as(kept), kept)


def check_cache(cache: Cache, depth: int) -> Cache:
    """The cache, with its layer for the memory. ValueError where it is of a kind that could not be exact.

    Plain layers keep every column. Sliding and quantised ones would lose or change some; offloaded ones are untested.
    """
    if not isinstance(cache, DynamicCache | StaticCache):
        raise ValueError(
            f"an LRT keeps its state in a DynamicCache or StaticCache, not in a {type(cache).__name__}; leave the "
            "cache to generate(), or make it with DynamicCache(config=model.config)"
        )
    layers = cache.layers
    plain = all(type(layer) in (DynamicLayer, StaticLayer) for layer in layers)
    if not plain or len(layers) not in (0, depth, depth + 1):
        kinds = sorted({type(layer).__name__ for layer in layers})
        raise ValueError(
            f"an LRT of {depth} layers keeps its state in a DynamicCache or StaticCache with one plain layer each, not "
            f"in this {type(cache).__name__} of {len(layers)} layers {kinds}; leave the cache to generate(), or make "
            "it with DynamicCache(config=model.config)"
        )
    if len(layers) == depth and int(cache.get_seq_length()) != 0:
        raise ValueError(
            "this cache was filled by what keeps no memory (another model, or prefix tuning); start from an empty one"
        )
    if len(layers) == depth:  # made from a config, which knows the attention layers only
        layers.append(StaticLayer(layers[0].get_max_length()) if isinstance(cache, StaticCache) else DynamicLayer())
    return cache


def columns_of(cache: Cache, layer: int) -> tuple[Tensor, Tensor]:
    """Keys and values (B, G, S, K) of the columns that a layer has; a static one has room for more."""
    stored: Any = cache.layers[layer]
    length = int(cache.get_seq_length())
    return stored.keys[:, :, :length], stored.values[:, :, :length]


def past(cache: Cache, depth: int) -> Tensor | None:
    """Tokens (B, S) of the columns in the cache, -1 for padding; None where it is empty."""
    return decode_digits(columns_of(cache, depth)[1][:, 0]) if int(cache.get_seq_length()) else None


def read_cache(
    cache: Cache | None, config: ModelConfig, tokens: Tensor, columns: Columns, like: Tensor
) -> tuple[State, Tensor]:
    """(State with room for tokens (B, T) behind what the cache has, (B,) int: how many positions that is).

    cache None: an empty State. columns: which of the new tokens are real. like: has the State's type and device.
    Raises ValueError where rows differ, or a static cache or the context has no room.
    """
    batch, new = tokens.shape
    known = None if cache is None else past(cache, config.kv_layers)
    sources = len(config.stored_sources)
    before = Columns.of(torch.ones(batch, 0, dtype=torch.bool) if known is None else known >= 0)
    start = before.lengths.to(tokens.device)
    old_columns = 0 if known is None else known.shape[1]
    slots = old_columns + new
    if cache is not None:
        rows = batch if known is None else known.shape[0]
        if rows != batch:
            raise ValueError(f"the cache holds {rows} rows, the call has {batch}; start from an empty cache")
        limit = int(cache.get_max_length()) if isinstance(cache, StaticCache) else slots
        if slots > limit:
            raise ValueError(f"{slots} tokens exceed the {limit} of this static cache; make a longer one")

    def widen(shape: tuple[int, ...], dim: int, old: Tensor | None) -> Tensor:
        """A buffer of `slots` slots along `dim` that begins with the real columns of `old`."""
        buffer = like.new_zeros(shape)
        if old is not None:
            buffer.narrow(dim, 0, old_columns).copy_(before.compact(old, dim))
        return buffer

    layers = range(config.kv_layers + 1)
    old = [(None, None) for _ in layers] if cache is None or known is None else [columns_of(cache, i) for i in layers]
    heads = (batch, config.num_kv_heads, slots, config.head_dim)
    keys = tuple(widen(heads, 2, k) for k, _ in old[:-1])
    values = tuple(widen(heads, 2, v) for _, v in old[:-1])
    history = old[-1][0]  # the memory, in the last layer's keys
    if history is not None and sources:
        history = history[:, 0].unflatten(-1, (sources, config.width))
    memory = widen((batch, slots, sources, config.width), 1, history if sources else None)
    index = torch.arange(slots, device=tokens.device)
    positions = torch.where(index < start.unsqueeze(1), index, -1)
    written = torch.full((batch, slots), -1, dtype=torch.long, device=tokens.device)
    if known is not None:
        written[:, :old_columns] = before.compact(known, 1)
    # Without padding all rows are written up to the same position, which lets the State do without masks.
    written_until = old_columns if before.order is None else 0
    # The buffers are this call's own, so that overwriting them is safe.
    state = State(keys, values, memory, written, None, positions, written_until=written_until, write=OVERWRITING)
    if not config.unlimited_context and int((start + columns.lengths).max()) > config.context:
        raise ValueError(
            f"{int((start + columns.lengths).max())} positions exceed the context of {config.context}; shorten the "
            "prompt or max_new_tokens, or use a model in which every layer has a sliding window"
        )
    return state, start


def append(cache: Cache, config: ModelConfig, state: State, start: Tensor, tokens: Tensor, columns: Columns) -> None:
    """Write the positions of tokens (B, T), which follow `start` (B,), from the state to the end of the cache.

    tokens are compacted; columns says where the padding is that the cache gets again.
    """
    batch, new = tokens.shape
    index = start.unsqueeze(1) + torch.arange(new, device=start.device)
    index = index.clamp(max=state.slots - 1)  # padding may lie beyond; it is dropped below

    def new_columns(buffer: Tensor, dim: int) -> Tensor:
        """The call's positions of a State's buffer, as columns."""
        shape = [1] * buffer.dim()
        shape[0], shape[dim] = index.shape
        sizes = list(buffer.shape)
        sizes[dim] = new
        return columns.spread(buffer.gather(dim, index.view(shape).expand(sizes)), dim)

    for layer, (k, v) in enumerate(zip(state.keys, state.values, strict=True)):
        cache.update(new_columns(k, 2), new_columns(v, 2), layer)
    history = new_columns(state.memory, 1).flatten(2).unsqueeze(1)
    if history.shape[-1] == 0:  # nothing remembered: the layer still has to know its length
        history = state.memory.new_zeros(batch, 1, new, 1)
    real = columns.spread(torch.ones_like(tokens, dtype=torch.bool) & is_real(columns, tokens), 1)
    known = torch.where(real, columns.spread(tokens, 1), -1)
    cache.update(history, encode_digits(known, history.dtype).unsqueeze(1), config.kv_layers)


def is_real(columns: Columns, tokens: Tensor) -> Tensor:
    """(B, T) bool: which of the compacted positions are real."""
    return torch.arange(tokens.shape[1], device=tokens.device) < columns.lengths.to(tokens.device).unsqueeze(1)
