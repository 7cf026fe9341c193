"""One progress bar for all long work: the share that is done, the time left, and a text of the caller's beside it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

LINE_EVERY = 60.0
"""Seconds between lines where there is no terminal to draw a bar on."""


class Advance(Protocol):
    """Called with how much was done since the last call, and a text to show beside the bar."""

    def __call__(self, amount: float, text: str = "") -> None: ...


@contextmanager
def bar(title: str, total: float | None, show: bool = True) -> Iterator[Advance]:
    """A transient bar on standard error while the block runs; nothing if not `show`.

    Where standard error is no terminal (a cluster's log), a line every LINE_EVERY seconds. `total` is in the units of
    `Advance`; None where the end is not known.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        TaskProgressColumn(),
        TimeRemainingColumn(compact=True),  # before the text, which a narrow terminal cuts
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not (show and console.is_terminal)) as progress:
        task = progress.add_task(title, total=total, text="")
        done, printed = 0.0, time.monotonic()

        def advance(amount: float, text: str = "") -> None:
            nonlocal done, printed
            progress.update(task, advance=amount, text=text)
            done += amount
            if show and not console.is_terminal and time.monotonic() - printed >= LINE_EVERY:
                printed = time.monotonic()
                share = "" if total is None else f"/{total:,.0f} ({done / max(total, 1):.0%})"
                print(f"{title} {done:,.0f}{share} {text}", file=sys.stderr, flush=True)

        yield advance


def warn(text: str) -> None:
    """A line on standard error: standard output is for results, which may be JSON."""
    print(f"warning: {text}", file=sys.stderr)
