"""What a memory is: its sources, how they are combined, and where they enter. Plain data, checked when it is made.

Layers are counted as in the paper: block 1 is the first, block L the last; "layer 0" is the normalised token
embedding. `MemoryConfig.source` and `MemoryConfig.layers` both use this numbering.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from lrt.utils.plugins import Plugin
from lrt.utils.registry import Registry
from lrt.utils.short_repr import changed_fields
from lrt.utils.validation import Limits, check_choice, check_numbers


def one_channel(sources: int) -> int:
    """All sources together make one memory vector."""
    return min(1, sources)


def channel_per_source(sources: int) -> int:
    """Each source is a memory vector of its own."""
    return sources


def is_layer(number: object) -> bool:
    """Whether it may be the number of a layer."""
    return isinstance(number, int) and not isinstance(number, bool)


def spread_delay(delay: int | tuple[int, ...], sources: int) -> tuple[int, ...]:
    """The delay of each of so many sources."""
    return delay if isinstance(delay, tuple) else (delay,) * sources


# The tables of names stand here, below the classes, because a configuration is checked where no model is built.
OWN_INJECTIONS = ("none", "residual", "key_value", "both")
"""The library's own."""
INJECTIONS: Registry[Any] = Registry("injection", reserved=OWN_INJECTIONS)
"""Name -> the class of a block's injection; `lrt.model.memory` fills it."""
COMBINATIONS: Registry[Callable[[int], int]] = Registry("combine", {"sum": one_channel, "channels": channel_per_source})
"""Name -> how many memory vectors so many sources give; `lrt.model.memory.READERS` has the classes."""
MODEL_KINDS = (INJECTIONS.kind, COMBINATIONS.kind)
"""What a plugin may register that weights belong to."""

LONGEST = 2**30
"""The longest context, window and delay, in positions."""
MEMORY_LIMITS = {
    "delay": Limits(1, LONGEST, whole=True, several=True),
    "residual_init": Limits(-1000, 1000),
}
"""What numbers may be: beyond them a memory makes no sense, or fails after minutes. Generous: old files must load."""


@dataclass(frozen=True)
class MemoryConfig:
    """How a token receives the hidden state of the token before it (LRT, arXiv 2605.26797, section 3)."""

    injection: str = "both"
    """Where memory enters: none (nowhere: a plain Transformer), residual (the residual stream), key_value (the keys and
    values), both; or an injection that a plugin registers."""
    projection: Literal["shared", "layerwise"] = "shared"
    """One pair of memory projections U_k, U_v for all layers, or one pair per layer. Ignored without key_value."""
    source: int | tuple[int, ...] | None = None
    """The layer whose output is remembered: 0 (the embedding: token shift) to L (the final hidden state, also
    spelled None), or several layers."""
    combine: str = "sum"
    """Several sources: sum, one learned weighted sum; channels, one each with its own γ, gates and projections; or a
    combination that a plugin registers. Source (0, 0) as channels is token shift with as many of them as (0, L) has:
    what a channel gives without recurrence."""
    initial: Literal["zeros", "embedding"] = "zeros"
    """What stands for sources >= 1 of a slot that no pass has written yet: zeros, or that token's embedding x_0."""
    delay: int | tuple[int, ...] = 1
    """How many positions back the memory is read; the first `delay` positions of a document read zeros. Also one number
    per source: sources (0, 0, 0) as channels at delays (1, 2, 3) mix a token with the three before it, which is a short
    convolution of width 4. A layer that comes twice, at two delays, is stored once."""
    layers: tuple[int, ...] | tuple[tuple[int, ...], ...] | None = None
    """The blocks (1..L) that inject the memory; None means all. For channels also one tuple of blocks per source: those
    below the first that reads a remembered layer are then computed once per training step."""
    state_start: Literal["active", "neutral"] = "active"
    """How channels of sources >= 1 begin. neutral: with γ, U_k and U_v zero, so that they add nothing until they are
    trained. An LRT is then its control without recurrence until recurrence is switched on (`schedules.late`)."""
    residual_init: float = 0.1
    """Initial value of γ, the learned scale of the residual injection (0.1 in the paper)."""

    def __post_init__(self) -> None:
        for name in ("source", "layers", "delay"):  # JSON has no tuples
            value = getattr(self, name)
            if isinstance(value, list | tuple):
                object.__setattr__(self, name, tuple(tuple(v) if isinstance(v, list) else v for v in value))
        INJECTIONS.check(self.injection)
        check_choice(self, "projection", ("shared", "layerwise"))
        COMBINATIONS.check(self.combine)
        check_choice(self, "initial", ("zeros", "embedding"))
        check_numbers(self, MEMORY_LIMITS, "memory.")
        check_choice(self, "state_start", ("active", "neutral"))
        self._check_layers()
        self._check_sources()

    def __repr__(self) -> str:
        return changed_fields(self)

    def _check_sources(self) -> None:
        if self.source == ():
            raise ValueError("memory.source is empty; name at least one layer, or use injection='none'")
        several, delay = self.source if isinstance(self.source, tuple) else (), self.delay
        if isinstance(delay, tuple) and len(delay) != len(several):
            raise ValueError(
                f"memory.delay {delay} has {len(delay)} numbers for memory.source {self.source!r}; give one number, or "
                "name several sources and give one for each"
            )
        # As channels, 0 may come twice: the control of `combine`.
        once = [
            read
            for read in zip(several, spread_delay(delay, len(several)), strict=True)
            if read[0] != 0 or self.combine == "sum"
        ]
        if len(set(once)) != len(once):
            raise ValueError(
                f"memory.source {several} names a layer twice at memory.delay {delay}; name each layer once (but for 0 "
                "among channels), or give it another delay each time"
            )

    def _check_layers(self) -> None:
        layers, several = self.layers, len(self.source) if isinstance(self.source, tuple) else 1
        if layers is None or (isinstance(layers, tuple) and all(map(is_layer, layers))):
            pass
        elif isinstance(layers, tuple) and all(isinstance(own, tuple) and all(map(is_layer, own)) for own in layers):
            if self.combine != "channels" or len(layers) != several:
                raise ValueError(
                    f"memory.layers names blocks for {len(layers)} sources, memory.source {self.source!r} with combine "
                    f"{self.combine!r} has {several}; give one tuple of blocks per source, with combine='channels'"
                )
        else:
            raise ValueError(
                f"memory.layers is {layers!r}; give block numbers, for example (1, 2), or None for all, or a tuple of "
                "them per source"
            )
        if self.state_start == "neutral" and several > 1 and self.combine != "channels":
            raise ValueError(
                f"memory.state_start is 'neutral' with {several} sources combined by {self.combine!r}; use "
                "combine='channels', in which each source has γ and projections of its own"
            )

    def sources(self, depth: int) -> tuple[int, ...]:
        """The source layers as a tuple of ints in 0..depth; empty with injection `none`."""
        if self.injection == "none":
            return ()
        if self.source is None:
            return (depth,)
        return self.source if isinstance(self.source, tuple) else (self.source,)

    def delays(self, depth: int) -> tuple[int, ...]:
        """How many positions back each of `sources(depth)` is read."""
        sources = self.sources(depth)
        return spread_delay(self.delay, len(sources)) if sources else ()

    @property
    def longest_delay(self) -> int:
        """The furthest back that anything is read."""
        return max(self.delay) if isinstance(self.delay, tuple) else self.delay

    def stored_sources(self, depth: int) -> tuple[int, ...]:
        """The layers that a State has to store, each once: all but the embedding, which follows from the token."""
        return tuple(dict.fromkeys(s for s in self.sources(depth) if s > 0))

    def channels(self, depth: int) -> int:
        """How many memory vectors a position reads: one per source with `channels`, else one (zero with `none`)."""
        return COMBINATIONS[self.combine](len(self.sources(depth)))

    def channel_layers(self, depth: int) -> tuple[tuple[int, ...], ...]:
        """For each channel the blocks (1..depth) that inject it, in order."""
        if self.layers is None:
            return (tuple(range(1, depth + 1)),) * self.channels(depth)
        if any(isinstance(own, tuple) for own in self.layers):
            return tuple(tuple(sorted(own)) for own in self.layers if isinstance(own, tuple))
        return (tuple(sorted(n for n in self.layers if isinstance(n, int))),) * self.channels(depth)

    def injected_layers(self, depth: int) -> tuple[int, ...]:
        """The blocks (1..depth) that inject a channel, in order."""
        return tuple(sorted({layer for own in self.channel_layers(depth) for layer in own}))

    def plugin_uses(self) -> list[tuple[str, Plugin]]:
        """What plugins have to register before this can be built, as `plugins.describe` takes it."""
        return INJECTIONS.uses(self.injection) + COMBINATIONS.uses(self.combine)
