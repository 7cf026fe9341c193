"""Which tokens of a step one run of the model computes: spans of consecutive positions, each a request of its own.

A step of the engine schedules some tokens of each of R requests, side by side in one row of N. A run computes all of
them or some: those of some requests, every g-th one of them, or one of each. To the attention kernels a span is a
request that ends where the span ends, so that a class of a strided sweep is a batch of requests of one token.

Shapes: N tokens of the step, n of a run, m spans.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Chunk:
    """The tokens of one request in a step."""

    request: int
    """Its row in the step."""
    start: int
    """Where its first token stands in the step's row of tokens."""
    tokens: int
    position: int
    """Of its first token, in the request."""


@dataclass(frozen=True)
class Spans:
    """Tokens of one run."""

    requests: Tensor
    """(m,) int: each span's request, on the CPU."""
    bounds: Tensor
    """(m + 1,) int: where in the run each span begins, and its end, on the CPU."""
    index: Tensor
    """(n,) int: where in the step each token stands, on the CPU."""

    @classmethod
    def whole(cls, chunks: list[Chunk]) -> Spans:
        """All tokens of these chunks, a span for each."""
        return cls._of([(c.request, c.start, c.start + c.tokens) for c in chunks])

    @classmethod
    def every(cls, chunks: list[Chunk], first: int, groups: int) -> Spans:
        """Of each chunk the tokens first, first + groups, …: each a span."""
        starts = [torch.arange(c.start + first, c.start + c.tokens, groups) for c in chunks]
        counts = torch.tensor([len(places) for places in starts])
        requests = torch.tensor([c.request for c in chunks]).repeat_interleave(counts)
        index = torch.cat(starts)
        return cls(requests, torch.arange(len(index) + 1), index)

    @classmethod
    def _of(cls, spans: list[tuple[int, int, int]]) -> Spans:
        requests, starts, stops = (torch.tensor(column) for column in zip(*spans, strict=True))
        bounds = torch.cat((torch.zeros(1, dtype=torch.long), (stops - starts).cumsum(0)))
        return cls(requests, bounds, torch.cat([torch.arange(start, stop) for _, start, stop in spans]))

    @property
    def tokens(self) -> int:
        return len(self.index)

    @property
    def longest(self) -> int:
        """Tokens of the longest span."""
        return int(self.bounds.diff().max())

    @property
    def rows(self) -> Tensor:
        """(n,) int: each token's span."""
        return torch.repeat_interleave(torch.arange(len(self.requests)), self.bounds.diff())

    @property
    def lasts(self) -> Tensor:
        """(m,) int: where in the step each span's last token stands."""
        return self.index[self.bounds[1:] - 1]

    def split(self, most: int) -> Iterator[tuple[Spans, slice]]:
        """Spans of at most so many requests each, one after another, and which tokens of this run they have."""
        for first in range(0, len(self.requests), most):
            bounds = self.bounds[first : first + most + 1]
            tokens = slice(int(bounds[0]), int(bounds[-1]))
            yield Spans(self.requests[first : first + most], bounds - bounds[0], self.index[tokens]), tokens
