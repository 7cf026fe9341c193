"""One progress bar for all long work: what is done, how fast, time left, and whatever else is worth seeing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


class Advance(Protocol):
    """Called with how much was done since the last call, and a text to show beside the bar."""

    def __call__(self, amount: float, text: str = "") -> None: ...


@contextmanager
def bar(title: str, total: float | None, show: bool = True) -> Iterator[Advance]:
    """A transient bar on standard error while the block runs; nothing where that is no terminal, or not `show`.

    A `total` of None: work whose end is not known.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not (show and console.is_terminal)) as progress:
        task = progress.add_task(title, total=total, text="")

        def advance(amount: float, text: str = "") -> None:
            progress.update(task, advance=amount, text=text)

        yield advance
