"""How far a study is: estimates may be wrong, the bar stays within them, and the time left follows the clock."""

from __future__ import annotations

import pytest

from lrt.experiments.studies import pace
from lrt.experiments.studies.grid import Cell
from lrt.experiments.studies.pace import Pace

CELLS = [Cell((name,), 0, {}, 5.0) for name in ("a", "b", "c")]
MINUTES = {"a/0": 1.0, "b/0": 2.0}


class Shown:
    """Stands for a bar: how much of it is done."""

    done = 0.0

    def __call__(self, amount: float, text: str = "") -> None:
        self.done += amount


def test_a_cell_that_does_more_than_was_announced_does_not_pass_its_end():
    bar = Shown()
    study = Pace(MINUTES, bar)
    study.begin(CELLS[0], CELLS[:2])
    study.advance(0.75)
    study.advance(40)
    assert bar.done == 1.0
    study.begin(CELLS[1], CELLS[1:2])
    study.advance(40)
    assert bar.done == 3.0


def test_the_bar_follows_what_other_processes_did_and_what_was_not_announced():
    bar = Shown()
    study = Pace(MINUTES, bar)
    study.begin(CELLS[1], CELLS[1:2])  # another process ran the first
    assert bar.done == 1.0
    study.begin(CELLS[2], CELLS[2:])  # not announced: it takes longer than all that was
    study.advance(5.0)
    assert 0.0 <= bar.done <= 3.0


def test_the_time_left_is_that_of_the_pace_so_far(monkeypatch: pytest.MonkeyPatch):
    clock = iter([0.0, 600.0])
    monkeypatch.setattr(pace.time, "monotonic", lambda: next(clock))
    study = Pace(MINUTES, Shown())
    assert study.time_left(CELLS[:2]) == "2 cells left, about 3 min"  # as announced
    assert study.time_left(CELLS[1:2]) == "1 cell left, about 20 min"  # the first took ten minutes, not one
    assert study.time_left([]) == "that was the last"
