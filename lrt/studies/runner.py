"""Run a study: cell by cell, each finished one a JSON line. What is done is skipped, so a stopped study goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from lrt.bench.measure import hardware
from lrt.progress import Advance, bar
from lrt.studies.grid import Cell, Fields, Study

Line = dict[str, Any]
"""One finished cell: study, cell, choices, seed, key, fields, result, seconds, hardware."""


class Kind(Protocol):
    """What the cells of a study run, and how their results are shown."""

    def run(self, fields: Fields, advance: Advance) -> dict[str, Any]:
        """One cell's result, plain data: no weights, no text. `advance(amount, text)` counts to 1."""
        ...

    def table(self, lines: Sequence[Line]) -> str:
        """Markdown."""
        ...

    def figure(self, lines: Sequence[Line], path: Path) -> None:
        """Draw what the study shows into an SVG file."""
        ...


def finished(file: Path) -> list[Line]:
    """The lines of a file of results; none where it does not exist. A line that was cut short is passed over."""
    lines = []
    for text in file.read_text().splitlines() if file.exists() else ():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def of(study: Study, lines: Sequence[Line]) -> list[Line]:
    """The newest line of each cell of the study as it is now, in the study's order."""
    newest = {(line["cell"], line["key"]): line for line in lines}
    return [newest[c.name, c.key] for c in study.cells if (c.name, c.key) in newest]


def left(study: Study, lines: Sequence[Line], only: Sequence[str] = ()) -> list[Cell]:
    """The cells still to run; with `only`, those whose names hold all of these words."""
    done = {line["cell"] for line in of(study, lines)}
    return [c for c in study.cells if c.name not in done and all(word in c.name.split("/") for word in only)]


def announced(cells: Sequence[Cell], done: int) -> str:
    """What is said before the first cell runs."""
    minutes = sum(cell.minutes for cell in cells)
    return f"{len(cells)} cells to run, about {minutes:,.0f} minutes in all; {done} are done already"


def run(study: Study, kind: Kind, file: Path, only: Sequence[str] = (), progress: bool = True) -> list[Line]:
    """Run what is left, appending to `file` as cells finish; returns the study's lines."""
    waiting = left(study, finished(file), only)
    print(announced(waiting, len(study.cells) - len(left(study, finished(file)))))
    file.parent.mkdir(parents=True, exist_ok=True)
    with bar(study.name, max(1e-9, sum(c.minutes for c in waiting)), progress) as advance:
        for cell in waiting:

            def told(amount: float, text: str = "", cell: Cell = cell) -> None:
                advance(amount * cell.minutes, f"{cell.name} {text}")

            line = finish(study, cell, kind, told)
            append(file, line)
    return of(study, finished(file))


def append(file: Path, line: Line) -> None:
    """Add a line, on its own also where the last one was cut short."""
    whole = not file.exists() or file.read_text()[-1:] in ("", "\n")
    with file.open("a") as out:
        out.write(("" if whole else "\n") + json.dumps(line) + "\n")


def finish(study: Study, cell: Cell, kind: Kind, advance: Advance) -> Line:
    """Run one cell."""
    begun = time.perf_counter()
    result = kind.run(cell.fields, advance)
    return {
        "study": study.name,
        "edition": study.edition,
        "cell": cell.name,
        "choices": dict(zip(study.axes, cell.choices, strict=True)),
        "seed": cell.seed,
        "key": cell.key,
        "fields": cell.fields,
        "result": result,
        "seconds": round(time.perf_counter() - begun, 1),
        "hardware": json.loads(json.dumps(hardware(), default=str)),
    }
