"""The student: own text, an injection of their own, three seeds beside two controls, a table and a figure."""

from __future__ import annotations

import email
from pathlib import Path

import pytest
from support.journey import Terminal
from support.page import Page

INJECTION = '''
"""The memory, through a gate of its own for every channel."""

import torch
from torch import Tensor, nn

import lrt
from lrt.model.memory import Residual


class Gated(Residual):
    """x + γ · (sigmoid(scale) · m)."""

    def __init__(self, config: lrt.ModelConfig) -> None:
        super().__init__(config)
        self.scale = nn.Parameter(torch.zeros(config.width))

    def residual(self, x: Tensor, memory: Tensor) -> Tensor:
        return super().residual(x, self.scale.sigmoid() * memory)


lrt.register_injection("gated", Gated, optim={"scale": "adamw"})
'''
PLUGIN = ("--plugin", "gated.py")
TEXTS = ("generator.py", "policy.py", "quoprimime.py", "utils.py")
"""Of the package email: so little text that its eight epochs bound the runs, and not the minutes."""
SMALL = ("--depth", "2", "--width", "32", "--context", "32", "--rates", "1")
RUN = (
    *("--data", "runs/fair/data", "--model.width", "32", "--model.heads", "2", "--model.context", "32"),
    *("--batch-size", "8", "--device-batch", "8", "--horizon", "steps=20"),
)


@pytest.fixture
def terminal(tmp_path: Path) -> Terminal:
    (tmp_path / "gated.py").write_text(INJECTION.lstrip(), encoding="utf-8")
    (tmp_path / "texts").mkdir()
    for name in TEXTS:
        source = Path(email.__file__).with_name(name).read_text(encoding="utf-8")
        (tmp_path / "texts" / name).write_text(source, encoding="utf-8")
    return Terminal(tmp_path)


@pytest.mark.slow
def test_an_own_injection_is_compared_on_an_own_text_and_goes_into_a_paper(terminal: Terminal):
    compare_over_seeds(terminal)
    write_table(terminal)


def compare_over_seeds(terminal: Terminal) -> None:
    """`lrt fair`, on three seeds."""
    models = ("transformer", "token-shift", "gated")
    command = (*PLUGIN, "fair", "texts", "--models", *models, "--minutes", "30", *SMALL)
    shown = terminal.lrt(*command)
    assert "9 runs: 3 models, seed 0 at rates 1, then seeds up to 2 at each model's best rate" in shown
    assert "3 seeds; the interval" in " ".join(shown.split())
    page = Page((terminal.folder / "runs/fair/report.html").read_text(encoding="utf-8"))
    assert [link for link in page.loaded if not link.startswith(("data:", "#"))] == []  # nothing from elsewhere
    assert {"transformer", "token shift", "gated"} <= {cell.strip() for cell in page.cells}
    assert (terminal.folder / "runs/fair/difference.pdf").read_bytes().startswith(b"%PDF")
    table = terminal.lrt(*command, "--format", "latex")  # nothing is trained again
    for name in ("transformer", "token shift", "gated"):
        assert f"\n{name} & " in table


def write_table(terminal: Terminal) -> None:
    """A run of each on the same text, `lrt compare`, LaTeX and a figure."""
    terminal.lrt("train", "d2-transformer", *RUN, "--out", "runs/plain")
    terminal.lrt("train", "d2-token-shift", *RUN, "--out", "runs/shift")
    terminal.lrt(*PLUGIN, "train", "d2", *RUN, "--out", "runs/gated", "--model.memory.injection", "gated")
    command = ("compare", "runs/plain", "runs/shift", "runs/gated", "--format", "latex", "--figure", "figure.pdf")
    assert "trained on the text data, which is not in runs/data; give its folder: --data FOLDER" in terminal.lrt(
        *PLUGIN, *command, fails=True
    )
    own_text = ("--data", "runs/fair/data")
    assert "needs the plugin gated: pass --plugin gated.py" in terminal.lrt(*command, *own_text, fails=True)
    table = terminal.lrt(*PLUGIN, *command, *own_text)
    rows = [line for line in table.splitlines() if line.endswith(r" \\")]
    assert [row.split(" & ")[0] for row in rows] == ["run", "plain", "shift", "gated"]
    assert r"\begin{tabular}" in table
    assert (terminal.folder / "figure.pdf").read_bytes().startswith(b"%PDF")
