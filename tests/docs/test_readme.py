"""README.md: short, narrow tables, and its program prints what it says."""

from __future__ import annotations

import re

import pytest
from support.pages import ROOT, blocks

README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")
WORD = re.compile(r"\S*\w\S*")


def test_it_is_short():
    assert len(WORD.findall(TEXT)) <= 700


def test_tables_are_narrow():
    rows = [line for line in TEXT.splitlines() if line.startswith("|")]
    assert len(rows) > 5
    assert max(row.count("|") - 1 for row in rows) <= 5


def test_the_program_prints_what_stands_below_it(capsys: pytest.CaptureFixture[str]):
    shown = blocks(README)
    (program,) = [i for i, block in enumerate(shown) if block.language == "python"]
    exec(compile(shown[program].text, "README.md", "exec"), {})
    assert shown[program + 1].language == "text"
    assert capsys.readouterr().out == shown[program + 1].text
