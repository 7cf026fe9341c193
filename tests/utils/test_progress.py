"""The time left can be read everywhere: on a narrow terminal, in a log, in a notebook."""

from __future__ import annotations

import io
import itertools
import time
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Progress

from lrt.utils import progress
from lrt.utils.progress import NotebookDisplay, bar, progress_line, terminal_columns, time_left

TEXT = "loss 3.412 |g| 0.33 live 2.3104 gap +0.0031 γ 0.12 12,345 tok/s MFU 43 %"


def half_done(seconds: float, width: int = 80, title: str = "training") -> Progress:
    """A bar at 50 of 100, after `seconds` for each of the last ten."""
    clock = itertools.count(0.0, seconds)
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    shown = Progress(
        *terminal_columns(), console=console, expand=True, get_time=lambda: next(clock), auto_refresh=False,
        speed_estimate_period=1e9,
    )  # fmt: skip
    number = shown.add_task(title, total=100, text=TEXT)
    shown.update(number, advance=39)  # done before this process: no speed follows from it
    for _ in range(11):
        shown.update(number, advance=1)
    return shown


@pytest.mark.parametrize("title", ["training", "memory embedding of a run with a name"])
def test_a_terminal_of_80_columns_shows_the_time_left(title: str):
    shown = half_done(60.0, title=title)
    shown.console.print(shown.get_renderable())
    line, *more = shown.console.file.getvalue().splitlines()  # pyright: ignore[reportAttributeAccessIssue]
    assert more == []
    assert len(line) <= 80
    assert "50% ETA 50:00 " in line
    assert title in line
    assert line.endswith("…")  # only the text gives way


@pytest.mark.parametrize(("seconds", "shown"), [(0.1, "ETA 0:05"), (6.0, "ETA 5:00"), (600.0, "ETA 8:20:00")])
def test_the_time_left_is_in_hours_minutes_and_seconds(seconds: float, shown: str):
    (task,) = half_done(seconds).tasks
    assert time_left(task) == shown
    assert progress_line(task) == f"training 50/100 (50%) {shown} {TEXT}"


def test_without_an_end_or_a_speed_no_time_is_made_up():
    console = Console(file=io.StringIO())
    with Progress(console=console, disable=True) as shown:
        ends = [shown.add_task("reading", total=total, text="") for total in (None, 100)]
        assert [progress_line(shown.tasks[number]) for number in ends] == ["reading 0", "reading 0/100 (0%) ETA -:--"]


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    clock = iter([0.0, 59.0, 60.0, 60.0, 61.0, 121.0, 121.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with bar("training", 100) as advance:
        for text in ("a", "b", "c", "d"):
            advance(10, text)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" ETA ")[0] for line in lines] == ["training 20/100 (20%)", "training 40/100 (40%)"]
    assert [line[-1] for line in lines] == ["b", "d"]


def test_a_share_is_never_more_than_all():
    shown = Progress(*terminal_columns(), console=Console(file=io.StringIO()), disable=True)
    number = shown.add_task("study", total=10, text="")
    shown.update(number, advance=15)
    assert progress_line(shown.tasks[number]).startswith("study 15/10 (100%)")


def test_a_bar_within_a_bar_stands_below_it(monkeypatch: pytest.MonkeyPatch):
    out = io.StringIO()
    terminal = Console(file=out, force_terminal=True, width=80, color_system=None)
    monkeypatch.setattr(progress, "error_console", lambda: terminal)
    with bar("training", 10) as steps, bar("live", 100) as scores:
        steps(3)
        scores(50)
        patience = time.monotonic() + 10
        while " 50% " not in out.getvalue():  # rich draws ten times a second
            assert time.monotonic() < patience
            time.sleep(0.02)
        above, _, below = out.getvalue().rpartition("training")[2].partition("live")
    assert " 30% " in above
    assert " 50% " in below


def test_what_is_not_to_be_shown_is_not(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    with bar("training", 2, show=False) as advance:
        advance(1)
    assert capsys.readouterr() == ("", "")


class Cell:
    """Stands for a cell of a notebook: what is displayed, and what takes its place."""

    def __init__(self) -> None:
        self.pages: list[dict[str, str]] = []

    def display(self, page: dict[str, str], **_: Any) -> Cell:
        self.pages.append(page)
        return self

    update = display


def test_a_notebook_shows_a_bar_in_one_place(monkeypatch: pytest.MonkeyPatch):
    cell = Cell()
    monkeypatch.setattr(progress.importlib, "import_module", lambda name: cell)
    display = NotebookDisplay()
    display.clear()
    assert cell.pages == []  # what was never drawn leaves nothing
    (task,) = half_done(6.0, title="<training>").tasks
    display.draw(task)
    display.draw(task)
    assert cell.pages[0] == cell.pages[1]
    assert cell.pages[0]["text/plain"] == progress_line(task)
    assert cell.pages[0]["text/html"].startswith(
        '<progress value="50" max="100"></progress> <code>&lt;training&gt; 50/'
    )
    display.clear()
    assert cell.pages[2] == {"text/html": "", "text/plain": ""}
