"""How the memory of an earlier position enters the model: read it, project it, inject it.

Shapes: B batch, T positions, C memory channels, P remembered sources (those >= 1), D width, G key/value heads,
K head size. Memory is (C, B, T, D): one vector per channel and position, zeros where a document begins.
Each source is read so many positions back as its delay says; those of one delay are read from the State at once.

With u the block's normalised input, γ and G learned (spec, section 1):

    x <- x + γ m                                 residual injection, before a block
    k <- g_loc k + g_mem U_k m, v likewise       key/value injection, before rotary positions and QK-norm
    [g_loc, g_mem] = 2σ(G u)                     gates per token and head; 1 at first, as G starts at 0

The embedding is not stored. Source 0, and the stand-in of `initial="embedding"`, follow from the token and are computed
again whenever the memory is read. So `plain` is exact for token shift, and gradients reach the embedding under every
schedule. The State stores sources >= 1 alone, each as a vector of its own; they are combined at reading.

Source: LRT, arXiv 2605.26797, section 3. To add an injection, write a class with `residual` and `key_value` and
register it (`register_injection`); its parameters are the block's own, only U_k and U_v live apart in `Projection`,
which runs before the layer stack because the memory is known before it starts. To add a way to combine sources, write a
`MemoryReader` with another `combine` (`register_combination`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrt.model.config import ModelConfig
from lrt.model.layers import rms
from lrt.model.memory_config import COMBINATIONS, INJECTIONS, one_channel
from lrt.model.state_protocol import MemoryRead, ModelState, Positions

Projected = tuple[Tensor | tuple[Tensor, ...], Tensor | tuple[Tensor, ...]]
"""U_k m and U_v m of one layer: each has a (B, T, G, K) per channel that the layer reads, as one tensor or several."""
Groups = Mapping[str, str | tuple[object, ...]]
"""Parameter -> how it is trained: "muon" (a matrix, or a stack of them), "adamw" (anything else), or the fields of an
`lrt.training.optim.ParameterRow` behind its pattern, such as ("adamw", "scalar_lr", 0.1)."""


class MemoryReader(nn.Module):
    """Assemble the memory that positions read: stored sources, the predecessor's embedding, their combination.

    An ablation puts another module in its place (`with_memory_reader`); the model's forward does not know.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        memory = config.memory
        self.sources = config.sources
        self.stored = config.stored_sources
        self.reads = tuple(zip(config.sources, config.delays, strict=True))
        """Each source and how many positions back it is read."""
        # Each once. A State is looked into even where there are no sources: it has the memory's type and device.
        self.delays = tuple(dict.fromkeys(config.delays)) or (memory.longest_delay,)
        self.stand_in = memory.initial == "embedding" and len(self.stored) > 0
        self.first_channels, self.leaves_out = config.first_channels, config.first_channels < config.channels
        if isinstance(memory.source, tuple) and self.sources and memory.combine == "sum":  # equal weights at first
            self.weights = nn.Parameter(torch.full((len(self.sources),), 1.0 / len(self.sources)))
        else:
            self.register_parameter("weights", None)

    def forward(self, state: ModelState, positions: Positions, embedding: nn.Embedding) -> Tensor:
        """The memory (C, B, T, D) that `positions` read from `state`; before anything is written it may lack the last
        channels, those of remembered layers, which would be zeros."""
        return self.read({delay: state.read_memory(positions, delay) for delay in self.delays}, embedding)

    def read(self, past: Mapping[int, MemoryRead], embedding: nn.Embedding) -> Tensor:
        """The memory (C, B, T, D) assembled from what stands so far back, by each of `delays`."""
        like = past[self.delays[0]]
        zero = like.memory.new_zeros(())
        embedded = {
            delay: self.embed(read, embedding) if self.stand_in or (0, delay) in self.reads else zero
            for delay, read in past.items()
        }
        if like.nowhere_written and self.leaves_out:
            return torch.stack([embedded[delay] for _, delay in self.reads[: self.first_channels]])
        parts = [
            self.remembered(past[delay], source, embedded[delay] if self.stand_in else zero, zero)
            if source > 0
            else embedded[delay]
            for source, delay in self.reads
        ]
        return self.combine(parts, like.memory)

    def remembered(self, past: MemoryRead, source: int, unwritten: Tensor, zero: Tensor) -> Tensor:
        """A layer >= 1 (B, T, D): what was written, or what stands in for it; outside the document zero."""
        inside, written = past.inside.unsqueeze(-1), past.written.unsqueeze(-1)
        return torch.where(inside, torch.where(written, past.memory[:, :, self.stored.index(source)], unwritten), zero)

    def embed(self, past: MemoryRead, embedding: nn.Embedding) -> Tensor:
        """x_0 (B, T, D) of the remembered tokens, zeros where unknown or outside the document."""
        known = past.inside & (past.tokens >= 0)
        return rms(embedding(past.tokens.clamp(min=0))) * known.unsqueeze(-1)

    def combine(self, parts: list[Tensor], like: Tensor) -> Tensor:
        """Parts (B, T, D), one per source, to channels (C, B, T, D): one each, or the one rms(Σ w_s · part_s).

        `like`, the stored memory (B, T, P, D), gives shape, type and device where there are no sources: C is then 0.
        Parts are RMS-normalised already: the State stores them so, and x_0 is.
        """
        if not parts:
            return like.new_zeros(0, *like.shape[:2], like.shape[-1])
        stacked = torch.stack(parts) if len(parts) > 1 else parts[0].unsqueeze(0)
        if self.weights is None:
            return stacked
        return rms(torch.einsum("c,cbtd->btd", self.weights.to(stacked.dtype), stacked)).unsqueeze(0)


READERS: dict[str, type[MemoryReader]] = {"sum": MemoryReader, "channels": MemoryReader}
"""Name of a combination -> what reads and combines the sources; `COMBINATIONS` knows whose the names are."""


class NoProjection(nn.Module):
    """Absent projections: nothing to project, nothing to add."""

    def reset(self) -> None:
        """Initial values."""

    def forward(self, memory: Tensor) -> tuple[Projected, ...]:
        """One set, for all blocks."""
        empty = memory.new_zeros(0)
        return ((empty, empty),)


class Projection(NoProjection):
    """U_k and U_v of all layers; channels that enter the same blocks are applied in one matrix product."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.depth = config.depth
        self.heads = (config.num_kv_heads, config.head_dim)
        self.shared = config.memory.projection == "shared"
        self.channel_layers = config.channel_layers
        self.neutral = config.state_channels if config.memory.state_start == "neutral" else ()
        # One parameter for all layers and channels, a stack of logical matrices: Muon orthogonalises each on its own,
        # and FSDP2 gathers them as one unit. (layers, C, [k, v], G·K, D) where all channels enter the same blocks;
        # else (channels' layers, [k, v], G·K, D), the layers of the first channel first.
        sets = [1 if self.shared else len(own) for own in self.channel_layers]
        self.starts = tuple(sum(sets[:channel]) for channel in range(len(sets) + 1))
        self.uniform = len(set(self.channel_layers)) == 1
        stack = (sets[0], len(sets)) if self.uniform else (sum(sets),)
        self.weight = nn.Parameter(torch.empty(*stack, 2, config.num_kv_heads * config.head_dim, config.width))

    @torch.no_grad()
    def reset(self) -> None:
        """Uniform, with standard deviation 1/sqrt(D); zero for channels that start neutral."""
        bound = math.sqrt(3 / self.weight.shape[-1])
        nn.init.uniform_(self.weight, -bound, bound)
        for channel in self.neutral:
            self.of_channels(channel, channel + 1).zero_()

    def of_channels(self, first: int, last: int) -> Tensor:
        """The weights (n, layers, 2, G·K, D), a view, of channels first … last-1, which enter the same blocks."""
        if self.uniform:
            return self.weight[:, first:last].transpose(0, 1)
        return self.weight[self.starts[first] : self.starts[last]].unflatten(0, (last - first, -1))

    def forward(self, memory: Tensor, layers: Collection[int] | None = None) -> tuple[Projected, ...]:
        """(U_k m, U_v m) for each block, 1 to L, of the channels that it reads; nothing for blocks not in `layers`.

        memory (C, B, T, D) may lack the last channels.
        """
        projected: list[Projected] = [((), ())] * self.depth
        for first, last in self.runs(memory.shape[0]):
            wanted = [i for i in self.channel_layers[first] if layers is None or i in layers]
            if wanted:
                sets = slice(None) if self.shared else self.sets(first, wanted)
                products = self.multiply(memory[first:last], self.of_channels(first, last)[:, sets])
                # A shared projection has one set for all its layers.
                for layer, new in zip(wanted, products * len(wanted) if self.shared else products, strict=True):
                    projected[layer - 1] = join(projected[layer - 1], new)
        return tuple(projected)

    def runs(self, channels: int) -> Iterator[tuple[int, int]]:
        """(first, last + 1) of consecutive channels, of the first `channels`, that enter the same blocks."""
        first = 0
        for _, run in itertools.groupby(self.channel_layers[:channels]):
            last = first + len(list(run))
            yield first, last
            first = last

    def sets(self, channel: int, layers: list[int]) -> slice:
        """Where the consecutive `layers` stand among those of a channel."""
        first = self.channel_layers[channel].index(layers[0])
        return slice(first, first + len(layers))

    def multiply(self, memory: Tensor, weight: Tensor) -> list[Projected]:
        """(n, B, T, D) by (n, layers, 2, G·K, D): per layer U_k m and U_v m, (n, B, T, G, K) each."""
        channels, batch, length, _ = memory.shape
        count = weight.shape[1]
        weight = weight.flatten(1, 3)
        one = channels == 1  # one plain product
        out = F.linear(memory, weight[0]) if one else torch.bmm(memory.flatten(1, 2), weight.transpose(1, 2))
        # unbind, not indices: the gradients are stacked once, where each index would make zeros for all.
        parts = out.view(channels, batch, length, 2 * count, *self.heads).unbind(3)
        return list(zip(parts[::2], parts[1::2], strict=True))


def join(one: Projected, other: Projected) -> Projected:
    """The channels of both."""
    if len(one[0]) == 0:
        return other
    return (*one[0], *other[0]), (*one[1], *other[1])


class NoMemory(nn.Module):
    """The neutral injection: a plain Transformer's block."""

    projects: ClassVar[bool] = False
    """Whether U_k and U_v exist."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()

    @classmethod
    def projection(cls, config: ModelConfig) -> NoProjection:
        """What gives all blocks their U_k m and U_v m."""
        return Projection(config) if cls.projects else NoProjection()

    def reset(self) -> None:
        """Initial values."""

    def residual(self, x: Tensor, memory: Tensor) -> Tensor:
        """The residual stream (B, T, D) before the block."""
        return x

    def gates(self) -> list[nn.Linear]:
        """Linear layers on the block's normalised input: they join its product of queries, keys and values."""
        return []

    def key_value(self, logits: Sequence[Tensor], k: Tensor, v: Tensor, projected: Projected) -> tuple[Tensor, Tensor]:
        """Keys and values (B, T, G, K) before rotary positions and normalisation.

        logits: what each layer of `gates` gives, (B, T, its outputs). projected: U_k m and U_v m, (C, B, T, G, K) each.
        """
        return k, v


class Residual(NoMemory):
    """x + Σ_c γ_c · m_c before the block; γ are learned scalars that start at `MemoryConfig.residual_init`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.init = config.memory.residual_init
        self.neutral = config.state_channels if config.memory.state_start == "neutral" else ()
        self.gamma = nn.Parameter(torch.empty(config.channels))

    @torch.no_grad()
    def reset(self) -> None:
        super().reset()
        nn.init.constant_(self.gamma, self.init)
        for channel in self.neutral:
            self.gamma[channel] = 0

    def residual(self, x: Tensor, memory: Tensor) -> Tensor:
        for channel, gamma in zip(memory, self.gamma, strict=False):  # the last channels may be left out
            x = x + gamma * channel
        return x


class KeyValue(NoMemory):
    """g_loc · k + Σ_c g_mem,c · U_k,c m_c, and likewise for v; gates 2σ(G u) per token and head start at 1.

    The gates belong to this injection and exist only with it.
    """

    projects = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.groups = config.num_kv_heads
        self.gate = nn.Linear(config.width, config.num_kv_heads * (1 + config.channels), bias=False)

    def reset(self) -> None:
        super().reset()
        nn.init.zeros_(self.gate.weight)

    def gates(self) -> list[nn.Linear]:
        return [self.gate]

    def key_value(self, logits: Sequence[Tensor], k: Tensor, v: Tensor, projected: Projected) -> tuple[Tensor, Tensor]:
        (gate,) = logits
        opened = 2 * torch.sigmoid(gate).unflatten(-1, (-1, self.groups, 1))  # (B, T, 1 + C, G, 1)
        local, *others = opened.unbind(2)
        k, v = local * k, local * v
        for gate, key, value in zip(others, *projected, strict=False):  # the last channels may be left out
            k, v = k + gate * key, v + gate * value
        return k, v


class Both(Residual, KeyValue):
    """Residual and key/value injection together: the paper's best."""


GROUPS: dict[str, Groups] = {}
"""How parameters are trained that were registered with, by "injection low_rank" or "combine gated"."""
BUILT_IN: dict[str, type[NoMemory]] = {"none": NoMemory, "residual": Residual, "key_value": KeyValue, "both": Both}
for _name, _kind in BUILT_IN.items():
    INJECTIONS.register(_name, _kind)


def register_injection(name: str, injection: type[NoMemory], optim: Groups | None = None) -> None:
    """Make `MemoryConfig(injection=name)` mean a class of one's own, `injection(config)`, one in each injecting block.

    It has `residual` and `key_value`, and may have `gates` and a `projection`, as `NoMemory` documents them. `optim`
    says how its parameters are trained, by their names. ValueError where the name is taken.

    >>> import lrt
    >>> from lrt.model.memory import Residual
    >>> class Clipped(Residual):
    ...     def residual(self, x, memory):
    ...         return super().residual(x, memory.clamp(-2, 2))
    >>> lrt.register_injection("clipped", Clipped)
    >>> lrt.MemoryConfig(injection="clipped").injection
    'clipped'
    """
    INJECTIONS.register(name, injection, stacklevel=2)
    GROUPS[f"{INJECTIONS.kind} {name}"] = dict(optim or {})


def register_combination(
    name: str,
    reader: type[MemoryReader],
    optim: Groups | None = None,
    channels: Callable[[int], int] = one_channel,
) -> None:
    """Add a way to combine several sources: `MemoryConfig(source=(…), combine=name)` then makes a `reader`.

    A reader is a subclass of `MemoryReader` that overrides its method `combine(parts, like)`: from one tensor (B, T, D)
    per source to the memory (C, B, T, D). `like`, the stored memory (B, T, P, D), gives type and device.
    `channels(number of sources)` is C, which sizes of parameters follow from. `optim` says how the reader's parameters
    are trained, by their names. ValueError where the name is taken.
    """
    COMBINATIONS.register(name, channels, stacklevel=2)
    READERS[name] = reader
    GROUPS[f"{COMBINATIONS.kind} {name}"] = dict(optim or {})
