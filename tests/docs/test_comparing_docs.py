"""The commands of docs/try.md and docs/comparing-fairly.md are commands; tests/experiments runs them at tiny sizes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from lrt.cli import verbs
from lrt.cli.fair import Fair
from lrt.cli.try_ import Try

DOCS = Path(__file__).parents[2] / "docs"


def commands(page: str) -> list[list[str]]:
    """The arguments of every command in a block without a language."""
    blocks = re.findall(r"^```\n(.*?)^```$", (DOCS / page).read_text(encoding="utf-8"), re.M | re.S)
    return [shlex.split(line)[1:] for block in blocks for line in block.splitlines()]


@pytest.mark.parametrize(("page", "verb", "count"), [("try.md", Try, 1), ("comparing-fairly.md", Fair, 3)])
def test_commands_are_commands(page: str, verb: type, count: int):
    parsed = [verbs.parse(command) for command in commands(page)]
    assert len(parsed) == count
    assert all(isinstance(one, verb) for one in parsed)
