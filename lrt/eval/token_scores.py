"""Scores token by token: several ways of scoring side by side, cut by position and document, with intervals.

Every target of the windows has its nats under each *column*: `live`, `parallel`, each pass of the schedule, `off`
(nothing recurrent is read). A stopped scoring goes on from its ledger, and ranks share the windows.

Shapes: B windows, T positions, n targets.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lrt.data.batch import IGNORED
from lrt.data.windows import Windows
from lrt.eval.ledger import InMemory
from lrt.eval.scoring import BATCH, score, score_parallel
from lrt.model.cross_entropy import token_nats
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.schedules.base import Schedule
from lrt.schedules.library import plain, sequential
from lrt.schedules.refinement import refine
from lrt.utils.progress import bar

Columns = Callable[[LatentRecurrentTransformer, Tensor], dict[str, Tensor]]
"""(model, tokens (B, T)) -> nats (B, T-1) by name; NaN where a column has none."""
EDGES = (0, 8, 32, 128, 512, 2048, 8192)
"""Where position buckets begin, and buckets of document lengths in tokens."""
RESAMPLES = 2000
"""Of the bootstrap over documents."""
LEVEL = 0.95
"""Of its intervals."""
Interval = tuple[float, float] | tuple[None, None]
"""(low, high); a single document has none."""


@dataclass(frozen=True)
class TokenScores:
    """One entry per target, window by window in the order of the text."""

    document: np.ndarray
    """(n,) which of the split's documents."""
    place: np.ndarray
    """(n,) position in its window, from 0: how much context the token had."""
    position: np.ndarray
    """(n,) position in its document."""
    length: np.ndarray
    """(n,) tokens of its document."""
    tokens: np.ndarray
    """(n,) the token ids."""
    bytes: np.ndarray
    """(n,) UTF-8 bytes."""
    nats: dict[str, np.ndarray]
    """(n,) by column; NaN where it has none."""


def standard_columns(schedule: Schedule) -> Columns:
    """live, parallel, every pass of the schedule, and off. Of a mixture or stages the passes are left out."""
    parts = schedule.scoring_parts()

    def columns(model: LatentRecurrentTransformer, tokens: Tensor) -> dict[str, Tensor]:
        nats = {
            "live": score(model, tokens),
            "parallel": torch.stack([p * score_parallel(model, tokens, part) for p, part in parts]).sum(0),
            "off": score_parallel(model, tokens, plain()),
        }
        if len(parts) == 1:
            nats |= pass_nats(model, tokens, parts[0][1])
        return nats

    return columns


def pass_nats(model: LatentRecurrentTransformer, tokens: Tensor, schedule: Schedule) -> dict[str, Tensor]:
    """`pass 1`, `pass 2`, …: the nats of the positions that each computed, NaN elsewhere."""
    by_pass, length = {}, tokens.shape[1] - 1
    # A pass without positions is left out of a schedule; padding keeps it in, so that the others keep their numbers.
    longest = max(p.stride for p in schedule.passes(model.config.context))
    tokens = F.pad(tokens, (0, max(0, longest - length)))
    with torch.no_grad():
        for number, (p, _, hidden) in enumerate(refine(model, tokens[:, :-1], schedule).passes, 1):
            nats = torch.full(tokens[:, 1:].shape, math.nan, dtype=hidden.dtype, device=tokens.device)
            nats[:, p.slice] = token_nats(model, hidden, tokens[:, 1:][:, p.slice]).to(nats)
            by_pass[f"pass {number}"] = nats[:, :length]
    return by_pass


def bfloat16_columns(model: LatentRecurrentTransformer) -> Columns:
    """live, bfloat16 live, and the control: bfloat16 that is given the exact memory at every position.

    Control less live is what bfloat16's arithmetic costs; bfloat16 live less control is what its errors add by going
    round the recurrence.
    """
    low = copy.deepcopy(model).to(torch.bfloat16)

    def columns(model: LatentRecurrentTransformer, tokens: Tensor) -> dict[str, Tensor]:
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        with torch.no_grad():
            state = model.empty_state(len(inputs), inputs.shape[1], tokens=inputs).in_place()
            exact = refine(model, inputs, sequential(), state=state)
            # All positions in one forward, which reads the memory that float32 has written.
            memory = exact.state.memory.to(torch.bfloat16)
            written = low.empty_state(len(inputs), inputs.shape[1], tokens=inputs)
            written = dataclasses.replace(written, memory=memory, slot_positions=exact.state.slot_positions)
            hidden, _ = low(inputs, range(inputs.shape[1]), written)
            return {
                "live": token_nats(model, exact.hidden, targets),
                "bfloat16 live": score(low, tokens),
                "bfloat16 control": token_nats(low, hidden, targets),
            }

    return columns


def token_scores(
    model: LatentRecurrentTransformer,
    windows: Windows,
    token_bytes: Tensor | None,
    columns: Columns,
    ledger: InMemory,
    batch_size: int = BATCH,
    prefix_bytes: int = 0,
    progress: bool = True,
) -> TokenScores:
    """Score every target of the windows; all ranks of the ledger call it and get all scores.

    ValueError for a tokenizer without a byte alphabet: the bytes of its single tokens are not known.
    """
    if token_bytes is None:
        raise ValueError("this tokenizer has no byte alphabet: only whole splits have scores (lrt evaluate)")
    device = model.embedding.weight.device
    index_of = {str(start): i for i, start in enumerate(windows.starts)}  # a window's key is where its text starts
    todo = np.array([index_of[key] for key in ledger.todo(list(index_of))], dtype=np.int64)
    part = windows.select(todo)
    was_training = model.training
    model.eval()
    with bar("scoring tokens", len(todo), progress) as advance:
        first = 0
        for batch in part.batches(batch_size):
            nats = {name: value.cpu().double() for name, value in columns(model, batch.tokens.to(device)).items()}
            rows = range(first, first + len(batch.tokens))
            valid = [int((row != IGNORED).sum()) for row in batch.targets]
            ledger.add(
                {
                    str(part.starts[i]): {name: json_numbers(value[row, : valid[row]]) for name, value in nats.items()}
                    for row, i in enumerate(rows)
                }
            )
            first += len(batch.tokens)
            advance(len(batch.tokens))
    model.train(was_training)
    return gather_rows(windows, ledger.gather(), token_bytes.numpy(), prefix_bytes)


def json_numbers(values: Tensor) -> list[float | None]:
    """Numbers for JSON, which knows no NaN."""
    return [None if math.isnan(v) else v for v in values.tolist()]


def gather_rows(windows: Windows, done: Mapping[str, Any], token_bytes: np.ndarray, prefix_bytes: int) -> TokenScores:
    """The windows' scores in the order of the text."""
    order = np.argsort(windows.starts)
    starts, lengths = windows.starts[order], windows.lengths[order]
    spans = list(zip(starts, lengths, strict=True))
    places = np.concatenate([np.arange(n) for n in lengths])
    where = np.concatenate([np.arange(s, s + n) for s, n in spans])  # in the split's tokens
    offsets = windows.documents.offsets
    document = np.searchsorted(offsets, where, side="right") - 1
    tokens = np.concatenate([np.asarray(windows.documents.tokens[s : s + n]) for s, n in spans]).astype(np.int64)
    position = where - offsets[document]
    names = list(dict.fromkeys(name for s in starts for name in done[str(s)]))
    nats = {  # None becomes NaN
        name: np.array([v for s, n in spans for v in done[str(s)].get(name) or [None] * n], dtype=np.float64)
        for name in names
    }
    # A document's first token may begin with a space that is no part of the text.
    size = token_bytes[tokens] - np.where(position == 0, prefix_bytes, 0)
    return TokenScores(document, places, position, np.diff(offsets)[document], tokens, size, nats)


def column_bpb(scores: TokenScores, column: str, subset: np.ndarray | None = None) -> float:
    """Bits per byte of a column, over the targets that it has; `subset` (n,) bool: of those."""
    nats = scores.nats[column]
    counted = ~np.isnan(nats) if subset is None else ~np.isnan(nats) & subset
    size = scores.bytes[counted].sum()
    return float(nats[counted].sum() / (math.log(2) * size)) if size > 0 else math.nan


def bootstrap_interval(scores: TokenScores, column: str, minus: str | None = None, seed: int = 0) -> Interval:
    """The 95 % interval of a column's BPB, or of its difference to another's, over documents drawn anew.

    The documents are what varies: tokens of one document are no independent samples, and a single one has no interval.
    """
    _, index = np.unique(scores.document, return_inverse=True)
    count = int(index.max()) + 1
    if count == 1:
        return None, None
    present = ~np.isnan(scores.nats[column])
    nats = np.where(present, scores.nats[column] - (0 if minus is None else scores.nats[minus]), 0.0)
    # By document: nats and bytes of the targets that the column has.
    sums = np.bincount(index, np.where(np.isnan(nats), 0, nats), count)
    sizes = np.bincount(index, scores.bytes * present, count)
    generator = np.random.default_rng(seed)
    samples = []
    for _ in range(RESAMPLES):
        # How often each document is drawn. BPB is a ratio of sums, not a mean of the documents' ratios.
        times = np.bincount(generator.integers(count, size=count), minlength=count)
        samples.append((times @ sums) / (math.log(2) * max(1, times @ sizes)))
    low, high = np.quantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def bpb_by_bucket(scores: TokenScores, by: np.ndarray) -> list[dict[str, Any]]:
    """BPB of every column by buckets of a quantity of the targets: from (included) to (excluded)."""
    buckets = []
    for low, high in zip(EDGES, (*EDGES[1:], None), strict=True):
        inside = (by >= low) & (by < (np.inf if high is None else high))
        if inside.any():
            values = {name: column_bpb(scores, name, inside) for name in scores.nats if not name.startswith("pass")}
            buckets.append({"from": low, "to": high, "targets": int(inside.sum()), "bpb": values})
    return buckets


def summarise(scores: TokenScores, pairs: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    """The values of a bpb or bfloat16 result: plain data. `pairs` (a, b): differences a - b, with intervals."""
    columns = {}
    for name in scores.nats:
        low, high = bootstrap_interval(scores, name)
        columns[name] = {"bpb": column_bpb(scores, name), "low": low, "high": high}
    differences = {}
    for a, b in pairs:
        low, high = bootstrap_interval(scores, a, b)
        differences[f"{a} - {b}"] = {"bpb": column_bpb(scores, a) - column_bpb(scores, b), "low": low, "high": high}
    return {
        "targets": len(scores.tokens),
        "bytes": int(scores.bytes.sum()),
        "documents": len(np.unique(scores.document)),
        "columns": columns,
        "differences": differences,
        "by_place_in_window": bpb_by_bucket(scores, scores.place),
        "by_position_in_document": bpb_by_bucket(scores, scores.position),
        "by_document_length": bpb_by_bucket(scores, scores.length),
    }
