"""What docs/notebook.md shows works: its blocks run, in order, with smaller models on a small text."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from lrt.training.recipes import RECIPES

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "notebook.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
HORIZON = 'horizon="tokens=400_000"'
TINY = 'horizon="steps=2", data="texts", device="cpu"'


@pytest.mark.slow  # the report draws every figure
def test_the_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    lines = "".join(f"line {i}: {i * i} is the square of {i}\n" for i in range(600))
    (tmp_path / "texts" / "squares.txt").write_text(lines)
    recipe = RECIPES["d2"]()
    model = dataclasses.replace(recipe.model, width=16, heads=2, context=48, mlp_width=24)
    tiny = dataclasses.replace(recipe, model=model, batch_size=4, device_batch=4)
    monkeypatch.setitem(RECIPES, "d2", lambda: tiny)
    source = "".join(BLOCKS)
    assert source.count(HORIZON) == 2
    exec(compile(source.replace(HORIZON, TINY), "docs/notebook.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "step  tokens" in printed
    assert "Metrics(live " in printed
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert (tmp_path / "report.html").is_file()
