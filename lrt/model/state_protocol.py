"""What the model asks of a State: the protocol that every State serves, and what it answers with.

Shapes: B batch, T positions of one call, S slots, H query heads, G key/value heads, K head size, P remembered sources,
D width.

The model's forward knows nothing else of a State. So slots, residue classes, windows, pages and a Hugging Face cache
run through the same forward, in training, prefill and decoding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, Self

from torch import Tensor

from lrt.model.execution import Execution

Positions = range | Tensor
"""Positions of one call: a range, or an int tensor (T,) or, for ragged rows, (B, T).

A pass is a range. Python then knows which slots are visible, and the common cases (everything; one token; a stride) run
without a mask made from tensors. Tensors take the general path; tests hold the two against each other.
"""


@dataclass(frozen=True)
class MemoryRead:
    """What stands a number of positions before each of T positions. Which of it counts is `MemoryReader`'s affair."""

    tokens: Tensor
    """(B, T) int, -1 where unknown."""
    memory: Tensor
    """(B, T, P, D); arbitrary where not written."""
    written: Tensor
    """(B, T) bool: whether a call has written that position; if not, the memory's `initial` stands in."""
    inside: Tensor
    """(B, T) bool: whether that position exists and belongs to the same document; if not, zeros are read."""
    nowhere_written: bool = False
    """Whether the State knows, without asking the device, that nothing is written at all. False is always right."""


class Visible(Protocol):
    """What a State's `visible` gives: the keys and values that one layer's queries see."""

    def attend(self, q: Tensor, keys: Any, values: Any) -> Tensor:
        """Softmax attention (B, H, T, K) of q (B, H, T, K) over what is visible of one layer's cache."""
        ...


class ModelState(Protocol):
    """What the model asks of a State, and all that it knows of one.

    Five things are such: `State` (slots), `StridedState` (residue classes, for training), `RollingState` (windows, of
    constant size), `PagedState` (vLLM's pages), and a Hugging Face cache, read into slots and back around each call.
    tests/model/test_states.py runs over all of them. Methods that change something return another State.

    A call asks in this order: `write_tokens`, `read_memory`, `mark_written`, `visible`; per layer `write`, then the
    `attend` of what `visible` gave; at the end `write_cache` and `write_memory`.
    """

    @property
    def batch(self) -> int:
        """B: rows."""
        ...

    @property
    def slots(self) -> int:
        """S: positions that can be held at once."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """(layers, G, K, P, D): what the model that made it must have."""
        ...

    @property
    def reusable(self) -> bool:
        """Whether slots may be reused, so that positions may exceed S."""
        ...

    @property
    def documents(self) -> Tensor | None:
        """(B, S) int, the packed document of each slot; None where a row is one document."""
        ...

    @property
    def execution(self) -> Execution:
        """How calls compute; decides no numbers. It travels here so that the model and schedules need no flag."""
        ...

    # `keys` and `values`, one entry per layer and loop, are the State's own affair: the model hands them on to `write`
    # and `attend`.
    @property
    def keys(self) -> tuple[Any, ...]: ...

    @property
    def values(self) -> tuple[Any, ...]: ...

    @property
    def write(self) -> Callable[[Any, Any, Tensor, int], Any]:
        """(a layer's keys or values, `where`, new (B, G, T, K), dimension 2) -> the layer's keys or values."""
        ...

    def where(self, positions: Positions) -> Any:
        """Where these positions stand, as `write` takes it."""
        ...

    def write_tokens(self, positions: Positions, tokens: Tensor) -> Self:
        """Note the tokens (B, T) of a call: source 0 of their successors is known from now on."""
        ...

    def read_memory(self, positions: Positions, delay: int) -> MemoryRead:
        """What stands `delay` positions before each of `positions`."""
        ...

    def mark_written(self, positions: Positions) -> Self:
        """Mark the positions of a call as written. Keys, values and memory follow in the same call."""
        ...

    def visible(self, positions: Positions, window: int | None) -> Visible:
        """What attends to the keys that `visible_keys` names. Call after `mark_written`: a position sees itself."""
        ...

    def write_cache(self, keys: tuple[Any, ...], values: tuple[Any, ...]) -> Self:
        """The same with the layers' keys and values that a call has written."""
        ...

    def write_memory(self, positions: Positions, memory: Tensor) -> Self:
        """Replace the memory (B, T, P, D) of these positions."""
        ...
