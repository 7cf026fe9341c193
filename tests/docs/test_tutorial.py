"""docs/tutorial.md from its first to its last line, with a smaller text and fewer tokens."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.pages import DOCS, blocks, lrt_arguments

from lrt.cli.main import main

PAGE = DOCS / "tutorial.md"
SMALLER = ["--model.width", "16", "--model.heads", "2", "--model.context", "64", "--batch-size", "4"]
FEWER = {
    "diagnose": ["--at-least", "300"],
    "evaluate": ["--at-least", "300"],
    "sample": [],
    "report": [],
    "prepare": [],
}


def smaller(arguments: list[str]) -> list[str]:
    """The command with what a test can wait for. What is matched to another run follows it by itself."""
    if arguments[0] != "train":
        return [*arguments, *FEWER[arguments[0]]]
    device = ["--device-batch", "4", "--eval.every", "0", "--device", "cpu"]
    return [*(re.sub(r"^tokens=\d+$", "tokens=2000", word) for word in arguments), *SMALLER, *device]


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    first, last = [block.text for block in blocks(PAGE) if block.language == "python"]
    few = "stdlib_files()"
    assert few in first
    exec(compile(first.replace(few, f"{few}[:25]"), "docs/tutorial.md", "exec"), {})
    commands = list(lrt_arguments(PAGE))
    assert [arguments[0] for arguments in commands].count("train") == 3
    for arguments in commands:
        main(smaller(arguments))
    assert Path("runs/report.html").stat().st_size > 10_000
    capsys.readouterr()
    exec(compile(last.replace("generate(40", "generate(10"), "docs/tutorial.md", "exec"), {})
    assert capsys.readouterr().out.startswith("def ")
