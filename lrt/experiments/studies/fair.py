"""What `lrt fair` shows of its cells, from their lines alone: a verdict in words, a table, and a figure.

Every model stands at the rate that was best on val with the first seed. Differences are from the first model, paired by
seed, on test (contract, section 5).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from lrt.data.prepared import Prepared
from lrt.eval.report.style import GREY, colour_of
from lrt.eval.report.table import Table
from lrt.experiments.studies.comparisons import (
    RATE,
    Choices,
    Difference,
    format_difference,
    format_value,
    group_by_axes,
    is_at_edge,
    paired_difference,
    rate_cell,
    rates_tried,
    scored_lines,
    seeds_cell,
    test_bpb,
)
from lrt.experiments.studies.grid import Cell, Fields
from lrt.experiments.studies.language import Language
from lrt.experiments.studies.runner import Line


class Fair(Language):
    """Cells of language, whose minutes come from the plan that was made for all of them."""

    def __init__(self) -> None:
        super().__init__(difference_figure)

    def minutes(self, cell: Cell, device: str) -> float:
        return cell.minutes

    def tables(self, lines: Sequence[Line]) -> list[Table]:
        return [group_table(lines, group, choices) for group, choices in group_by_axes(lines).items()]


class OwnText(Fair):
    """The same on one prepared text, which cells name by its fingerprint: where its folder lies is in no key.

    All that is kept beside the results is in `folder`.
    """

    def __init__(self, data: Prepared, folder: Path) -> None:
        super().__init__()
        self.data, self.folder = data, folder

    def missing(self, cell: Cell) -> str | None:
        return None

    def open_text(self, fields: Fields) -> Prepared:
        return self.data

    def fingerprint(self, fields: Fields) -> str | None:
        return self.data.fingerprint


def terminal_tables(lines: Sequence[Line]) -> list[Table]:
    """The tables in 80 columns: what is the same for all models stands elsewhere."""
    tables = Fair().tables(lines)
    return [Table(t.title, t.head[:TERMINAL], [row[:TERMINAL] for row in t.body]) for t in tables]


TERMINAL = 4
"""Columns of the table that a terminal shows."""


def group_table(lines: Sequence[Line], group: tuple[str, ...], choices: Choices) -> Table:
    """A row per model, the first one on top."""
    first = next(iter(choices))
    head = ["model", "live BPB", "difference", "step", "rate (tried)", "parameters", "seeds"]
    base = choices[first][0]["result"]["step_ratio"]  # measured before training: one that diverged has it too
    body = []
    for name, of_choice in choices.items():
        scored = scored_lines(of_choice)
        live = format_value(statistics.fmean(map(test_bpb, scored)), ".4f") if scored else "diverged"
        step = statistics.fmean(line["result"]["step_ratio"] for line in scored) / base if scored else None
        body.append(
            [
                name,
                live,
                "" if name == first else format_difference(paired_difference(of_choice, choices[first])),
                format_value(step, ".2f"),
                rate_cell(of_choice, rates_tried(lines, group, name)),
                f"{of_choice[0]['result']['parameters']:,}",
                seeds_cell(of_choice),
            ]
        )
    return Table(f"At equal {', '.join(group)}", head, body)


def verdict(lines: Sequence[Line]) -> list[str]:
    """A sentence for each thing that is equal."""
    return [
        f"At equal {', '.join(group)}, {say_differences(choices)}."
        for group, choices in group_by_axes(lines).items()
        if len(choices) > 1
    ]


def narrow_sweeps(lines: Sequence[Line]) -> list[str]:
    """A sentence for each thing that is equal, where a model's best rate is the lowest or highest that was tried."""
    sentences = []
    for group, choices in group_by_axes(lines).items():
        best = {name: float(of_choice[0]["fields"].get(RATE, 1)) for name, of_choice in choices.items()}
        edge = [name for name, rate in best.items() if is_at_edge(rate, rates_tried(lines, group, name))]
        if edge:
            sentences.append(
                f"At equal {', '.join(group)} the best rate of {', '.join(edge)} is at the edge of what was tried; "
                "the same command with more --rates goes on."
            )
    return sentences


def say_differences(choices: Choices) -> str:
    """Every model beside the first, from the best on; and which seeds diverged."""
    first, *others = choices
    if not scored_lines(choices[first]):
        return f"nothing can be compared with {first}: {say_diverged(choices, first)}"
    differences = {name: paired_difference(choices[name], choices[first]) for name in others}
    known = {name: difference for name, difference in differences.items() if difference is not None}
    sentences = []
    for name in [*sorted(known, key=lambda name: known[name].mean), *(name for name in others if name not in known)]:
        sentence = say_difference(name, first, known[name]) if name in known else f"{name} has no seed to compare"
        lost = say_diverged(choices, name, first)
        sentences.append(f"{sentence}{', and' if name in known else ':'} {lost}" if lost else sentence)
    return "; ".join(sentences)


def say_diverged(choices: Choices, *names: str) -> str:
    """Which seeds of these models diverged; empty where none did."""
    parts = []
    for name in names:
        lost = [str(line["seed"]) for line in choices[name] if "test" not in line["result"]]
        if lost:
            parts.append(f"{name} diverged with seed{'s' * (len(lost) > 1)} {', '.join(lost)}")
    return " and ".join(parts)


def say_difference(name: str, first: str, difference: Difference) -> str:
    """Whether a model is better or worse than the first, which is said only of an interval that excludes zero."""
    seeds = f"{difference.seeds} seed{'s' * (difference.seeds > 1)}"
    word = "better" if difference.mean < 0 else "worse"
    if difference.half is None:
        return f"{name} is {abs(difference.mean):.1f} % {word} than {first}, live ({seeds}: too few for an interval)"
    if abs(difference.mean) <= difference.half:
        return f"{name} cannot be told apart from {first} ({difference}, {seeds}; the interval holds zero)"
    size = f"{abs(difference.mean):.1f} % ± {difference.half:.1f}"
    return f"{name} is {size} {word} than {first}, live ({seeds}; the interval excludes zero)"


def difference_figure(lines: Sequence[Line]) -> Figure:
    """How far each model's live score on test is from the first one's, with the 95 % t-interval over seeds."""
    groups = group_by_axes(lines)
    # One above the other, so that a phone shows them as wide as it is; as high as they have models.
    height = sum(1.1 + 0.35 * len(choices) for choices in groups.values())
    figure = Figure(figsize=(6.4, max(1.5, height)), layout="constrained")
    panels = figure.subplots(max(1, len(groups)), squeeze=False)[:, 0]
    for panel, (group, choices) in zip(panels, groups.items(), strict=False):
        panel.set_title(f"at equal {', '.join(group)}", fontsize=10)
        first, *others = choices
        differences = [paired_difference(choices[name], choices[first]) for name in others]
        for y, (name, difference) in enumerate(zip(others, differences, strict=True)):
            if difference is not None:
                half = difference.half or 0.0
                panel.errorbar([difference.mean], [y], xerr=[half], fmt="o", color=colour_of(name), capsize=3)
        panel.axvline(0, color=GREY, linewidth=1)
        panel.set_yticks(range(len(others)), others)
        panel.set_ylim(len(others) - 0.5, -0.5)
        panel.set_xlabel(f"live bits per byte against {first}, % (lower is better)")
    return figure
