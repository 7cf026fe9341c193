"""In a real Jupyter kernel: a bar that is drawn in its place, pictures, tables, and nothing that a page cannot show."""

from __future__ import annotations

from pathlib import Path

import nbclient
import nbformat
import pytest

CELLS = {
    "bar": """
from lrt.utils.progress import NotebookDisplay, bar
import time
NotebookDisplay.clear = lambda self: None  # so that the last drawing can be looked at
with bar("scoring", 2) as advance:
    time.sleep(0.3)
    advance(1, "x < y")
""",
    "train": """
import lrt
from lrt.training.config import EvalConfig
model = lrt.ModelConfig(depth=1, width=16, heads=2, context=32)
run = lrt.train(lrt.RunConfig(model, batch_size=4, horizon="steps=4"), "text.txt", "runs/tiny")
run
""",
    "plot": "run.plot()",
    "metrics": "run.metrics",
    "text": "run.diagnose('text', at_least=60)",
}


@pytest.mark.slow
def test_a_notebook_runs_and_shows_no_garbage(tmp_path: Path):
    (tmp_path / "text.txt").write_text("".join(f"line {i}: {i * i} is the square\n" for i in range(400)))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS.values()])
    nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = dict(zip(CELLS, (cell.outputs for cell in notebook.cells), strict=True))
    (shown,) = outputs["bar"]
    assert '<progress value="1" max="2"></progress> <code>scoring 1/2 (50%)' in shown.data["text/html"]
    assert "x &lt; y" in shown.data["text/html"]
    printed = "".join(one.text for cell in outputs.values() for one in cell if one.output_type == "stream")
    assert not {"\x1b", "\r"} & set(printed)
    assert printed.splitlines() == ["tiny: uncompiled passes (4 steps are fewer than 1,000)"]
    assert "<table>" in outputs["train"][-1].data["text/html"]
    assert {"image/png", "text/plain"} <= set(outputs["plot"][-1].data)
    assert "dataframe" in outputs["metrics"][-1].data["text/html"]
    assert "<span" in outputs["text"][-1].data["text/html"]
