"""`lrt diagnose`: measure one checkpoint in every way there is a table for, and keep the results beside it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lrt.data.prepared import Prepared
from lrt.data.tokenizer import Tokenizer
from lrt.data.windows import Windows, windows
from lrt.distributed.single import SINGLE_PROCESS, SingleProcess
from lrt.eval.ledger import Ledger
from lrt.eval.memory_stats import NOISE, layers, memory_reach, sample, scales, token_pieces
from lrt.eval.results import Result
from lrt.eval.scoring import HEADLINE, Metrics, evaluate, every_ablation
from lrt.eval.sweep_curve import sweep_curve
from lrt.eval.token_scores import Columns, TokenScores, bfloat16, standard, summarise, token_scores
from lrt.model import checkpoint
from lrt.model.checkpoint import snapshot_step, snapshots
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.schedules import library as schedules
from lrt.schedules.base import SCHEDULES, Schedule
from lrt.schedules.parse import Unknown, parse, parse_saved
from lrt.utils import files, plugins
from lrt.utils.progress import warn
from lrt.utils.provenance import hardware

ALONE_BY_FIRST = ("memory",)
"""Measures that rank 0 makes by itself: they take seconds. Of the others all ranks share the windows."""
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

    @property
    def used(self) -> Schedule:
        """The schedule of parallel scores: `plain` where nothing recurs."""
        recurs = self.model.config.memory.stored_sources(self.model.config.depth)
        return self.schedule if recurs else schedules.plain()

    @property
    def settings(self) -> dict[str, Any]:
        """What decides a score, beside the code: what is kept of a stopped measurement belongs to it."""
        return {
            "checkpoint": self.weights,
            "data": self.data,
            "schedule": repr(self.schedule),
            "targets": self.windows.targets,
        }

    def ledger(self, name: str, settings: Mapping[str, Any]) -> Ledger:
        """What is done of a measurement."""
        return Ledger(self.out / "partial", f"{name}-{self.name}", settings, self.ranks)

    def keep(self, name: str) -> Ledger:
        """The ledger of a score, by batches of windows."""
        return self.ledger(name, self.settings)

    @property
    def token_bytes(self) -> Any:
        return self.tokenizer.token_bytes()

    @property
    def prefix_bytes(self) -> int:
        return self.tokenizer.prefix_bytes("a")


def same_tokenizer(data: Prepared, tokenizer: Tokenizer, folder: Path) -> None:
    """Require that a corpus was prepared with the checkpoint's tokenizer."""
    if data.tokenizer.sha256 != tokenizer.sha256:
        raise ValueError(
            f"{data.path} was prepared with another tokenizer than {folder}'s; "
            f"prepare it with --tokenizer {folder / 'tokenizer.json'}"
        )


def subject(
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
    """Load a checkpoint, or a run's, and the windows it is measured on.

    None: the schedule it was trained with; the corpus's folder as its name.
    """
    folder = checkpoint.verify(path)
    model, tokenizer = checkpoint.load(folder, ranks.device)
    same_tokenizer(data, tokenizer, folder)
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
    )


def saved_schedule(folder: Path) -> Schedule:
    """A checkpoint's schedule; one that a plugin registers, and that is not loaded, is `Unknown`."""
    about = checkpoint.about(folder)
    reason = plugins.missing(about.get("plugins", ()), (SCHEDULES.kind,))
    return parse_saved(about.get("schedule", "plain()"), reason)


def corpus_names(folders: Sequence[Path]) -> list[str]:
    """What corpora are called: their folder, by its whole path where two have one name, as results replace others'."""
    short = [folder.resolve().name for folder in folders]
    return [name if short.count(name) == 1 else str(f) for name, f in zip(short, folders, strict=True)]


def sweeps(s: Subject) -> dict[str, Any]:
    """The sweep curve."""
    found = sweep_curve(
        s.model,
        s.windows,
        s.token_bytes,
        s.schedule,
        batch_size=s.batch_size,
        progress=s.progress,
        prefix_bytes=s.prefix_bytes,
        keep=s.keep,
    )
    return found.to_dict()


def ablations(s: Subject) -> dict[str, Any]:
    """Live, and live with the memory replaced in every way."""
    return summary_scores(s, every_ablation()).to_dict()


def summary_scores(s: Subject, replaced: Sequence[str] = HEADLINE) -> Metrics:
    """Parallel and live, and live with the memory replaced: what `lrt evaluate` prints."""
    return evaluate(
        s.model, s.windows, s.token_bytes, s.schedule, replaced, s.batch_size, s.progress, s.prefix_bytes, s.keep
    )


def score_corpora(subjects: Sequence[Subject]) -> Result:
    """Parallel and live scores of one checkpoint on several corpora, each by itself and all as one text.

    All ranks call it; nothing is written but what a stopped call goes on from.
    """
    begun = time.perf_counter()
    first = subjects[0]
    if isinstance(first.used, Unknown) and first.ranks.first:
        warn(f"{first.used.reason}. The score under {first.used} is left out")
    corpora = {s.name: summary_scores(s).to_dict() for s in subjects}
    settings = {"complete": all(c["complete"] for c in corpora.values()), "schedule": repr(first.schedule)}
    values = score_together(list(corpora.values())) | {"corpora": corpora}
    spent = time.perf_counter() - begun
    name = " and ".join(corpora)
    return Result("scores", name, first.weights, settings, values, spent, hardware(first.ranks.device))


def score_together(corpora: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Scores of several corpora as of one text: nats and bytes added up."""
    size = sum(c["bytes"] for c in corpora)
    found = dict(corpora[0])
    for name in found:
        if "bpb" in name:
            found[name] = math.fsum(c[name] * c["bytes"] for c in corpora) / size if len(corpora) > 1 else found[name]
    return found | {
        "targets": sum(c["targets"] for c in corpora),
        "bytes": size,
        "complete": all(c["complete"] for c in corpora),
        **({"gap": found["live_bpb"] - found["parallel_bpb"]} if "parallel_bpb" in found else {}),
    }


def score_windows(s: Subject, kind: str, columns: Columns) -> TokenScores:
    """The windows' scores token by token; stopped, they go on."""
    settings = {"checkpoint": s.weights, "data": s.data, "schedule": repr(s.schedule)}
    ledger = s.ledger(kind, settings)
    return token_scores(s.model, s.windows, s.token_bytes, columns, ledger, s.batch_size, s.prefix_bytes, s.progress)


def bits(s: Subject) -> dict[str, Any]:
    """BPB in every way, by position and document, with intervals."""
    scores = score_windows(s, "bpb", standard(s.used))
    return {"schedule": repr(s.used)} | summarise(scores, (("live", "parallel"), ("off", "live")))


def low_precision(s: Subject) -> dict[str, Any]:
    """bfloat16 beside its control."""
    scores = score_windows(s, "bfloat16", bfloat16(s.model))
    pairs = (("bfloat16 control", "live"), ("bfloat16 live", "bfloat16 control"))
    return {"schedule": repr(s.used)} | summarise(scores, pairs)


def memory(s: Subject) -> dict[str, Any]:
    """Gates, scales and reach; the scales of every snapshot that is there too."""
    inputs = sample(s.windows, min(8, s.batch_size), s.model.embedding.weight.device)
    history = []
    for folder in snapshots(s.run):
        model, _ = checkpoint.load(folder, inputs.device)
        history.append({"step": snapshot_step(folder), "layers": layers(model, inputs), **scales(model)})
    found = {"layers": layers(s.model, inputs), "reach": memory_reach(s.model, inputs), "noise": NOISE}
    return found | {"snapshots": history, "scales": scales(s.model), "inputs": list(inputs.shape)}


def text(s: Subject) -> dict[str, Any]:
    """The beginning of a document, with what recurrence gains on each token."""
    scores = score_windows(s, "bpb", standard(s.used))
    document = int(np.bincount(scores.document).argmax())
    chosen = np.flatnonzero(scores.document == document)[:TEXT]
    return token_pieces(
        s.tokenizer, *(v[chosen].tolist() for v in (scores.tokens, scores.nats["live"], scores.nats["off"]))
    )


MEASURES: dict[str, Callable[[Subject], dict[str, Any]]] = {
    "bpb": bits,
    "sweeps": sweeps,
    "ablations": ablations,
    "memory": memory,
    "text": text,
    "bfloat16": low_precision,
}
"""Kind of result -> how it is measured."""


def diagnose(s: Subject, measures: Sequence[str] = ("bpb", "sweeps", "ablations", "memory", "text")) -> list[Result]:
    """Measure a subject; each result is written as soon as it is there. All ranks call it.

    What they take long for is shared among ranks, and goes on where it was stopped.
    """
    found = []
    for kind in measures:
        begun = time.perf_counter()
        if kind not in ALONE_BY_FIRST:
            values = MEASURES[kind](s)
        else:
            with s.ranks.collective():
                values = s.ranks.broadcast(MEASURES[kind](replace(s, ranks=SINGLE_PROCESS)) if s.ranks.first else {})
        settings = {"targets": s.windows.targets, "complete": s.windows.complete, "schedule": repr(s.schedule)}
        spent = time.perf_counter() - begun
        found.append(Result(kind, s.name, s.weights, settings, values, spent, hardware(s.ranks.device)))
        if s.ranks.first:
            found[-1].write(s.out)
    return found
