"""`lrt report RUN…`: one HTML file with everything that is known of some runs. Reads JSON only, and loads nothing.

A run's folder gives its diary (metrics.jsonl), its checkpoint's config.json and its results (evaluation/*.json); what
is not there is left out.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lrt.eval.report import figures
from lrt.eval.report.html import PAGE, figure_row, table
from lrt.eval.report.sections import Run, ablation_table, core, memories, scores, sweep_curves, texts
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
DIARY = 2000
"""Points of a curve, at most: a figure does not show more."""


def report(path: Path, folders: Sequence[Path], studies: Sequence[str] = ()) -> None:
    """Write the report of some runs' folders, and of studies, whose sections are given."""
    if len(folders) + len(studies) <= 0:
        raise ValueError(
            "no run is given; name at least one folder of `lrt train`, or a study's results, STUDY.EDITION.jsonl"
        )
    runs = unique_names([Run.read(folder) for folder in folders], folders)
    parts = ["<h1>Latent recurrence: " + ("runs compared" if runs else "studies") + "</h1>"]
    parts += [*(comparison_section(runs) if runs else ()), *studies]
    page = PAGE.replace("</head>", STYLE + "</head>").replace("{body}", "\n".join(parts))
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_atomically(path, page)


def comparison_section(runs: Sequence[Run]) -> list[str]:
    """Everything that is known of runs, side by side."""
    colours = figures.colours_by_name([run.name for run in runs])
    return [
        overview(runs),
        *training(runs, colours),
        *scores(runs, colours),
        *sweep_curves(runs),
        *ablation_table(runs),
        *memories(runs, colours),
        *texts(runs),
        *core(runs),
        *settings(runs),
    ]


def unique_names(runs: Sequence[Run], folders: Sequence[Path]) -> list[Run]:
    """The runs, by the folder's whole path where two have one name."""
    names = [run.name for run in runs]
    return [
        run if names.count(run.name) == 1 else Run(str(folder), run.diary, run.about, run.results)
        for run, folder in zip(runs, folders, strict=True)
    ]


def overview(runs: Sequence[Run]) -> str:
    """One row per run."""
    body = []
    for run in runs:
        config = run.about.get("model")
        total = f"{count_parameters(ModelConfig.from_dict(config))[0]:,}" if config else ""
        trained = run.about.get("about", {}).get("trained", {})
        found = {**run.about.get("about", {}).get("scores", {}), **run.values("scores"), **run.values("ablations")}
        columns = run.values("bpb").get("columns", {})
        live = f"{found['live_bpb']:.4f}" if "live_bpb" in found else ""
        if "live" in columns:
            live = "{bpb:.4f}".format(**columns["live"])
            if columns["live"]["low"] is not None:
                live += " [{low:.3f}, {high:.3f}]".format(**columns["live"])
        core = run.values("core")
        body.append(
            [
                run.name,
                total,
                f"{trained['tokens']:,}" if trained else "",
                f"{trained['flops']:.2e}" if trained else "",
                f"{trained['seconds']:.0f}" if trained else "",
                run.about.get("about", {}).get("schedule", ""),
                live,
                f"{found['gap']:+.4f}" if "gap" in found else "",
                run.values("sweeps").get("verdict", ""),
                f"{core['score'][core['modes'][0]]:+.4f} {core['name']}" if core else "",
            ]
        )
    head = ["run", "parameters", "tokens", "FLOPs", "seconds", "schedule", "live BPB", "gap", "verdict", "CORE"]
    kept = [i for i in range(len(head)) if any(row[i] for row in body)]
    note = (
        "Bits per byte, lower is better; live is decoded token by token, what a user gets; gap is live less parallel."
    )
    return table([head[i] for i in kept], [[row[i] for i in kept] for row in body]) + f"<p>{note}</p>"


def training(runs: Sequence[Run], colours: Mapping[str, str]) -> list[str]:
    """Loss, and what was measured while training, against tokens, FLOPs and time."""
    curves = {run.name: run.diary for run in runs if run.diary}
    if not curves:
        return []
    thin = {name: lines[:: max(1, len(lines) // DIARY)] for name, lines in curves.items()}
    axes = (("tokens", 1e6, "million tokens"), ("flops", 1e12, "training TFLOPs"), ("seconds", 60, "minutes"))
    parts = ["<section><h2>Training</h2>"]
    loss = [(partial(draw_losses, thin, colours, axis), f"Loss against {axis[2]}") for axis in axes]
    parts.append(figure_row(*loss, caption="Training loss, smoothed, mean over the passes that have a loss."))
    live = watchable(curves, "live_bpb")
    if live:
        pictures = [
            (partial(draw_measurement, live, colours, "live_bpb", "live bits per byte", axis), f"Live, {axis[2]}")
            for axis in axes
        ]
        parts.append(figure_row(*pictures, caption="Live bits per byte while training."))
    others = (("gap", "gap, bits per byte"), ("memory_gamma", "mean |γ|"), ("memory_projection", "RMS of U"))
    pictures = [
        (partial(draw_measurement, having, colours, value, name, axes[0]), name)
        for value, name in others
        if (having := watchable(curves, value))
    ]
    if pictures:
        caption = "While training: live less parallel bits per byte; how strongly the memory is wired in."
        parts.append(figure_row(*pictures, caption=caption))
    return [*parts, "</section>"]


def watchable(curves: Mapping[str, list[dict[str, Any]]], value: str) -> dict[str, list[dict[str, Any]]]:
    """The diaries in which a quantity was measured."""
    return {run: lines for run, lines in curves.items() if any(value in line for line in lines)}


Axis = tuple[str, float, str]


def draw_losses(curves: Any, colours: Any, axis: Axis, ax: Any) -> None:
    figures.losses(ax, curves, colours, *axis)


def draw_measurement(curves: Any, colours: Any, value: str, name: str, axis: Axis, ax: Any) -> None:
    figures.draw_measured(ax, curves, colours, value, *axis, name)


def settings(runs: Sequence[Run]) -> list[str]:
    """Configurations, and what measured and rendered it all."""
    parts = [f"<section><h2>Settings</h2><p>Rendered by lrt {html.escape(code_version())}.</p>"]
    for run in runs:
        made = sorted({f"{r.kind} of {r.subject}: lrt {r.code}, {r.hardware.get('device', '')}" for r in run.results})
        lines = "".join(f"<li>{html.escape(line)}</li>" for line in made)
        about = html.escape(json.dumps(run.about, indent=2))
        parts.append(f"<details><summary>{html.escape(run.name)}</summary><ul>{lines}</ul><pre>{about}</pre></details>")
    return [*parts, "</section>"]
