"""How many hops a model's state survives: its loss where the memory holds what h hops brought, against live.

A hop carries what the memory holds from one position to the next that reads it. Behind h full passes the memory has
made h hops: none before the first pass, which reads the initial stand-in, and all of them when decoding live. The loss
after h hops is that of `multi_refinement(h)`, scored by its last pass. The sweep curve (`lrt.eval.sweep_curve`) has the
same losses up to 64 refinements, for its verdict on training; this goes on to live, with the error of each difference.

Shapes: B rows, T positions, D width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lrt.data.batch import IGNORED
from lrt.data.windows import Windows
from lrt.eval.ledger import LedgerFactory, in_memory
from lrt.eval.memory_stats import live_state
from lrt.eval.scoring import BATCH, batch_size_for, window_batches
from lrt.model.cross_entropy import token_nats
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.utils.device import double
from lrt.utils.progress import Advance, bar

TOLERANCE = 0.01
"""Of what the memory gives in all: a loss this near to live is live."""
ERRORS = 2
"""Standard errors within which a difference is none."""
ROUNDING = 1e-6
"""Nats per token: differences below are rounding, whatever their standard error."""
AT_REST = 1e-5
"""‖h_n − h_{n−1}‖ / ‖h_n‖ of the position that moved most, at which further hops bring nothing."""
NOTHING_RECURS = "nothing recurs: there is no memory to carry"
NOT_USED = "the memory is not used: what it gives is within the error of the measurement"
HARMFUL = "the memory does harm: live is worse than with what no hop brings"

WHY = {
    "about": "",
    "more than": ": as many as these rows can tell",
    "at least": ": what more of them bring is within the error of the measurement",
}
"""How the number of hops is meant -> what the verdict says of it."""

RowNats = dict[str, list[float]]
"""`live`, and each number of hops as text -> nats of every row."""


@dataclass(frozen=True)
class HopPoint:
    """The loss after some hops."""

    hops: int
    nats: float
    """Per token."""
    gap: float
    """That less live."""
    error: float | None
    """Standard error of the gap over rows; None: a single row has none."""

    @property
    def noise(self) -> float:
        """A gap up to this cannot be told from none."""
        return max(ROUNDING, ERRORS * (self.error or 0.0))


@dataclass(frozen=True)
class HopCurve:
    """The losses of one model by hops."""

    live: float
    """Nats per token."""
    targets: int
    rows: int
    """Windows of a text."""
    points: tuple[HopPoint, ...]
    """0 hops first. After the last the loss is live by construction: rows have no more positions."""
    survives: int | None
    """Hops. None: there is no memory, or it gives nothing."""
    how: str
    """"about": the fewest measured from which on the loss is live; "at least": so, but the error decides, and more hops
    may bring more; "more than": live only where rows end by construction, and the most at which it is not yet."""
    verdict: str
    """In words."""
    tolerance: float = TOLERANCE
    """Of what the memory gives, within which a loss is live, …"""
    errors: int = ERRORS
    """… or within so many standard errors."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)


def hop_counts(model: LatentRecurrentTransformer, longest: int) -> tuple[int, ...]:
    """0, 1, 2, 4, …, and the hops after which rows of `longest` positions are live; 0 alone where nothing recurs."""
    last = max(1, longest - 1) if model.config.is_recurrent else 0
    powers = (2**i for i in range(last.bit_length()))
    return tuple(sorted({0, last, *(h for h in powers if h < last)}))


def hidden_by_hops(model: LatentRecurrentTransformer, tokens: Tensor, most: int) -> Iterator[Tensor]:
    """Hidden states (B, T, D) of tokens (B, T) after 0, 1, …, `most` hops; from where they rest on, the same ones."""
    length, resting = tokens.shape[1], False
    state = model.empty_state(len(tokens), length, tokens=tokens)
    hidden, state = model(tokens, range(length), state)
    yield hidden
    for n in range(1, most + 1):
        if n < length and not resting:
            # The first n positions are exact: nothing before them changes any more.
            moved, state = model(tokens[:, n:], range(n, length), state)
            change = (moved - hidden[:, n:]).norm(dim=-1) / moved.norm(dim=-1)
            resting = bool((change <= AT_REST).all())
            hidden = torch.cat([hidden[:, :n], moved], 1)
        yield hidden


@torch.no_grad()
def score_rows(
    model: LatentRecurrentTransformer,
    inputs: Tensor,
    targets: Tensor,
    counts: Sequence[int],
    advance: Advance = lambda amount, text="": None,
) -> RowNats:
    """Nats of each row of inputs, targets (B, T) live and after each number of hops in `counts`.

    `advance` is called with the rows of each pass done, live decoding first.
    """
    valid = targets != IGNORED

    def row_sums(hidden: Tensor) -> list[float]:
        return (double(token_nats(model, hidden, targets)) * double(valid)).sum(1).tolist()

    nats = {"live": row_sums(live_state(model, inputs)[0])}
    advance(len(inputs), "live")
    for hops, hidden in enumerate(hidden_by_hops(model, inputs, max(counts))):
        if hops in counts:
            nats[str(hops)] = row_sums(hidden)
        advance(len(inputs), f"{hops} hops")
    return nats


def hops_of_rows(model: LatentRecurrentTransformer, inputs: Tensor, targets: Tensor) -> HopCurve:
    """The curve of rows of one's own: inputs, targets (B, T) int, targets IGNORED (-1) where nothing is asked."""
    nats = score_rows(model, inputs, targets, hop_counts(model, inputs.shape[1]))
    return summarise_hops(nats, (targets != IGNORED).sum(1).tolist())


def hops_of_windows(
    model: LatentRecurrentTransformer,
    windows: Windows,
    batch_size: int = BATCH,
    progress: bool = True,
    open_ledger: LedgerFactory = in_memory,
) -> HopCurve:
    """The curve of a text's windows. `open_ledger` gives the ledger of `hops`, whose ranks share the batches."""
    ledger, device = open_ledger("hops"), model.embedding.weight.device
    batches = window_batches(windows, batch_size_for(batch_size, len(windows), ledger.ranks.ranks))
    counts = hop_counts(model, int(windows.lengths.max()))
    todo, was_training = ledger.todo(list(batches)), model.training
    model.eval()
    # A step of the bar is a window's live decoding, or one of its passes.
    with bar("hops", (2 + counts[-1]) * sum(len(batches[key]) for key in todo), progress) as advance:
        for key in todo:
            batch = next(batches[key].batches(len(batches[key])))
            inputs, targets = batch.tokens[:, :-1].to(device), batch.targets[:, :-1].to(device)
            ledger.add({key: score_rows(model, inputs, targets, counts, advance)})
    model.train(was_training)
    done = ledger.gather()
    names = ("live", *map(str, counts))
    nats = {name: [row for key in batches for row in done[key][name]] for name in names}
    return summarise_hops(nats, windows.lengths.tolist())


def summarise_hops(nats: Mapping[str, Sequence[float]], targets: Sequence[int]) -> HopCurve:
    """The curve of rows, from their nats (`RowNats`) and how many targets each has."""
    size, live = sum(targets), math.fsum(nats["live"])
    points = []
    for name in nats:
        if name != "live":
            gaps = np.subtract(nats[name], nats["live"])
            points.append(HopPoint(int(name), math.fsum(nats[name]) / size, *ratio_and_error(gaps, targets)))
    points.sort(key=lambda point: point.hops)
    return HopCurve(live / size, size, len(targets), tuple(points), *surviving_hops(points))


def ratio_and_error(sums: np.ndarray, sizes: Sequence[int]) -> tuple[float, float | None]:
    """Σ sums / Σ sizes over rows (n,), and its standard error where rows differ in size; None for a single row.

    The error of a ratio estimator (Cochran, Sampling Techniques, section 6.4): of what each row's sum is off the ratio.
    """
    total, count = float(np.sum(sizes)), len(sizes)
    ratio = float(np.sum(sums)) / total
    if count == 1:
        return ratio, None
    off = sums - ratio * np.asarray(sizes)
    return ratio, math.sqrt(count / (count - 1) * float(off @ off)) / total


def surviving_hops(points: Sequence[HopPoint]) -> tuple[int | None, str, str]:
    """`survives`, `how` and `verdict` of a curve, the point of 0 hops first.

    A loss is live where it is nearer than TOLERANCE of what the memory gives, or than its noise. All later ones have to
    be live as well: a loss that swings passes live without staying there.
    """
    gain = points[0]
    if len(points) == 1:
        return None, "", NOTHING_RECURS
    if gain.gap <= gain.noise:
        return None, "", HARMFUL if gain.gap < -gain.noise else NOT_USED
    allowed = TOLERANCE * gain.gap
    live = first_within(points, [max(allowed, point.noise) for point in points])
    if live == len(points) - 1:
        how, survives = "more than", points[live - 1].hops
    else:
        near = live == first_within(points, [max(allowed, ROUNDING)] * len(points))
        how, survives = "about" if near else "at least", points[live].hops
    return survives, how, f"the state survives {how} {survives} hops{WHY[how]}"


def first_within(points: Sequence[HopPoint], allowed: Sequence[float]) -> int:
    """The index from which on all gaps are at most what is allowed of each; at most the last one, which is live."""
    # Not "is farther": a score that is no number is not near.
    away = [i for i, point in enumerate(points[:-1]) if not abs(point.gap) <= allowed[i]]
    return away[-1] + 1 if away else 0
