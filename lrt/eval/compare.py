"""`lrt compare`: runs scored on the same windows, and how sure the difference from the first one is.

A token's score under one run is paired with its score under the other: what makes a text hard is in both, and drops out
of the difference. Scores are those of `lrt diagnose --only bpb`, kept where it keeps them, so nothing is scored twice.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from lrt.data.prepared import Prepared
from lrt.data.windows import windows
from lrt.distributed.single_process import SingleProcess
from lrt.eval.diagnose import Subject, load_subject, measure_bpb, score_windows
from lrt.eval.results import Result, read_results
from lrt.eval.runs import Run, ScoredOn
from lrt.eval.scoring import BATCH
from lrt.eval.token_scores import Interval, TokenScores, bootstrap_interval, column_bpb, standard_columns
from lrt.model import checkpoint
from lrt.utils.files import check_writable
from lrt.utils.provenance import hardware

FEWEST_DOCUMENTS = 10
"""Below so many documents, windows are drawn anew instead: an interval from two books would say little."""
Unit = Literal["documents", "windows"]


@dataclass(frozen=True)
class Difference:
    """Live bits per byte of a run less those of the first."""

    bpb: float
    low: float | None
    """Of the 95 % interval; None where one window is all there is."""
    high: float | None
    relative: float
    """Over the first run's score: -0.01 is one per cent better."""

    @property
    def clear(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Comparison:
    """Runs on one text, the first of them the one that others are compared with."""

    on: ScoredOn
    unit: Unit
    """What was drawn anew for the intervals."""
    units: int
    runs: Mapping[str, Run]
    """By name, with the scores that were just made."""
    differences: Mapping[str, Difference]
    """Of all but the first."""

    @property
    def first(self) -> str:
        """The name of the run that others are compared with."""
        return next(iter(self.runs))


def compare(
    folders: Mapping[str, Path],
    data: Prepared,
    split: str,
    at_least: int | None,
    batch_size: int = BATCH,
    device: str = "cpu",
    progress: bool = True,
) -> Comparison:
    """Score runs (name -> folder) live and parallel on the same windows of `data`, and compare them with the first.

    Windows are as long as the shortest context. Results go beside each checkpoint. ValueError for fewer than two runs,
    and for a run without a checkpoint or of another tokenizer than the data's, before anything is scored.
    """
    if len(folders) < 2:
        raise ValueError(
            f"{len(folders)} run is named; name two different ones at least, the first is what others are compared with"
        )
    before = {name: check_run(folder, data) for name, folder in folders.items()}
    context = min(run.context for run in before.values() if run.context is not None)
    scores, on = {}, None
    for name, folder in folders.items():
        subject = load_subject(folder, data, split, at_least, batch_size, None, SingleProcess(device), progress)
        shared = on_windows(subject, data, context, at_least)
        on = score_and_keep(shared, context)
        scores[name] = score_windows(shared, "bpb", standard_columns(shared.scoring_schedule))
    assert on is not None
    first, *others = scores.values()
    unit, unit_of_target = units_of(first)
    differences = [difference(one, first, unit_of_target) for one in others]
    runs = {name: Run.read(folder) for name, folder in folders.items()}
    return Comparison(
        on, unit, len(np.unique(unit_of_target)), runs, dict(zip(list(runs)[1:], differences, strict=True))
    )


def check_run(folder: Path, data: Prepared) -> Run:
    """What is known of a run that can be scored on `data`. ValueError for one that cannot."""
    saved = checkpoint.verify(folder)
    check_writable(folder / "evaluation")
    run = Run.read(folder)
    if run.config.get("tokenizer_sha256") != data.tokenizer.sha256:
        raise ValueError(
            f"{data.path} was prepared with another tokenizer than {saved}'s; compare runs of one tokenizer, on text "
            f"prepared with --tokenizer {saved / 'tokenizer.json'}"
        )
    return run


def on_windows(subject: Subject, data: Prepared, context: int, at_least: int | None) -> Subject:
    """The subject on windows of `context` tokens; where that is not its own, under a name of its own."""
    own = subject.model.config.context == context
    name = subject.name if own else f"{data.path.name} in {context}-{subject.split}"
    return dataclasses.replace(subject, name=name, windows=windows(data.split(subject.split), context, at_least))


def score_and_keep(subject: Subject, context: int) -> ScoredOn:
    """Score a subject, write the result, and say what it is of."""
    start = time.perf_counter()
    values = measure_bpb(subject)
    noted = {**subject.scored_on[subject.name], "context": context}
    settings = {
        "targets": subject.windows.targets,
        "complete": subject.windows.complete,
        "schedule": repr(subject.schedule),
        "on": {subject.name: noted},
    }
    spent, machine = time.perf_counter() - start, hardware(subject.ranks.device)
    measured = Result("bpb", subject.name, subject.weights, settings, values, spent, machine)
    if is_longer_known(measured, subject.out):
        name = f"{subject.name}, {values['targets']} tokens"
        measured = dataclasses.replace(measured, subject=name, settings={**settings, "on": {name: noted}})
    measured.write(subject.out)
    return ScoredOn(**noted, targets=values["targets"], name=subject.name.removesuffix(f"-{subject.split}"))


def is_longer_known(measured: Result, folder: Path) -> bool:
    """Whether a folder has the same of more tokens, which is not to be replaced by this."""
    same = (measured.kind, measured.subject, measured.checkpoint)
    return any(
        (one.kind, one.subject, one.checkpoint) == same and one.values["targets"] > measured.values["targets"]
        for one in read_results(folder)
    )


def units_of(scores: TokenScores) -> tuple[Unit, np.ndarray]:
    """What is drawn anew for an interval, and (n,) which one each target is of: documents, or windows of few documents.

    Windows of one document are not independent. Of paired differences that matters less than of scores.
    """
    if len(np.unique(scores.document)) >= FEWEST_DOCUMENTS:
        return "documents", scores.document
    return "windows", np.cumsum(scores.place == 0)


def difference(one: TokenScores, first: TokenScores, units: np.ndarray) -> Difference:
    """Of two runs on the same targets, live, with the interval over units drawn anew."""
    assert np.array_equal(one.tokens, first.tokens)
    nats = {"one": one.nats["live"], "first": first.nats["live"]}
    paired = dataclasses.replace(first, document=units, nats=nats)
    low, high = paired_interval(paired)
    base = column_bpb(paired, "first")
    apart = column_bpb(paired, "one") - base
    return Difference(apart, low, high, apart / base if base > 0 else math.nan)


def paired_interval(paired: TokenScores) -> Interval:
    """The 95 % interval of column "one" less column "first"."""
    return bootstrap_interval(paired, "one", minus="first")
