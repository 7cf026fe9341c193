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

from lrt.experiments.studies import power_law
from lrt.experiments.studies.comparisons import (
    AGAINST,
    RATE,
    Rows,
    complete_seeds,
    difference,
    group_by_axes,
    on_val,
    rest,
    sizes_by_family,
)
from lrt.experiments.studies.runner import Line

Draw = Callable[[Sequence[Line]], Figure]


def save_figure(make: Callable[[], Figure], path: Path) -> None:
    """Draw into an SVG file: small, and the same bytes from the same lines."""
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "lrt"}):
        make().savefig(path, format="svg", metadata={"Date": None})


def frontier(lines: Sequence[Line]) -> Figure:
    """Live BPB on val, by which choices are made, against the paired step time, a panel per group; bars are the
    deviation over seeds. Names stand beside the panel, the cheapest first: in it they would lie on each other."""
    groups = {
        key: {n: r for n, r in rows.items() if any("test" in x["result"] for x in r)}
        for key, rows in group_by_axes(lines).items()
    }
    figure, panels = panels_for([", ".join(key) for key in groups], width=7.0)
    for panel, rows in zip(panels, groups.values(), strict=True):
        times = {n: statistics.fmean(line["result"]["step_ratio"] for line in each) for n, each in rows.items()}
        for number, name in enumerate(sorted(times, key=times.__getitem__)):
            values = [on_val(line) for line in rows[name] if "test" in line["result"]]
            error = statistics.stdev(values) if len(values) > 1 else 0.0
            panel.errorbar(
                [times[name]],
                [statistics.fmean(values)],
                yerr=[error],
                color=f"C{number % 10}",  # the ten colours, with another mark each time round
                marker="osD^v"[number // 10 % 5],
                linestyle="none",
                capsize=3,
                label=name,
            )
        panel.set(xlabel="step time over the Transformer's (paired)", ylabel="live bits per byte, val")
        panel.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=6)
    return figure


def leads(lines: Sequence[Line]) -> Figure:
    """How far each model's live score on test is from the Transformer's, a panel per text: at equal tokens and at
    equal wall-clock. Bars are the 95 % t-interval over seeds."""
    axes = [axis for axis in (lines[0]["choices"] if lines else ()) if axis != RATE][:-1]
    panels_of: dict[str, dict[str, Rows]] = {}
    for key, rows in group_by_axes(lines).items():
        panels_of.setdefault(", ".join(rest(key, axes)), {})[complete_seeds(key, axes)] = rows
    figure, panels = panels_for(list(panels_of))
    every = dict.fromkeys(name for by_equal in panels_of.values() for rows in by_equal.values() for name in rows)
    names = [name for name in every if name != AGAINST[0]]
    for panel, by_equal in zip(panels, panels_of.values(), strict=True):
        for number, (equal, rows) in enumerate(by_equal.items()):
            found = {n: difference(rows[n], rows.get(AGAINST[0], ())) for n in names if n in rows}
            points = [(names.index(n) + 0.2 * number, d) for n, d in found.items() if d is not None]
            panel.errorbar(
                [d.mean for _, d in points],
                [y for y, _ in points],
                xerr=[d.half or 0.0 for _, d in points],
                fmt="os^"[number % 3],
                markerfacecolor="none" if number else None,
                capsize=3,
                label=f"equal {equal}" if equal else None,
            )
        panel.axvline(0, color="0.5", linewidth=1)
        panel.set_yticks(range(len(names)), names, fontsize=8)
        panel.invert_yaxis()
        panel.set_xlabel("live bits per byte against the Transformer's, %")
        if any(by_equal):
            panel.legend(fontsize=7)
    return figure


def source_curve(lines: Sequence[Line]) -> Figure:
    """Live BPB on val against the source layer, in the order of the choices; bars are the deviation over seeds."""
    groups = group_by_axes(lines)
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
    for number, (name, points) in enumerate(sizes_by_family(lines).items()):
        compute, loss = [p.flops for p in points], [p.loss for p in points]
        colour = f"C{number}"
        panel.plot(compute, loss, "o", color=colour, label=name)
        grid = np.geomspace(min(compute), max(compute), 50)
        if len(points) >= 4:
            law = power_law.fit(compute, loss)
            panel.plot(grid, [law.loss(c) for c in grid], color=colour, linewidth=1)
        if len(points) >= power_law.FEWEST:
            drawn = [[each.loss(c) for c in grid] for each in power_law.bootstrap(compute, loss, resamples=200)]
            low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
            panel.fill_between(grid, low, high, color=colour, alpha=0.15, linewidth=0)
    panel.set(xscale="log", yscale="log", xlabel="training FLOPs, all passes", ylabel="live bits per byte")
    panel.yaxis.set_major_formatter("{x:g}")  # less than a decade: not 2 × 10⁰
    panel.yaxis.set_minor_formatter("{x:g}")
    panel.legend(fontsize=7)
    return figure


def panels_for(titles: Sequence[str], width: float = 5.2) -> tuple[Figure, list[Any]]:
    """A figure with a panel per title, two in a row, each `width` inches wide."""
    columns = min(2, max(1, len(titles)))
    rows = max(1, math.ceil(len(titles) / columns))
    figure = Figure(figsize=(width * columns, 3.8 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flatten())
    for panel, title in zip(panels, titles, strict=False):
        panel.set_title(title, fontsize=9)
    for panel in panels[len(titles) :]:
        panel.set_axis_off()
    return figure, panels[: len(titles)]
