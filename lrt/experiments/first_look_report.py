"""The page of `lrt try`, from JSON alone: the verdict, scores, curves, and what both models write."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lrt.eval.report.figures import COLOURS, Quantity, draw_losses
from lrt.eval.report.html import figure_svg, render_page
from lrt.eval.report.table import Table
from lrt.utils.files import replace_atomically
from lrt.utils.json_lines import read_json_lines

NAMES = {"transformer": "Transformer", "lrt": "LRT"}
"""Families as people call them."""
MEMORIES = {"live_bpb_memory_zero": "memory zeroed", "live_bpb_memory_embedding": "last token only"}
"""Scores of an LRT with another memory than its own, and what they are called."""
STYLE = """<style>
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
.pair > div { min-width: 0; }
@media (max-width: 40rem) { .pair { grid-template-columns: 1fr; } }
</style>"""


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
    # The demo's third colour is the LRT's, its first the Transformer's.
    colours = dict(zip(curves, (COLOURS[0], COLOURS[2]), strict=True))
    tokens = Quantity("tokens", 1e3, "thousand tokens")
    samples = "".join(
        f"<div><h3>{NAMES[family]}</h3><pre>{html.escape(text)}</pre></div>"
        for family, text in summary["samples"].items()
    )
    parts = [
        "<h1>A Transformer and an LRT on this text</h1>",
        f"<p><b>{html.escape(verdict)}</b></p>",
        score_table(summary["models"]).html(),
        f"<p>Bits per byte, lower is better, on {summary['models']['lrt']['targets']:,} tokens of held-out text. Live "
        "is decoded token by token, what a user gets; parallel is as it was trained. Below the LRT: its score where "
        "its memory holds nothing, or only the previous token.</p>",
        "<figure>",
        figure_svg(lambda ax: draw_losses(ax, curves, colours, tokens), "Loss against tokens"),
        "<figcaption>Training loss, smoothed, lower is better.</figcaption></figure>",
        "<h2>What they write</h2>",
        f'<div class="pair">{samples}</div>',
        "<h2>Settings</h2>",
        f"<p>{html.escape(summary['hardware'])}. {summary['seconds']:.0f} seconds in all.</p>",
        f"<details><summary>summary.json</summary><pre>{html.escape(json.dumps(summary, indent=2))}</pre></details>",
    ]
    replace_atomically(path, render_page(parts, STYLE))
