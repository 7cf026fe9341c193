"""The figures of `lrt report`: each draws one thing on a matplotlib axis, from results as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

COLOURS = ("#8c8c8c", "#d98c1f", "#2f7fd1", "#3f9e5a")
PALETTE = (*COLOURS[1:], COLOURS[0], "#b0508f", "#7a6fd0", "#5fb6b6", "#c7564a")
Diary = Sequence[Mapping[str, Any]]
Curves = Mapping[str, Diary]


def colours_by_name(names: Sequence[str]) -> dict[str, str]:
    """A colour per name, the same in every figure."""
    return {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(names)}


def losses(ax: Axes, curves: Curves, colours: Mapping[str, str], key: str, unit: float, label: str) -> None:
    """Training loss, smoothed, against a quantity of the diary."""
    shown: list[float] = []
    for name, lines in curves.items():
        values = running_mean([line["loss"] for line in lines], max(1, len(lines) // 40))
        shown += values[len(values) // 10 :]
        ax.plot([line[key] / unit for line in lines], values, color=colours[name], label=name, linewidth=1.6)
    low, high = min(shown), max(shown)  # the first tenth falls so far that it would hide the rest
    ax.set_ylim(low - 0.05 * (high - low) - 1e-3, high + 0.05 * (high - low) + 1e-3)
    ax.set_xlabel(label)
    ax.set_ylabel("training loss, nats per token")
    ax.legend()


def draw_measured(
    ax: Axes, curves: Curves, colours: Mapping[str, str], value: str, key: str, unit: float, label: str, name: str
) -> None:
    """A quantity that was measured while training, against another of the diary."""
    for run, lines in curves.items():
        points = [(line[key] / unit, line[value]) for line in lines if value in line]
        if points:
            ax.plot(*zip(*points, strict=True), color=colours[run], label=run, marker="o", markersize=3, linewidth=1.4)
    ax.set_xlabel(label)
    ax.set_ylabel(name)
    ax.legend()


def by_block(ax: Axes, points: Sequence[tuple[int, Sequence[Mapping[str, Any]]]], key: str, name: str) -> None:
    """A quantity of the memory by training step, a line per block, the lower ones darker; channels' mean."""
    blocks = [row["layer"] for row in points[0][1] if key in row]
    shades = colormaps["viridis"](np.linspace(0.1, 0.85, len(blocks)))
    for block, shade in zip(blocks, shades, strict=True):
        line = [(step, mean_curve(rows[block - 1], key)) for step, rows in points]
        ax.plot(*zip(*line, strict=True), color=shade, marker="o", markersize=3, linewidth=1.4, label=f"block {block}")
    ax.set_xlabel("training step")
    ax.set_ylabel(name)
    ax.legend(ncols=2 if len(blocks) <= 8 else 4, fontsize=7)


def mean_curve(row: Mapping[str, Any], key: str) -> float:
    """Of one block: γ, a ratio, or the memory's gates (the first of `gates` is the local one)."""
    return float(np.mean(row[key][1:] if key == "gates" else row[key]))


def draw_sweeps(ax: Axes, values: Mapping[str, Any]) -> None:
    """Bits per byte by refinements, a line per stride, live and parallel beside."""
    for colour, (groups, points) in zip(PALETTE, values["curves"].items(), strict=False):
        label = "full" if int(groups) == 1 else f"stride {groups}"
        ax.plot([p["refinements"] for p in points], [p["bpb"] for p in points], ".-", color=colour, label=label)
    ax.axhline(values["live_bpb"], color="#8c8c8c", linewidth=1, linestyle="--", label="live")
    refinements(ax, values)
    ax.set_ylabel("bits per byte")
    ax.legend(ncols=2)


def refinements(ax: Axes, values: Mapping[str, Any]) -> None:
    """The axis of refinement counts."""
    counts = [p["refinements"] for p in next(iter(values["curves"].values()))]
    ticks = [n for n in counts if n + 1 not in counts or n < 4]  # 63 and 64 would overlap
    ax.set_xscale("symlog", linthresh=4)
    ax.set_xticks(ticks, map(str, ticks))
    ax.set_xlim(-0.3, 1.2 * counts[-1])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("refinements")


def distances(ax: Axes, values: Mapping[str, Any]) -> None:
    """Distance to the live memory by refinements, a line per stride."""
    for colour, (groups, points) in zip(PALETTE, values["curves"].items(), strict=False):
        label = "full" if int(groups) == 1 else f"stride {groups}"
        shown = [(p["refinements"], max(p["distance"], 1e-16)) for p in points]
        ax.plot(*zip(*shown, strict=True), ".-", color=colour, label=label)
    ax.set_yscale("log")
    refinements(ax, values)
    ax.set_ylabel("distance to the live memory")
    ax.legend(ncols=2)


def gates(ax: Axes, values: Mapping[str, Any]) -> None:
    """Mean gates: a row per block, a column per gate and head."""
    rows = [row for row in values["layers"] if "gates" in row]
    grid = np.array([np.array(row["gates"]).flatten() for row in rows])
    image = ax.imshow(grid, cmap="coolwarm", vmin=0, vmax=2, aspect="auto")
    kinds, heads = np.array(rows[0]["gates"]).shape
    names = ["local", *([f"memory {c}" for c in range(1, kinds)] if kinds > 2 else ["memory"])]
    ax.set_xticks(range(kinds * heads), [f"{name}\nhead {h + 1}" for name in names for h in range(heads)], fontsize=7)
    ax.set_yticks(range(len(rows)), [f"block {row['layer']}" for row in rows])
    for (y, x), value in np.ndenumerate(grid):
        shade = "#ffffff" if abs(value - 1) > 0.6 else "#222222"  # the map is dark at both ends
        ax.text(x, y, f"{value:.2f}", ha="center", va="center", color=shade, fontsize=8)
    ax.figure.colorbar(image, ax=ax, label="mean gate (starts at 1)")


def draw_reach(ax: Axes, values: Mapping[str, Mapping[str, Any]], colours: Mapping[str, str]) -> None:
    """Divergence of the next token's distribution by how long ago a memory was perturbed."""
    for name, found in values.items():
        points = [(p["back"], max(p["kl"], 1e-16)) for p in found["reach"]]
        ax.plot(*zip(*points, strict=True), ".-", color=colours[name], label=name)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xlabel("tokens ago that a memory was perturbed")
    ax.set_ylabel("KL, nats")
    ax.legend()


def gains(ax: Axes, values: Mapping[str, Mapping[str, Any]], colours: Mapping[str, str], by: str, label: str) -> None:
    """What recurrence gains (off less live) by a quantity of the tokens."""
    width = 0.8 / max(1, len(values))
    most = max((found[by] for found in values.values()), key=len)
    for i, (name, found) in enumerate(values.items()):
        gained = [bucket["bpb"]["off"] - bucket["bpb"]["live"] for bucket in found[by]]
        ax.bar(
            [x + (i + 0.5) * width - 0.4 for x in range(len(gained))], gained, width, color=colours[name], label=name
        )
    names = [f"{b['from']}-{b['to'] - 1}" if b["to"] else f"from {b['from']}" for b in most]
    ax.set_xticks(range(len(most)), names, fontsize=7)
    ax.axhline(0, color="#8c8c8c", linewidth=0.8)
    ax.set_xlabel(label)
    ax.set_ylabel("bits per byte gained")
    ax.margins(y=0.3)  # room for the legend
    ax.legend()


def running_mean(values: list[float], span: int) -> list[float]:
    """Running mean over the last `span` values (fewer at the start)."""
    out, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - span] if i >= span else 0.0)
        out.append(total / min(i + 1, span))
    return out
