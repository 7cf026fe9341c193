"""What every benchmark of data with state gives: rows of tokens, and of each token what it must cost.

A row is a text of words, each one token, from a program that can be run again. A model is trained to predict all of it.
Of every token the *floor* is known where there can be one: the nats that it costs a reader who knows the whole state,
which are those of the program's own choices. Excess nats over the floor are the score; 0 is all state known.

Shapes: B rows, T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BOS = 0
"""The token that begins a row."""
NOTHING = -1
"""`asked` where the state decides nothing."""


@dataclass(frozen=True)
class Rows:
    """Rows of a benchmark."""

    tokens: Tensor
    """(B, T) int64; the first of a row is BOS, and padding behind its end is BOS too."""
    floor: Tensor
    """(B, T) float32: nats of each token for who knows the state; 0 for BOS and padding, NaN where none is known."""
    asked: Tensor
    """(B, T) int64: at tokens that the state decides (answers: their floor is 0; in chess, all moves), how far the
    state lies back in the benchmark's unit (`Benchmark.distance`), from 0 on; NOTHING elsewhere."""
    lengths: Tensor
    """(B,) int64: tokens of each row without padding, BOS counted."""

    def __post_init__(self) -> None:
        shape = self.tokens.shape
        if self.floor.shape != shape or self.asked.shape != shape or self.lengths.shape != shape[:1]:
            raise ValueError(
                f"tokens are {tuple(shape)}, floor {tuple(self.floor.shape)}, asked {tuple(self.asked.shape)}, lengths "
                f"{tuple(self.lengths.shape)}; the first three are (B, T), lengths (B,)"
            )

    @property
    def counted(self) -> Tensor:
        """(B, T) bool: the tokens that a model is asked to predict, all but BOS and padding."""
        places = torch.arange(self.tokens.shape[1])
        return (places >= 1) & (places < self.lengths.unsqueeze(1))

    def take(self, which: Tensor | slice) -> Rows:
        """Some of the rows, by their numbers (N,) int64 or a slice."""
        return Rows(self.tokens[which], self.floor[which], self.asked[which], self.lengths[which])

    def then(self, other: Rows) -> Rows:
        """These rows and behind them others of equal T."""
        pairs = zip(self.columns, other.columns, strict=True)
        return Rows(*(torch.cat(pair) for pair in pairs))

    @property
    def columns(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens, floor, asked and lengths."""
        return self.tokens, self.floor, self.asked, self.lengths


Sampler = Callable[[int, int, torch.Generator], Rows]
"""(rows, length, generator) -> rows of `length` positions. Equal generators give equal rows."""
Details = Callable[[Rows, Tensor], Mapping[str, Any]]
"""(rows, live logits (B, T, V)) -> what a benchmark measures beside nats and right answers, as plain data."""


def nothing_known() -> Mapping[str, Any]:
    """Of rows that follow from seeds alone."""
    return {}


@dataclass(frozen=True)
class Benchmark:
    """Data with state: how rows are drawn, and in which words."""

    name: str
    words: tuple[str, ...]
    """The vocabulary: token i is word i, and 0 is BOS, written as nothing."""
    distance: str
    """What `Rows.asked` counts, in words: "updates since the value was last shown"."""
    chance: float
    """The chance of an answer for who knows the grammar and no state; NaN where that is no one number."""
    sampler: Sampler
    bounds: tuple[int, ...] = (0, 1, 2, 3, 4, 8)
    """Where bins of distances begin."""
    far: int | None = 4
    """From which distance on an answer needs a state that is carried; None where distance does not say so."""
    origin: Callable[[], Mapping[str, Any]] = nothing_known
    """What rows were made by or read from, with its version: plain data for every result's line."""
    details: Details | None = None

    def sample(self, rows: int, length: int, generator: torch.Generator) -> Rows:
        """Fresh rows. ValueError for a length below 2: BOS, and a token to predict."""
        if length < 2 or rows < 1:
            raise ValueError(f"{rows} rows of {length} tokens; a row has BOS and a token at least")
        return self.sampler(rows, length, generator)

    def text(self, tokens: Tensor) -> str:
        """A row's text: tokens (T,)."""
        return "".join(self.words[t] for t in tokens.tolist())
