"""What a model pays on data with state, live: excess nats over the floor, exact answers, and both by distance.

Shapes: B rows, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lrt.data.batch import IGNORED
from lrt.experiments.state_data.rows import NOTHING, Benchmark, Rows
from lrt.experiments.state_tracking.measure import held_out_generator, live_hidden
from lrt.experiments.state_tracking.tasks import Examples, Task
from lrt.model.cross_entropy import token_nats
from lrt.model.transformer import LatentRecurrentTransformer

BATCH = 64
"""Rows that are decoded side by side."""


def as_task(benchmark: Benchmark) -> Task:
    """A benchmark as something to train on: every next token is asked. What has no floor counts as if it were 0."""

    def sample(rows: int, length: int, generator: torch.Generator) -> Examples:
        text = benchmark.sample(rows, length, generator)
        floor = text.floor[text.counted]
        return Examples(text.tokens, next_tokens(text), float(floor.nan_to_num().mean()))

    size = len(benchmark.words)
    return Task(benchmark.name, size, size, benchmark.chance, sample, shortest=2)


def next_tokens(rows: Rows) -> Tensor:
    """(B, T): what follows each token; IGNORED behind a row's last."""
    following = torch.where(rows.counted, rows.tokens, IGNORED)[:, 1:]
    return torch.nn.functional.pad(following, (0, 1), value=IGNORED)


@dataclass(frozen=True)
class TokenScores:
    """What a model made of rows: of each token, as it stands in them."""

    rows: Rows
    nats: Tensor
    """(B, T) float32: live, 0 for BOS and padding."""
    right: Tensor
    """(B, T) bool: the likeliest token was this one."""

    @property
    def known(self) -> Tensor:
        """(B, T) bool: the tokens that have a floor."""
        return self.rows.counted & ~self.rows.floor.isnan()

    def first(self, rows: int) -> TokenScores:
        """Those of the first rows."""
        return TokenScores(self.rows.take(slice(rows)), self.nats[:rows], self.right[:rows])


@torch.no_grad()
def score_rows(model: LatentRecurrentTransformer, rows: Rows, batch: int = BATCH) -> TokenScores:
    """Decode rows token by token and compare."""
    nats, right = torch.zeros(rows.tokens.shape), torch.zeros(rows.tokens.shape, dtype=torch.bool)
    targets = next_tokens(rows)
    for first in range(0, len(targets), batch):
        at = slice(first, first + batch)
        tokens, following = (x[at].to(model.embedding.weight.device) for x in (rows.tokens, targets))
        hidden = live_hidden(model, tokens)
        nats[at, 1:] = token_nats(model, hidden, following)[:, :-1].float().cpu()
        right[at, 1:] = (model.logits(hidden).argmax(-1) == following)[:, :-1].cpu()
    return TokenScores(rows, nats, right & rows.counted)


@torch.no_grad()
def live_logits(model: LatentRecurrentTransformer, rows: Rows, batch: int = BATCH) -> Tensor:
    """(B, T, V) float32 on the CPU, decoded token by token."""
    device = model.embedding.weight.device
    parts = [model.logits(live_hidden(model, tokens.to(device))).float().cpu() for tokens in rows.tokens.split(batch)]
    return torch.cat(parts)


@dataclass(frozen=True)
class Bin:
    """The tokens of one distance, or of one stretch of positions."""

    tokens: int
    right: int
    nats: float
    """Their sum, live."""
    floor: float
    """Likewise, for who knows the state; NaN where a token has none."""

    @property
    def excess(self) -> float:
        """Mean nats over the floor."""
        return (self.nats - self.floor) / self.tokens


def bin_of(scores: TokenScores, where: Tensor) -> Bin:
    """Those tokens (B, T) bool."""
    nats, floor = (float(x[where].double().sum()) for x in (scores.nats, scores.rows.floor))
    return Bin(int(where.sum()), int(scores.right[where].sum()), nats, floor)


def by_distance(scores: TokenScores, bounds: Sequence[int]) -> dict[int, Bin]:
    """Answers by how far their state lies back: bounds (0, 1, 4) make 0, 1 to 3, 4 and more, named by their first."""
    return by_number(scores, scores.rows.asked, scores.rows.asked != NOTHING, bounds)


def by_position(scores: TokenScores) -> dict[int, Bin]:
    """Tokens with a floor by where they stand: 1, 2 to 3, 4 to 7, …, named by their first."""
    places = torch.arange(scores.nats.shape[1]).expand_as(scores.nats)
    bounds = [2**n for n in range(scores.nats.shape[1].bit_length()) if 2**n < scores.nats.shape[1]]
    return by_number(scores, places, scores.known, bounds)


def by_number(scores: TokenScores, numbers: Tensor, where: Tensor, bounds: Sequence[int]) -> dict[int, Bin]:
    """The tokens `where`, by the bounds between which their numbers (B, T) lie."""
    upper = [*bounds[1:], torch.iinfo(torch.int64).max]
    bins = {
        low: bin_of(scores, where & (numbers >= low) & (numbers < high))
        for low, high in zip(bounds, upper, strict=True)
    }
    return {low: one for low, one in bins.items() if one.tokens}


def held_out_rows(benchmark: Benchmark, purpose: str, rows: int, length: int, seed: int) -> Rows:
    """A test's rows: a function of purpose, length and seed, from seeds that no training draws from."""
    return benchmark.sample(rows, length, held_out_generator(purpose, benchmark.name, length, seed))
