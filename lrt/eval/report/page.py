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
from lrt.eval.report.sections import (
    Run,
    ablation_section,
    core_section,
    memory_section,
    score_section,
    sweep_section,
    text_section,
)
from lrt.eval.report.table import Table
from lrt.model.config import ModelConfig
from lrt.model.size import count_parameters
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
    runs = unique_names([Run.read(folder) for folder in folders], folders)
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
        *ablation_section(runs),
        *memory_section(runs, colours),
        *text_section(runs),
        *core_section(runs),
        *settings_section(runs),
    ]


def unique_names(runs: Sequence[Run], folders: Sequence[Path]) -> list[Run]:
    """The runs, by the folder's whole path where two have one name."""
    names = [run.name for run in runs]
    return [
        run if names.count(run.name) == 1 else replace(run, name=str(folder))
        for run, folder in zip(runs, folders, strict=True)
    ]


def overview(runs: Sequence[Run]) -> str:
    """A table with a row per run."""
    head = ["run", "parameters", "tokens", "FLOPs", "seconds", "schedule", "live BPB", "gap", "verdict", "CORE"]
    note = (
        "Bits per byte, lower is better; live is decoded token by token, what a user gets; gap is live less parallel."
    )
    return Table("", head, [run_cells(run) for run in runs]).html() + f"<p>{note}</p>"


def run_cells(run: Run) -> list[str]:
    """The cells of a run; empty where something is not known."""
    config, trained = run.config.get("model"), run.about.get("trained", {})
    # Later measurements replace those that the checkpoint was saved with.
    scores = {**run.about.get("scores", {}), **run.values("scores"), **run.values("ablations")}
    live = f"{scores['live_bpb']:.4f}" if "live_bpb" in scores else ""
    columns = run.values("bpb").get("columns", {})
    if "live" in columns:
        live = "{bpb:.4f}".format(**columns["live"])
        if columns["live"]["low"] is not None:
            live += " [{low:.3f}, {high:.3f}]".format(**columns["live"])
    core = run.values("core")
    return [
        run.name,
        f"{count_parameters(ModelConfig.from_dict(config))[0]:,}" if config else "",
        f"{trained['tokens']:,}" if trained else "",
        f"{trained['flops']:.2e}" if trained else "",
        f"{trained['seconds']:.0f}" if trained else "",
        run.about.get("schedule", ""),
        live,
        f"{scores['gap']:+.4f}" if "gap" in scores else "",
        run.values("sweeps").get("verdict", ""),
        f"{core['score'][core['modes'][0]]:+.4f} {core['name']}" if core else "",
    ]


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
    live = runs_with(curves, "live_bpb")
    if live:
        pictures = [
            _measured_figure(live, colours, x, "live_bpb", "live bits per byte", f"Live, {x.label}") for x in X_AXES
        ]
        parts.append(figure_row(*pictures, caption="Live bits per byte while training."))
    others = (("gap", "gap, bits per byte"), ("memory_gamma", "mean |γ|"), ("memory_projection", "RMS of U"))
    pictures = [
        _measured_figure(having, colours, TOKENS, key, label, label)
        for key, label in others
        if (having := runs_with(curves, key))
    ]
    if pictures:
        caption = "While training: live less parallel bits per byte; how strongly the memory is wired in."
        parts.append(figure_row(*pictures, caption=caption))
    return [*parts, "</section>"]


def _measured_figure(
    curves: Curves, colours: Mapping[str, str], x: Quantity, key: str, label: str, title: str
) -> tuple[Callable[[Axes], None], str]:
    """A figure of `figure_row`: `draw_measured` and its title."""
    return partial(figures.draw_measured, curves=curves, colours=colours, x=x, key=key, label=label), title


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
