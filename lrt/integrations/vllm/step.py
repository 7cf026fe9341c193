"""One step of the engine: tokens of many requests, each computed with true recurrence, however many it has.

A request with one token needs one run: what it reads was written before. A chunk of a prompt is computed as
`lrt.inference.prefill` does it: token by token (`exact`), or by sweeps until a certificate says that it is within the
tolerance. The first run computes single tokens and all chunks that are swept. Then only these are computed again, in
strided sweeps that end at the highest remembered layer, and what lies above runs at their end. Chunks that do not
contract are computed token by token.

Sweeps begin with a full pass, other than lrt's own: the pages may hold keys of other requests, which must not be seen.

Shapes: N tokens of the step, n of a run, Q compared states, P remembered sources, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from lrt.inference.certificate import Certificate
from lrt.integrations.vllm.convergence import Bucket, buckets
from lrt.integrations.vllm.sharing import waves
from lrt.integrations.vllm.spans import Chunk, Spans
from lrt.model.config import ModelConfig


class Run(Protocol):
    """The model over some tokens of the step."""

    def __call__(
        self, spans: Spans, swept: bool, blocks: range | None = None, stream: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(final hidden state, or residual stream behind the last of `blocks`, (n, D); memory (n, P, D), or None where
        these blocks do not give it).

        swept: whether all positions before those of the run are written, those of this step too. blocks, stream: as
        `LatentRecurrentTransformer.forward` takes them, stream (n, D).
        """
        ...


@dataclass
class Step:
    """What is computed of one step."""

    config: ModelConfig
    run: Run
    chunks: Sequence[Chunk]
    tolerances: Mapping[int, float | None]
    """By request: what a chunk's sweeps have to be within; None: token by token."""
    groups: int
    """Stride of the sweeps."""
    hidden: Tensor
    """(N, D): the final hidden states, filled in."""
    agree: Callable[[Any], Any] = lambda decision: decision
    """A decision, as all processes take it that hold a part of this model."""
    waiting: Mapping[int, set[int]] = field(default_factory=dict)
    """By request, those whose tokens of this step come before its own (`sharing.readers`)."""
    certificates: dict[int, Certificate] = field(default_factory=dict)
    """By request, of chunks with more than one token."""

    def compute(self) -> Tensor:
        """Compute all tokens: the final hidden states (N, D)."""
        for chunks in waves(self.chunks, self.waiting):
            self.compute_wave(chunks)
        return self.hidden

    def compute_wave(self, chunks: list[Chunk]) -> None:
        """Compute chunks none of which reads what another writes."""
        long = [chunk for chunk in chunks if chunk.tokens > 1 and self.config.is_recurrent]
        # A sweep of so few takes as many runs as computing them one by one.
        exact = [c for c in long if self.tolerances[c.request] is None or c.tokens <= self.groups]
        apart = {chunk.request for chunk in exact}
        first = [chunk for chunk in chunks if chunk.request not in apart]
        self.certificates |= {c.request: token_by_token(c, "asked for, or too short for sweeps") for c in exact}
        if first:
            spans = Spans.whole(first)
            output, memory = self.run(spans, swept=False)
            self.hidden[spans.index] = output
            swept = [chunk for chunk in long if chunk.request not in apart]
            if swept:
                exact += Sweeps.after(self, swept, spans, output, memory).until_settled()
        self.decode(exact)

    def decode(self, chunks: list[Chunk]) -> None:
        """Token by token: the reference."""
        for column in range(max((chunk.tokens for chunk in chunks), default=0)):
            spans = Spans.every([c for c in chunks if c.tokens > column], column, max(c.tokens for c in chunks))
            self.hidden[spans.index], _ = self.run(spans, swept=True)


@dataclass
class Sweeps:
    """The chunks of a step that are swept together."""

    step: Step
    active: list[Bucket]
    values: Tensor
    """(N, Q, D): the newest of what is compared."""
    lower: range
    """The blocks that a sweep runs."""
    upper: range
    """Those above, which run at the end."""
    count: int = 0
    """Sweeps so far, after the first pass."""

    @classmethod
    def after(cls, step: Step, chunks: list[Chunk], spans: Spans, output: Tensor, memory: Tensor | None) -> Sweeps:
        """After a first pass over these chunks, and perhaps others."""
        config = step.config
        lower, upper = range(config.memory_blocks), range(config.memory_blocks, config.kv_layers)
        others = [source for source in config.stored_sources if source != config.depth]
        compared = len(others) + (len(upper) == 0)
        values = output.new_zeros(len(step.hidden), compared, config.width)
        sweeps = cls(step, buckets(chunks, compared, len(upper) > 0, output), values, lower, upper)
        sweeps.note(spans, output, memory)
        return sweeps

    def note(self, spans: Spans, output: Tensor, memory: Tensor | None) -> None:
        """What a run has computed, as it is compared: the final hidden state where runs give it, and the sources below
        it."""
        config = self.step.config
        assert memory is not None
        others = [i for i, source in enumerate(config.stored_sources) if source != config.depth]
        parts = [memory[:, others]] if len(self.upper) else [output.unsqueeze(1), memory[:, others]]
        self.values[spans.index] = torch.cat(parts, 1)

    def until_settled(self) -> list[Chunk]:
        """Sweep; the chunks that have to be computed token by token come back."""
        step, failed = self.step, []
        stream = torch.empty_like(step.hidden)
        while True:
            for bucket in self.active:
                bucket.record(self.values)
            if len(self.upper) and self.count:
                self.finish(stream)
            failed += self.leave()
            if not self.active:
                return failed
            chunks = [chunk for bucket in self.active for chunk in bucket.chunks]
            for first in range(step.groups):
                spans = Spans.every(chunks, first, step.groups)
                output, memory = step.run(spans, True, self.lower if len(self.upper) else None)
                (stream if len(self.upper) else step.hidden)[spans.index] = output
                self.note(spans, output, memory)
            self.count += 1

    def finish(self, stream: Tensor) -> None:
        """Run the upper blocks over the chunks whose memory has settled, from the residual stream (N, D)."""
        places = [[p for p in range(len(b.chunks)) if self.done(b, p)] for b in self.active]
        places = self.step.agree(places)
        chunks = [bucket.chunks[p] for bucket, due in zip(self.active, places, strict=True) for p in due]
        if chunks:
            spans = Spans.whole(chunks)
            self.step.hidden[spans.index], _ = self.step.run(spans, True, self.upper, stream[spans.index])
        for bucket, due in zip(self.active, places, strict=True):
            bucket.record_ends(self.step.hidden, due)

    def done(self, bucket: Bucket, place: int) -> bool:
        """Whether the memory of a chunk is exact, or within its tolerance as far as measured."""
        chunk = bucket.chunks[place]
        return self.exact >= chunk.tokens or place in bucket.settled(self.tolerance(chunk))

    @property
    def exact(self) -> int:
        """How many of a chunk's first tokens the sweeps have made exact; the first pass is the first repetition."""
        return self.count * self.step.groups + (self.step.groups == 1)

    def tolerance(self, chunk: Chunk) -> float:
        """What a swept chunk has to be within."""
        limit = self.step.tolerances[chunk.request]
        assert limit is not None
        return limit

    def leave(self) -> list[Chunk]:
        """Take out the chunks that are done, with their certificates, and those that are computed token by token, which
        come back."""
        step, decisions = self.step, []
        for bucket in self.active:
            decisions.append([self.decide(bucket, place) for place in range(len(bucket.chunks))])
        decisions = step.agree(decisions)
        failed, active = [], []
        for bucket, rows in zip(self.active, decisions, strict=True):
            for chunk, certificate in zip(bucket.chunks, rows, strict=True):
                if certificate is not None:
                    step.certificates[chunk.request] = certificate
                    failed += [chunk] if certificate.path == "fallback" else []
            staying = [place for place, certificate in enumerate(rows) if certificate is None]
            active += [bucket.select(staying)] if staying else []
        self.active = active
        return failed

    def decide(self, bucket: Bucket, place: int) -> Certificate | None:
        """The certificate of a chunk that leaves, None of one that stays."""
        chunk, groups = bucket.chunks[place], self.step.groups
        limit = self.tolerance(chunk)
        row = bucket.certificate(place, groups, self.count, limit)
        if self.exact >= chunk.tokens:
            exact = {"residual": 0.0, "worst": 0.0, "worst_position": None}
            return dataclasses.replace(row, reason="exact: as many sweeps as a class has positions", **exact)
        if row.within(limit):
            return row
        if bucket.too_slow(place, groups, self.count, limit):
            reason = f"more sweeps would take more runs than token by token (residual {row.residual or 0:.1e})"
            return dataclasses.replace(token_by_token(chunk, reason), path="fallback", sweeps=self.count)
        return None


def token_by_token(chunk: Chunk, reason: str) -> Certificate:
    """Of a chunk that is computed exactly."""
    return Certificate("exact", reason, tokens=chunk.tokens, forwards=1.0)
