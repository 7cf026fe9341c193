"""Figures of the studies of language, from their lines alone."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lrt.eval.report.style import GREY, colour_of, markers_of
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
    t_half_width,
    val_bpb,
)
from lrt.experiments.studies.runner import Line

MakeFigure = Callable[[Sequence[Line]], Figure]
LABEL_HEIGHT = 0.062
"""Of a name beside a panel, as a part of the panel's height."""
EQUAL_MARKERS = "os^"
"""Of what is equal: tokens, wall-clock, FLOPs."""


class Point(NamedTuple):
    """A choice in a figure of cost and score."""

    name: str
    time: float
    """Of a step, over the Transformer's."""
    score: float
    """Live bits per byte, the mean over seeds."""
    half: float
    """Half of its 95 % interval; 0 below three seeds, which have none."""


def frontier_figure(lines: Sequence[Line]) -> Figure:
    """Live BPB on val, by which choices are made, against the paired step time, a panel per group, with 95 % intervals.

    What nothing beats in both is in colour, and its name stands beside the panel; the rest is grey.
    """
    groups = {group: frontier_points(choices) for group, choices in group_by_axes(lines).items()}
    figure, panels = make_panels([", ".join(group) for group in groups], width=6.4)
    for panel, points in zip(panels, groups.values(), strict=True):
        best = frontier(points)
        for point in points:
            named = point in best or point.name == TRANSFORMER
            draw_point(panel, point, colour_of(point.name) if named else GREY, named)
        panel.set(
            xlabel="step time over the Transformer's (paired)", ylabel="live bits per byte, val (lower is better)"
        )
        label_beside(panel, [point for point in points if point in best or point.name == TRANSFORMER])
    return figure


def frontier_points(choices: Choices) -> list[Point]:
    """The choices that have a run which did not diverge."""
    points = []
    for name, of_choice in choices.items():
        if scored := scored_lines(of_choice):
            time = statistics.fmean(line["result"]["step_ratio"] for line in of_choice)
            points.append(Point(name, time, *mean_interval([val_bpb(line) for line in scored])))
    return points


def frontier(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats: none is as cheap and better, or as good and cheaper."""
    ordered = sorted(points, key=lambda point: (point.time, point.score))
    best = itertools.accumulate((point.score for point in ordered), min, initial=math.inf)
    return [point for point, before in zip(ordered, best, strict=False) if point.score < before]


def draw_point(panel: Any, point: Point, colour: str, named: bool) -> None:
    """A dot with its interval; hollow and pale where it has no name in the figure."""
    style = {} if named else {"markerfacecolor": "none", "alpha": 0.6}
    half = point.half or None
    panel.errorbar([point.time], [point.score], half, fmt="o", color=colour, markersize=5, capsize=2, **style)


def label_beside(panel: Any, points: Sequence[Point]) -> None:
    """Names to the right of the panel, each with a line to its point: inside they would lie on each other."""
    low, high = panel.get_ylim()
    panel.set_ylim(low, high)
    ordered = sorted(points, key=lambda point: point.score)
    heights = spread([(point.score - low) / (high - low) for point in ordered], LABEL_HEIGHT)
    for point, height in zip(ordered, heights, strict=True):
        colour = colour_of(point.name)
        panel.annotate(
            point.name,
            (point.time, point.score),
            (1.03, height),
            textcoords="axes fraction",
            fontsize=8,
            va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "alpha": 0.45, "linewidth": 0.7, "shrinkB": 3},
        )


def spread(places: Sequence[float], apart: float) -> list[float]:
    """Ascending places, moved as little as needed so that neighbours are `apart`, downwards from 1 where they would
    pass it."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + apart) if moved else place)
    ceiling = 1.0
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], ceiling)
        ceiling = moved[i] - apart
    return moved


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half of its 95 % t-interval) over seeds; fewer than three have none, which is 0."""
    return statistics.fmean(values), t_half_width(values) if len(values) >= 3 else 0.0


def differences_figure(lines: Sequence[Line]) -> Figure:
    """How far each model's live score on test is from the Transformer's, a panel per text: at equal tokens, and hollow
    at equal wall-clock, with 95 % t-intervals over seeds."""
    axes = group_axes(lines)
    by_title: dict[str, dict[str, Choices]] = {}
    for group, choices in group_by_axes(lines).items():
        by_title.setdefault(", ".join(other_choices(group, axes)), {})[equal_choice(group, axes)] = choices
    figure, panels = make_panels(list(by_title), shared_names=True)
    models = dict.fromkeys(name for by_equal in by_title.values() for choices in by_equal.values() for name in choices)
    names = [name for name in models if name != TRANSFORMER]
    for panel, by_equal in zip(panels, by_title.values(), strict=True):
        panel.axvline(0, color=GREY, linewidth=1)
        for number, choices in enumerate(by_equal.values()):
            draw_differences(panel, choices, names, number)
        panel.set_yticks(range(len(names)), names, fontsize=8)
        panel.set_ylim(len(names) - 0.5, -0.5)
        panel.set_xlabel("live bits per byte against the Transformer's, % (left is better)", fontsize=8)
    equals = list(dict.fromkeys(equal for by_equal in by_title.values() for equal in by_equal if equal))
    handles = [
        Line2D([], [], color=GREY, marker=EQUAL_MARKERS[i % 3], markerfacecolor=GREY if i == 0 else "none", label=equal)
        for i, equal in enumerate(f"equal {equal}" for equal in equals)
    ]
    legend_below(figure, handles)
    return figure


def draw_differences(panel: Any, choices: Choices, names: Sequence[str], number: int) -> None:
    """The differences from the Transformer at one thing that is equal, a fifth of a row below the one before."""
    base = choices.get(TRANSFORMER, ())
    for row, name in enumerate(names):
        apart = paired_difference(choices[name], base) if name in choices else None
        if apart is not None:
            colour = colour_of(name)
            panel.errorbar(
                [apart.mean],
                [row + 0.24 * number],
                xerr=apart.half,
                fmt=EQUAL_MARKERS[number % 3],
                color=colour,
                markerfacecolor=colour if number == 0 else "none",
                markersize=5,
                capsize=2,
            )


def source_figure(lines: Sequence[Line]) -> Figure:
    """Live BPB on val against the source layer, in the order of the choices, with 95 % t-intervals over seeds."""
    groups = group_by_axes(lines)
    figure, panels = make_panels([", ".join(group) for group in groups])
    for panel, choices in zip(panels, groups.values(), strict=True):
        for place, (name, of_choice) in enumerate(choices.items()):
            if scored := [val_bpb(line) for line in scored_lines(of_choice)]:
                mean, half = mean_interval(scored)
                panel.errorbar([place], [mean], half or None, fmt="o", color=colour_of(name), capsize=3)
        panel.set_xticks(range(len(choices)), list(choices), rotation=30, ha="right", fontsize=8)
        panel.set_ylabel("live bits per byte, val (lower is better)")
    return figure


def scaling_figure(lines: Sequence[Line]) -> Figure:
    """Live BPB against training FLOPs, a power law through each family of at least 4 sizes, with the bootstrap's band
    from 8 on. Nothing is drawn beyond what was run."""
    figure, (panel,) = make_panels([""])
    families = sizes_by_family(lines)
    markers = markers_of(list(families))
    for name, sizes in families.items():
        compute, loss = [s.flops for s in sizes], [s.loss for s in sizes]
        colour = colour_of(name)
        panel.plot(compute, loss, markers[name], color=colour, label=name, markersize=5)
        grid = np.geomspace(min(compute), max(compute), 50)
        if len(sizes) >= 4:
            law = power_law.fit(compute, loss)
            panel.plot(grid, [law.loss(c) for c in grid], color=colour, linewidth=1)
        if len(sizes) >= power_law.FEWEST:
            curves = [[law.loss(c) for c in grid] for law in power_law.bootstrap(compute, loss, resamples=200)]
            low, high = np.quantile(curves, [0.025, 0.975], axis=0)
            panel.fill_between(grid, low, high, color=colour, alpha=0.15, linewidth=0)
    panel.set(xscale="log", yscale="log", xlabel="training FLOPs, all passes")
    panel.set_ylabel("live bits per byte, test (lower is better)")
    panel.yaxis.set_major_formatter("{x:g}")  # less than a decade: not 2 × 10⁰
    panel.yaxis.set_minor_formatter("{x:g}")
    legend_below(figure, panel.get_legend_handles_labels()[0])
    return figure


def legend_below(figure: Figure, handles: Sequence[Any], columns: int = 2) -> None:
    """One legend for all panels, below them, where it lies on nothing. None for no handles."""
    if handles:
        figure.legend(handles=list(handles), loc="outside lower center", ncols=columns, fontsize=8)


def make_panels(titles: Sequence[str], width: float = 5.2, shared_names: bool = False) -> tuple[Figure, list[Any]]:
    """A figure with a panel per title, two in a row, each `width` inches wide. `shared_names`: rows are named once."""
    columns = min(2, max(1, len(titles)))
    rows = max(1, math.ceil(len(titles) / columns))
    figure = Figure(figsize=(width * columns, 3.9 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False, sharey="row" if shared_names else False).flatten())
    for panel, title in zip(panels, titles, strict=False):
        panel.set_title(title, fontsize=9)
    for panel in panels[len(titles) :]:
        panel.set_axis_off()
    return figure, panels[: len(titles)]
