"""Scores: bits per byte under a schedule, and live, token by token with true recurrence: what a user gets.

Shapes: B rows, T positions. BPB = nats / (ln 2 · bytes) over targets (contract, section 4).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrt.data.batch import IGNORED
from lrt.data.windows import Windows
from lrt.eval.ablations import ABLATIONS, OwnMemory, ablate, with_ablation
from lrt.eval.ledger import InMemory, LedgerFactory, in_memory
from lrt.inference.decoders import decoder
from lrt.model.cross_entropy import token_nats
from lrt.model.execution import EAGER
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.schedules.base import Schedule
from lrt.schedules.library import plain
from lrt.schedules.parse import Unknown
from lrt.schedules.refinement import refine
from lrt.utils.progress import Advance, bar

BATCH = 64
"""Windows scored at once."""
TWO_FORWARDS = "two_forwards"
"""The ablation that is a scorer of its own, not another memory."""
HEADLINE = ("zero", "embedding")
"""What a comparison always contains (contract, section 5)."""


def every_ablation() -> tuple[str, ...]:
    """What `evaluate` can replace the memory with."""
    return (*ABLATIONS, TWO_FORWARDS)


def score(
    model: LatentRecurrentTransformer,
    tokens: Tensor,
    documents: Tensor | None = None,
    advance: Advance | None = None,
) -> Tensor:
    """Live negative log-likelihoods (B, T-1), in nats, of tokens (B, T) int: each decoded from those before it.

    documents (B, T) int separates packed documents. The first token of a later one (its BOS) is scored from the last
    position of the one before, which says nothing of it: leave it out. `advance` is called with the rows
    of each position done. Gives no gradients; `refine(model, tokens, schedules.sequential())` is the same with them.
    ValueError for T below 2.
    """
    batch, length = tokens.shape
    if length < 2:
        raise ValueError(
            f"tokens have shape {tuple(tokens.shape)}; scoring needs at least two per row: BOS and one more"
        )
    inputs = tokens[:, :-1]
    input_documents = None if documents is None else documents[:, :-1]
    hidden: list[Tensor] = []
    # The decoder of generation, so that what is scored is what a user gets. Its buffers are ordinary tensors, hence
    # no_grad; its calls enter inference mode themselves.
    with torch.no_grad():
        decode = decoder(model, model.empty_state(batch, length - 1, input_documents))
    for t in range(length - 1):
        hidden.append(decode(inputs[:, t], [t] * batch))
        if advance is not None:
            advance(batch)
    with torch.inference_mode():  # what they returned are inference tensors, which autograd refuses
        nats = token_nats(model, torch.stack(hidden, dim=1), tokens[:, 1:])
    return nats.clone()  # outside inference mode: an ordinary tensor


def score_parallel(
    model: LatentRecurrentTransformer, tokens: Tensor, schedule: Schedule, documents: Tensor | None = None
) -> Tensor:
    """Negative log-likelihoods (B, T-1) in nats under a schedule, each position by the last pass that computed it."""
    input_documents = None if documents is None else documents[:, :-1]
    with torch.no_grad():
        hidden = refine(model, tokens[:, :-1], schedule, input_documents, execution=EAGER).hidden
        return token_nats(model, hidden, tokens[:, 1:])


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
    parallel_bpb: float | None
    """Bits per byte under the schedule. None: the schedule is a plugin's that is not loaded."""
    live_bpb: float
    """Bits per byte decoding token by token: the headline."""
    gap: float | None
    """live_bpb - parallel_bpb: what training sees and decoding does not get."""
    live_bpb_memory_zero: float | None = None
    """Live, with the memory zeroed at test time."""
    live_bpb_memory_embedding: float | None = None
    """Live, with the memory replaced by the previous token's embedding."""
    live_bpb_memory_shuffled: float | None = None
    """Live, each row reading another row's memory; which one depends on the batch."""
    live_bpb_memory_delayed_1: float | None = None
    """Live, the memory read one token further back."""
    live_bpb_memory_delayed_8: float | None = None
    """Live, the memory read eight tokens further back."""
    live_bpb_memory_frozen: float | None = None
    """Live, every position reading the memory of its window's first one."""
    live_bpb_two_forwards: float | None = None
    """Live, every token refined once more, with its own memory: depth instead of recurrence."""
    registered: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Live, under ablations that users registered, by live_bpb_memory_NAME."""

    def __repr__(self) -> str:
        beside = "" if self.parallel_bpb is None else f", parallel {self.parallel_bpb:.4f}, gap {self.gap:+.4f}"
        return f"Metrics(live {self.live_bpb:.4f}{beside} bits per byte; {self.targets:,} tokens)"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Metrics:
        """The inverse of `to_dict`."""
        own = {field.name for field in dataclasses.fields(cls)} - {"registered"}
        known: dict[str, Any] = {"parallel_bpb": None, "gap": None} | {name: values[name] for name in own & set(values)}
        return cls(**known, registered={name: value for name, value in values.items() if name not in own})

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON; what was not measured is left out."""
        values = dataclasses.asdict(self)
        registered = values.pop("registered")
        return {name: value for name, value in values.items() if value is not None} | registered


Scorer = Callable[[LatentRecurrentTransformer, Tensor, Advance], Tensor]
"""(model, tokens (B, T), advance) -> nats (B, T-1)."""


def live_scorer(model: LatentRecurrentTransformer, tokens: Tensor, advance: Advance) -> Tensor:
    """`score` as a Scorer."""
    return score(model, tokens, advance=advance)


def two_forwards(model: LatentRecurrentTransformer, tokens: Tensor, advance: Advance) -> Tensor:
    """Live, each token computed twice: the second forward reads the memory that the first one wrote, and replaces it.

    What this gains over live is depth; what live gains over zeroed memory is recurrence (PonderLM-2's comparison). The
    second forward reads the token's own memory: exact live decoding is a fixed point, so one that read the
    predecessor's again would change nothing.
    """
    again, inputs, hidden = with_ablation(model, OwnMemory), tokens[:, :-1], []
    with torch.no_grad():
        state = model.empty_state(len(inputs), inputs.shape[1], tokens=inputs).in_place()
        for t in range(inputs.shape[1]):
            _, state = model(inputs[:, t : t + 1], range(t, t + 1), state)
            h, state = again(inputs[:, t : t + 1], range(t, t + 1), state)
            hidden.append(h)
            advance(len(inputs))
        return token_nats(model, torch.cat(hidden, dim=1), tokens[:, 1:])


def schedule_scorer(schedule: Schedule) -> Scorer:
    """The scorer of a schedule; of a mixture the probability-weighted mean, of stages the last one's."""

    def scorer(model: LatentRecurrentTransformer, tokens: Tensor, advance: Advance) -> Tensor:
        nats = torch.stack([p * score_parallel(model, tokens, part) for p, part in schedule.scoring_parts()]).sum(0)
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
    ledger: InMemory | None = None,
) -> tuple[float, int]:
    """(BPB, bytes) of a model over evaluation windows. All ranks of the ledger call it, and share the batches.

    `token_bytes` (V,) gives each token's bytes; None (a tokenizer without a byte alphabet) counts the documents'
    UTF-8 size, which needs all of their windows. `prefix_bytes` are those that the tokenizer puts before every
    document (sentencepiece's space) and that are no part of it.
    """
    if token_bytes is None and not windows.complete:
        raise ValueError(
            "this tokenizer has no byte alphabet: score the whole split (at_least=None), so that its size counts"
        )
    device, ledger = model.embedding.weight.device, InMemory() if ledger is None else ledger
    batches = window_batches(windows, batch_size)
    todo = ledger.todo(list(batches))
    with bar(title.replace("_", " "), sum(batches[key].positions for key in todo), progress) as advance:
        for key in todo:
            batch = next(batches[key].batches(batch_size))
            tokens, targets = batch.tokens.to(device), batch.targets[:, :-1]
            valid = targets != IGNORED
            nats = scorer(model, tokens, advance).cpu()
            size = 0 if token_bytes is None else int(token_bytes[targets[valid]].sum())
            ledger.add({key: [float(nats[valid].double().sum()), size]})
    done = ledger.gather()
    total_nats, total_bytes = (sum(done[key][i] for key in batches) for i in range(2))
    if token_bytes is None:
        total_bytes = windows.documents.bytes
    else:
        total_bytes -= prefix_bytes * windows.document_starts
    return total_nats / (math.log(2) * total_bytes), total_bytes


def window_batches(windows: Windows, batch_size: int) -> dict[str, Windows]:
    """The windows of each batch, by the key of a ledger's item: its first window and the batch size.

    Items are whole batches: with shuffled memory a score depends on which windows are scored together.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    firsts = range(0, len(windows), batch_size)
    return {f"{first}+{batch_size}": windows.select(slice(first, first + batch_size)) for first in firsts}


def batch_size_for(batch_size: int, count: int, ranks: int) -> int:
    """Windows scored at once: at most `batch_size`, and so few that every rank has some of `count`."""
    return min(batch_size, -(-count // ranks))


def size_without_lone_window(batch_size: int, count: int) -> int:
    """The largest batch size up to `batch_size`, else the least above, that leaves none of `count` windows alone."""
    sizes = [*range(batch_size, 1, -1), *range(batch_size, count + 1)]
    return next(size for size in sizes if size > 1 and count % size != 1)


def evaluate(
    model: LatentRecurrentTransformer,
    windows: Windows,
    token_bytes: Tensor | None,
    schedule: Schedule,
    ablations: Sequence[str] = HEADLINE,
    batch_size: int = BATCH,
    progress: bool = True,
    prefix_bytes: int = 0,
    open_ledger: LedgerFactory = in_memory,
) -> Metrics:
    """Score a model under its training schedule and live, and, where it has a memory, live with that replaced.

    `token_bytes` and `prefix_bytes` as for `bits_per_byte`. `ablations` are names of `ABLATIONS`, and `two_forwards`; a
    single window cannot be `shuffled`. `open_ledger` gives each score's ledger by its name: a stopped evaluation goes
    on from there, and its ranks, which all call this, share the batches. ValueError for an unknown ablation.
    """
    unknown = sorted(set(ablations) - set(every_ablation()))
    if unknown:
        raise ValueError(f"unknown ablations {', '.join(unknown)}; choose among {', '.join(every_ablation())}")
    recurrent = bool(model.config.stored_sources)
    schedule = schedule if model.config.is_recurrent else plain()

    # Before anything is measured: all scores share one batch size, and so the keys of their ledgers.
    batch_size = batch_size_for(batch_size, len(windows), open_ledger("live").ranks.ranks)
    if len(windows) == 1:  # there is no other window's memory to read
        ablations = [name for name in ablations if name != "shuffled"]
    if "shuffled" in ablations:
        batch_size = size_without_lone_window(batch_size, len(windows))

    def bpb(scored: LatentRecurrentTransformer, scorer: Scorer, title: str) -> tuple[float, int]:
        return bits_per_byte(
            scored, windows, token_bytes, scorer, batch_size, title, progress, prefix_bytes, open_ledger(title)
        )

    was_training = model.training
    model.eval()
    parallel = None if isinstance(schedule, Unknown) else bpb(model, schedule_scorer(schedule), "parallel")[0]
    live, size = bpb(model, live_scorer, "live")
    ablated: dict[str, float] = {}
    for name in ablations if recurrent else ():
        if name == TWO_FORWARDS:
            ablated["live_bpb_two_forwards"], _ = bpb(model, two_forwards, "two forwards")
        else:
            ablated[f"live_bpb_memory_{name}"], _ = bpb(ablate(model, name), live_scorer, f"memory {name}")
    model.train(was_training)
    gap = None if parallel is None else live - parallel
    own = {field.name for field in dataclasses.fields(Metrics)}
    registered = {name: ablated.pop(name) for name in sorted(set(ablated) - own)}
    return Metrics(
        repr(schedule), windows.targets, size, windows.complete, parallel, live, gap, registered=registered, **ablated
    )
