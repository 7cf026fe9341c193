"""The figure of some runs: their loss and their live scores over the tokens trained on."""

from __future__ import annotations

import io
from collections.abc import Sequence

from matplotlib.figure import Figure

from lrt.eval.report.figures import Quantity, draw_losses, draw_measured
from lrt.eval.report.score_tables import run_family
from lrt.eval.report.style import run_colours
from lrt.eval.runs import Run

TOKENS = (Quantity("tokens", 1e6, "million tokens"), Quantity("tokens", 1e3, "thousand tokens"))
"""The x axis: of the longest run, the first unit of which it has one."""


class RunFigure(Figure):
    """A figure that a notebook shows by itself, whether or not pyplot is set up there."""

    def _repr_png_(self) -> bytes:
        out = io.BytesIO()
        self.savefig(out, format="png", dpi=120)
        return out.getvalue()


def draw_runs(runs: Sequence[Run]) -> RunFigure:
    """Loss on the left; live bits per byte on the right, where they were measured. ValueError without a metrics log."""
    for run in runs:
        if not run.metrics:
            raise ValueError(f"{run.name} has no metrics.jsonl to draw; give a folder that `lrt train` wrote")
    curves = {run.name: run.metrics for run in runs}
    longest = max(lines[-1]["tokens"] for lines in curves.values())
    x = next((quantity for quantity in TOKENS if longest >= quantity.unit), TOKENS[-1])
    colours = run_colours({run.name: run_family(run) for run in runs})
    figure = RunFigure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_losses(left, curves, colours, x)
    live = {name: lines for name, lines in curves.items() if any("live_bpb" in line for line in lines)}
    if live:
        draw_measured(right, live, colours, x, "live_bpb", "live bits per byte (lower is better)")
    else:
        right.set_axis_off()
    return figure
