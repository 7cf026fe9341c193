"""The figures of the reports: a function draws one thing on a matplotlib axis, from results as plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from lrt.eval.report.style import GREY
from lrt.eval.runs import Score

LINES = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9")
"""Of the curves of one run, in order."""
TINY = 1e-16
"""The least value drawn on a logarithmic axis: exact zeros have to be somewhere."""
Curves = Mapping[str, Sequence[Mapping[str, Any]]]
"""Run -> the lines of its metrics log, one per step."""


class Quantity(NamedTuple):
    """What stands on the x axis of a training curve."""

    key: str
    """Of a line of the metrics log."""
    unit: float
    """What the values are divided by."""
    label: str


def draw_scores(ax: Axes, scores: Mapping[str, Score], colours: Mapping[str, str]) -> None:
    """A dot per run, its live score, with its interval where there is one, on an axis that shows no more than these."""
    for y, (name, score) in enumerate(scores.items()):
        live, ends = score.values["live_bpb"], score.values.get("interval")
        span = None if ends is None else [[max(0.0, live - ends[0])], [max(0.0, ends[1] - live)]]
        ax.errorbar([live], [y], xerr=span, fmt="o", color=colours[name], capsize=3)
    ax.set_yticks(range(len(scores)), [f"{name}  {score.cell('live_bpb')}" for name, score in scores.items()])
    ax.set_ylim(len(scores) - 0.5, -0.5)
    ax.margins(x=0.1)
    ax.set_xlabel("live bits per byte (left is better)")


def draw_losses(ax: Axes, curves: Curves, colours: Mapping[str, str], x: Quantity) -> None:
    """Training loss in nats per token, smoothed over a fortieth of the run."""
    shown: list[float] = []
    for name, lines in curves.items():
        values = running_mean([line["loss"] for line in lines], max(1, len(lines) // 40))
        shown += values[len(values) // 10 :]
        ax.plot([line[x.key] / x.unit for line in lines], values, color=colours[name], label=name, linewidth=1.6)
    low, high = min(shown), max(shown)  # the first tenth falls so far that it would hide the rest
    ax.set_ylim(low - 0.05 * (high - low) - 1e-3, high + 0.05 * (high - low) + 1e-3)
    ax.set_xlabel(x.label)
    ax.set_ylabel("training loss, nats per token")
    ax.legend()


def draw_measured(ax: Axes, curves: Curves, colours: Mapping[str, str], x: Quantity, key: str, label: str) -> None:
    """What was measured now and then while training: `key` of those lines that have it."""
    for run, lines in curves.items():
        points = [(line[x.key] / x.unit, line[key]) for line in lines if key in line]
        if points:
            ax.plot(*zip(*points, strict=True), color=colours[run], label=run, marker="o", markersize=3, linewidth=1.4)
    ax.set_xlabel(x.label)
    ax.set_ylabel(label)
    ax.legend()


def draw_by_block(ax: Axes, points: Sequence[tuple[int, Sequence[Mapping[str, Any]]]], key: str, label: str) -> None:
    """A quantity of the memory by training step, a line per block, the lower ones darker; channels' mean.

    `points`: (step, what `memory_stats.layers` gave then).
    """
    blocks = [row["layer"] for row in points[0][1] if key in row]
    shades = colormaps["viridis"](np.linspace(0.1, 0.85, len(blocks)))
    for block, shade in zip(blocks, shades, strict=True):
        line = [(step, channel_mean(rows[block - 1], key)) for step, rows in points]
        ax.plot(*zip(*line, strict=True), color=shade, marker="o", markersize=3, linewidth=1.4, label=f"block {block}")
    ax.set_xlabel("training step")
    ax.set_ylabel(label)
    ax.legend(ncols=2 if len(blocks) <= 8 else 4, fontsize=7)


def channel_mean(row: Mapping[str, Any], key: str) -> float:
    """Of one block: γ, a ratio, or the memory's gates (the first of `gates` is the local one)."""
    return float(np.mean(row[key][1:] if key == "gates" else row[key]))


def draw_sweeps(ax: Axes, values: Mapping[str, Any]) -> None:
    """Bits per byte by refinements, a line per stride, live beside."""
    for colour, label, points in _by_stride(values):
        ax.plot([p["refinements"] for p in points], [p["bpb"] for p in points], ".-", color=colour, label=label)
    ax.axhline(values["live_bpb"], color=GREY, linewidth=1, linestyle="--", label="live")
    _refinement_axis(ax, values)
    ax.set_ylabel("bits per byte")
    ax.legend(ncols=2)


def draw_distances(ax: Axes, values: Mapping[str, Any]) -> None:
    """Relative distance to the live memory by refinements, a line per stride."""
    for colour, label, points in _by_stride(values):
        shown = [(p["refinements"], max(p["distance"], TINY)) for p in points]
        ax.plot(*zip(*shown, strict=True), ".-", color=colour, label=label)
    ax.set_yscale("log")
    _refinement_axis(ax, values)
    ax.set_ylabel("distance to the live memory")
    ax.legend(ncols=2)


def _by_stride(values: Mapping[str, Any]) -> list[tuple[str, str, Sequence[Mapping[str, Any]]]]:
    """(colour, label, points) of each curve of a sweep curve; stride 1 is a full pass."""
    curves = zip(LINES, values["curves"].items(), strict=False)
    return [(c, "full" if int(stride) == 1 else f"stride {stride}", points) for c, (stride, points) in curves]


def _refinement_axis(ax: Axes, values: Mapping[str, Any]) -> None:
    """The x axis of refinement counts: linear up to 4, logarithmic above."""
    counts = [p["refinements"] for p in next(iter(values["curves"].values()))]
    ticks = [n for n in counts if n + 1 not in counts or n < 4]  # 63 and 64 would overlap
    ax.set_xscale("symlog", linthresh=4)
    ax.set_xticks(ticks, map(str, ticks))
    ax.set_xlim(-0.3, 1.2 * counts[-1])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("refinements")


def draw_hops(ax: Axes, runs: Mapping[str, Mapping[str, Any]], colours: Mapping[str, str]) -> None:
    """Nats per token above live by hops, with the errors within which it is live; of runs in which something recurs."""
    for name, values in runs.items():
        points = [(p["hops"], p["gap"], values["errors"] * (p["error"] or 0)) for p in values["points"]]
        hops, gaps, errors = zip(*points, strict=True)
        ax.errorbar(hops, gaps, errors, color=colours[name], label=name, marker="o", markersize=3, capsize=2)
    ax.axhline(0, color=GREY, linewidth=1, linestyle="--")
    ticks = sorted({p["hops"] for values in runs.values() for p in values["points"]})
    apart = [n for n, after in zip(ticks, [*ticks[1:], math.inf], strict=True) if n < 2 or after > 1.3 * n]
    ax.set_xscale("symlog", linthresh=1)
    ax.set_xticks(apart, map(str, apart))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlim(-0.2, 1.2 * ticks[-1])
    ax.set_xlabel("hops that the memory has made")
    ax.set_ylabel("nats per token above live")
    ax.legend()


def draw_gates(ax: Axes, values: Mapping[str, Any]) -> None:
    """Mean gates: a row per block, a column per gate and head."""
    rows = [row for row in values["layers"] if "gates" in row]
    grid = np.array([np.array(row["gates"]).flatten() for row in rows])
    image = ax.imshow(grid, cmap="coolwarm", vmin=0, vmax=2, aspect="auto")  # a gate is 2σ: 0 to 2
    kinds, heads = np.array(rows[0]["gates"]).shape
    names = ["local", *([f"memory {c}" for c in range(1, kinds)] if kinds > 2 else ["memory"])]
    ax.set_xticks(range(kinds * heads), [f"{name}\nhead {h + 1}" for name in names for h in range(heads)], fontsize=7)
    ax.set_yticks(range(len(rows)), [f"block {row['layer']}" for row in rows])
    for (y, x), gate in np.ndenumerate(grid):
        ink = "#ffffff" if abs(gate - 1) > 0.6 else "#222222"  # the map is dark at both ends
        ax.text(x, y, f"{gate:.2f}", ha="center", va="center", color=ink, fontsize=8)
    ax.figure.colorbar(image, ax=ax, label="mean gate (starts at 1)")


def draw_reach(ax: Axes, runs: Mapping[str, Mapping[str, Any]], colours: Mapping[str, str]) -> None:
    """Divergence of the next token's distribution by how long ago a memory was perturbed."""
    for name, values in runs.items():
        points = [(p["back"], max(p["kl"], TINY)) for p in values["reach"]]
        ax.plot(*zip(*points, strict=True), ".-", color=colours[name], label=name)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xlabel("tokens ago that a memory was perturbed")
    ax.set_ylabel("KL, nats")
    ax.legend()


def draw_gains(
    ax: Axes, runs: Mapping[str, Mapping[str, Any]], colours: Mapping[str, str], by: str, label: str
) -> None:
    """What recurrence gains (off less live) by a quantity of the tokens: `by` names the buckets of a bpb result."""
    longest = max((values[by] for values in runs.values()), key=len)
    for i, (name, values) in enumerate(runs.items()):
        gains = [bucket["bpb"]["off"] - bucket["bpb"]["live"] for bucket in values[by]]
        places = [x + 0.08 * (i - (len(runs) - 1) / 2) for x in range(len(gains))]  # side by side around each tick
        ax.plot(places, gains, "o:", color=colours[name], label=name, markersize=5, linewidth=1)
    names = [f"{b['from']}-{b['to'] - 1}" if b["to"] else f"from {b['from']}" for b in longest]
    ax.set_xticks(range(len(longest)), names, fontsize=7)
    ax.axhline(0, color=GREY, linewidth=0.8)
    ax.set_xlabel(label)
    ax.set_ylabel("bits per byte gained (higher is better)")
    ax.margins(y=0.3)  # room for the legend
    ax.legend()


def running_mean(values: list[float], span: int) -> list[float]:
    """Mean over the last `span` values, or over all so far where there are fewer."""
    means, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - span] if i >= span else 0.0)
        means.append(total / min(i + 1, span))
    return means
