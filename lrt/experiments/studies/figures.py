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
    TRANSFORMER,
    Choices,
    equal_choice,
    group_axes,
    group_by_axes,
    other_choices,
    paired_difference,
    scored_lines,
    sizes_by_family,
    val_bpb,
)
from lrt.experiments.studies.runner import Line

MakeFigure = Callable[[Sequence[Line]], Figure]


def save_figure(make: Callable[[], Figure], path: Path) -> None:
    """Draw into an SVG file: small, and the same bytes from the same lines."""
    # Text stays text, ids are hashes of content, and there is no date: else each call gives other bytes.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "lrt"}):
        make().savefig(path, format="svg", metadata={"Date": None})


def frontier_figure(lines: Sequence[Line]) -> Figure:
    """Live BPB on val, by which choices are made, against the paired step time, a panel per group; bars are the
    deviation over seeds. Names stand beside the panel, the cheapest first: in it they would lie on each other."""
    groups = {
        group: {name: of_choice for name, of_choice in choices.items() if scored_lines(of_choice)}
        for group, choices in group_by_axes(lines).items()
    }
    figure, panels = make_panels([", ".join(group) for group in groups], width=7.0)
    for panel, choices in zip(panels, groups.values(), strict=True):
        times = {
            name: statistics.fmean(line["result"]["step_ratio"] for line in of_choice)
            for name, of_choice in choices.items()
        }
        for number, name in enumerate(sorted(times, key=times.__getitem__)):
            mean, deviation = mean_deviation([val_bpb(line) for line in scored_lines(choices[name])])
            panel.errorbar(
                [times[name]],
                [mean],
                yerr=[deviation],
                color=f"C{number % 10}",  # the ten colours, with another mark each time round
                marker="osD^v"[number // 10 % 5],
                linestyle="none",
                capsize=3,
                label=name,
            )
        panel.set(xlabel="step time over the Transformer's (paired)", ylabel="live bits per byte, val")
        panel.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=6)
    return figure


def mean_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Over seeds; the deviation of a single one is 0."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def differences_figure(lines: Sequence[Line]) -> Figure:
    """How far each model's live score on test is from the Transformer's, a panel per text: at equal tokens and at
    equal wall-clock. Bars are the 95 % t-interval over seeds."""
    axes = group_axes(lines)
    by_title: dict[str, dict[str, Choices]] = {}
    for group, choices in group_by_axes(lines).items():
        by_title.setdefault(", ".join(other_choices(group, axes)), {})[equal_choice(group, axes)] = choices
    figure, panels = make_panels(list(by_title))
    models = dict.fromkeys(name for by_equal in by_title.values() for choices in by_equal.values() for name in choices)
    names = [name for name in models if name != TRANSFORMER]
    for panel, by_equal in zip(panels, by_title.values(), strict=True):
        for number, (equal, choices) in enumerate(by_equal.items()):
            base = choices.get(TRANSFORMER, ())
            differences = {n: paired_difference(choices[n], base) for n in names if n in choices}
            # One row per model; what is equal stands a fifth of a row apart.
            points = [(names.index(n) + 0.2 * number, d) for n, d in differences.items() if d is not None]
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


def source_figure(lines: Sequence[Line]) -> Figure:
    """Live BPB on val against the source layer, in the order of the choices; bars are the deviation over seeds."""
    groups = group_by_axes(lines)
    figure, panels = make_panels([", ".join(group) for group in groups])
    for panel, choices in zip(panels, groups.values(), strict=True):
        scores = [[val_bpb(line) for line in scored_lines(of_choice)] for of_choice in choices.values()]
        points = [(i, *mean_deviation(values)) for i, values in enumerate(scores) if values]
        places, means, deviations = zip(*points, strict=True) if points else ((), (), ())
        panel.errorbar(places, means, deviations, marker="o", capsize=3)
        panel.set_xticks(range(len(choices)), list(choices), rotation=30, ha="right", fontsize=7)
        panel.set_ylabel("live bits per byte, val")
    return figure


def scaling_figure(lines: Sequence[Line]) -> Figure:
    """Live BPB against training FLOPs, a power law through each family of at least 4 sizes, with the bootstrap's band
    from 8 on. Nothing is drawn beyond what was run."""
    figure, (panel,) = make_panels(["scaling"])
    for number, (name, sizes) in enumerate(sizes_by_family(lines).items()):
        compute, loss = [s.flops for s in sizes], [s.loss for s in sizes]
        colour = f"C{number}"
        panel.plot(compute, loss, "o", color=colour, label=name)
        grid = np.geomspace(min(compute), max(compute), 50)
        if len(sizes) >= 4:
            law = power_law.fit(compute, loss)
            panel.plot(grid, [law.loss(c) for c in grid], color=colour, linewidth=1)
        if len(sizes) >= power_law.FEWEST:
            curves = [[law.loss(c) for c in grid] for law in power_law.bootstrap(compute, loss, resamples=200)]
            low, high = np.quantile(curves, [0.025, 0.975], axis=0)
            panel.fill_between(grid, low, high, color=colour, alpha=0.15, linewidth=0)
    panel.set(xscale="log", yscale="log", xlabel="training FLOPs, all passes", ylabel="live bits per byte")
    panel.yaxis.set_major_formatter("{x:g}")  # less than a decade: not 2 × 10⁰
    panel.yaxis.set_minor_formatter("{x:g}")
    panel.legend(fontsize=7)
    return figure


def make_panels(titles: Sequence[str], width: float = 5.2) -> tuple[Figure, list[Any]]:
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
