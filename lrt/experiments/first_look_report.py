"""The page of `lrt try`, from JSON alone: the verdict, scores, curves, and what both models write."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lrt.eval.report.figures import Quantity, draw_losses
from lrt.eval.report.html import figure_row
from lrt.eval.report.render import notes, render, section
from lrt.eval.report.style import colour_of
from lrt.eval.report.table import Table
from lrt.utils.files import replace_atomically
from lrt.utils.json_lines import read_json_lines

NAMES = {"transformer": "Transformer", "lrt": "LRT"}
"""Families as people call them."""
MEMORIES = {"live_bpb_memory_zero": "memory zeroed", "live_bpb_memory_embedding": "last token only"}
"""Scores of an LRT with another memory than its own, and what they are called."""
CURVES = "Training loss, smoothed, lower is better."


def score_table(models: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row per model, the live score and the difference from the first one beside its name."""
    base = next(iter(models.values()))["live_bpb"]

    def scores(name: str, live: float, *others: str) -> list[str]:
        return [name, f"{live:.4f}", f"{100 * (live / base - 1):+.1f} %" if live != base else "", *others]

    body = []
    for family, model in models.items():
        costs = [f"{model['parallel_bpb']:.4f}", f"{model['train_seconds']:.0f} s", f"{model['tokens']:,}"]
        body.append(scores(NAMES[family], model["live_bpb"], *costs, f"{model['parameters']:,}"))
        body += [scores(f"  {name}", model[key], "", "", "", "") for key, name in MEMORIES.items() if key in model]
    return Table("", ["model", "live", "difference", "parallel", "training", "tokens", "parameters"], body)


def write_report(path: Path, summary: Mapping[str, Any], verdict: str, logs: Mapping[str, Path]) -> None:
    """Write the page; `logs` are the families' metrics.jsonl."""
    curves = {NAMES[family]: read_json_lines(log) for family, log in logs.items()}
    colours = {name: colour_of(name) for name in curves}
    draw = partial(draw_losses, curves=curves, colours=colours, x=Quantity("tokens", 1e3, "thousand tokens"))
    scored = notes(
        f"Bits per byte, lower is better, on {summary['models']['lrt']['targets']:,} tokens of held-out text. Live is "
        "decoded token by token, what a user gets; parallel is as it was trained. Below the LRT: its score where its "
        "memory holds nothing, or only the previous token."
    )
    samples = [(NAMES[family], text) for family, text in summary["samples"].items()]
    settings = render("details", name="summary.json", lines=[], text=json.dumps(summary, indent=2))
    parts = [
        *section("Scores", [verdict], [score_table(summary["models"]).html(), scored]),
        *section("Training", [], [figure_row((draw, "Loss against tokens"), caption=CURVES)]),
        *section("What they write", [], [render("samples", samples=samples)]),
        *section("Settings", [], [notes(f"{summary['hardware']}. {summary['seconds']:.0f} seconds in all."), settings]),
    ]
    replace_atomically(path, render("page", title="A Transformer and an LRT on this text", parts=parts))
