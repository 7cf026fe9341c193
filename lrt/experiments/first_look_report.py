"""The page of `lrt try`, from JSON alone: the verdict, scores, curves, and what both models write."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lrt.eval.report.figures import COLOURS, Quantity, draw_losses
from lrt.eval.report.html import figure_svg, render_page
from lrt.experiments.demo_report import SCORES, SIZES, comparison_table
from lrt.utils.files import replace_atomically
from lrt.utils.json_lines import read_json_lines

NAMES = {"transformer": "Transformer", "lrt": "LRT"}
"""Families as people call them."""
STYLE = """<style>
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
.pair > div { min-width: 0; }
@media (max-width: 40rem) { .pair { grid-template-columns: 1fr; } }
</style>"""


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
        f"<p>Bits per byte, lower is better, on {html.escape(summary['scored_on'])}. Live is decoded token by token, "
        "what a user gets. Below the LRT: its memory zeroed, and replaced by the previous token's embedding.</p>",
        comparison_table("", summary, (*SIZES, *SCORES)).html(),
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
