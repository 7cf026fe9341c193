"""RollingState: a State of constant size, for positions computed one by one where every layer slides.

Shapes: B batch, W keys that a window holds beside the own, P remembered sources, D width, G key/value heads,
K head size.

All that a position can see is the last memory and the last W keys and values of each layer, so nothing else is kept,
and nothing asks which position it is: that would be another graph for each when the calls are compiled.

It serves models whose layers all slide, with sources >= 1 at delay 1 (`schedules/unrolled.py` says which).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lrt.model.execution import EAGER, Execution
from lrt.model.state import State
from lrt.model.state_protocol import MemoryRead, Positions


@dataclass(frozen=True)
class Everything:
    """Attention to all keys that are there: the window's, and the position's own. So no mask is needed."""

    def attend(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Softmax attention (B, H, 1, K) of q (B, H, 1, K) over keys and values (B, G, n, K)."""
        return F.scaled_dot_product_attention(q, keys, values, enable_gqa=q.shape[1] != keys.shape[1])


@dataclass(frozen=True)
class RollingState:
    """What a position knows of the past: constant in size. The next position is `position`, whatever it is called."""

    keys: tuple[Tensor, ...]
    """One (B, G, W, K) per layer, the last ones; fewer at the beginning."""
    values: tuple[Tensor, ...]
    """Likewise."""
    memory: Tensor
    """(B, 1, P, D): the sources' states at the last position; zeros before the first, as that one reads zeros."""
    tokens: Tensor
    """(B, 1) int: unknown (-1), as no source needs them."""
    windows: tuple[int, ...]
    """Of each layer, in positions, the own one included."""
    position: int = 0
    """How many positions came before."""
    execution: Execution = EAGER
    documents: None = None
    """A row is one document."""
    reusable: bool = True
    """Positions are not bounded by `slots`."""

    @classmethod
    def of(cls, empty: State, windows: tuple[int | None, ...]) -> RollingState:
        """From an empty State of a model whose layers all slide."""
        assert all(window is not None for window in windows)
        return cls(
            tuple(k[:, :, :0] for k in empty.keys),
            tuple(v[:, :, :0] for v in empty.values),
            empty.memory[:, :1],
            empty.tokens[:, :1],
            tuple(window for window in windows if window is not None),
        )

    @property
    def batch(self) -> int:
        return self.memory.shape[0]

    @property
    def slots(self) -> int:
        """Positions that a call of one position may look at: itself, the window, the delay of 1."""
        return max(2, *self.windows) + 1

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.keys), *self.keys[0].shape[1::2], *self.memory.shape[2:])  # [1::2] of (B, G, W, K): G, K

    def detach(self) -> RollingState:
        """The same, with every gradient cut."""
        keys, values = (tuple(x.detach() for x in cache) for cache in (self.keys, self.values))
        return dataclasses.replace(self, keys=keys, values=values, memory=self.memory.detach())

    def detach_memory(self) -> RollingState:
        """The same, with the gradient through the memory cut."""
        return dataclasses.replace(self, memory=self.memory.detach())

    # --- what the model asks -----------------------------------------------------------------------------------

    def where(self, positions: Positions) -> None:
        """Behind all that is stored: `write` needs no place."""

    def write(self, cache: Tensor, slots: None, new: Tensor, dim: int) -> Tensor:
        """The new keys or values (B, G, 1, K) behind those that are stored."""
        return torch.cat((cache, new), dim)

    def write_tokens(self, positions: Positions, tokens: Tensor) -> RollingState:
        """Nothing: no source reads them."""
        return self

    def read_memory(self, positions: Positions, delay: int) -> MemoryRead:
        """The last memory; `delay` is 1."""
        # Before the first position the zeros that it reads stand in `memory`, so that nothing is a special case.
        yes = torch.ones_like(self.tokens, dtype=torch.bool)
        return MemoryRead(self.tokens, self.memory, yes, yes)

    def mark_written(self, positions: Positions) -> RollingState:
        """Nothing: what is written is what is there."""
        return self

    def visible(self, positions: Positions, window: int | None) -> Everything:
        """Everything: `write_cache` has dropped what is out of the window."""
        return Everything()

    def write_cache(self, keys: tuple[Tensor, ...], values: tuple[Tensor, ...]) -> RollingState:
        """Keep what the next position sees: the window less itself."""
        kept = [window - 1 for window in self.windows]
        return dataclasses.replace(
            self,
            keys=tuple(k[:, :, max(0, k.shape[2] - n) :] for k, n in zip(keys, kept, strict=True)),
            values=tuple(v[:, :, max(0, v.shape[2] - n) :] for v, n in zip(values, kept, strict=True)),
        )

    def write_memory(self, positions: Positions, memory: Tensor) -> RollingState:
        """Replace the memory (B, 1, P, D): the next position reads no other."""
        return dataclasses.replace(self, memory=memory)
