"""What a model is: frozen dataclasses, one docstring under each field, checked when they are made.

Layers are counted as in the paper: block 1 is the first, block L the last. The memory is `memory_config`'s.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from lrt.model.memory_config import LONGEST, OWN_INJECTIONS, MemoryConfig, is_layer
from lrt.utils.short_repr import changed_fields
from lrt.utils.validation import Limits, check_choice, check_numbers

HEAD_SIZES = (128, 64, 32, 16, 8)
"""What `from_depth` tries, in this order (spec, section 1: 128, smaller where the model is small)."""
UNSET = -math.inf
"""The least value of what is checked by itself, together with another field."""
MODEL_LIMITS = {
    "depth": Limits(1, 10_000, whole=True),
    "width": Limits(1, 2**20, whole=True),
    "heads": Limits(1, 2**16, whole=True),
    "kv_heads": Limits(UNSET, 2**16, whole=True, optional=True),
    "head_size": Limits(UNSET, 2**16, whole=True, optional=True),
    "vocab_size": Limits(1, 2**27, whole=True),
    "context": Limits(1, LONGEST, whole=True),
    "window": Limits(UNSET, LONGEST, whole=True, optional=True),
    "mlp_ratio": Limits(0, 1024, above=True),
    "mlp_width": Limits(UNSET, 2**24, whole=True, optional=True),
    "rope_base": Limits(1, 1e12),
    "softcap": Limits(0.001, 1e6),
    "skip_init": Limits(-1000, 1000),
    "loops": Limits(1, 10_000, whole=True),
    "thoughts": Limits(0, 1000, whole=True),
}
"""What numbers may be: beyond them a model makes no sense, or fails after minutes. Generous, as old files must load."""


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer in the nanochat style (spec, section 1) and its memory.

    Raises ValueError, with the value, the limit and the fix, where fields contradict each other.
    """

    depth: int = 4
    """Number of blocks, L."""
    width: int = 128
    """Width of the residual stream, D."""
    heads: int = 2
    """Query heads, H."""
    kv_heads: int | None = None
    """Key and value heads, G; must divide `heads`. None: as many as query heads."""
    head_size: int | None = None
    """Size of one head, K (even). None: width / heads."""
    vocab_size: int = 2048
    """Number of tokens, V."""
    context: int = 256
    """Longest sequence in tokens. No limit where every layer slides (`window_pattern` without L)."""
    value_embeddings: Literal["none", "alternate", "all"] = "none"
    """Token-indexed value embeddings: on no layer, on every other layer (the last included), or on all."""
    window_pattern: str = "L"
    """One letter per layer, repeated over the depth: L attends to the full context, S to the last `window` tokens."""
    window: int | None = None
    """Tokens seen by an S layer, the current one included. None: half of `context`."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLP over `width`."""
    mlp_width: int | None = None
    """Hidden width of the MLP, in place of `mlp_ratio`: how parameter counts are matched."""
    rope_base: float = 10000.0
    """Base of the rotary angles."""
    softcap: float = 15.0
    """Logits are softcap · tanh(logits / softcap)."""
    skip_init: float = 0.1
    """Initial value of β, the learned scale with which every block adds the token embedding x_0 again."""
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    """The recurrent memory."""
    loops: int = 1
    """How often the stack of blocks is applied to a token (Loop Transformer); every loop has keys and values of its
    own, and what layer l remembers or gives is that of the last loop. A State has depth · loops pairs of keys and
    values; nothing else knows of loops."""
    thoughts: int = 0
    """Latent thoughts per token (PonderLM-2, 2509.23184): positions behind it, whose input is the final hidden state of
    the position before; what follows the token is read off the last of them. A State has 1 + thoughts positions per
    token. Only the model's forward and the fused step count in them; callers count tokens, so that schedules, losses
    and decoders are a Transformer's. What counts the State's positions (prefill, engine, sessions) refuses thoughts."""

    def __post_init__(self) -> None:
        check_numbers(self, MODEL_LIMITS)
        if self.depth * self.loops > MODEL_LIMITS["depth"].most:
            raise ValueError(
                f"depth {self.depth} times loops {self.loops} is {self.depth * self.loops}; a token passes at most "
                f"{MODEL_LIMITS['depth'].most:,} blocks"
            )
        if self.num_kv_heads < 1 or self.heads % self.num_kv_heads != 0:
            raise ValueError(f"kv_heads is {self.kv_heads}; it must divide heads ({self.heads})")
        if self.head_size is None and self.width % self.heads != 0:
            raise ValueError(
                f"width {self.width} is not a multiple of heads {self.heads}; change one, or give head_size"
            )
        if self.head_dim < 2 or self.head_dim % 2 != 0:
            raise ValueError(f"the head size is {self.head_dim}; rotary positions need an even one")
        check_choice(self, "value_embeddings", ("none", "alternate", "all"))
        if len(self.window_pattern) == 0 or not set(self.window_pattern) <= {"L", "S"}:
            raise ValueError(
                f"window_pattern is {self.window_pattern!r}; use the letters L (full) and S (sliding), for example "
                "'SSSL'"
            )
        if self.sliding_window < 1:
            raise ValueError(f"window is {self.window}; it must be at least 1")
        if not 1 <= self.mlp_dim <= MODEL_LIMITS["mlp_width"].most:
            raise ValueError(f"the MLP would be {self.mlp_dim} wide; change mlp_ratio or mlp_width")
        self._check_memory()
        self._check_thoughts()
        # Asked for now, so that they are plain attributes: torch's compiler cannot compute a cached property.
        for name, attribute in vars(ModelConfig).items():
            if isinstance(attribute, cached_property):
                getattr(self, name)

    def __repr__(self) -> str:
        return changed_fields(self)

    def _check_memory(self) -> None:
        for source in self.sources:
            if not is_layer(source) or not 0 <= source <= self.depth:
                raise ValueError(
                    f"memory.source {source!r} is no layer of this model; use 0 (the embedding) to {self.depth} (the "
                    "last)"
                )
        for layer in self.injected_layers:
            if not 1 <= layer <= self.depth:
                raise ValueError(f"memory.layers names block {layer}; this model has blocks 1 to {self.depth}")
        if any(len(set(own)) != len(own) or len(own) == 0 for own in self.channel_layers):
            raise ValueError(
                f"memory.layers is {self.memory.layers}; name each block once, at least one, or use injection='none'"
            )
        if self.memory.longest_delay >= self.context:
            raise ValueError(f"memory.delay is {self.memory.delay}; it must be below the context ({self.context})")

    def _check_thoughts(self) -> None:
        # A delay and a window count positions of the State, of which a token then has several.
        if self.thoughts != 0 and (self.memory.injection != "none" or "S" in self.window_pattern):
            raise ValueError(
                f"thoughts is {self.thoughts}: latent thoughts need memory.injection 'none' and full attention "
                f"(window_pattern 'L'), here {self.memory.injection!r} and {self.window_pattern!r}"
            )

    @cached_property
    def num_kv_heads(self) -> int:
        """Key and value heads, G."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @cached_property
    def head_dim(self) -> int:
        """Size of one head, K."""
        return self.width // self.heads if self.head_size is None else self.head_size

    @cached_property
    def mlp_dim(self) -> int:
        """Hidden width of the MLP."""
        return int(self.mlp_ratio * self.width) if self.mlp_width is None else self.mlp_width

    @cached_property
    def sliding_window(self) -> int:
        """Tokens an S layer sees, itself included."""
        return max(1, self.context // 2) if self.window is None else self.window

    # What follows from the fields is computed once, when it is first asked for: a served token asks often.

    @cached_property
    def windows(self) -> tuple[int | None, ...]:
        """The attention window of each application of a block, loop after loop; None for the full context."""
        pattern = self.window_pattern
        once = tuple(self.sliding_window if pattern[i % len(pattern)] == "S" else None for i in range(self.depth))
        return once * self.loops

    @cached_property
    def sources(self) -> tuple[int, ...]:
        """The layers whose output is remembered, 0 (the embedding) to L; empty with injection `none`."""
        return self.memory.sources(self.depth)

    @cached_property
    def stored_sources(self) -> tuple[int, ...]:
        """Those of them that a State has to store: all but the embedding, which follows from the token."""
        return self.memory.stored_sources(self.depth)

    @cached_property
    def delays(self) -> tuple[int, ...]:
        """How many positions back each of `sources` is read."""
        return self.memory.delays(self.depth)

    @cached_property
    def memory_blocks(self) -> int:
        """Blocks to run, loop after loop, until the memory of a position is known: none where only source 0 is read."""
        return (self.loops - 1) * self.depth + max(self.stored_sources) if self.stored_sources else 0

    @cached_property
    def injected_layers(self) -> tuple[int, ...]:
        """The blocks (1..L) that inject the memory, in order."""
        return self.memory.injected_layers(self.depth)

    @cached_property
    def channels(self) -> int:
        """How many memory vectors a position reads, C."""
        return self.memory.channels(self.depth)

    @cached_property
    def channel_layers(self) -> tuple[tuple[int, ...], ...]:
        """For each channel the blocks (1..L) that inject it, in order."""
        return self.memory.channel_layers(self.depth)

    @cached_property
    def block_channels(self) -> tuple[tuple[int, ...], ...]:
        """For each block the channels, counted from 0, that it injects."""
        layers = range(1, self.depth + 1)
        return tuple(tuple(c for c, own in enumerate(self.channel_layers) if layer in own) for layer in layers)

    @cached_property
    def state_channels(self) -> tuple[int, ...]:
        """The channels, counted from 0, in which a remembered layer >= 1 is."""
        if self.channels == len(self.sources):
            return tuple(c for c, source in enumerate(self.sources) if source > 0)
        return tuple(range(self.channels)) if self.stored_sources else ()

    @cached_property
    def first_channels(self) -> int:
        """How many channels a pass reads before anything is written: all, or those of the embedding alone, where the
        others would be zeros.

        Where the embedding's come first, and the library's own injections, which take fewer channels, read them. A
        pass before recurrence is switched on then costs what the control's does. Models without the embedding among
        their channels read zeros, as they always did; so do those with a block that reads a remembered layer alone,
        whose γ would have no gradient, which DDP expects.
        """
        embeddings = [source == 0 for source in self.sources]
        count, memory = sum(embeddings), self.memory
        own = memory.injection in OWN_INJECTIONS and memory.combine == "channels" and memory.initial == "zeros"
        if not own or count == 0 or not all(embeddings[:count]):
            return self.channels
        alone = any(read and read[0] >= count for read in self.block_channels)
        return self.channels if alone else count

    @cached_property
    def first_state_block(self) -> int:
        """The first block (1..L) that reads a remembered layer, L + 1 where none does: what blocks below it compute
        follows from the tokens alone."""
        return min((self.channel_layers[c][0] for c in self.state_channels), default=self.depth + 1)

    @cached_property
    def blocks_below_memory(self) -> int:
        """How many of the first blocks follow from the tokens alone, so that once is enough to compute them: those
        below the first that reads a remembered layer. None where one of them is remembered, as all remembered layers
        are written together, or where nothing is."""
        below = self.first_state_block - 1
        return below if self.stored_sources and below < min(self.stored_sources) else 0

    def of_block(self, layer: int) -> ModelConfig:
        """This configuration as block `layer` sees it: with the sources alone that it injects."""
        own, memory = self.block_channels[layer - 1], self.memory
        if own in ((), tuple(range(self.channels))):
            return self
        sources = tuple(self.sources[c] for c in own)
        delay = tuple(memory.delay[c] for c in own) if isinstance(memory.delay, tuple) else memory.delay
        return dataclasses.replace(self, memory=dataclasses.replace(memory, source=sources, delay=delay, layers=None))

    def layers_of(self, blocks: range | None) -> frozenset[int]:
        """The blocks (1..L) that these applications of blocks are, counted from 0, loop after loop; all for None."""
        applications = range(self.kv_layers) if blocks is None else blocks
        return frozenset(i % self.depth + 1 for i in applications)

    def count_projections(self, blocks: range | None = None, channels: int | None = None) -> int:
        """Pairs of U_k and U_v that these applications of blocks add of the first `channels`; all for None."""
        reached = self.layers_of(blocks)
        pairs = [len(reached & set(own)) for own in self.channel_layers[:channels]]
        return sum(pairs if self.memory.projection == "layerwise" else (min(1, n) for n in pairs))

    @cached_property
    def kv_layers(self) -> int:
        """Pairs of keys and values a position leaves: one per block and loop."""
        return self.depth * self.loops

    @cached_property
    def positions_per_token(self) -> int:
        """Positions of a token: its own and its thoughts'."""
        return 1 + self.thoughts

    @cached_property
    def forwards(self) -> int:
        """Forwards through the stack of blocks per generated token."""
        return self.loops * self.positions_per_token

    @cached_property
    def is_recurrent(self) -> bool:
        """Whether one full pass only approximates what decoding computes: a remembered layer, or a latent thought."""
        return self.thoughts > 0 or len(self.stored_sources) > 0

    @cached_property
    def unlimited_context(self) -> bool:
        """Whether every layer slides, so that the context is no limit and slots may be reused."""
        return "L" not in self.window_pattern[: self.depth]

    @cached_property
    def lookback(self) -> int:
        """How many earlier positions an endless stream must keep: the longest window less the own, or delay."""
        return max(max(w or 0 for w in self.windows) - 1, self.memory.longest_delay)

    def has_value_embedding(self, layer: int) -> bool:
        """Whether block `layer` (1..L) has a value embedding."""
        return {"none": False, "alternate": (self.depth - layer) % 2 == 0, "all": True}[self.value_embeddings]

    @classmethod
    def from_depth(cls, depth: int, **overrides: Any) -> ModelConfig:
        """The one size dial (spec, section 1): width 64 · depth, head size 128 where it divides that, else 64, 32, …"""
        width = overrides.pop("width", 64 * depth)
        # width > size: at least two heads
        head_size = next((size for size in HEAD_SIZES if width % size == 0 and width > size), None)
        if head_size is None:
            raise ValueError(f"width {width} fits no head size of {HEAD_SIZES}; give heads and head_size")
        return cls(**{"depth": depth, "width": width, "heads": width // (head_size or 1), **overrides})

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelConfig:
        """The inverse of `to_dict`. A field that is absent has its default: files of older versions stay readable.

        Raises ValueError, naming them, where fields are unknown.
        """
        data = json.loads(json.dumps(data))  # a deep copy: `pop` below is not to change the caller's
        memory = data.pop("memory", {})
        for kind, fields in ((MemoryConfig, memory), (cls, data)):
            known = {f.name for f in dataclasses.fields(kind)}
            unknown = sorted(set(fields) - known)
            if unknown:
                raise ValueError(
                    f"{kind.__name__} has no field {', '.join(unknown)}; it has {', '.join(sorted(known))}"
                )
        return cls(memory=MemoryConfig(**memory), **data)
