"""Tables and the figure of the study of data with state, from its lines alone.

The last axis is what is compared, every other makes groups of its own. Each choice stands with the rate that was best
on val. Differences are paired by seed, with 95 % t-intervals (contract, section 5).
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.figure import Figure

from lrt.eval.report.table import Table
from lrt.experiments.studies.comparisons import BASELINES, RATE, Difference, split_choices, t_half_width
from lrt.experiments.studies.figures import make_panels
from lrt.experiments.studies.runner import Line

Choices = dict[str, list[Line]]
FAR = 4
"""Answers from so many updates on are those that only a carried state answers."""


def groups_of(lines: Sequence[Line]) -> dict[tuple[str, ...], Choices]:
    """(choices of the other axes) -> choice of the compared axis -> its lines at the best rate, one per seed."""
    groups: dict[tuple[str, ...], dict[str, list[Line]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        if "tests" in line["result"]:
            group, choice = split_choices(line)
            groups[group][choice].append(line)
    return {
        group: {choice: at_best_rate(of_choice) for choice, of_choice in choices.items()}
        for group, choices in groups.items()
    }


def at_best_rate(lines: Sequence[Line]) -> list[Line]:
    """The lines of the rate that is best on val with the first seed."""
    first = min(line["seed"] for line in lines)
    best = min((line for line in lines if line["seed"] == first), key=lambda line: line["result"]["val_excess"])
    rate = best["choices"].get(RATE)
    return sorted((line for line in lines if line["choices"].get(RATE) == rate), key=lambda line: line["seed"])


def excess(line: Line, length: str) -> float:
    """Excess nats per token at a length; nats where no floor is known."""
    one = line["result"]["tests"][length]["all"]
    return one["nats"] if one["excess"] is None else one["excess"]


def exact(line: Line, length: str, least: int = 0) -> float | None:
    """Of the answers at a length whose state lies at least so far back, the part that is right; None of none."""
    bins = [one for low, one in line["result"]["tests"][length]["by_distance"].items() if int(low) >= least]
    asked = sum(one["tokens"] for one in bins)
    return sum(one["right"] for one in bins) / asked if asked else None


def difference(lines: Sequence[Line], others: Sequence[Line], read: Callable[[Line], float]) -> Difference | None:
    """Of what is read of lines from what is read of others, in per cent of the others' mean, paired by seed."""
    by_seed = {line["seed"]: read(line) for line in others}
    pairs = [(read(line), by_seed[line["seed"]]) for line in lines if line["seed"] in by_seed]
    if not pairs:
        return None
    unit = statistics.fmean(other for _, other in pairs) / 100
    per_cent = [(one - other) / unit for one, other in pairs]
    return Difference(statistics.fmean(per_cent), t_half_width(per_cent) if len(pairs) >= 3 else None, len(pairs))


def slopes(lines: Sequence[Line], others: Sequence[Line], length: str) -> list[float]:
    """By seed: how fast the gain over others grows with position, in nats per token and doubling of the position."""
    by_seed = {line["seed"]: positions(line, length) for line in others}
    return [
        slope({low: by_seed[line["seed"]][low] - own for low, own in positions(line, length).items()})
        for line in lines
        if line["seed"] in by_seed
    ]


def positions(line: Line, length: str) -> dict[int, float]:
    """Mean nats of the tokens of each stretch of positions, by its first."""
    return {int(low): one["nats"] for low, one in line["result"]["tests"][length]["by_position"].items()}


def slope(gain: dict[int, float]) -> float:
    """Least squares over log2 of the position, from the eighth on: before it there is no state to speak of."""
    points = [(math.log2(low), value) for low, value in gain.items() if low >= 8]
    x, y = (statistics.fmean(p[i] for p in points) for i in (0, 1))
    return sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)


def interval(values: Sequence[float], digits: int = 4) -> str:
    """Mean ± half of the 95 % t-interval; without one where there are fewer than three."""
    if not values:
        return ""
    mean = f"{statistics.fmean(values):+.{digits}f}"
    return f"{mean} ± {t_half_width(values):.{digits}f}" if len(values) >= 3 else f"{mean} ({len(values)} seeds)"


def tables(lines: Sequence[Line]) -> list[Table]:
    """Per group: excess at every length beside the controls'; exact answers by distance; gain by position."""
    made = []
    for group, choices in groups_of(lines).items():
        title = ", ".join(group)
        made += [excess_table(title, choices), distance_table(title, choices), position_table(title, choices)]
    return made


def lengths_of(choices: Choices) -> list[str]:
    return list(next(iter(choices.values()))[0]["result"]["tests"])


def baselines_of(choices: Choices) -> list[str]:
    """The controls that a group has: the first, and the strongest without recurrence."""
    known = [name for name in BASELINES if name in choices]
    return known[:1] + known[1:][-1:]


def excess_table(title: str, choices: Choices) -> Table:
    lengths, controls = lengths_of(choices), baselines_of(choices)
    first = lengths[0]
    head = ["model", "rate", "seeds", "parameters", "step", "tokens", *(f"excess, {n}" for n in lengths)]
    head += [*(f"vs {name}" for name in controls), "memory embedding", "memory zero"]
    body = []
    for name, lines in choices.items():
        counted = lines[0]["result"]
        row = [name, f"{lines[0]['fields'].get(RATE, 1):g}", str(len(lines)), f"{counted['parameters']:,}"]
        row += [f"{counted['step_ratio']:.2f}", f"{statistics.fmean(x['result']['tokens'] for x in lines):,.0f}"]
        row += [f"{statistics.fmean(excess(line, n) for line in lines):.4f}" for n in lengths]
        for other in controls:
            change = None if other == name else difference(lines, choices[other], lambda line: excess(line, first))
            row.append("" if change is None else str(change))
        for ablation in ("embedding", "zero"):
            values = [line["result"]["ablated"].get(ablation) for line in lines]
            row.append(mean_excess(values) if all(values) else "")
        body.append(row)
    return Table(f"{title}: nats per token over the floor; differences at {first}", head, body)


def mean_excess(bins: Sequence[dict[str, Any]]) -> str:
    return f"{statistics.fmean(b['nats'] if b['excess'] is None else b['excess'] for b in bins):.4f}"


def distance_table(title: str, choices: Choices) -> Table:
    """Right answers in per cent at every length, by how far the state lies back."""
    head, columns = ["model"], []
    for length in lengths_of(choices):
        lows = [int(n) for n in next(iter(choices.values()))[0]["result"]["tests"][length]["by_distance"]]
        columns += [(length, low) for low in lows]
        head += [f"{length}: {low}{'+' if low == lows[-1] else ''}" for low in lows] + [f"{length}: {FAR}+ in all"]
        columns.append((length, -FAR))
    body = []
    for name, lines in choices.items():
        row = [name]
        for length, low in columns:
            values = [exact(x, length, -low) if low < 0 else exact_in(x, length, low) for x in lines]
            known = [v for v in values if v is not None]
            row.append(f"{100 * statistics.fmean(known):.1f}" if known else "")
        body.append(row)
    return Table(f"{title}: right answers, %, by distance", head, body)


def exact_in(line: Line, length: str, low: int) -> float | None:
    """Right answers of one bin."""
    one = line["result"]["tests"][length]["by_distance"].get(str(low))
    return one["right"] / one["tokens"] if one else None


def position_table(title: str, choices: Choices) -> Table:
    """The gain over each control, nats per token, and how fast it grows with the position."""
    controls, lengths = baselines_of(choices), lengths_of(choices)
    head = ["slope of the gain", *(f"over {name}, {n}" for name in controls for n in lengths)]
    body = [
        [
            name,
            *(
                "" if other == name else interval(slopes(lines, choices[other], n), 5)
                for other in controls
                for n in lengths
            ),
        ]
        for name, lines in choices.items()
    ]
    return Table(f"{title}: nats per token for each doubling of the position", head, body)


def figure(lines: Sequence[Line]) -> Figure:
    """Right answers against distance and gain against position at the first length, a row of panels per group."""
    groups = groups_of(lines)
    titles = [f"{', '.join(group)}: {what}" for group in groups for what in ("answers", "nats over the floor")]
    made, panels = make_panels(titles)
    for number, choices in enumerate(groups.values()):
        length = lengths_of(choices)[0]
        for index, (name, of_choice) in enumerate(choices.items()):
            style = {"color": f"C{index % 10}", "marker": "o", "markersize": 3.5, "label": name}
            first = of_choice[0]["result"]["tests"][length]
            lows = [int(low) for low in first["by_distance"]]
            right = [[exact_in(line, length, low) or 0.0 for line in of_choice] for low in lows]
            panels[2 * number].plot(lows, [100 * statistics.fmean(v) for v in right], **style)
            places = sorted(positions(of_choice[0], length))
            values = [
                statistics.fmean(
                    over_floor(line["result"]["tests"][length]["by_position"][str(low)]) for line in of_choice
                )
                for low in places
            ]
            panels[2 * number + 1].plot(places, values, **style)
        panels[2 * number].set(xlabel="updates since a value in plain sight", ylabel="right, %", ylim=(0, 104))
        panels[2 * number + 1].set(xlabel="position", ylabel="excess nats per token", xscale="log", yscale="log")
        panels[2 * number].legend(fontsize="x-small", frameon=False)
    return made


def over_floor(one: dict[str, Any]) -> float:
    return one["nats"] if one["excess"] is None else one["excess"]
