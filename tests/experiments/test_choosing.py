"""The figure for those who choose a schedule: what it draws is the page's table, and its models are the study's."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from lrt.eval.hops import HopCurve, HopPoint
from lrt.eval.report.style import save_figure
from lrt.experiments.studies.state_tracking import recipe

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def choosing() -> Iterator[ModuleType]:
    """benchmarks/choosing.py."""
    before = [*sys.path]
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module("choosing")
    sys.path[:] = before


def table() -> dict[str, tuple[str, str, str]]:
    """Of docs/state-tracking.md: schedule -> exact, felt, cost."""
    page = (ROOT / "docs" / "state-tracking.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(.*?)`.*? \| \w+ \| (\w+) \| (\w+) \| ([\d.]+)", page, re.MULTILINE)
    return {schedule: (exact, felt, cost) for schedule, exact, felt, cost in rows}


def test_reach_and_cost_are_those_of_the_table(choosing: ModuleType):
    """Of the table exact and felt have a test with code of its own (test_state_tracking.py)."""
    page = table()
    page["plain()"] = ("1", "6", "1")  # "1 position", "6 positions on"
    assert set(page) == set(choosing.REACHING)
    for name, (exact, felt, cost) in page.items():
        reach = choosing.measure_reach(name)
        assert (exact, felt) in (("all", "all"), (str(reach.exact), str(reach.felt))), name
        assert reach.cost == pytest.approx(float(cost), abs=0.05), name
    whole = choosing.measure_reach("sequential()")
    assert (whole.exact, whole.felt) == (choosing.LENGTH, choosing.LENGTH - 1)


def test_the_trained_models_are_the_study_s(choosing: ModuleType):
    for schedule, name in choosing.TRAINED.items():
        assert recipe("parity", name).schedule == schedule


def test_the_figure_is_the_same_each_time(choosing: ModuleType, tmp_path: Path):
    points = tuple(HopPoint(h, 2.0 - h / 63, 1.0, 0.1) for h in (0, 1, 2, 4, 8, 16, 32, 63))
    curve = HopCurve(0.125, 640, 10, points, 32, "more than", "more than 32 hops")
    reach = {"plain()": choosing.Reach(1, 6, 1.0), "sequential()": choosing.Reach(60, 59, 1.0)}
    for name in ("a.svg", "b.svg"):
        save_figure(lambda: choosing.make_figure(reach, {"sequential()": curve}), tmp_path / name)
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    assert {"sequential(): live 0.12", "plain()", "× 1.0, one token after another"} <= set(
        re.findall(r">([^<>]+)<", text)
    )
