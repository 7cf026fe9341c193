"""Figures of the studies of language, from their lines alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from lrt import scaling
from lrt.studies.comparisons import grouped, on_val, sizes
from lrt.studies.runner import Line

Draw = Callable[[Sequence[Line]], Figure]


def saved(make: Callable[[], Figure], path: Path) -> None:
    """Draw into an SVG file: small, and the same bytes from the same lines."""
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "lrt"}):
        make().savefig(path, format="svg", metadata={"Date": None})


def frontier(lines: Sequence[Line]) -> Figure:
    """Live BPB on val, by which choices are made, against the paired step time, a panel per group; bars are the
    deviation over seeds."""
    groups = {
        key: {n: r for n, r in rows.items() if any("test" in x["result"] for x in r)}
        for key, rows in grouped(lines).items()
    }
    figure, panels = panels_for([", ".join(key) for key in groups])
    for panel, rows in zip(panels, groups.values(), strict=True):
        for name, each in rows.items():
            values = [on_val(line) for line in each if "test" in line["result"]]
            x = statistics.fmean(line["result"]["step_ratio"] for line in each)
            error = statistics.stdev(values) if len(values) > 1 else 0.0
            panel.errorbar([x], [statistics.fmean(values)], yerr=[error], marker="o", capsize=3)
            panel.annotate(name, (x, statistics.fmean(values)), xytext=(5, 3), textcoords="offset points", fontsize=7)
        panel.set(xlabel="step time over the Transformer's (paired)", ylabel="live bits per byte, val")
    return figure


def source_curve(lines: Sequence[Line]) -> Figure:
    """Live BPB on val against the source layer, in the order of the choices; bars are the deviation over seeds."""
    groups = grouped(lines)
    figure, panels = panels_for([", ".join(key) for key in groups])
    for panel, rows in zip(panels, groups.values(), strict=True):
        found = {name: [on_val(line) for line in each if "test" in line["result"]] for name, each in rows.items()}
        points = [(i, values) for i, values in enumerate(found.values()) if values]
        means = [statistics.fmean(values) for _, values in points]
        errors = [statistics.stdev(values) if len(values) > 1 else 0.0 for _, values in points]
        panel.errorbar([i for i, _ in points], means, errors, marker="o", capsize=3)
        panel.set_xticks(range(len(found)), list(found), rotation=30, ha="right", fontsize=7)
        panel.set_ylabel("live bits per byte, val")
    return figure


def scaling_curves(lines: Sequence[Line]) -> Figure:
    """Live BPB against training FLOPs, a power law through each family of at least 4 sizes, with the bootstrap's band
    from 8 on. Nothing is drawn beyond what was run."""
    figure, (panel,) = panels_for(["scaling"])
    for number, (name, points) in enumerate(sizes(lines).items()):
        compute, loss = [p.flops for p in points], [p.loss for p in points]
        colour = f"C{number}"
        panel.plot(compute, loss, "o", color=colour, label=name)
        grid = np.geomspace(min(compute), max(compute), 50)
        if len(points) >= 4:
            law = scaling.fit(compute, loss)
            panel.plot(grid, [law.loss(c) for c in grid], color=colour, linewidth=1)
        if len(points) >= scaling.FEWEST:
            drawn = [[each.loss(c) for c in grid] for each in scaling.bootstrap(compute, loss, resamples=200)]
            low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
            panel.fill_between(grid, low, high, color=colour, alpha=0.15, linewidth=0)
    panel.set(xscale="log", yscale="log", xlabel="training FLOPs, all passes", ylabel="live bits per byte")
    panel.legend(fontsize=7)
    return figure


def panels_for(titles: Sequence[str]) -> tuple[Figure, list[Any]]:
    """A figure with a panel per title, two in a row."""
    columns = min(2, max(1, len(titles)))
    rows = max(1, math.ceil(len(titles) / columns))
    figure = Figure(figsize=(5.2 * columns, 3.8 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flatten())
    for panel, title in zip(panels, titles, strict=False):
        panel.set_title(title, fontsize=9)
    for panel in panels[len(titles) :]:
        panel.set_axis_off()
    return figure, panels[: len(titles)]
