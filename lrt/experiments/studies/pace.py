"""How far a study is, and how long the rest takes: by what was announced, and by what was measured since."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from lrt.experiments.studies.grid import Cell
from lrt.utils.progress import Advance
from lrt.utils.timing import format_duration


class Pace:
    """What is done of a study, in the minutes that its cells were announced to take.

    These may be wrong, and other processes run cells too. So the bar is set anew before each cell, to what is left, and
    within a cell it never passes the cell's end.
    """

    def __init__(self, minutes: Mapping[str, float], show: Advance) -> None:
        """`minutes` of the cells that are to run, by name; `show` draws the bar, in minutes."""
        self.minutes, self.show = minutes, show
        self.total = sum(minutes.values())
        self.shown = self.limit = 0.0
        self.begun = time.monotonic()

    def minutes_of(self, cell: Cell) -> float:
        """As announced. Of a sweep's later seeds another choice may have been: then as the study says."""
        return self.minutes.get(cell.name, cell.minutes)

    def minutes_left(self, cells: Sequence[Cell]) -> float:
        """Of these cells, and no more than there were at first."""
        return min(self.total, sum(map(self.minutes_of, cells)))

    def begin(self, cell: Cell, left: Sequence[Cell]) -> None:
        """A cell begins, and `left` are not done yet, it among them."""
        done = self.total - self.minutes_left(left)
        self.show(done - self.shown)
        self.shown, self.limit = done, min(self.total, done + self.minutes_of(cell))

    def advance(self, amount: float, text: str = "") -> None:
        """So many minutes more of the cell that has begun."""
        step = min(amount, self.limit - self.shown)
        self.shown += step
        self.show(step, text)

    def time_left(self, cells: Sequence[Cell]) -> str:
        """For these cells, at the pace since the start; as announced while nothing is done. In words."""
        if not cells:
            return "that was the last"
        left = self.minutes_left(cells)
        done = self.total - left
        seconds = left * ((time.monotonic() - self.begun) / done if done > 0 else 60.0)
        count = "1 cell" if len(cells) == 1 else f"{len(cells)} cells"
        return f"{count} left, about {format_duration(seconds)}"
