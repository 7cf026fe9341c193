"""The demo's table and its page, from JSON alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from lrt.eval.report.figures import Quantity, draw_losses
from lrt.eval.report.html import figure_row
from lrt.eval.report.names import name_of
from lrt.eval.report.render import notes, render, section
from lrt.eval.report.style import colour_of
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
    ("gap", lambda m: f"{m['live_bpb'] - m['parallel_bpb']:+.4f}"),
)
ABLATIONS = tuple((key, name_of(key)) for key in ("live_bpb_memory_zero", "live_bpb_memory_embedding"))
DOTS_CAPTION = (
    "Live bits per byte, decoded token by token, on held-out text. Hollow: the LRT with its memory tampered with at "
    "test time, which shows how much it leans on it."
)
LOSS_CAPTION = (
    "Training loss (nats per token, mean over the passes that have a loss; smoothed) against tokens and against time."
)


def terminal_table(summary: Mapping[str, Any]) -> Table:
    """The comparison in 80 columns: sizes are the same for all and stand elsewhere."""
    title = "bits per byte; lower is better; live is what a user gets"
    return comparison_table(f"{title}\n{summary['scored_on']}", summary, SCORES)


def comparison_table(title: str, summary: Mapping[str, Any], columns: Sequence[Column]) -> Table:
    """A row per model, then its ablations: live and the difference from the first model, then `columns`."""
    models: Mapping[str, Mapping[str, Any]] = summary["models"]
    base = next(iter(models.values()))["live_bpb"]

    def against_first(bpb: float) -> str:
        return f"{100 * (bpb / base - 1):+.1f} %"

    body = []
    for name, m in models.items():
        beside = [f"{m['live_bpb']:.4f}", against_first(m["live_bpb"])]
        body.append([display_name(name), *beside, *(cell(m) for _, cell in columns)])
        for key, label in ABLATIONS:
            if key in m:
                body.append([f"  {label}", f"{m[key]:.4f}", against_first(m[key]), *[""] * len(columns)])
    return Table(title, ["model", "live", "vs first", *(column for column, _ in columns)], body)


def display_name(family: str) -> str:
    """`token_shift` is "token shift"."""
    return family.replace("_", " ")


def write_report(path: Path, summary: Mapping[str, Any], logs: Mapping[str, Path], sample: str) -> None:
    """Write the report: table, loss curves from the families' metrics.jsonl (`logs`), a sample, the settings."""
    curves = {display_name(n): read_json_lines(log) for n, log in logs.items()}
    colours = {name: colour_of(name) for name in curves}
    axes = Quantity("tokens", 1e6, "million tokens"), Quantity("seconds", 60, "minutes of training")
    losses = [(partial(draw_losses, curves=curves, colours=colours, x=x), f"Loss against {x.label}") for x in axes]
    scored = f"Bits per byte (BPB) on held-out text, lower is better: {summary['scored_on']}."
    dots = figure_row((partial(draw_scores, summary=summary), "Live bits per byte"), caption=DOTS_CAPTION, height=2.8)
    sizes_and_scores = comparison_table("", summary, (*SCORES, *SIZES)).html()
    settings = render("details", name="summary.json", lines=[], text=json.dumps(summary, indent=2))
    spent = notes(f"{summary['hardware']}. {summary['seconds']:.0f} seconds in all.")
    parts = [
        *section("Scores", headline(summary), [dots, sizes_and_scores, notes(scored)]),
        *section("Training", [], [figure_row(*losses, caption=LOSS_CAPTION)]),
        *section("A sample from the LRT", [], [render("sample", text=sample)]),
        *section("Settings", [], [spent, settings]),
    ]
    replace_atomically(path, render("page", title="Latent recurrence on this machine", parts=parts))


def headline(summary: Mapping[str, Any]) -> list[str]:
    """What came out, in two sentences."""
    models = summary["models"]
    lrt, base, shift = (models[name]["live_bpb"] for name in ("lrt", "transformer", "token_shift"))
    return [
        f"At equal parameters and tokens, the latent recurrent transformer's live bits per byte are "
        f"{100 * (lrt / base - 1):+.1f} % against the transformer's (less is better), and "
        f"{100 * (lrt / shift - 1):+.1f} % against token shift's, the control that reads the previous token's "
        "embedding and needs no recurrence.",
        "This is one seed: seeds alone differ by two or three per cent.",
    ]


def draw_scores(ax: Axes, summary: Mapping[str, Any]) -> None:
    """A dot per model, the first on top, and a hollow one per ablation below its model's."""
    dots: list[tuple[str, float, str, bool]] = []
    for name, m in summary["models"].items():
        colour = colour_of(name)
        dots.append((display_name(name), m["live_bpb"], colour, True))
        dots += [(f"{display_name(name)}, {label}", m[key], colour, False) for key, label in ABLATIONS if key in m]
    for y, (_, bpb, colour, whole) in enumerate(dots):
        ax.plot([bpb], [y], "o", color=colour, markerfacecolor=colour if whole else "none")
    ax.set_yticks(range(len(dots)), [f"{label}  {bpb:.4f}" for label, bpb, *_ in dots])
    ax.set_ylim(len(dots) - 0.5, -0.5)
    ax.margins(x=0.1)
    ax.set_xlabel("live bits per byte (left is better)")
