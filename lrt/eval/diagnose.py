"""`lrt diagnose`: measure one checkpoint, each kind of result by its entry of `MEASURES`, and keep results beside it.

To add a kind, write a function of a `Subject` that returns plain data, and give it a line in `MEASURES`, one in
`lrt.eval.report.result_tables.TABLES` and one in `lrt.eval.report.sentences.SENTENCES`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lrt.data.prepared import Prepared
from lrt.data.tokenizer import Tokenizer
from lrt.data.windows import Windows, windows
from lrt.distributed.single_process import SINGLE_PROCESS, SingleProcess
from lrt.eval.hops import hops_of_windows
from lrt.eval.ledger import Ledger
from lrt.eval.memory_stats import NOISE, layer_stats, longest_inputs, memory_reach, memory_scales, token_pieces
from lrt.eval.results import Result
from lrt.eval.scoring import HEADLINE, Metrics, evaluate, every_ablation
from lrt.eval.sweep_curve import sweep_curve
from lrt.eval.token_scores import Columns, TokenScores, bfloat16_columns, standard_columns, summarise, token_scores
from lrt.model import checkpoint
from lrt.model.checkpoint import snapshot_step, snapshots
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.schedules import library as schedules
from lrt.schedules.base import SCHEDULES, Schedule
from lrt.schedules.parse import Unknown, parse, parse_saved
from lrt.utils import files, plugins
from lrt.utils.progress import warn
from lrt.utils.provenance import hardware

RANK_0_ALONE = ("memory",)
"""Kinds that rank 0 measures by itself: they take seconds. For the others all ranks share the windows."""
TEXT = 1500
"""Tokens of the coloured text."""


@dataclass(frozen=True)
class Subject:
    """A checkpoint and what it is measured on."""

    model: LatentRecurrentTransformer
    tokenizer: Tokenizer
    weights: str
    """SHA-256 of the weights."""
    schedule: Schedule
    """The one trained with."""
    windows: Windows
    batch_size: int
    progress: bool
    run: Path
    """The run's folder, or the checkpoint's."""
    name: str
    """The corpus and its split."""
    data: str
    """The corpus's fingerprint."""
    out: Path
    """Where results go."""
    ranks: SingleProcess = SINGLE_PROCESS
    split: str = "val"

    @property
    def scored_on(self) -> dict[str, Any]:
        """What scores are of, for a result: fields of `runs.ScoredOn`, by the subject's name."""
        return {self.name: {"data": self.data, "split": self.split, "context": self.model.config.context}}

    @property
    def scoring_schedule(self) -> Schedule:
        """The schedule of parallel scores: `plain` where nothing recurs."""
        recurs = self.model.config.stored_sources
        return self.schedule if recurs else schedules.plain()

    @property
    def settings(self) -> dict[str, Any]:
        """What decides a score, beside the code: the settings of its ledger."""
        return {
            "checkpoint": self.weights,
            "data": self.data,
            "schedule": repr(self.schedule),
            "targets": self.windows.targets,
        }

    def ledger(self, name: str, settings: Mapping[str, Any]) -> Ledger:
        """What is done of a measurement that `settings` decide."""
        return Ledger(self.out / "partial", f"{name}-{self.name}", settings, self.ranks)

    def score_ledger(self, name: str) -> Ledger:
        """The ledger of a score, by batches of windows."""
        return self.ledger(name, self.settings)

    @property
    def token_bytes(self) -> Tensor | None:
        """`Tokenizer.token_bytes`."""
        return self.tokenizer.token_bytes()

    @property
    def prefix_bytes(self) -> int:
        """`Tokenizer.prefix_bytes`, which is the same for every text."""
        return self.tokenizer.prefix_bytes("a")


def check_tokenizer(data: Prepared, tokenizer: Tokenizer, folder: Path) -> None:
    """ValueError unless a corpus was prepared with the checkpoint's tokenizer."""
    if data.tokenizer.sha256 != tokenizer.sha256:
        raise ValueError(
            f"{data.path} was prepared with another tokenizer than {folder}'s; "
            f"prepare it with --tokenizer {folder / 'tokenizer.json'}"
        )


def load_subject(
    path: Path,
    data: Prepared,
    split: str,
    at_least: int | None,
    batch_size: int,
    out: Path | None = None,
    ranks: SingleProcess = SINGLE_PROCESS,
    progress: bool = True,
    schedule: str | None = None,
    name: str | None = None,
) -> Subject:
    """Load a checkpoint, or a run's, and the windows of `data` that it is measured on (`at_least` targets).

    `schedule` None: the one it was trained with. `name` None: the corpus's folder. `out` None: evaluation/ in `path`.
    ValueError for a corpus of another tokenizer.
    """
    folder = checkpoint.verify(path)
    model, tokenizer = checkpoint.load(folder, ranks.device)
    check_tokenizer(data, tokenizer, folder)
    return Subject(
        model,
        tokenizer,
        files.sha256(folder / "model.safetensors"),
        saved_schedule(folder) if schedule is None else parse(schedule),
        windows(data.split(split), model.config.context, at_least),
        batch_size,
        progress and ranks.first,
        path,
        f"{name or data.path.name}-{split}",
        data.fingerprint,
        out or path / "evaluation",
        ranks,
        split,
    )


def saved_schedule(folder: Path) -> Schedule:
    """A checkpoint's schedule; one that a plugin registers, and that is not loaded, is `Unknown`."""
    about = checkpoint.about(folder)
    reason = plugins.missing(about.get("plugins", ()), (SCHEDULES.kind,))
    return parse_saved(about.get("schedule", "plain()"), reason)


def corpus_names(folders: Sequence[Path]) -> list[str]:
    """What corpora are called: their folders' names, or paths where two have one name: results go by names."""
    short = [folder.resolve().name for folder in folders]
    return [name if short.count(name) == 1 else str(f) for name, f in zip(short, folders, strict=True)]


def measure_sweeps(subject: Subject) -> dict[str, Any]:
    """`sweep_curve` as plain data."""
    curve = sweep_curve(
        subject.model,
        subject.windows,
        subject.token_bytes,
        subject.schedule,
        batch_size=subject.batch_size,
        progress=subject.progress,
        prefix_bytes=subject.prefix_bytes,
        open_ledger=subject.score_ledger,
    )
    return curve.to_dict()


def measure_hops(subject: Subject) -> dict[str, Any]:
    """`hops_of_windows` as plain data."""
    curve = hops_of_windows(subject.model, subject.windows, subject.batch_size, subject.progress, subject.score_ledger)
    return curve.to_dict()


def measure_ablations(subject: Subject) -> dict[str, Any]:
    """Scores with the memory replaced by every ablation."""
    return summary_scores(subject, every_ablation()).to_dict()


def summary_scores(subject: Subject, ablations: Sequence[str] = HEADLINE) -> Metrics:
    """Parallel and live, and live with the memory replaced: what `lrt evaluate` prints."""
    return evaluate(
        subject.model,
        subject.windows,
        subject.token_bytes,
        subject.schedule,
        ablations,
        subject.batch_size,
        subject.progress,
        subject.prefix_bytes,
        subject.score_ledger,
    )


def score_corpora(subjects: Sequence[Subject]) -> Result:
    """Parallel and live scores of one checkpoint on several corpora, each by itself and all as one text.

    All ranks call it; nothing is written but what a stopped call goes on from.
    """
    start = time.perf_counter()
    first = subjects[0]
    schedule = first.scoring_schedule
    if isinstance(schedule, Unknown) and first.ranks.first:
        warn(f"{schedule.reason}. The score under {schedule} is left out")
    corpora = {subject.name: summary_scores(subject).to_dict() for subject in subjects}
    settings = {
        "complete": all(c["complete"] for c in corpora.values()),
        "schedule": repr(first.schedule),
        "on": {name: on for subject in subjects for name, on in subject.scored_on.items()},
    }
    values = score_together(list(corpora.values())) | {"corpora": corpora}
    spent = time.perf_counter() - start
    name = " and ".join(corpora)
    return Result("scores", name, first.weights, settings, values, spent, hardware(first.ranks.device))


def score_together(corpora: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Scores of several corpora as of one text: nats and bytes added up. One corpus keeps its scores."""
    size = sum(c["bytes"] for c in corpora)
    scores = dict(corpora[0])
    for name in scores if len(corpora) > 1 else ():
        if "bpb" in name:
            scores[name] = math.fsum(c[name] * c["bytes"] for c in corpora) / size
    return scores | {
        "targets": sum(c["targets"] for c in corpora),
        "bytes": size,
        "complete": all(c["complete"] for c in corpora),
        **({"gap": scores["live_bpb"] - scores["parallel_bpb"]} if "parallel_bpb" in scores else {}),
    }


def score_windows(subject: Subject, kind: str, columns: Columns) -> TokenScores:
    """The windows' scores token by token; stopped, they go on.

    Items are windows, which do not depend on how many others there are: `settings` leaves the targets out.
    """
    settings = {"checkpoint": subject.weights, "data": subject.data, "schedule": repr(subject.schedule)}
    ledger = subject.ledger(kind, settings)
    return token_scores(
        subject.model,
        subject.windows,
        subject.token_bytes,
        columns,
        ledger,
        subject.batch_size,
        subject.prefix_bytes,
        subject.progress,
    )


def measure_bpb(subject: Subject) -> dict[str, Any]:
    """BPB live, parallel, by pass and off, by position and document, with intervals."""
    scores = score_windows(subject, "bpb", standard_columns(subject.scoring_schedule))
    return {"schedule": repr(subject.scoring_schedule)} | summarise(scores, (("live", "parallel"), ("off", "live")))


def measure_bfloat16(subject: Subject) -> dict[str, Any]:
    """BPB of bfloat16 beside its control (`bfloat16_columns`), with intervals."""
    scores = score_windows(subject, "bfloat16", bfloat16_columns(subject.model))
    pairs = (("bfloat16 control", "live"), ("bfloat16 live", "bfloat16 control"))
    return {"schedule": repr(subject.scoring_schedule)} | summarise(scores, pairs)


def measure_memory(subject: Subject) -> dict[str, Any]:
    """Gates, scales and reach; the scales of every snapshot that is there too."""
    # A few windows are enough: these are means over all of their positions.
    inputs = longest_inputs(subject.windows, min(8, subject.batch_size), subject.model.embedding.weight.device)
    history = []
    for folder in snapshots(subject.run):
        model, _ = checkpoint.load(folder, inputs.device)
        history.append({"step": snapshot_step(folder), "layers": layer_stats(model, inputs), **memory_scales(model)})
    stats = {"layers": layer_stats(subject.model, inputs), "reach": memory_reach(subject.model, inputs), "noise": NOISE}
    return stats | {"snapshots": history, "scales": memory_scales(subject.model), "inputs": list(inputs.shape)}


def measure_text(subject: Subject) -> dict[str, Any]:
    """The beginning of the document with the most tokens in the windows, scored live and off."""
    # The ledger of `measure_bpb`: where that was called before, nothing is computed again.
    scores = score_windows(subject, "bpb", standard_columns(subject.scoring_schedule))
    document = int(np.bincount(scores.document).argmax())
    tokens = np.flatnonzero(scores.document == document)[:TEXT]
    return token_pieces(
        subject.tokenizer, *(v[tokens].tolist() for v in (scores.tokens, scores.nats["live"], scores.nats["off"]))
    )


MEASURES: dict[str, Callable[[Subject], dict[str, Any]]] = {
    "bpb": measure_bpb,
    "sweeps": measure_sweeps,
    "hops": measure_hops,
    "ablations": measure_ablations,
    "memory": measure_memory,
    "text": measure_text,
    "bfloat16": measure_bfloat16,
}
"""Kind of result -> how it is measured."""


def diagnose(
    subject: Subject, measures: Sequence[str] = ("bpb", "sweeps", "hops", "ablations", "memory", "text")
) -> list[Result]:
    """Measure a subject: results of the kinds `measures`, each written as soon as it is there. All ranks call it.

    What takes long is shared among ranks, and goes on where it was stopped.
    """
    results = []
    for kind in measures:
        start = time.perf_counter()
        if kind in RANK_0_ALONE:
            alone = replace(subject, ranks=SINGLE_PROCESS)
            with subject.ranks.collective():
                values = subject.ranks.broadcast(MEASURES[kind](alone) if subject.ranks.first else {})
        else:
            values = MEASURES[kind](subject)
        settings = {
            "targets": subject.windows.targets,
            "complete": subject.windows.complete,
            "schedule": repr(subject.schedule),
            "on": subject.scored_on,
        }
        spent = time.perf_counter() - start
        results.append(
            Result(kind, subject.name, subject.weights, settings, values, spent, hardware(subject.ranks.device))
        )
        if subject.ranks.first:
            results[-1].write(subject.out)
    return results
