"""A run's folder as an object: it shows what its files say, and keeps what it measures as the command line does."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import matplotlib.figure
import pandas
import pytest
from support.page import Page

import lrt
from lrt.data.prepare import prepare
from lrt.eval.results import Result, read_results
from lrt.eval.run_folder import Measurement
from lrt.eval.run_html import sparkline
from lrt.training.config import EvalConfig

TINY = lrt.ModelConfig(depth=1, width=16, heads=2, context=32, mlp_width=24)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/tiny, and the data that it was trained on in runs/data."""
    root = tmp_path_factory.mktemp("place")
    text = root / "text.txt"
    text.write_text("".join(f"line {i}: {i * i} is the square of {i}\n" for i in range(400)))
    data = prepare(root / "runs" / "data" / "squares", [text], vocab_size=300, progress=False)
    config = lrt.RunConfig(TINY, batch_size=4, horizon="steps=6", schedule="settled(0, 1, 1)")
    scored = EvalConfig(every=3, targets=200)
    lrt.train(config, data, root / "runs" / "tiny", "cpu", evaluation=scored, progress=False)
    return root


@pytest.fixture
def run(place: Path, tmp_path: Path) -> lrt.Run:
    """A copy, so that what one test measures is not there in another."""
    shutil.copytree(place / "runs", tmp_path / "runs")
    return lrt.Run(tmp_path / "runs" / "tiny", "cpu")


def test_what_is_logged_is_a_row_per_step(run: lrt.Run, monkeypatch: pytest.MonkeyPatch):
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    table = run.metrics
    assert isinstance(table, pandas.DataFrame)
    assert list(table.loss) == [line["loss"] for line in lines]
    assert table.live_bpb.notna().sum() == 2
    monkeypatch.setitem(sys.modules, "pandas", None)
    assert run.metrics == lines


def test_what_it_evaluates_is_kept_and_shown(run: lrt.Run):
    assert run.data.path == run.folder.parent / "data" / "squares"
    scores = run.evaluate(at_least=300)
    (kept,) = read_results(run.folder / "evaluation")
    assert (kept.kind, kept.subject) == ("scores", "squares-val")
    assert kept.values["corpora"]["squares-val"] == scores.to_dict()
    assert scores.gap == pytest.approx(scores.live_bpb - (scores.parallel_bpb or 0))
    assert scores.targets >= 300
    assert f"{scores.live_bpb:.4f}" in [cell.strip() for cell in Page(run._repr_html_()).cells]


def test_data_that_is_elsewhere_has_to_be_given(run: lrt.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    moved = (tmp_path / "runs" / "data" / "squares").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"trained on the text .* not in runs/data or .*; give its folder"):
        run.evaluate()
    assert lrt.Run(run.folder, "cpu", moved).data.path == moved
    (tmp_path / "runs" / "data" / "broken").mkdir()
    (tmp_path / "runs" / "data" / "broken" / "manifest.json").write_text("{")
    shutil.copytree(moved, tmp_path / "runs" / "data" / "renamed")
    assert lrt.Run("runs/tiny").data.path.name == "renamed"


def test_a_text_is_shown_in_colours_and_escaped(run: lrt.Run):
    measured = run.diagnose("text", at_least=60)
    assert read_results(run.folder / "evaluation")[0].values == measured.values
    assert repr(measured).startswith(("Recurrence makes ", "Nothing recurs in the run"))
    with pytest.raises(ValueError, match="kind is 'colours'; choose one of bpb, "):
        run.diagnose("colours")
    values = {"pieces": ["<b>", " x"], "live": [1.0, 2.0], "off": [3.0, 2.0]}
    page = Measurement(Result("text", "x-val", "ab", {}, values))._repr_html_()
    assert "<b>" not in page
    assert page.count("<span") == 2
    assert "&lt;b&gt;</span>" in page
    assert "rgba(46,160,67,0.70)" in page


def test_other_measurements_are_lines(run: lrt.Run):
    measured = run.diagnose("hops", at_least=60)
    said, _, table = repr(measured).partition("\n\n")
    assert said == f"The run: {measured.values['verdict']}."
    assert "nats per token" in table
    assert measured._repr_html_().startswith("<pre>The run: ")


def test_a_figure_has_axes_with_units(run: lrt.Run, place: Path):
    shutil.copytree(run.folder, run.folder.with_name("again"))
    figure = run.plot(lrt.Run(run.folder.with_name("again")))
    assert isinstance(figure, matplotlib.figure.Figure)
    left, right = figure.axes
    assert (left.get_xlabel(), left.get_ylabel()) == ("thousand tokens", "training loss, nats per token")
    assert (right.get_xlabel(), right.get_ylabel()) == ("thousand tokens", "live bits per byte (lower is better)")
    assert left.lines[0].get_xdata()[-1] == run.record.metrics[-1]["tokens"] / 1000  # pyright: ignore[reportIndexIssue]
    assert [len(ax.lines) for ax in figure.axes] == [2, 2]
    assert figure._repr_png_().startswith(b"\x89PNG")  # pyright: ignore[reportAttributeAccessIssue]


def test_it_says_in_one_line_what_it_is(run: lrt.Run):
    live = run.record.about["scores"]["live_bpb"]
    known = f"{run.record.parameters:,} parameters, trained on 768 tokens, live {live:.4f} bits per byte"
    assert repr(run) == f"Run('{run.folder}', {known})"
    parsed = Page(run._repr_html_())
    assert {"table", "svg", "polyline"} <= parsed.tags
    assert "768" in [cell.strip() for cell in parsed.cells]


def test_a_run_that_has_only_begun_is_a_run(run: lrt.Run, tmp_path: Path):
    begun = tmp_path / "<begun>"
    begun.mkdir()
    shutil.copy(run.folder / "metrics.jsonl", begun)
    shown = lrt.Run(begun)
    assert repr(shown) == f"Run('{begun}')"
    assert "&lt;begun&gt;" in shown._repr_html_()
    assert "<begun>" not in shown._repr_html_()
    with pytest.raises(ValueError, match="is not a checkpoint"):
        shown.sample()
    with pytest.raises(ValueError, match="nowhere is no run"):
        lrt.Run(tmp_path / "nowhere")
    (tmp_path / "scored").mkdir()
    Result("bpb", "x-val", "ab", {}, {}).write(tmp_path / "scored" / "evaluation")
    with pytest.raises(ValueError, match=r"scored has no metrics\.jsonl to draw"):
        lrt.Run(tmp_path / "scored").plot()


def test_samples_and_the_report(run: lrt.Run, tmp_path: Path):
    assert run.model is run.model
    samples = run.sample("line 1", n=2, max_new_tokens=8, seed=3)
    assert samples == [run.model.complete("line 1", 8, seed=seed) for seed in (3, 4)]
    (run.folder / "metrics.jsonl").unlink()  # no curves, which take a second to draw
    page = run.report(tmp_path / "page.html", run)
    assert page == tmp_path / "page.html"
    assert page.read_text().count(f"{run.record.scores[0].values['live_bpb']:.4f}") >= 2


def test_a_curve_fits_its_picture():
    points = sparkline([3.0, 1.0, 2.0]).split('points="')[1].split('"')[0]
    assert points == "0.0,2.0 120.0,38.0 240.0,20.0"
    assert "nan" not in sparkline([1.0, 1.0])
