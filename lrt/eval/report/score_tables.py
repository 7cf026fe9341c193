"""Tables of what runs are known to be: scores of one text stand in one column, those of another in another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lrt.eval.report.names import name_of
from lrt.eval.report.table import Table
from lrt.eval.runs import Run, Score, ScoredOn
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


def live_scores(runs: Sequence[Run], on: ScoredOn) -> dict[str, Score]:
    """The runs that have a live score of a text, by name."""
    scores = {run.name: score for run in runs for score in run.scores if score.on == on}
    return {name: score for name, score in scores.items() if "live_bpb" in score.values}


def overview_table(runs: Sequence[Run]) -> Table:
    """A row per run: live and the difference from the first beside its name, for each text; then what it cost.

    Of several texts gaps are left out.
    """
    texts, first = texts_scored(runs), runs[0].name
    letters = {on: f" ({label.partition(':')[0]})" if len(texts) > 1 else "" for on, label in texts.items()}
    shown = 2 if len(texts) > 1 else 3
    titles = (name_of("live_bpb"), f"less {first}'s", name_of("gap"))[:shown]
    head = ["run", *(title + letters[on] for on in texts for title in titles), "verdict"]
    head += ["parameters", "tokens", "training FLOPs", "training, s", "CORE", "schedule"]
    by_text = [live_scores(runs, on) for on in texts]
    body = []
    for run in runs:
        scored = [cell for scores in by_text for cell in score_cells(scores, run.name, first)[:shown]]
        verdict = run.values("sweeps").get("verdict", "")
        body.append([run.name, *scored, verdict, *cost_cells(run), core_cell(run), run.about.get("schedule", "")])
    return Table("", head, body)


def score_cells(scores: Mapping[str, Score], name: str, first: str) -> list[str]:
    """Live, less the first run's, and the gap; empty where a run has no score of the text."""
    if name not in scores:
        return ["", "", ""]
    return [scores[name].cell("live_bpb"), less_first(scores, name, first), scores[name].cell("gap")]


def less_first(scores: Mapping[str, Score], name: str, first: str) -> str:
    """A live score less the first run's, with its per cent; empty of the first, and where that has no score."""
    if name == first or first not in scores:
        return ""
    base = scores[first].values["live_bpb"]
    apart = scores[name].values["live_bpb"] - base
    return f"{apart:+.4f} ({100 * apart / base:+.1f} %)"


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
