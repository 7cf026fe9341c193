"""What a notebook shows of a run and of a measurement: fragments of HTML that take the page's own colours."""

from __future__ import annotations

import html
from collections.abc import Sequence

from lrt.eval.report.figures import running_mean
from lrt.eval.report.render import render
from lrt.eval.report.score_tables import overview_table, texts_scored
from lrt.eval.report.sections import token_span
from lrt.eval.report.table import Table
from lrt.eval.results import Result
from lrt.eval.runs import Run

POINTS = 120
"""Points of a sparkline."""
WIDTH, HEIGHT = 240, 40
"""Of a sparkline, in pixels."""


def run_html(run: Run) -> str:
    """A line for each thing that is known, what the scores are of, and the curve of the loss."""
    head, row = overview_table([run]).cells()
    table = Table(run.name, ("", ""), list(zip(head[1:], row[1:], strict=True)))
    labels = "<br>".join(html.escape(label) for label in texts_scored([run]).values())
    loss = [line["loss"] for line in run.metrics]
    return f"{table.html()}<p>{labels}</p>{loss_curve(loss) if len(loss) > 1 else ''}"


def loss_curve(loss: Sequence[float]) -> str:
    """A sparkline of the smoothed training loss, and where it begins and ends."""
    smooth = running_mean(list(loss), max(1, len(loss) // 40))
    label = f"training loss, nats per token: {smooth[0]:.3f} to {smooth[-1]:.3f} in {len(loss):,} steps"
    return f"<p>{sparkline(smooth[:: max(1, len(smooth) // POINTS)])} {label}</p>"


def sparkline(values: Sequence[float]) -> str:
    """An inline SVG of a curve, in the text's colour; two values at least."""
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    points = " ".join(
        f"{i * WIDTH / (len(values) - 1):.1f},{2 + (high - value) / span * (HEIGHT - 4):.1f}"
        for i, value in enumerate(values)
    )
    line = f'<polyline points="{points}" fill="none" stroke="currentColor" stroke-width="1.5"/>'
    return f'<svg width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="training loss">{line}</svg>'


def measurement_html(result: Result, text: str) -> str:
    """A measured text in colours; of anything else its lines, `text`."""
    if result.kind != "text":
        return f"<pre>{html.escape(text)}</pre>"
    tokens = list(map(token_span, *(result.values[key] for key in ("pieces", "live", "off"))))
    note = "Green: recurrence makes the token likelier; red: less likely. The strongest colour is 2 bits."
    style = "<style>.text { white-space: pre-wrap; font-family: monospace }</style>"
    return f"{style}<p>{note}</p>{render('tokens', name='', tokens=tokens)}"
