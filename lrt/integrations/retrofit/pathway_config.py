"""What a retrofitted pathway is: plain data, kept in config.json under `latent_memory`.

Layers are counted as everywhere in lrt: block 1 is the first, L the last; "layer 0" is the token's embedding.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

PREFILLS = ("exact", "converged", "fast")
SCORINGS = ("auto", "schedule", "live")
TOLERANCES = {"converged": 1e-5, "fast": 1e-3}
"""By how much the last pass may move a position's memory, and all to come together (docs/contract.md, section 4)."""


@dataclass(frozen=True)
class PathwayConfig:
    """How each token of a pretrained decoder receives hidden states of the token before it."""

    source: int | tuple[int, ...] | None = None
    """The layer whose output is remembered: 0 (the embedding: token shift, the control) to L (None), or several, which
    are channels with γ, gates and projections of their own."""
    layers: tuple[int, ...] | None = None
    """The blocks (1..L) that read the memory; None means all."""
    projection: str = "shared"
    """One pair of projections U_k, U_v for all blocks, or `layerwise`: one pair each."""
    schedule: str = "settled(0, 1, 1)"
    """How it is trained (docs/training.md). The default costs a third more than training the model without it."""
    prefill: str = "converged"
    """How texts are read in `eval()`: token by token (`exact`), or by passes over all of them until they move a memory
    by at most 1e-5 (`converged`) or 1e-3 (`fast`)."""

    scoring: str = "auto"
    """What a call without a cache computes. `auto`: live in `eval()`, the schedule in `train()` and where `base_model`
    is called, as TRL does. `live`: true recurrence everywhere, also where it is trained, with the gradients of the last
    pass: one policy for what is sampled, scored and trained. `schedule`: the schedule everywhere."""

    def __post_init__(self) -> None:
        for name in ("source", "layers"):  # JSON has no tuples
            value = getattr(self, name)
            if isinstance(value, list | tuple):
                object.__setattr__(self, name, tuple(value))
        if self.projection not in ("shared", "layerwise"):
            raise ValueError(f"projection is {self.projection!r}; choose one of shared, layerwise")
        if self.scoring not in SCORINGS:
            raise ValueError(f"scoring is {self.scoring!r}; choose one of {', '.join(SCORINGS)}")
        if self.prefill not in PREFILLS:
            raise ValueError(f"prefill is {self.prefill!r}; choose one of {', '.join(PREFILLS)}")

    def sources(self, depth: int) -> tuple[int, ...]:
        """The remembered layers, one per channel. ValueError where the model has not got them."""
        sources = (depth,) if self.source is None else self.source if isinstance(self.source, tuple) else (self.source,)
        if not sources or len(set(sources)) != len(sources) or not all(within(s, 0, depth) for s in sources):
            raise ValueError(
                f"source is {self.source!r}; name layers from 0 (the embedding) to {depth} (the last), each once"
            )
        return sources

    def readers(self, depth: int) -> tuple[int, ...]:
        """The blocks that read the memory, in order. ValueError where the model has not got them."""
        layers = tuple(range(1, depth + 1)) if self.layers is None else self.layers
        if not layers or len(set(layers)) != len(layers) or not all(within(i, 1, depth) for i in layers):
            raise ValueError(f"layers is {self.layers!r}; name blocks from 1 to {depth}, each once, or None for all")
        return tuple(sorted(layers))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)


def within(number: object, low: int, high: int) -> bool:
    """Whether it is a whole number from low to high."""
    return type(number) is int and low <= number <= high
