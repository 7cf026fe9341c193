"""Tables of what runs are known to be: scores of one text stand in one column, those of another in another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lrt.eval.report.names import name_of
from lrt.eval.report.table import Table
from lrt.eval.runs import Run, ScoredOn
from lrt.model.config import ModelConfig

COLUMNS = (
    "live_bpb", "interval", "parallel_bpb", "schedule", "gap", "live_bpb_memory_zero", "live_bpb_memory_embedding",
)  # fmt: skip
"""What a table of scores shows of each."""


def unique_names(folders: Sequence[Path]) -> list[str]:
    """What runs are called: their folders' names, or whole paths where two have one name."""
    names = [Run.read(folder).name for folder in folders]
    return [name if names.count(name) == 1 else str(f) for name, f in zip(names, folders, strict=True)]


def run_family(run: Run) -> str:
    """A run's family, by its configuration: transformer, token shift, loop, ponder or lrt."""
    if not (saved := run.config.get("model")):
        return "lrt"  # a folder of results alone does not say
    model = ModelConfig.from_dict(saved)
    if model.memory.injection != "none":
        return "lrt" if model.stored_sources else "token shift"
    if model.loops > 1:
        return "loop"
    return "ponder" if model.thoughts else "transformer"


def texts_scored(runs: Sequence[Run]) -> dict[ScoredOn, str]:
    """Everything that some run was scored on, and its label: with a letter in front where there are several."""
    texts = list(dict.fromkeys(score.on for run in runs for score in run.scores))
    named = {on.data: on.name for run in runs for on in (s.on for s in run.scores) if on.name}
    labels = [ScoredOn(on.data, on.split, on.context, on.targets, named.get(on.data, "")).label for on in texts]
    if len(texts) == 1:
        return dict(zip(texts, labels, strict=True))
    return {on: f"{chr(ord('A') + i)}: {label}" for i, (on, label) in enumerate(zip(texts, labels, strict=True))}


def score_tables(runs: Sequence[Run]) -> dict[ScoredOn, Table]:
    """A table of scores for each text, its runs from the best live score to the worst: no order spans two texts."""
    tables = {}
    for on, label in texts_scored(runs).items():
        rows = [(run.name, score) for run in runs for score in run.scores if score.on == on]
        rows.sort(key=lambda row: row[1].values.get("live_bpb", float("inf")))
        body = [[name, *map(score.cell, COLUMNS)] for name, score in rows]
        tables[on] = Table(label, ["run", *map(name_of, COLUMNS)], body)
    return tables


def overview_table(runs: Sequence[Run]) -> Table:
    """A row per run; of several texts, live bits per byte in a column of its own for each, and gaps are left out."""
    texts = texts_scored(runs)
    if len(texts) == 1:
        scored = [(on, key, name_of(key)) for on in texts for key in ("live_bpb", "gap")]
    else:
        scored = [(on, "live_bpb", f"{name_of('live_bpb')} ({label.partition(':')[0]})") for on, label in texts.items()]
    head = ["run", "parameters", "tokens", "FLOPs", "seconds", *(t for *_, t in scored), "verdict", "CORE", "schedule"]
    body = []
    for run in runs:
        by_text = {score.on: score for score in run.scores}
        cells = [by_text[on].cell(key) if on in by_text else "" for on, key, _ in scored]
        verdict = run.values("sweeps").get("verdict", "")
        body.append([run.name, *cost_cells(run), *cells, verdict, core_cell(run), run.about.get("schedule", "")])
    return Table("", head, body)


def cost_cells(run: Run) -> list[str]:
    """Parameters, tokens, FLOPs and seconds; empty where not known."""
    trained = run.trained
    return [
        "" if run.parameters is None else f"{run.parameters:,}",
        "" if run.tokens is None else f"{run.tokens:,}",
        f"{trained['flops']:.2e}" if "flops" in trained else "",
        f"{trained['seconds']:.0f}" if "seconds" in trained else "",
    ]


def core_cell(run: Run) -> str:
    """CORE's score under true recurrence, and its name."""
    core = run.values("core")
    return f"{core['score'][core['modes'][0]]:+.4f} {core['name']}" if core else ""


def run_table(run: Run) -> Table:
    """One run's scores, a row for each text."""
    labels = texts_scored([run])
    body = [[labels[score.on], *map(score.cell, COLUMNS)] for score in run.scores]
    return Table("", ["measured on", *map(name_of, COLUMNS)], body)
