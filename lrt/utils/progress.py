"""One progress bar for all long work: the share that is done, the time left, and a text of the caller's beside it.

`bar` draws it where it can be seen: on a terminal, in a notebook, or as a line now and then in a log.
"""

from __future__ import annotations

import functools
import html
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn
from rich.table import Column
from rich.text import Text

LINE_EVERY = 60.0
"""Seconds between lines where there is no terminal to draw a bar on."""
NOTEBOOK_EVERY = 0.25
"""Seconds between two drawings in a notebook, whose page takes longer to draw than a terminal."""
SPEED_OVER = 600.0
"""Seconds over which the speed is averaged, from which the time left follows: steps may take minutes."""


class Advance(Protocol):
    """Called with how much was done since the last call, and a text to show beside the bar."""

    def __call__(self, amount: float, text: str = "") -> None: ...


def time_left(task: Task) -> str:
    """`ETA 1:02:03`, hours, minutes and seconds. `ETA -:--` until there is a speed; empty where there is no end."""
    if task.total is None:
        return ""
    if task.time_remaining is None:
        return "ETA -:--"
    minutes, seconds = divmod(int(task.time_remaining), 60)
    hours, minutes = divmod(minutes, 60)
    return f"ETA {hours}:{minutes:02}:{seconds:02}" if hours else f"ETA {minutes}:{seconds:02}"


def progress_line(task: Task) -> str:
    """A task on one line: what, how much of how much, the time left, the caller's text."""
    share = "" if task.total is None else f"/{task.total:,.0f} ({min(1.0, task.completed / max(task.total, 1)):.0%})"
    parts = (f"{task.description} {task.completed:,.0f}{share}", time_left(task), task.fields["text"])
    return " ".join(filter(None, parts))


class TimeLeft(ProgressColumn):
    """`time_left`, which no other column may push off a narrow terminal."""

    def render(self, task: Task) -> Text:
        return Text(time_left(task))


def terminal_columns() -> tuple[ProgressColumn, ...]:
    """A bar's columns. Only the caller's text, the last of them, gives way where a line is too long."""
    return (
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        TaskProgressColumn(table_column=Column(no_wrap=True)),
        TimeLeft(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[text]}", table_column=Column(no_wrap=True, ratio=1, overflow="ellipsis")),
    )


@functools.cache
def error_console() -> Console:
    """Standard error's. One for all bars: rich draws those of one console below each other."""
    return Console(stderr=True)


@contextmanager
def bar(title: str, total: float | None, show: bool = True) -> Iterator[Advance]:
    """A transient bar on standard error while the block runs; nothing if not `show`.

    Within another bar's block it stands below that one. In a notebook it is a part of the cell. Where standard error is
    neither (a cluster's log), a line comes every LINE_EVERY seconds. `total` is in the units of `Advance`; None where
    the end is not known.
    """
    console = error_console()
    on_terminal = show and console.is_terminal
    with Progress(
        *terminal_columns(), console=console, transient=True, expand=True, disable=not on_terminal,
        speed_estimate_period=SPEED_OVER,
    ) as progress, elsewhere(console, show) as draw:  # fmt: skip
        number = progress.add_task(title, total=total, text="")
        (task,) = progress.tasks

        def advance(amount: float, text: str = "") -> None:
            progress.update(number, advance=amount, text=text)
            draw(task)

        yield advance


@contextmanager
def elsewhere(console: Console, show: bool) -> Iterator[Callable[[Task], None]]:
    """What draws a task where there is no terminal: called often, it draws seldom. Nothing on a terminal."""
    if not show or console.is_terminal:
        yield lambda task: None
    elif console.is_jupyter:
        display = NotebookDisplay()
        try:
            yield every(NOTEBOOK_EVERY, display.draw)
        finally:
            display.clear()
    else:
        yield every(LINE_EVERY, lambda task: print(progress_line(task), file=sys.stderr, flush=True))


def every(seconds: float, draw: Callable[[Task], None]) -> Callable[[Task], None]:
    """`draw`, but nothing within `seconds` of the last drawing, nor of now: what is quickly done is not drawn."""
    last = time.monotonic()

    def draw_seldom(task: Task) -> None:
        nonlocal last
        if time.monotonic() - last >= seconds:
            last = time.monotonic()
            draw(task)

    return draw_seldom


class NotebookDisplay:
    """A bar in a cell of a notebook, drawn again in its place."""

    handle: Any = None
    """Of the place in the cell, from the first drawing on."""

    def draw(self, task: Task) -> None:
        """Show how far a task is."""
        share = "" if task.total is None else f' value="{task.completed}" max="{max(task.total, 1)}"'
        line = progress_line(task)
        self._show({"text/html": f"<progress{share}></progress> <code>{html.escape(line)}</code>", "text/plain": line})

    def clear(self) -> None:
        """Leave nothing: what a block comes to is its caller's to say."""
        if self.handle is not None:
            self._show({"text/html": "", "text/plain": ""})

    def _show(self, page: dict[str, str]) -> None:
        """Draw a page, by type of content, in the place of the one before."""
        if self.handle is not None:
            self.handle.update(page, raw=True)
        else:  # only a kernel has IPython, and there it is loaded
            self.handle = importlib.import_module("IPython.display").display(page, raw=True, display_id=True)


def warn(text: str) -> None:
    """A line on standard error: standard output is for results, which may be JSON."""
    print(f"warning: {text}", file=sys.stderr)
