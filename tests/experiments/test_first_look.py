"""`lrt try` from a text to its report, at a tiny size; and what its minutes come to."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console
from support.page import Page

from lrt.cli.main import main
from lrt.data.corpus import stdlib_files
from lrt.data.prepared import Prepared
from lrt.experiments import demo, first_look
from lrt.experiments.first_look import FAMILIES, make_plan, open_report, side_by_side, verdict
from lrt.training import recipes
from lrt.training.speed import Speed

FAST = Speed(train=1e-4, live=1e-3, parallel=1e-3)
TOKENS = 1024
SCORES = {"live_bpb": 2.0, "parallel_bpb": 2.0, "train_seconds": 1.0, "tokens": TOKENS, "parameters": 9, "targets": 100}


def shrink(patch: pytest.MonkeyPatch) -> None:
    """Rows of 64 tokens, and samples of 20."""
    patch.setattr(recipes, "CONTEXT", 64)
    for module in (demo, first_look):
        patch.setattr(module, "SAMPLE", 20)


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 60 KB."""
    file = tmp_path_factory.mktemp("book") / "book.txt"
    source = next(path for path in stdlib_files() if path.stat().st_size > 90_000)
    file.write_text(source.read_text(encoding="utf-8")[:60_000], encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def made(book: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that `lrt try` wrote, after two steps of each family."""
    out = tmp_path_factory.mktemp("runs") / "try"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(first_look, "measure_speed", lambda *_: FAST)
        shrink(patch)
        patch.setattr(first_look, "make_plan", lambda *_: first_look.Plan(TOKENS, 100, 9.0))
        first_look.first_look(out, [book], device="cpu", progress=False)
    return out


@pytest.fixture
def summary(made: Path) -> dict[str, Any]:
    return json.loads((made / "summary.json").read_text())


# --- what the minutes come to --------------------------------------------------------------------------------------


def sizes(train: int, test: int) -> Prepared:
    """A text of so many tokens, of which nothing is read."""
    return cast(
        "Prepared", SimpleNamespace(manifest={"splits": {"train": {"tokens": train}, "test": {"tokens": test}}})
    )


def test_a_plan_fills_the_time_and_scores_for_a_quarter_of_it_at_most():
    speeds = {"transformer": FAST, "lrt": Speed(2e-4, 1e-3, 1e-3)}
    per_target = (1 + 3) * 1e-3 + 2e-3  # live, live with three memories, and each under its schedule
    plan = make_plan(speeds, 160.0, sizes(10**9, 10**6), minutes=3.0)
    assert plan.targets == int(0.25 * 160 / per_target)
    assert plan.seconds == pytest.approx(160, abs=0.01)
    assert plan.tokens * 3e-4 + plan.targets * per_target == pytest.approx(plan.seconds)
    short = make_plan(speeds, 160.0, sizes(10_000, 100), minutes=3.0)
    assert (short.targets, short.tokens) == (100, 8 * 10_000)  # a text is read a few times, not longer
    assert short.seconds == pytest.approx(80_000 * 3e-4 + 100 * per_target)


def test_minutes_in_which_nothing_is_learned_are_refused():
    slow = {"transformer": Speed(1.0, 1e-3, 1e-3), "lrt": Speed(1.0, 1e-3, 1e-3)}
    with pytest.raises(
        ValueError, match=r"in --minutes 3 each of 2 runs sees too little text here; give --minutes 182\d"
    ):
        make_plan(slow, 160.0, sizes(10**9, 10**6), 3.0)


# --- what it leaves ------------------------------------------------------------------------------------------------


def test_both_are_compared_at_equal_tokens_and_parameters(summary: dict[str, Any]):
    models = summary["models"]
    assert list(models) == ["transformer", "lrt"]
    assert {model["tokens"] for model in models.values()} == {TOKENS}
    sizes = [model["parameters"] for model in models.values()]
    assert max(sizes) - min(sizes) <= 0.005 * min(sizes)
    assert len({model["targets"] for model in models.values()}) == 1
    assert "live_bpb_memory_zero" in models["lrt"]


def test_the_report_says_what_the_terminal_says(made: Path, summary: dict[str, Any]):
    text = (made / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert verdict(summary) in text
    assert f"{summary['models']['lrt']['live_bpb']:.4f}" in page.cells
    assert [place for place in page.loaded if not place.startswith(("#", "data:"))] == []
    assert "script" not in page.tags
    assert all(sample.startswith(summary["prompt"]) for sample in summary["samples"].values())


@pytest.mark.parametrize(("lrt", "words"), [(1.9, "the LRT needs 5.0 % fewer"), (2.2, "the LRT needs 10.0 % more")])
def test_the_verdict_is_a_sentence(lrt: float, words: str):
    models = {"transformer": {"live_bpb": 2.0}, "lrt": {"live_bpb": lrt, "tokens": 41_000}}
    assert verdict({"models": models}).startswith(
        f"After 41,000 tokens the LRT is at {lrt:.2f} bits per byte live, the Transformer at 2.00: {words}."
    )


def test_the_same_command_measures_nothing_again(
    made: Path, book: Path, monkeypatch: pytest.MonkeyPatch, summary: dict[str, Any]
):
    shrink(monkeypatch)
    for name in ("measure_speed", "make_plan"):
        monkeypatch.setattr(first_look, name, lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr("lrt.experiments.demo.train", lambda *_: pytest.fail("trained again"))
    again = first_look.first_look(made, [book], device="cpu", progress=False)
    assert again["models"] == summary["models"]
    assert again["samples"] == summary["samples"]
    trained = sum(json.loads((made / family / "result.json").read_text())["result"]["seconds"] for family in FAMILIES)
    assert again["seconds"] > trained  # those of the call that trained them count
    assert not list(made.glob("*.old"))


def test_the_report_of_another_text_is_set_aside(
    made: Path, book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shrink(monkeypatch)
    shutil.copytree(made, tmp_path / "try")
    other = tmp_path / "other.txt"
    other.write_text(book.read_text(encoding="utf-8")[:50_000], encoding="utf-8")
    monkeypatch.setattr(first_look, "measure_speed", lambda *_: FAST)
    monkeypatch.setattr(first_look, "make_plan", lambda *_: first_look.Plan(TOKENS, 100, 9.0))
    kept = {"transformer": SCORES, "lrt": SCORES}
    monkeypatch.setattr(first_look, "train_families", lambda *_: (kept, 0.0))
    first_look.first_look(tmp_path / "try", [other], device="cpu", progress=False)
    for name in ("report.html", "summary.json"):
        assert (tmp_path / "try" / f"{name}.old").read_bytes() == (made / name).read_bytes()
        assert (tmp_path / "try" / name).read_bytes() != (made / name).read_bytes()
    assert len(json.loads((tmp_path / "try" / "horizon.json").read_text())["plans"]) == 2


def test_other_minutes_are_measured(made: Path, book: Path, monkeypatch: pytest.MonkeyPatch):
    shrink(monkeypatch)

    class Measured(Exception):
        """The speed was asked for."""

    def measure(*_: object) -> None:
        raise Measured

    monkeypatch.setattr(first_look, "measure_speed", measure)
    with pytest.raises(Measured):
        first_look.first_look(made, [book], minutes=2.0, device="cpu", progress=False)


# --- the terminal and the browser ----------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 40])
def test_samples_stand_side_by_side_within_the_width(width: int):
    samples = {"transformer": "short words " * 9, "lrt": "x" * 120 + " [bold]größer[/] 漢字"}
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(side_by_side(samples, width))
    lines = console.export_text().splitlines()
    assert lines[0].split() == ["Transformer", "LRT"]
    assert max(len(line.rstrip()) for line in lines) <= width
    assert sum(line.count("x") for line in lines) == 120  # nothing is cut off
    assert "[bold]" in "".join(lines)


@pytest.mark.parametrize(
    ("environment", "terminal", "platform", "opened"),
    [
        ({"DISPLAY": ":0"}, True, "linux", True),
        ({"DISPLAY": ":0"}, False, "linux", False),
        ({"DISPLAY": ":0", "SSH_CONNECTION": "a b"}, True, "linux", False),
        ({}, True, "linux", False),
        ({}, True, "darwin", True),
    ],
)
def test_a_report_is_opened_where_somebody_sees_it(
    environment: dict[str, str], terminal: bool, platform: str, opened: bool, monkeypatch: pytest.MonkeyPatch
):
    pages: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda page: pages.append(page) or True)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    assert open_report(Path("report.html"), environment) is opened
    assert len(pages) == opened


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "lrt: no text is given; name a text file"),
        (["SHORT"], "lrt: the text is too short to compare models on:"),
        (["BOOK", "--minutes", "0"], "lrt: --minutes is 0; it must be a finite number above 0"),
        (["BOOK", "--prompt", "word " * 400], "lrt: the prompt has"),
    ],
    ids=["none", "short", "minutes", "prompt"],
)
def test_mistakes_are_a_sentence(
    words: list[str], message: str, book: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "short.txt").write_text(book.read_text()[:5000])
    places = {"SHORT": str(tmp_path / "short.txt"), "BOOK": str(book)}
    with pytest.raises(SystemExit) as ended:
        main(["try", *(places.get(word, word) for word in words), "--out", str(tmp_path / "try"), "--device", "cpu"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(message)


@pytest.mark.slow
def test_a_book_is_read_compared_and_reported(book: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The command for real. How long it takes is in the log: other work on the machine would decide a test of that."""
    main(["try", str(book), "--out", str(tmp_path / "try"), "--minutes", "2.5", "--device", "cpu", "--no-open"])
    assert re.search(r"After [\d,]+ tokens the LRT is at \d\.\d\d bits per byte live", capsys.readouterr().out)
    assert (tmp_path / "try" / "report.html").stat().st_size > 10_000
