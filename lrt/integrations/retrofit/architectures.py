"""Which decoders of transformers can be retrofitted, and where each makes its keys and values.

A model type that is not in the table is refused: whether its layers hand keyword arguments on to their attention, and
how a fused projection orders its rows, cannot be seen from outside. The tests run over the table.

Shapes: B rows, T positions, G key/value heads, K head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Layout(Protocol):
    """Which submodules of an attention make keys and values, and how these lie in what they put out."""

    @property
    def projections(self) -> tuple[str, ...]:
        """Names of the submodules."""
        ...

    def add(self, projection: str, out: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """`out` (B, T, rows) of this projection, with key and value (B, T, G, K) added to its keys and values."""
        ...


@dataclass(frozen=True)
class Separate:
    """A projection for keys and one for values."""

    key: str = "k_proj"
    value: str = "v_proj"

    @property
    def projections(self) -> tuple[str, ...]:
        return (self.key, self.value)

    def add(self, projection: str, out: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return out + (key if projection == self.key else value).flatten(2)


@dataclass(frozen=True)
class Stacked:
    """One projection whose rows are all queries, then all keys, then all values."""

    name: str

    @property
    def projections(self) -> tuple[str, ...]:
        return (self.name,)

    def add(self, projection: str, out: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = key.flatten(2), value.flatten(2)
        width = key.shape[-1]
        q, k, v = out.split((out.shape[-1] - 2 * width, width, width), -1)
        return torch.cat((q, k + key, v + value), -1)


@dataclass(frozen=True)
class PerHead:
    """One projection whose rows are query, key and value of the first head, then those of the second, and so on."""

    name: str

    @property
    def projections(self) -> tuple[str, ...]:
        return (self.name,)

    def add(self, projection: str, out: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = out.view(*key.shape[:3], 3, key.shape[-1]).unbind(3)
        return torch.stack((q, k + key, v + value), 3).view_as(out)


@dataclass(frozen=True)
class Architecture:
    """One model type."""

    layout: Layout = Separate()
    attention: str = "self_attn"
    """The submodule of a decoder layer that attends."""


USUAL = Architecture()
ARCHITECTURES: dict[str, Architecture] = {
    "arcee": USUAL,
    "cohere": USUAL,
    "cohere2": USUAL,
    "gemma": USUAL,
    "gemma2": USUAL,
    "gemma3_text": USUAL,
    "glm": USUAL,
    "gpt2": Architecture(Stacked("c_attn"), "attn"),
    "gpt_neox": Architecture(PerHead("query_key_value"), "attention"),
    "granite": USUAL,
    "helium": USUAL,
    "llama": USUAL,
    "mistral": USUAL,
    "olmo": USUAL,
    "olmo2": USUAL,
    "phi": USUAL,
    "phi3": Architecture(Stacked("qkv_proj")),
    "qwen2": USUAL,
    "qwen3": USUAL,
    "smollm3": USUAL,
    "starcoder2": USUAL,
}
"""Model type -> where its keys and values are made. nemotron and stablelm are not here: their layers keep the keyword
arguments to themselves."""
