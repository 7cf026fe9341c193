"""The memory in a cache of transformers: one more layer, behind those of the decoder.

Shapes: B rows, S columns of the cache (padding included), T new columns, P remembered layers, D width.

The extra layer keeps, per column, the memory (its keys, (B, 1, S, P·D)) and whether it is a token (its values,
(B, 1, S, 1)). It is a growing layer, so crop, beam reordering and selection of rows work as for the others.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer


class MemoryLayer(DynamicLayer):
    """The memory of all columns. It grows in a static cache too, whose layers with a window do not know its length."""

    is_compileable = True  # or a static cache would be masked as a growing one


GROWING = (DynamicLayer, DynamicSlidingWindowLayer, MemoryLayer)
"""Layers that make new tensors where they grow, and change none."""


def check_cache(cache: Cache, depth: int) -> None:
    """ValueError where the cache is of a kind that could not be exact, or was filled without a memory."""
    if not isinstance(cache, DynamicCache | StaticCache) or cache.offloading:
        raise ValueError(
            f"a retrofitted model keeps its state in a DynamicCache or StaticCache that is not offloaded, not in this "
            f"{type(cache).__name__}; leave the cache to generate()"
        )
    if len(cache.layers) <= depth and int(cache.get_seq_length()) != 0:
        raise ValueError(
            "this cache was filled by what keeps no memory (another model, or prefix tuning); start from an empty one"
        )


def held_columns(cache: Cache | None) -> int:
    """S."""
    return 0 if cache is None else int(cache.get_seq_length())


def read_last(cache: Cache | None, depth: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """(memory (P, B, 1, D) of the last token of each row, (B,) bool: which rows have one); `like` (P, B, T, D)."""
    sources, batch, _, width = like.shape
    columns = held_columns(cache)
    if cache is None or columns == 0:
        nothing = like.new_zeros(sources, batch, 1, width)
        return nothing, torch.zeros(batch, dtype=torch.bool, device=like.device)
    stored: Any = cache.layers[depth]
    if stored.keys.shape[0] != batch:
        raise ValueError(f"the cache holds {stored.keys.shape[0]} rows, the call has {batch}; start from an empty one")
    index = torch.arange(1, columns + 1, device=like.device)
    last = (stored.values[:, 0, :columns, 0] * index).amax(1).long()  # 0: padding alone
    at = (last - 1).clamp(min=0)[:, None, None].expand(batch, 1, stored.keys.shape[-1])
    memory = stored.keys[:, 0, :columns].gather(1, at)
    return memory.view(batch, 1, sources, width).permute(2, 0, 1, 3), last > 0


def append(cache: Cache, depth: int, memory: Tensor, real: Tensor) -> None:
    """Write the memory (P, B, T, D) of new columns, of which `real` (B, T) are tokens, behind what the layer holds."""
    if len(cache.layers) == depth:
        cache.layers.append(MemoryLayer())
    keys = memory.permute(1, 2, 0, 3).flatten(2).unsqueeze(1)
    cache.update(keys, real[:, None, :, None].to(keys.dtype), depth)


def fork(cache: Cache) -> Cache:
    """A copy that may grow while this one stays: no tensor is copied where growing makes new ones."""
    forked = copy.copy(cache)
    forked.layers = [copy.copy(layer) if type(layer) in GROWING else copy.deepcopy(layer) for layer in cache.layers]
    return forked
