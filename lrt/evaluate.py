"""Scores: bits per byte under a schedule, and live, token by token with true recurrence: what a user gets.

Shapes: B rows, T positions. BPB = nats / (ln 2 · bytes) over targets (contract, section 4).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lrt.config import IGNORED
from lrt.data.loader import Windows
from lrt.decode import decoder
from lrt.loss import token_nats
from lrt.model.injection import Recall
from lrt.model.state import Positions, State
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.progress import Advance, bar
from lrt.refine import refine
from lrt.schedules import Schedule, plain

BATCH = 64
"""Windows scored at once."""


def score(
    model: LatentRecurrentTransformer,
    tokens: Tensor,
    documents: Tensor | None = None,
    advance: Advance | None = None,
) -> Tensor:
    """Live negative log-likelihoods (B, T-1), in nats, of tokens (B, T) int: each decoded from those before it.

    documents (B, T) int separates packed documents. `advance` is told of every position done. Gives no gradients;
    `refine(model, tokens, schedules.sequential())` is the same with them.
    """
    batch, length = tokens.shape
    if length < 2:
        raise ValueError(
            f"tokens have shape {tuple(tokens.shape)}; scoring needs at least two per row: BOS and one more"
        )
    inputs = tokens[:, :-1]
    known = None if documents is None else documents[:, :-1]
    hidden: list[Tensor] = []
    with torch.no_grad():
        way = decoder(model, model.empty_state(batch, length - 1, known))
    for t in range(length - 1):
        hidden.append(way(inputs[:, t], [t] * batch))
        if advance is not None:
            advance(batch)
    with torch.inference_mode():
        nats = token_nats(model, torch.stack(hidden, dim=1), tokens[:, 1:])
    return nats.clone()  # outside inference mode: an ordinary tensor


def score_parallel(
    model: LatentRecurrentTransformer, tokens: Tensor, schedule: Schedule, documents: Tensor | None = None
) -> Tensor:
    """Negative log-likelihoods (B, T-1) in nats under a schedule, each position by the last pass that computed it."""
    known = None if documents is None else documents[:, :-1]
    with torch.no_grad():
        hidden = refine(model, tokens[:, :-1], schedule, known).hidden
        return token_nats(model, hidden, tokens[:, 1:])


class ZeroMemory(nn.Module):
    """Ablation: every position reads zeros."""

    def __init__(self, recall: Recall) -> None:
        super().__init__()
        self.recall = recall

    def forward(self, state: State, positions: Positions, embedding: nn.Embedding) -> Tensor:
        return torch.zeros_like(self.recall(state, positions, embedding))


class EmbeddingMemory(nn.Module):
    """Ablation: every position reads the embedding of the token `delay` back, whatever the source."""

    def __init__(self, recall: Recall) -> None:
        super().__init__()
        self.recall = recall

    def forward(self, state: State, positions: Positions, embedding: nn.Embedding) -> Tensor:
        found = state.read_memory(positions, self.recall.delay)
        embedded = self.recall.embed(found, embedding)
        return self.recall.combine([embedded for _ in self.recall.sources], found.memory)


ABLATIONS: dict[str, Callable[[Recall], nn.Module]] = {"zero": ZeroMemory, "embedding": EmbeddingMemory}


def ablated(model: LatentRecurrentTransformer, name: str) -> LatentRecurrentTransformer:
    """The model, parameters shared, with its memory replaced at test time: `zero` or `embedding`."""
    if name not in ABLATIONS:
        raise ValueError(f"unknown ablation {name!r}; choose one of {', '.join(ABLATIONS)}")
    assert isinstance(model.recall, Recall), "an ablation of an ablation"
    return model.with_recall(ABLATIONS[name](model.recall))


@dataclass(frozen=True)
class Metrics:
    """Scores of one model on one split."""

    schedule: str
    """The schedule of `parallel_bpb`: the one trained with, `plain()` where nothing recurs."""
    targets: int
    """Tokens scored."""
    bytes: int
    """Their UTF-8 bytes."""
    complete: bool
    """Whether that is the whole split, not a sample of windows."""
    parallel_bpb: float
    """Bits per byte under the schedule."""
    live_bpb: float
    """Bits per byte decoding token by token: the headline."""
    gap: float
    """live_bpb - parallel_bpb: what training sees and decoding does not get."""
    live_bpb_memory_zero: float | None = None
    """Live, with the memory zeroed at test time."""
    live_bpb_memory_embedding: float | None = None
    """Live, with the memory replaced by the previous token's embedding."""

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)


Scorer = Callable[[LatentRecurrentTransformer, Tensor, Advance], Tensor]
"""(model, tokens (B, T), advance) -> nats (B, T-1)."""


def live(model: LatentRecurrentTransformer, tokens: Tensor, advance: Advance) -> Tensor:
    """The live scorer."""
    return score(model, tokens, advance=advance)


def under(schedule: Schedule) -> Scorer:
    """The scorer of a schedule; a mixture is the probability-weighted mean, stages are their last."""

    def scorer(model: LatentRecurrentTransformer, tokens: Tensor, advance: Advance) -> Tensor:
        nats = torch.stack([p * score_parallel(model, tokens, part) for p, part in schedule.scored()]).sum(0)
        advance(nats.numel())
        return nats

    return scorer


def bits_per_byte(
    model: LatentRecurrentTransformer,
    windows: Windows,
    token_bytes: Tensor | None,
    scorer: Scorer,
    batch_size: int = BATCH,
    title: str = "scoring",
    progress: bool = True,
    prefix_bytes: int = 0,
) -> tuple[float, int]:
    """(BPB, bytes) of a model over evaluation windows.

    `token_bytes` (V,) gives each token's bytes; None (a tokenizer without a byte alphabet) counts the documents'
    UTF-8 size, which needs all of their windows. `prefix_bytes` are those that the tokenizer puts before every
    document (sentencepiece's space) and that are no part of it.
    """
    if token_bytes is None and not windows.complete:
        raise ValueError(
            "this tokenizer has no byte alphabet: score the whole split (at_least=None), so that its size counts"
        )
    device = model.embedding.weight.device
    nats, size = 0.0, 0
    with bar(
        title, sum(b.tokens.shape[0] * (b.tokens.shape[1] - 1) for b in windows.batches(batch_size)), progress
    ) as tell:
        for batch in windows.batches(batch_size):
            tokens, targets = batch.tokens.to(device), batch.targets[:, :-1]
            valid = targets != IGNORED
            scored = scorer(model, tokens, tell).cpu()
            nats += float(scored[valid].double().sum())
            if token_bytes is not None:
                size += int(token_bytes[targets[valid]].sum())
    size = windows.documents.bytes if token_bytes is None else size - prefix_bytes * windows.openings
    return nats / (math.log(2) * size), size


def evaluate(
    model: LatentRecurrentTransformer,
    windows: Windows,
    token_bytes: Tensor | None,
    schedule: Schedule,
    ablations: bool = True,
    batch_size: int = BATCH,
    progress: bool = True,
    prefix_bytes: int = 0,
) -> Metrics:
    """Score a model under its training schedule and live, and, where it has a memory, live with that replaced."""
    recurrent = bool(model.config.memory.remembered(model.config.depth))
    schedule = schedule if recurrent else plain()

    def bpb(chosen: LatentRecurrentTransformer, scorer: Scorer, title: str) -> tuple[float, int]:
        return bits_per_byte(chosen, windows, token_bytes, scorer, batch_size, title, progress, prefix_bytes)

    was_training = model.training
    model.eval()
    parallel, size = bpb(model, under(schedule), "parallel")
    alive, _ = bpb(model, live, "live")
    replaced: dict[str, float] = {}
    if recurrent and ablations:
        for name in ABLATIONS:
            replaced[f"live_bpb_memory_{name}"], _ = bpb(ablated(model, name), live, f"memory {name}")
    model.train(was_training)
    return Metrics(
        repr(schedule), windows.targets, size, windows.complete, parallel, alive, alive - parallel, **replaced
    )
