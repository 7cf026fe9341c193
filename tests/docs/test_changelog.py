"""The table "0.1 to 0.2: old name, new name" of CHANGELOG.md leads to names that are there."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

TEXT = (Path(__file__).resolve().parents[2] / "CHANGELOG.md").read_text(encoding="utf-8")
TABLE = TEXT[TEXT.index("| module in 0.1") :].split("\n\n")[0].splitlines()[2:]
NAME = re.compile(r"`([\w.]+)`")


def targets(line: str) -> list[tuple[str, str]]:
    """(module, name) pairs that a row says are there now."""
    old, new, names = (cell.strip() for cell in line.strip("|").split("|"))
    home = NAME.findall(old if new == "the same" else new)[0]
    pairs = [(home, "__doc__")]
    for group in filter(None, names.split(";")):
        body, _, elsewhere = group.partition(" in `")
        module = elsewhere.rstrip("` ") or home
        pairs += [(module, NAME.findall(part)[-1]) for part in body.split(",")]
    return pairs


def test_there_are_rows():
    assert len(TABLE) > 100
    assert sum(len(targets(line)) for line in TABLE) > 500


@pytest.mark.parametrize("line", TABLE, ids=lambda line: NAME.findall(line)[0])
def test_new_names_are_there(line: str):
    for module, name in targets(line):
        assert hasattr(importlib.import_module(module), name), f"{module} has no {name}"
