"""The demo's table and its page, from JSON alone."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from lrt.eval.report.figures import COLOURS, Quantity, draw_losses
from lrt.eval.report.html import figure_svg, render_page
from lrt.eval.report.table import Table
from lrt.utils.files import replace_atomically
from lrt.utils.json_lines import read_json_lines

Column = tuple[str, Callable[[Mapping[str, Any]], str]]
"""A title, and the cell that a model's entry in the summary gives."""
SIZES: tuple[Column, ...] = (
    ("parameters", lambda m: f"{m['parameters']:,}"),
    ("tokens", lambda m: f"{m['tokens']:,}"),
    ("TFLOPs", lambda m: f"{m['training_flops'] / 1e12:.1f}"),
)
SCORES: tuple[Column, ...] = (
    ("train s", lambda m: f"{m['train_seconds']:.0f}"),
    ("parallel", lambda m: f"{m['parallel_bpb']:.4f}"),
    ("live", lambda m: f"{m['live_bpb']:.4f}"),
    ("gap", lambda m: f"{m['live_bpb'] - m['parallel_bpb']:+.4f}"),
)
ABLATIONS = (
    ("live_bpb_memory_zero", "memory zeroed"),
    ("live_bpb_memory_embedding", "memory embedding"),
)


def terminal_table(summary: Mapping[str, Any]) -> Table:
    """The comparison in 80 columns: sizes are the same for all and stand elsewhere."""
    title = "bits per byte; lower is better; live is what a user gets"
    return comparison_table(f"{title}\n{summary['scored_on']}", summary, SCORES)


def comparison_table(title: str, summary: Mapping[str, Any], columns: Sequence[Column]) -> Table:
    """A row per model, then its ablations, live alone; the last column is against the first model."""
    models: Mapping[str, Mapping[str, Any]] = summary["models"]
    base = next(iter(models.values()))["live_bpb"]

    def against_first(bpb: float) -> str:
        return f"{100 * (bpb / base - 1):+.1f} %"

    body = []
    for name, m in models.items():
        body.append([display_name(name), *(cell(m) for _, cell in columns), against_first(m["live_bpb"])])
        for key, label in ABLATIONS:
            if key in m:
                cells = [f"{m[key]:.4f}" if column == "live" else "" for column, _ in columns]
                body.append([f"  {label}", *cells, against_first(m[key])])
    return Table(title, ["model", *(column for column, _ in columns), "vs first"], body)


def display_name(family: str) -> str:
    """`token_shift` is "token shift"."""
    return family.replace("_", " ")


def write_report(path: Path, summary: Mapping[str, Any], logs: Mapping[str, Path], sample: str) -> None:
    """Write the report: table, loss curves from the families' metrics.jsonl (`logs`), a sample, the settings."""
    curves = {display_name(n): read_json_lines(log) for n, log in logs.items()}
    colours = dict(zip(curves, COLOURS, strict=False))
    tokens, minutes = Quantity("tokens", 1e6, "million tokens"), Quantity("seconds", 60, "minutes of training")
    parts = [
        "<h1>Latent recurrence on this machine</h1>",
        f"<p>{_headline(summary)}</p>",
        comparison_table("", summary, (*SIZES, *SCORES)).html(),
        f"<p>Bits per byte on held-out text: {html.escape(summary['scored_on'])}.</p>",
        "<figure>",
        figure_svg(lambda ax: _draw_scores(ax, summary), "Live bits per byte", wide=False),
        "<figcaption>Live bits per byte, decoded token by token, on held-out text. Lighter: the LRT with its memory "
        "tampered with at test time, which shows how much it leans on it.</figcaption></figure>",
        "<figure>",
        figure_svg(lambda ax: draw_losses(ax, curves, colours, tokens), "Loss against tokens"),
        figure_svg(lambda ax: draw_losses(ax, curves, colours, minutes), "Loss against time"),
        "<figcaption>Training loss (nats per token, mean over the passes that have a loss; smoothed) against tokens "
        "and against time.</figcaption></figure>",
        "<h2>A sample from the LRT</h2>",
        f"<pre>{html.escape(sample)}</pre>",
        "<h2>Settings</h2>",
        f"<p>{html.escape(str(summary['hardware']))}. {summary['seconds']:.0f} seconds in all.</p>",
        f"<details><summary>summary.json</summary><pre>{html.escape(json.dumps(summary, indent=2))}</pre></details>",
    ]
    replace_atomically(path, render_page(parts))


def _headline(summary: Mapping[str, Any]) -> str:
    models = summary["models"]
    lrt, base, shift = (models[name]["live_bpb"] for name in ("lrt", "transformer", "token_shift"))
    return (
        f"At equal parameters and tokens, the latent recurrent transformer's live bits per byte are "
        f"<b>{100 * (lrt / base - 1):+.1f} %</b> against the transformer's (less is better), and "
        f"<b>{100 * (lrt / shift - 1):+.1f} %</b> against token shift's, the control that reads the previous token's "
        "embedding and needs no recurrence. One seed: seeds alone differ by two or three per cent."
    )


def _draw_scores(ax: Axes, summary: Mapping[str, Any]) -> None:
    """A bar per model, the first on top, and a lighter one per ablation below its model's."""
    bars: list[tuple[str, float, str, float]] = []
    for colour, (name, m) in zip(COLOURS, summary["models"].items(), strict=False):
        bars.append((display_name(name), m["live_bpb"], colour, 1.0))
        bars += [(f"{name}, {label}", m[key], colour, 0.4) for key, label in ABLATIONS if key in m]
    labels, values, colours, alphas = zip(*reversed(bars), strict=True)
    for y, (bpb, colour, alpha) in enumerate(zip(values, colours, alphas, strict=True)):
        ax.barh(y, bpb, color=colour, alpha=alpha)
        ax.text(bpb, y, f" {bpb:.3f}", va="center")
    ax.set_yticks(range(len(labels)), labels)
    ax.set_xlim(0, max(values) * 1.15)  # room for the numbers
    ax.set_xlabel("live bits per byte")
