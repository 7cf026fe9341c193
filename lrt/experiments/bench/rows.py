"""One line of a benchmark, and how lines are printed: as a table, or as one JSON object."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lrt.eval.report.table import Table


@dataclass(frozen=True)
class Row:
    """A figure, and its target where there is one."""

    name: str
    value: float
    spread: float | None = None
    """Half the distance between the quartiles of the rounds' ratios; None where nothing was timed."""
    at_least: float | None = None
    at_most: float | None = None
    about: dict[str, Any] = field(default_factory=dict)
    """What else belongs to it: plain data."""
    measure: str = "value"
    """What `value` is: its key in JSON, and the head of its column."""
    figures: Mapping[str, float | str | None] = field(default_factory=dict)
    """Other measures of the same thing: keys of their own in JSON. Numbers among them are columns of the table."""

    @property
    def holds(self) -> bool | None:
        """Whether the target is met; None where there is none."""
        if self.at_least is None and self.at_most is None:
            return None
        low = self.at_least is None or self.value >= self.at_least
        return low and (self.at_most is None or self.value <= self.at_most)

    @property
    def target(self) -> str:
        """In words."""
        parts = [
            f"{word} {limit:g}" for word, limit in (("≥", self.at_least), ("≤", self.at_most)) if limit is not None
        ]
        return " and ".join(parts) or "reported"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        fields = dataclasses.asdict(self)
        value, figures = {fields.pop("measure"): fields.pop("value")}, fields.pop("figures")
        return {"name": fields.pop("name"), **value, **fields, "target": self.target, "holds": self.holds, **figures}


def row_table(rows: Sequence[Row], title: str = "") -> Table:
    """Rows as cells of text: value, spread, every number among the figures, and targets where there are any."""
    numbers = dict.fromkeys(k for row in rows for k, v in row.figures.items() if not isinstance(v, str))
    measures = "/".join(dict.fromkeys(row.measure for row in rows))
    targets = ["target", ""] if any(row.holds is not None for row in rows) else []
    head = ["", measures, "±", *(name.replace("_", " ") for name in numbers), *targets]
    body = [
        [
            row.name,
            format_number(row.value),
            "" if row.spread is None else f"{row.spread:.3f}",
            *(format_number(row.figures.get(name)) for name in numbers),
            *([row.target, {True: "holds", False: "MISSED", None: ""}[row.holds]] if targets else []),
        ]
        for row in rows
    ]
    return Table(title, head, body)


def print_table(rows: Sequence[Row], title: str) -> None:
    """Rows as lines of text, columns aligned. No line is cut or wrapped, so that output in a file is whole."""
    table = row_table(rows, title)
    # Names to the left, numbers to the right; `rstrip` where the last column is empty.
    widths = [max(map(len, column)) for column in zip(table.head, *table.body, strict=True)]
    print(title)
    for name, *cells in (table.head, *table.body):
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        print("  ".join([name.ljust(widths[0]), *padded]).rstrip())


def format_number(value: float | str | None) -> str:
    """Four significant digits; thousands whole, with commas."""
    if value is None or isinstance(value, str):
        return value or "-"
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.4g}"


def print_json(rows: Sequence[Row], about: Mapping[str, Any]) -> None:
    """One line: {"rows": […], and what `about` says of all of them}."""
    print(json.dumps({"rows": [row.to_dict() for row in rows], **about}))


def hardware_title(about: Mapping[str, Any]) -> str:
    """The machine in words, over a table."""
    return ", ".join(str(value) for value in about["hardware"].values())
