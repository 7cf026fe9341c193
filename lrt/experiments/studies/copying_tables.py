"""When does each family learn to copy from its context? A table and a figure, from lines with the field `copying`.

A curve is [steps, nats per token of rows given once, and of the same tokens again], as `language.train_cell` keeps it.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from matplotlib.figure import Figure

from lrt.eval.report.style import GREY, colour_of, markers_of
from lrt.eval.report.table import Table
from lrt.experiments.studies.comparisons import Choices, group_by_axes, interval
from lrt.experiments.studies.figures import legend_below, make_panels
from lrt.experiments.studies.runner import Line

LEARNED = 0.5
"""Nats per token by which the second time has to be cheaper: copying is learned."""


def copying_tables(lines: Sequence[Line]) -> list[Table]:
    """One per group that has curves: what copying saves at the end, and when it was learned."""
    head = ["model", "seeds", "nats, first", "again", "saved", f"learned ({LEARNED} nats)", "at step", "test, live"]
    made = []
    for group, choices in with_curves(lines).items():
        body = [copying_row(name, of_choice) for name, of_choice in choices.items()]
        made.append(Table(", ".join((*group, "copying from the context")), head, body))
    return made


def with_curves(lines: Sequence[Line]) -> dict[tuple[str, ...], Choices]:
    """The groups and choices whose lines have a curve."""
    groups = group_by_axes([line for line in lines if "copying" in line["result"]])
    return {group: choices for group, choices in groups.items() if any(choices.values())}


def copying_row(name: str, lines: Sequence[Line]) -> list[str]:
    curves = [line["result"]["copying"] for line in lines]
    first, again = (statistics.fmean(curve[-1][column] for curve in curves) for column in (1, 2))
    steps = [step for curve in curves if (step := learned_at(curve)) is not None]
    saved = [curve[-1][1] - curve[-1][2] for curve in curves]
    return [
        name,
        str(len(lines)),
        f"{first:.3f}",
        f"{again:.3f}",
        interval(saved, ".3f"),
        f"{len(steps)} of {len(curves)}",
        interval(steps, ".0f"),
        f"{statistics.fmean(line['result']['test']['live_bpb'] for line in lines):.4f}",
    ]


def learned_at(curve: Sequence[Sequence[float]]) -> float | None:
    """The first scored step from which on the second time is cheaper by LEARNED; None where that never lasts."""
    saves = [first - again >= LEARNED for _, first, again in curve]
    lasting = next((n for n in range(len(saves)) if all(saves[n:])), None)
    return None if lasting is None else curve[lasting][0]


def copying_figure(lines: Sequence[Line]) -> Figure:
    """What copying saves against steps: a panel per group, a colour per family, a line per seed."""
    groups = with_curves(lines)
    figure, panels = make_panels([", ".join(group) for group in groups])
    for panel, choices in zip(panels, groups.values(), strict=True):
        markers = markers_of(list(choices))
        for name, of_choice in choices.items():
            for seed, line in enumerate(of_choice):
                steps, first, again = zip(*line["result"]["copying"], strict=True)
                saved = [a - b for a, b in zip(first, again, strict=True)]
                style = {"color": colour_of(name), "marker": markers[name], "markersize": 3, "linewidth": 1}
                panel.plot(steps, saved, label=None if seed else name, **style)
        panel.axhline(LEARNED, color=GREY, linewidth=1, linestyle=":")
        panel.set(xlabel="training steps", ylabel="nats per token saved by copying (higher is better)")
    legend_below(figure, [handle for panel in panels[:1] for handle in panel.get_legend_handles_labels()[0]])
    return figure
