"""`lrt report RUN…`: one HTML file with everything that is known of some runs. Reads JSON only, and loads no model.

A run's folder gives its metrics log (metrics.jsonl), its checkpoint's config.json and its results
(evaluation/*.json); what is not there is left out.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from matplotlib.axes import Axes

from lrt.eval.report import figures
from lrt.eval.report.figures import Curves, Quantity
from lrt.eval.report.html import figure_row, render_page
from lrt.eval.report.score_tables import overview_table, texts_scored, unique_names
from lrt.eval.report.sections import (
    ablation_section,
    core_section,
    hop_section,
    memory_section,
    score_section,
    sweep_section,
    text_section,
)
from lrt.eval.runs import Run, ScoredOn
from lrt.utils.files import replace_atomically
from lrt.utils.provenance import code_version

STYLE = """<style>
.text { white-space: pre-wrap; word-break: break-word; font: .85rem/1.7 ui-monospace, monospace; }
.text span { border-radius: 2px; }
section { border-top: 1px solid var(--line); margin-top: 2rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1rem; }
h3 { margin-bottom: .3rem; }
body { max-width: 76rem; } p, figcaption, .text { max-width: 60rem; }
.scroll { margin: 1rem 0; }
@media print {
  :root { --back: #fff; --ink: #000; color-scheme: light; }
  body { font-size: 12px; } section { break-inside: auto; }
  h2, h3 { break-after: avoid; } tr, .pair > div { break-inside: avoid; }
  .scroll { overflow: visible; } table { font-size: .72rem; }
  th, td { white-space: normal; overflow-wrap: break-word; padding: .1rem .3rem; }
  .pair { grid-template-columns: 1fr 1fr; }
  .text span { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
}
</style>"""
CURVE_POINTS = 2000
"""Points of a curve, at most: a figure does not show more."""
TOKENS = Quantity("tokens", 1e6, "million tokens")
X_AXES = (TOKENS, Quantity("flops", 1e12, "training TFLOPs"), Quantity("seconds", 60, "minutes"))
"""What training curves are drawn against."""


def report(path: Path, folders: Sequence[Path], studies: Sequence[str] = ()) -> None:
    """Write the report of some runs' folders, and of studies, whose sections are HTML."""
    if len(folders) + len(studies) <= 0:
        raise ValueError(
            "no run is given; name at least one folder of `lrt train`, or a study's results, STUDY.EDITION.jsonl"
        )
    names = unique_names(folders)
    runs = [replace(Run.read(folder), name=name) for name, folder in zip(names, folders, strict=True)]
    parts = ["<h1>Latent recurrence: " + ("runs compared" if runs else "studies") + "</h1>"]
    parts += [*(run_sections(runs) if runs else ()), *studies]
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_atomically(path, render_page(parts, STYLE))


def run_sections(runs: Sequence[Run]) -> list[str]:
    """Everything that is known of runs, side by side, as HTML."""
    colours = figures.colours_by_name([run.name for run in runs])
    return [
        overview(runs),
        *training_section(runs, colours),
        *score_section(runs, colours),
        *sweep_section(runs),
        *hop_section(runs, colours),
        *ablation_section(runs),
        *memory_section(runs, colours),
        *text_section(runs),
        *core_section(runs),
        *settings_section(runs),
    ]


def overview(runs: Sequence[Run]) -> str:
    """A table with a row per run, what its scores were measured on, and what was left out."""
    notes = [
        "Bits per byte, lower is better; live is decoded token by token, what a user gets; gap is live less parallel.",
        *texts_scored(runs).values(),
        *(f"{run.name}: {outdated_note(run)}" for run in runs if run.outdated),
    ]
    return overview_table(runs).html() + f"<p>{'<br>'.join(map(html.escape, notes))}</p>"


def outdated_note(run: Run) -> str:
    """Which measurements are not shown, and why."""
    names = sorted({f"{result.kind} of {result.subject}" for result in run.outdated})
    return f"{', '.join(names)} left out: measured of other weights than its checkpoint's. Measure again."


def training_section(runs: Sequence[Run], colours: Mapping[str, str]) -> list[str]:
    """Loss, and what was measured while training, against tokens, FLOPs and time."""
    curves: Curves = {run.name: run.metrics for run in runs if run.metrics}
    if not curves:
        return []
    parts = ["<section><h2>Training</h2>"]
    thin = {name: lines[:: max(1, len(lines) // CURVE_POINTS)] for name, lines in curves.items()}
    pictures = [
        (partial(figures.draw_losses, curves=thin, colours=colours, x=x), f"Loss against {x.label}") for x in X_AXES
    ]
    parts.append(figure_row(*pictures, caption="Training loss, smoothed, mean over the passes that have a loss."))
    for text, names in texts_while_training(runs).items():
        live = {name: curves[name] for name in names}
        pictures = [
            _measured_figure(live, colours, x, "live_bpb", "live bits per byte", f"Live, {x.label}") for x in X_AXES
        ]
        gaps = runs_with(live, "gap")
        if gaps:
            pictures.append(_measured_figure(gaps, colours, TOKENS, "gap", "gap, bits per byte", "Gap, tokens"))
        caption = f"While training: live bits per byte, and live less parallel. {text.label}."
        parts.append(figure_row(*pictures, caption=caption))
    others = (("memory_gamma", "mean |γ|"), ("memory_projection", "RMS of U"))
    pictures = [
        _measured_figure(having, colours, TOKENS, key, label, label)
        for key, label in others
        if (having := runs_with(curves, key))
    ]
    if pictures:
        caption = "While training: how strongly the memory is wired in."
        parts.append(figure_row(*pictures, caption=caption))
    return [*parts, "</section>"]


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


def settings_section(runs: Sequence[Run]) -> list[str]:
    """Configurations, and what measured and rendered it all."""
    parts = [f"<section><h2>Settings</h2><p>Rendered by lrt {html.escape(code_version())}.</p>"]
    for run in runs:
        sources = {f"{r.kind} of {r.subject}: lrt {r.code}, {r.hardware.get('device', '')}" for r in run.results}
        lines = "".join(f"<li>{html.escape(line)}</li>" for line in sorted(sources))
        config = html.escape(json.dumps(run.config, indent=2))
        parts.append(
            f"<details><summary>{html.escape(run.name)}</summary><ul>{lines}</ul><pre>{config}</pre></details>"
        )
    return [*parts, "</section>"]
