"""`lrt report RUN…`: one HTML file with everything that is known of some runs. Reads JSON only, and loads no model.

A run's folder gives its metrics log (metrics.jsonl), its checkpoint's config.json and its results
(evaluation/*.json); what is not there is left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from markupsafe import Markup
from matplotlib.axes import Axes

from lrt.eval.report import figures, sentences
from lrt.eval.report.figures import Curves, Quantity
from lrt.eval.report.html import figure_row
from lrt.eval.report.render import notes, render, section
from lrt.eval.report.score_tables import live_scores, overview_table, run_family, texts_scored, unique_names
from lrt.eval.report.sections import (
    ablation_section,
    core_section,
    hop_section,
    memory_section,
    probe_section,
    score_section,
    sweep_section,
    text_section,
)
from lrt.eval.report.style import run_colours
from lrt.eval.runs import Run, ScoredOn
from lrt.utils.files import replace_atomically
from lrt.utils.provenance import code_version

CURVE_POINTS = 2000
"""Points of a curve, at most: a figure does not show more."""
TOKENS = Quantity("tokens", 1e6, "million tokens")
X_AXES = (TOKENS, Quantity("flops", 1e12, "training TFLOPs"), Quantity("seconds", 60, "minutes"))
"""What training curves are drawn against."""
LIVE = "live bits per byte (lower is better)"


def report(path: Path, folders: Sequence[Path], studies: Sequence[Markup] = ()) -> None:
    """Write the report of some runs' folders, and of studies, whose sections are HTML."""
    if len(folders) + len(studies) <= 0:
        raise ValueError(
            "no run is given; name at least one folder of `lrt train`, or a study's results, STUDY.EDITION.jsonl"
        )
    names = unique_names(folders)
    runs = [replace(Run.read(folder), name=name) for name, folder in zip(names, folders, strict=True)]
    parts = [*(run_sections(runs) if runs else ()), *studies]
    path.parent.mkdir(parents=True, exist_ok=True)
    title = "Latent recurrence: " + ("runs compared" if runs else "studies")
    replace_atomically(path, render("page", title=title, parts=parts))


def run_sections(runs: Sequence[Run]) -> list[Markup]:
    """Everything that is known of runs, side by side, as HTML."""
    colours = run_colours({run.name: run_family(run) for run in runs})
    return [
        *overview(runs, colours),
        *training_section(runs, colours),
        *score_section(runs, colours),
        *sweep_section(runs),
        *hop_section(runs, colours),
        *ablation_section(runs),
        *memory_section(runs, colours),
        *text_section(runs),
        *probe_section(runs),
        *core_section(runs),
        *settings_section(runs),
    ]


def overview(runs: Sequence[Run], colours: Mapping[str, str]) -> list[Markup]:
    """Which run is best, a dot per run, a table with a row per run, and what its scores were measured on."""
    texts = texts_scored(runs)
    lines = [
        "Bits per byte (BPB), lower is better; live is decoded token by token, what a user gets; gap is live less "
        "parallel. Differences are from the first run, on the same text.",
        *texts.values(),
        *(f"{run.name}: {outdated_note(run)}" for run in runs if run.outdated),
    ]
    pictures = [
        (partial(figures.draw_scores, scores=scores, colours=colours), f"Live bits per byte, {label}")
        for on, label in texts.items()
        if len(scores := live_scores(runs, on)) > 1
    ]
    height = 1.1 + 0.34 * len(runs)
    caption = "Live bits per byte with 95 % intervals over documents, where they were measured."
    dots = [figure_row(*pictures, caption=caption, height=height)] if pictures else []
    parts = [*dots, overview_table(runs).html(), notes(*lines)]
    return section("Overview", sentences.ranking(runs, texts), parts)


def outdated_note(run: Run) -> str:
    """Which measurements are not shown, and why."""
    names = sorted({f"{result.kind} of {result.subject}" for result in run.outdated})
    return f"{', '.join(names)} left out: measured of other weights than its checkpoint's. Measure again."


def training_section(runs: Sequence[Run], colours: Mapping[str, str]) -> list[Markup]:
    """Loss, and what was measured while training, against tokens, FLOPs and time."""
    curves: Curves = {run.name: run.metrics for run in runs if run.metrics}
    if not curves:
        return []
    thin = {name: lines[:: max(1, len(lines) // CURVE_POINTS)] for name, lines in curves.items()}
    pictures = [
        (partial(figures.draw_losses, curves=thin, colours=colours, x=x), f"Loss against {x.label}") for x in X_AXES
    ]
    parts = [figure_row(*pictures, caption="Training loss, smoothed, mean over the passes that have a loss.")]
    for text, names in texts_while_training(runs).items():
        parts.append(live_figures({name: curves[name] for name in names}, colours, text.label))
    others = (("memory_gamma", "mean |γ|"), ("memory_projection", "RMS of U"))
    pictures = [
        _measured_figure(having, colours, TOKENS, key, label, label)
        for key, label in others
        if (having := runs_with(curves, key))
    ]
    parts += [figure_row(*pictures, caption="How strongly the memory is wired in.")] if pictures else []
    return section("Training", sentences.losses(curves), parts)


def live_figures(curves: Curves, colours: Mapping[str, str], label: str) -> Markup:
    """What was scored on one text while training: live against three axes, and the gap."""
    pictures = [_measured_figure(curves, colours, x, "live_bpb", LIVE, f"Live, {x.label}") for x in X_AXES]
    if gaps := runs_with(curves, "gap"):
        pictures.append(_measured_figure(gaps, colours, TOKENS, "gap", "gap, bits per byte", "Gap, tokens"))
    return figure_row(*pictures, caption=f"While training: live bits per byte, and live less parallel. {label}.")


def _measured_figure(
    curves: Curves, colours: Mapping[str, str], x: Quantity, key: str, label: str, title: str
) -> tuple[Callable[[Axes], None], str]:
    """A figure of `figure_row`: `draw_measured` and its title."""
    return partial(figures.draw_measured, curves=curves, colours=colours, x=x, key=key, label=label), title


def texts_while_training(runs: Sequence[Run]) -> dict[ScoredOn, list[str]]:
    """What was scored while training, and the names of the runs: one figure shows scores of one text."""
    texts: dict[ScoredOn, list[str]] = {}
    for run in runs:
        # The last line may be scored on more tokens; what the curve is of stands in the first.
        first = next((line for line in run.metrics if "live_bpb" in line), None)
        if first is not None:
            texts.setdefault(run.trained_text("val", first.get("targets")), []).append(run.name)
    return texts


def runs_with(curves: Curves, key: str) -> Curves:
    """The metrics logs in which a quantity was measured."""
    return {run: lines for run, lines in curves.items() if any(key in line for line in lines)}


def settings_section(runs: Sequence[Run]) -> list[Markup]:
    """Configurations, and what measured and rendered it all."""
    parts = []
    for run in runs:
        sources = {f"{r.kind} of {r.subject}: lrt {r.code}, {r.hardware.get('device', '')}" for r in run.results}
        text = json.dumps(run.config, indent=2)
        parts.append(render("details", name=run.name, lines=sorted(sources), text=text))
    return section("Settings", [], [notes(f"Rendered by lrt {code_version()}."), *parts])
