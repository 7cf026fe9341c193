"""One sample of a request on its way through an engine: what it has drawn, and what shapes its next token.

Shapes: n rows, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lrt.inference.certificate import Certificate
from lrt.inference.grammar import GrammarState, mask_rows
from lrt.inference.request import Finish, Logprob, Request
from lrt.inference.row_pool import KeptRow
from lrt.inference.sampling import TokenCounts


@dataclass(eq=False)
class Job:
    """One sample of a request, from its submission to its end. Jobs are compared by identity."""

    request: Request
    number: int
    """The request's, as `submit` gave it."""
    sample: int
    """0 … request.samples - 1."""
    tokens: list[int]
    """The prompt and what was drawn."""
    fed: int = 0
    """How many of them are in the row's State: the next call computes tokens[fed], at this position."""
    reused: int = 0
    """How many of them were copied, not computed."""
    fork: KeptRow | None = None
    """A row that has the prompt, computed for an earlier sample."""
    counts: TokenCounts | None = None
    """Of its tokens, where its request steers what is drawn."""
    logprobs: list[Logprob] = field(default_factory=list)
    certificate: Certificate | None = None
    """How the prompt was computed, where in parallel (or why not), or the part of it that was copied; of the less
    exact of the two."""

    @property
    def new(self) -> list[int]:
        """What was drawn."""
        return self.tokens[len(self.request.tokens) :]

    @property
    def seed(self) -> int:
        return self.request.seed + self.sample

    @functools.cached_property
    def grammar(self) -> GrammarState | None:
        """Where its answer stands in the grammar of its request."""
        return None if self.request.grammar is None else self.request.grammar.start()

    def steer(self, logits: Tensor) -> Tensor:
        """Logits (V,) with the penalties and biases of its request."""
        if self.request.steering.neutral:
            return logits
        if self.counts is None:
            self.counts = TokenCounts(self.request.tokens, len(logits), logits.device)
        self.counts.update(self.tokens)
        return self.request.steering.apply(logits, self.counts)

    def advance(self, slots: int | None) -> Finish | None:
        """Follow the token that was drawn last, once for each: why the answer is complete, None where it is not."""
        reason = self.request.finish_reason(self.new, slots)
        # Where the grammar has failed any token was drawn, a stop token too: nothing says that the answer is whole.
        if self.grammar is None or (reason == "stop" and not self.grammar.failed):
            return reason
        return self.grammar.push(self.tokens[-1]) or reason


def shape_rows(jobs: Sequence[Job], logits: Tensor) -> Tensor:
    """Logits (n, V) from which the jobs draw: steered, and without what their grammars do not allow."""
    if not all(job.request.steering.neutral for job in jobs):
        logits = torch.stack([job.steer(row) for job, row in zip(jobs, logits, strict=True)])
    return mask_rows(logits, [job.grammar for job in jobs], [job.request.stop for job in jobs])


def log_probability(logits: Tensor, token: int, alternatives: int) -> Logprob:
    """The log-probability, in nats, of a token and of the `alternatives` most likely ones, from logits (V,)."""
    log = logits.float().log_softmax(-1)
    values, indices = log.topk(alternatives) if alternatives else (log[:0], log[:0].long())
    pairs = zip(indices.tolist(), values.tolist(), strict=True)
    return Logprob(float(log[token]), tuple((int(i), float(v)) for i, v in pairs))
