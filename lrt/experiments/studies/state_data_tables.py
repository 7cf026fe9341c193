"""Tables and the figure of the study of data with state, from its lines alone.

The last axis is what is compared, every other makes groups of its own. Each choice stands with the rate that was best
on val. Differences are paired by seed, with 95 % t-intervals (contract, section 5).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from lrt.eval.report.style import colour_of, markers_of
from lrt.eval.report.table import Table
from lrt.experiments.studies.comparisons import (
    BASELINES,
    RATE,
    Choices,
    Read,
    format_difference,
    format_value,
    group_by_axes,
    interval,
    paired,
    paired_difference,
)
from lrt.experiments.studies.figures import legend_below, make_panels
from lrt.experiments.studies.runner import Line

FIRST_POSITION = 8
"""Before it there is no state to speak of."""


def val_excess(line: Line) -> float:
    """Excess nats per token on val, by which choices are made; infinite where the run diverged."""
    return line["result"].get("val_excess", math.inf)


def excess(length: str) -> Read:
    """Excess nats per token at a length, of the tokens that have a floor; infinite where the run diverged."""
    return lambda line: line["result"]["tests"][length]["all"]["excess"] if finished(line) else math.inf


def text_nats(length: str) -> Read:
    """Nats per token of what has no floor; infinite where the run diverged."""
    return lambda line: line["result"]["tests"][length]["without_floor"]["nats"] if finished(line) else math.inf


def far_right(length: str) -> Read:
    """Of the answers that need a carried state, the part that is right; infinite where none is asked or it diverged."""

    def read(line: Line) -> float:
        bins = distances(line, length) if finished(line) else {}
        far = [one for low, one in bins.items() if low >= line["result"]["far"]]
        asked = sum(one["tokens"] for one in far)
        return sum(one["right"] for one in far) / asked if asked else math.inf

    return read


def finished(line: Line) -> bool:
    """Whether a run did not diverge."""
    return "tests" in line["result"]


def distances(line: Line, length: str) -> dict[int, dict[str, Any]]:
    """The answers of a line by their distance."""
    return {int(low): one for low, one in line["result"]["tests"][length]["by_distance"].items()}


def positions(line: Line, length: str) -> dict[int, float]:
    """Mean nats of the tokens of each stretch of positions, by its first."""
    return {int(low): one["nats"] for low, one in line["result"]["tests"][length]["by_position"].items()}


def slopes(lines: Sequence[Line], others: Sequence[Line], length: str) -> list[float]:
    """By seed: how fast the gain over others grows with position, in nats per token and doubling of the position."""
    by_seed = {line["seed"]: positions(line, length) for line in others if finished(line)}
    return [
        slope({low: by_seed[line["seed"]][low] - own for low, own in positions(line, length).items()})
        for line in lines
        if finished(line) and line["seed"] in by_seed
    ]


def slope(gain: dict[int, float]) -> float:
    """Least squares over log2 of the position, from the eighth on."""
    points = [(math.log2(low), value) for low, value in gain.items() if low >= FIRST_POSITION]
    x, y = (statistics.fmean(p[i] for p in points) for i in (0, 1))
    return sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)


def tables(lines: Sequence[Line]) -> list[Table]:
    """Per group: excess at every length beside the controls'; answers by distance; gain by position; the text."""
    made = []
    for group, choices in group_by_axes(lines, val_excess).items():
        scored = [line for of_choice in choices.values() for line in of_choice if finished(line)]
        if scored:
            title, lengths = ", ".join(group), list(scored[0]["result"]["tests"])
            made.append(excess_table(title, choices, lengths))
            made += [distance_table(title, choices, n) for n in lengths]
            made.append(position_table(title, choices, lengths))
            made += ply_tables(title, choices)
            if "without_floor" in scored[0]["result"]["tests"][lengths[0]]:
                made.append(text_table(title, choices, lengths))
    return made


def controls_of(choices: Choices) -> list[str]:
    """The controls that a group has: the first, and the strongest without recurrence."""
    known = [name for name in BASELINES if name in choices]
    return known[:1] + known[1:][-1:]


def mean_of(lines: Sequence[Line], read: Read, form: str = ".4f") -> str:
    """The mean over the seeds that did not diverge."""
    values = [value for value in map(read, lines) if math.isfinite(value)]
    return format_value(statistics.fmean(values) if values else None, form)


def differences(name: str, choices: Choices, read: Read) -> list[str]:
    """A choice's paired difference from each control, in per cent."""
    return [
        "" if other == name else format_difference(paired_difference(choices[name], choices[other], read))
        for other in controls_of(choices)
    ]


def excess_table(title: str, choices: Choices, lengths: Sequence[str]) -> Table:
    """What each choice cost and pays over the floor, beside the controls and with its memory replaced."""
    first = lengths[0]
    head = ["model", "rate", "seeds", "parameters", "step", "tokens", *(f"excess, {n}" for n in lengths)]
    head += [f"vs {name}" for name in controls_of(choices)]
    head += ["intact, on the rows of", "memory embedding", "memory zero"]
    body = []
    for name, lines in choices.items():
        scored = [line for line in lines if finished(line)]
        lost = len(lines) - len(scored)
        counted = lines[0]["result"]
        row = [name, f"{lines[0]['fields'].get(RATE, 1):g}", f"{len(scored)}" + (f", {lost} diverged" if lost else "")]
        row += [f"{counted['parameters']:,}", f"{counted['step_ratio']:.2f}"]
        row.append(f"{statistics.fmean(line['result']['tokens'] for line in scored):,.0f}" if scored else "")
        row += [mean_of(lines, excess(n)) for n in lengths]
        row += differences(name, choices, excess(first))
        body.append(row + [mean_of(scored, ablated(replaced)) for replaced in ("intact", "embedding", "zero")])
    return Table(f"{title}: nats per token over the floor; differences at {first}", head, body)


def ablated(replaced: str) -> Read:
    """Excess with the memory replaced; infinite where there is no memory."""
    return lambda line: line["result"]["ablated"].get(replaced, {}).get("excess", math.inf)


def distance_table(title: str, choices: Choices, length: str) -> Table:
    """Right answers by how far the state lies back, and those that need a carried state against the controls'."""
    scored = [line for of_choice in choices.values() for line in of_choice if finished(line)]
    lows = sorted({low for line in scored for low in distances(line, length)})
    far, unit = scored[0]["result"]["far"], scored[0]["result"]["distance"]
    head = ["model", *(f"{low}{'+' if low == lows[-1] else ''}" for low in lows)]
    if far is not None:
        head += [f"{far} and more", *(f"{far} and more, less {name}'s" for name in controls_of(choices))]
    body = []
    for name, lines in choices.items():
        row = [name, *(right_of(lines, length, low) for low in lows)]
        if far is not None:
            row.append(interval([100 * v for v in map(far_right(length), lines) if math.isfinite(v)], ".1f"))
            for other in controls_of(choices):
                pairs = [] if other == name else paired(lines, choices[other], far_right(length))
                row.append(interval([100 * (own - others) for own, others in pairs], "+.1f"))
        body.append(row)
    return Table(f"{title}: right answers of rows of {length}, %, by {unit}", head, body)


def right_of(lines: Sequence[Line], length: str, low: int) -> str:
    """Right answers of one bin over all seeds, in per cent, and how many were asked."""
    bins = [distances(line, length)[low] for line in lines if finished(line) and low in distances(line, length)]
    asked = sum(one["tokens"] for one in bins)
    return f"{100 * sum(one['right'] for one in bins) / asked:.1f} ({asked:,})" if asked else ""


def position_table(title: str, choices: Choices, lengths: Sequence[str]) -> Table:
    """How fast the gain over each control grows with the position."""
    controls = controls_of(choices)
    head = ["slope of the gain", *(f"over {name}, {n}" for name in controls for n in lengths)]
    body = [
        [name]
        + [
            "" if other == name else interval(slopes(lines, choices[other], n), "+.5f")
            for other in controls
            for n in lengths
        ]
        for name, lines in choices.items()
    ]
    return Table(f"{title}: nats per token for each doubling of the position", head, body)


def ply_tables(title: str, choices: Choices) -> list[Table]:
    """Of each kind of chess games: what a move costs over the floor, and how often both likeliest squares are legal."""
    of_choice = {
        name: [line["result"]["details"] for line in lines if "details" in line["result"]]
        for name, lines in choices.items()
    }
    made = []
    for kind in dict.fromkeys(kind for many in of_choice.values() for details in many for kind in details):
        plies = sorted({int(ply) for many in of_choice.values() for details in many for ply in details[kind]})
        body = [
            [name, *(ply_cell([bins for details in many if (bins := details[kind].get(str(ply)))]) for ply in plies)]
            for name, many in of_choice.items()
        ]
        what = f"{title}: {kind} games by ply, nats of a move over the floor (likeliest squares legal, %)"
        made.append(Table(what, ["model", *(f"{ply}" for ply in plies)], body))
    return made


def ply_cell(bins: Sequence[dict[str, Any]]) -> str:
    """Means over the seeds."""
    if not bins:
        return ""
    excess_of_a_move, legal = (statistics.fmean(one[name] for one in bins) for name in ("excess", "greedy_legal"))
    return f"{excess_of_a_move:.3f} ({100 * legal:.1f})"


def text_table(title: str, choices: Choices, lengths: Sequence[str]) -> Table:
    """What the tokens without a floor cost, which are the text's."""
    head = ["model", *(f"nats, {n}" for n in lengths), *(f"vs {name}" for name in controls_of(choices))]
    body = [
        [name, *(mean_of(lines, text_nats(n)) for n in lengths), *differences(name, choices, text_nats(lengths[0]))]
        for name, lines in choices.items()
    ]
    return Table(f"{title}: text, nats per token; differences at {lengths[0]}", head, body)


def figure(lines: Sequence[Line]) -> Figure:
    """Right answers against distance, and excess against position, at the first length; two panels per group."""
    groups = group_by_axes([line for line in lines if finished(line)], val_excess)
    titles = [f"{', '.join(group)}: {what}" for group in groups for what in ("answers", "nats over the floor")]
    drawn, panels = make_panels(titles)
    for number, choices in enumerate(groups.values()):
        answers, places = panels[2 * number : 2 * number + 2]
        some = next(iter(choices.values()))[0]["result"]
        length = next(iter(some["tests"]))
        markers = markers_of(list(choices))
        for name, of_choice in choices.items():
            style = {"color": colour_of(name), "marker": markers[name], "markersize": 4, "label": name}
            lows = sorted({low for line in of_choice for low in distances(line, length)})
            answers.plot(lows, [100 * mean_right(of_choice, length, low) for low in lows], **style)
            by_place = [line["result"]["tests"][length]["by_position"] for line in of_choice]
            stretches = sorted(map(int, by_place[0]))
            means = [statistics.fmean(one[str(low)]["excess"] for one in by_place) for low in stretches]
            places.plot(stretches, means, **style)
        answers.set(xlabel=some["distance"], ylabel="right answers, % (higher is better)", ylim=(0, 104))
        places.set(xlabel="position, tokens", ylabel="nats per token over the floor (lower is better)", xscale="log")
    handles = {str(h.get_label()): h for panel in panels for h in panel.get_legend_handles_labels()[0]}
    legend_below(drawn, list(handles.values()))
    return drawn


def mean_right(lines: Sequence[Line], length: str, low: int) -> float:
    """The part of a bin's answers that is right, over all seeds that have any."""
    bins = [one for line in lines if (one := distances(line, length).get(low))]
    return sum(one["right"] for one in bins) / sum(one["tokens"] for one in bins)
