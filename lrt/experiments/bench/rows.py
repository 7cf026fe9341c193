"""One line of a benchmark: a ratio, what it has to be, and whether it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Row:
    """A figure beside its target."""

    name: str
    value: float
    spread: float | None = None
    """Half the distance between the quartiles of the rounds' ratios; None where nothing was timed."""
    at_least: float | None = None
    at_most: float | None = None
    about: dict[str, Any] = field(default_factory=dict)
    """What else belongs to it: plain data."""

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
        return {**dataclasses.asdict(self), "target": self.target, "holds": self.holds}


def show(rows: Sequence[Row], title: str) -> None:
    """A table on standard output."""
    table = Table("", "value", "±", "target", "", title=title, title_justify="left")
    for row in rows:
        verdict = {True: "holds", False: "MISSED", None: ""}[row.holds]
        spread = "" if row.spread is None else f"{row.spread:.2f}"
        table.add_row(row.name, f"{row.value:.4g}", spread, row.target, verdict)
    Console().print(table)
