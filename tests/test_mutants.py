"""The mutation testing itself: its operators, its choice of tests, what it keeps, and that its lists fit the code."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def script() -> ModuleType:
    """benchmarks/mutants.py."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module("mutants")
    finally:
        sys.path.remove(str(BENCHMARKS))


SOURCE = '''"""Docstring of 1 and not 2."""
import torch

LIMIT: int = 3

class Thing:
    size = 4

    def __repr__(self) -> str:
        return "1" * 2

    @torch.no_grad()
    def first(self, x, most=0.5):
        """Not 1."""
        assert x > 1
        if not x or x < LIMIT:
            raise ValueError(f"x is {x + 1}, above {LIMIT - 1}")
        self.rest = x[1:-1]
        total = min(x[0], most).detach() + torch.zeros(len(x), dtype=torch.long)
        total -= 1
        print("one", total + 1)
        return total
'''

EXPECTED = {
    "LIMIT: int = 3": {"LIMIT: int = 0", "LIMIT: int = 2", "LIMIT: int = 4", "LIMIT: int = 6"},
    "size = 4": {"size = 0", "size = 3", "size = 5", "size = 8", "size = None"},
    "@torch.no_grad()": {"@torch.enable_grad()"},
    "def first(self, x, most=0.5):": {f"def first(self, x, most={n}):" for n in (0.0, 1.0, 1.5)},
    "if not x or x < LIMIT:": {
        "if (x) or x < LIMIT:",
        "if not x and x < LIMIT:",
        "if not x or x <= LIMIT:",
        "if not x or x >= LIMIT:",
        "if (not (not x or x < LIMIT)):",
    },
    'raise ValueError(f"x is {x + 1}, above {LIMIT - 1}")': {"pass"},
    "self.rest = x[1:-1]": {
        "pass",
        "self.rest = x[:-1]",
        "self.rest = x[1:]",
        "self.rest = x[1:(1)]",
        *(f"self.rest = x[{n}:-1]" for n in (0, 2)),
        *(f"self.rest = x[1:-{n}]" for n in (0, 2)),
    },
    "total -= 1": {"pass", "total += 1", "total -= 0", "total -= 2"},
    "return total": {"return None"},
    "total = min(x[0], most).detach() + torch.zeros(len(x), dtype=torch.long)": {
        "total = None",
        "total = max(x[0], most).detach() + torch.zeros(len(x), dtype=torch.long)",
        "total = min(x[0], most) + torch.zeros(len(x), dtype=torch.long)",
        "total = min(x[0], most).detach() - torch.zeros(len(x), dtype=torch.long)",
        "total = min(x[0], most).detach() + torch.zeros(len(x))",
        "total = min(x[1], most).detach() + torch.zeros(len(x), dtype=torch.long)",
        "total = min(x[(-1)], most).detach() + torch.zeros(len(x), dtype=torch.long)",
    },
}


def test_operators_break_what_tests_should_notice_and_nothing_else(script: ModuleType):
    made: dict[str, set[str]] = {}
    for mutant in script.mutants("f.py", SOURCE.encode()):
        before, after = mutant.diff
        made.setdefault(before, set()).add(after)
        assert mutant.parses(), mutant.diff
    assert made == EXPECTED


def test_a_mutant_knows_where_it_stands(script: ModuleType):
    (mutant,) = (m for m in script.mutants("f.py", SOURCE.encode()) if m.diff[1] == "if not x and x < LIMIT:")
    assert (mutant.function, mutant.line, mutant.operator) == ("Thing.first", 16, "boolean")
    assert (mutant.lines, mutant.scope) == (range(16, 17), range(13, 23))  # the condition, not its body
    by_hand = script.by_hand("f.py", SOURCE.encode(), "total -= 1", "total -= 7")
    assert (by_hand.function, by_hand.lines, by_hand.diff[1]) == ("Thing.first", range(20, 21), "total -= 7")
    with pytest.raises(ValueError, match=r"stands in f\.py 4 times"):
        script.by_hand("f.py", SOURCE.encode(), "total", "")


def test_a_sample_is_a_function_of_its_seed_and_of_every_room(script: ModuleType):
    files = {f"lrt/{room}/f.py": SOURCE.encode() for room in script.ROOMS}
    one, again, other = (script.sampled(files, 40, seed) for seed in (0, 0, 1))
    assert [m.key for m in one] == [m.key for m in again] != [m.key for m in other]
    assert {script.room_of(m) for m in one} == set(script.ROOMS)
    assert len({m.key for m in one}) == 40
    assert script.sources(("model",), [script.ROOT / "lrt/model/size.py"]).keys() == {"lrt/model/size.py"}
    assert {file.split("/")[1] for file in script.sources(("schedules", "model"))} == {"model", "schedules"}


def test_tests_that_run_the_line_come_first_and_the_fastest_of_them(script: ModuleType):
    coverage = script.Coverage()
    coverage.add(
        {"seconds": {"a": 3, "b": 1, "c": 2}, "failed": [], "lines": {"f.py": {"16": ["a", "b"], "20": ["c"]}}}
    )
    coverage.add({"seconds": {"d": 0.5}, "failed": ["e"], "lines": {"f.py": {"16": ["e"], "3": [""], "4": [""]}}})
    at = {m.lines.start: m for m in script.mutants("f.py", SOURCE.encode())}
    assert coverage.tests(at[16]) == ["b", "a"]
    assert coverage.tests(at[4]) == ["b", "c", "a", "d"]  # at import: all, those of the module first
    assert coverage.tests(at[18]) == []
    coverage.add(
        {"seconds": {"t[1]": 1, "t[2]": 2, "u": 9}, "failed": [], "lines": {"f.py": {"18": ["u", "t[2]", "t[1]"]}}}
    )
    assert coverage.tests(at[18]) == ["t[1]", "u", "t[2]"]  # every test before the variants of one


def test_results_are_kept_for_equal_code_and_equal_tests(script: ModuleType, tmp_path: Path, monkeypatch):
    mutant = script.sampled(script.sources(("schedules",)), 1, 0)[0]
    script.Results(tmp_path / "r.jsonl", trust_kills=False).add(mutant, {"fate": "killed", "by": "test"})
    assert json.loads((tmp_path / "r.jsonl").read_text())["mutant"] == mutant.key
    assert script.Results(tmp_path / "r.jsonl", trust_kills=False).get(mutant) == "killed"
    other = script.sampled(script.sources(("schedules",)), 2, 0)[1]
    script.Results(tmp_path / "r.jsonl", False, 10).add(other, {"fate": "time up", "seconds": 10})
    assert script.Results(tmp_path / "r.jsonl", False, 10).get(other) == "time up"
    assert script.Results(tmp_path / "r.jsonl", False, 20).get(other) is None  # with more time it may be noticed
    monkeypatch.setattr(script, "tests_digest", lambda room: "others")
    assert script.Results(tmp_path / "r.jsonl", trust_kills=False).get(mutant) is None
    assert script.Results(tmp_path / "r.jsonl", trust_kills=True).get(mutant) == "killed"
    monkeypatch.setattr(script, "code_digest", lambda: "other")
    assert script.Results(tmp_path / "r.jsonl", trust_kills=True).get(mutant) is None


def test_the_lists_fit_the_code(script: ModuleType):
    for name, mutant in script.named().items():
        assert mutant.parses(), name
    assert script.outdated() == []
