"""Keys and values of all positions of a text, of which a pass computes some: for strided schedules in training.

Shapes: B rows, T positions of a row, n positions of a pass, G key/value heads, K head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from lrt.schedules.base import Pass


class SlotLayer(CacheLayerMixin):
    """One layer. A pass replaces what its positions hold, in new tensors: gradients flow through what is kept."""

    is_sliding = False

    def __init__(self, slots: Slots) -> None:
        super().__init__()
        self.slots = slots

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        shape = (*key_states.shape[:2], self.slots.length, key_states.shape[3])
        self.keys, self.values = key_states.new_zeros(shape), value_states.new_zeros(shape)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All keys and values (B, G, T, K), after those (B, G, n, K) of the pass took their places."""
        p = self.slots.running
        if len(p.positions) == self.slots.length:
            self.keys, self.values, self.is_initialized = key_states, value_states, True
            return key_states, value_states
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        keys = torch.slice_scatter(self.keys, key_states, 2, p.start, p.stop, p.stride)
        values = torch.slice_scatter(self.values, value_states, 2, p.start, p.stop, p.stride)
        self.keys, self.values = keys, values
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.slots.length, 0

    def get_seq_length(self) -> int:
        return 0  # a full pass starts anew; others bring positions and masks of their own

    def get_max_length(self) -> int:
        return self.slots.length


class Slots(Cache):
    """A cache whose columns are positions, replaced by the pass that runs."""

    def __init__(self, depth: int, length: int) -> None:
        self.length = length
        self.running = Pass(0, length)
        self.written = torch.zeros(length, dtype=torch.bool)
        super().__init__(layers=[SlotLayer(self) for _ in range(depth)])

    def start(self, p: Pass) -> None:
        """The pass that runs now; a position sees itself."""
        self.running = p
        self.written[p.slice] = True

    def mask(self, window: int | None, like: Tensor) -> Tensor:
        """(1, 1, n, T), to be added to attention's logits: what the running pass sees of what is written."""
        here = torch.tensor(self.running.positions).unsqueeze(1)
        there = torch.arange(self.length)
        seen = (there <= here) & self.written
        if window is not None:
            seen &= here - there < window
        hidden = torch.finfo(like.dtype).min
        return torch.zeros(seen.shape, dtype=like.dtype).masked_fill(~seen, hidden)[None, None].to(like.device)

    def masks(self, config: Any, like: Tensor) -> Tensor | dict[str, Tensor]:
        """What the decoder takes for masks: one, or one for each kind of its layers."""
        window = getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None)
        if kinds is None:
            return self.mask(window, like)
        windows = {"full_attention": None, "sliding_attention": window}
        return {kind: self.mask(windows[kind], like) for kind in dict.fromkeys(kinds)}
