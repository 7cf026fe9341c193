"""Run a study: cell by cell, each finished one a JSON line. What is done is skipped, so a stopped study goes on.

Several processes, on one machine or on several that share the folder, may run one study: each claims a cell before it
runs it, and waits at the end for what others run, in case they leave it. A claim is a file that its process touches as
it goes on; one whose process has died (on this machine), or that was not touched for an hour (on another), is nobody's.
Claims are files, taken under a lock: a lock alone would not tell a dead process on another machine.

Studies share runs by the hash of a cell's fields, not by a common file of results: each study's lines are whole, can be
read alone, and say where they are from. Lines hold no weights and no text; tables and figures are made from them alone.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import filelock
from matplotlib.figure import Figure

from lrt.eval.report.table import Table
from lrt.experiments.studies.grid import Cell, Fields, Study
from lrt.experiments.studies.pace import Pace
from lrt.utils import plugins
from lrt.utils.files import append_durably
from lrt.utils.progress import Advance, bar
from lrt.utils.provenance import code_version, hardware
from lrt.utils.timing import format_duration

NAMED = {"cell", "key"}
"""What a line is known by."""
Line = dict[str, Any]
"""One finished cell: study, cell, choices, seed, key, fields, result, seconds, hardware; `from`, another study's cell
whose run this was."""
ABANDONED = 3600.0
"""Seconds after which a claim that was not touched is nobody's."""
WAIT = 5.0
"""Seconds between two looks at what others have left."""


class Kind(Protocol):
    """What the cells of a study run, and how their results are shown."""

    def minutes(self, cell: Cell, device: str) -> float:
        """About how long a cell will take here: declared, or measured from a few steps."""
        ...

    def missing(self, cell: Cell) -> str | None:
        """What a cell lacks here, and how to get it; None where it can run."""
        ...

    def is_current(self, line: Line) -> bool:
        """Whether a line's result is of what its fields come to now."""
        ...

    def run(self, fields: Fields, advance: Advance, device: str) -> dict[str, Any]:
        """One cell's result, plain data: no weights, no text. `advance(amount, text)` counts to 1."""
        ...

    def discard(self, line: Line) -> None:
        """Remove what a cell kept to go on from. Called once its line is on the disk, perhaps more than once."""
        ...

    def score(self, line: Line) -> str:
        """What a cell came to, in a few words with their unit, for the line that says it is done."""
        ...

    def tables(self, lines: Sequence[Line]) -> list[Table]:
        """What the study found, as text cells."""
        ...

    @property
    def figure(self) -> Callable[[Sequence[Line]], Figure]:
        """Draws what the study shows."""
        ...


def read_lines(file: Path) -> list[Line]:
    """The lines of a file of results; none where it does not exist. A line that was cut short is passed over.

    ValueError that names the line where it is whole, and no result.

    `append_line` sees to it that such a line stands alone, and writes ASCII: no character is cut in half, and
    splitlines finds no other line ends than the ones written.
    """
    lines = []
    for number, text in enumerate(file.read_text().splitlines() if file.exists() else (), start=1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError:  # the machine went down while it was written
            continue
        if not isinstance(line, dict) or not isinstance(line.get("result"), dict) or not line.keys() >= NAMED:
            raise ValueError(f"{file}: line {number} is no result of a cell; restore it, or remove the line")
        lines.append(line)
    return lines


def current_lines(kind: Kind, file: Path) -> list[Line]:
    """The lines that a cell would still come to, with the code and the data that are here."""
    return [line for line in read_lines(file) if kind.is_current(line)]


def study_lines(study: Study, lines: Sequence[Line]) -> list[Line]:
    """The newest line of each cell of the study as it is now, in the study's order."""
    newest = {(line["cell"], line["key"]): line for line in lines}
    return [newest[c.name, c.key] for c in study.cells if (c.name, c.key) in newest]


def newest_lines(lines: Sequence[Line]) -> list[Line]:
    """The last line of each cell, whatever its fields."""
    return list({line["cell"]: line for line in lines}.values())


def cells_left(study: Study, lines: Sequence[Line], only: Sequence[str] = ()) -> list[Cell]:
    """The cells still to run; with `only`, those whose names hold all of these words.

    Of a sweep's later seeds, only the best choice of the first one; where that is not known yet, the first choice
    stands for it, behind all cells of the first seed.
    """
    known = study_lines(study, lines)
    done = {line["cell"] for line in known}
    cells = [c for c in study.cells if all(word in (*c.choices, str(c.seed)) for word in only)]
    if study.sweep is not None:
        best = best_by_sweep(study, known)
        cells = [c for c in cells if c.seed == study.cells[0].seed or best[study.apart_from_sweep(c)] == c.choices]
    return [c for c in cells if c.name not in done]


def best_by_sweep(study: Study, lines: Sequence[Line]) -> dict[tuple[str, ...], tuple[str, ...]]:
    """For each combination of the axes not swept, the choices of its cell that was best with the first seed."""
    assert study.sweep is not None
    scores = {line["cell"]: line["result"].get(study.sweep.by, math.inf) for line in lines}
    best: dict[tuple[str, ...], Cell] = {}
    for cell in study.cells:
        if cell.seed == study.cells[0].seed:
            rival = best.setdefault(study.apart_from_sweep(cell), cell)
            if scores.get(cell.name, math.inf) < scores.get(rival.name, math.inf):
                best[study.apart_from_sweep(cell)] = cell
    return {key: cell.choices for key, cell in best.items()}


def run_study(
    study: Study,
    kind: Kind,
    file: Path,
    only: Sequence[str] = (),
    progress: bool = True,
    device: str = "cpu",
) -> list[Line]:
    """Run what is left, appending to `file` as cells finish; returns the study's lines.

    A cell whose very run another study's results beside `file` hold is not run again. One that fails is named, and the
    others go on; ValueError at the end.
    """
    missing, minutes = announce(study, kind, file, only, device)
    tidy_finished(study, kind, file)
    file.parent.mkdir(parents=True, exist_ok=True)
    failed: dict[str, str] = {}

    def left() -> list[Cell]:
        """Read anew each time: other processes write lines, and a sweep's later cells follow from the first ones'."""
        return [c for c in cells_left(study, current_lines(kind, file), only) if c.name not in {*missing, *failed}]

    with bar(study.name, max(1e-9, sum(minutes.values())), progress) as show:
        pace = Pace(minutes, show)
        while cells := left():
            cell = next_unclaimed(study, cells, file)
            if cell is None:
                pace.advance(0, f"waiting for what other processes run ({claim_file(file, cells[0]).parent})")
                time.sleep(WAIT)
                continue
            with claim(file, cell) as path:
                if path is None or cell not in left():  # another process was faster
                    continue
                pace.begin(cell, cells)
                heartbeat = advance_cell(pace.advance, cell, pace.minutes_of(cell), path)
                try:
                    line = find_shared(study, kind, cell, file) or run_cell(study, cell, kind, heartbeat, device)
                except Exception as error:
                    failed[cell.name] = f"{type(error).__name__}: {error}"
                    print(f"{cell.name} failed: {failed[cell.name]}", flush=True)
                else:
                    append_line(file, line)
                    kind.discard(line)
                    print(finished_line(kind, line, pace.time_left(left())), flush=True)
    if failed:
        raise ValueError(
            f"{len(failed)} cells failed, the others are done; they run again with the same command: "
            + "; ".join(f"{name}: {error}" for name, error in failed.items())
        )
    return study_lines(study, current_lines(kind, file))


def finished_line(kind: Kind, line: Line, time_left: str) -> str:
    """A cell that is done: its score, how long it took or whose run it was, and what is left."""
    taken = f"from {line['from']}" if "from" in line else f"in {format_duration(line['seconds'])}"
    return f"{line['cell']}: {kind.score(line)}, {taken}; {time_left}"


def announce(
    study: Study, kind: Kind, file: Path, only: Sequence[str] = (), device: str = "cpu"
) -> tuple[dict[str, str], dict[str, float]]:
    """Print what is left to run and how long it takes. Returns why cells cannot run, and the minutes of the others."""
    check_words(study, only)
    waiting = cells_left(study, current_lines(kind, file), only)
    missing = {cell.name: reason for cell in waiting if (reason := kind.missing(cell)) is not None}
    for reason in sorted(set(missing.values())):
        print(f"{list(missing.values()).count(reason)} cells are left out: {reason}", flush=True)
    minutes = {
        cell.name: 0.0 if find_shared(study, kind, cell, file) else cell_minutes(study, kind, cell, device)
        for cell in waiting
        if cell.name not in missing
    }
    total, done = sum(minutes.values()), len(study_lines(study, current_lines(kind, file)))
    time_needed = f", about {format_duration(60 * total)} in all" if minutes else ""
    print(
        f"{len(minutes)} {'cell' if len(minutes) == 1 else 'cells'} to run{time_needed}; {done} are done already",
        flush=True,
    )
    return missing, minutes


def tidy_finished(study: Study, kind: Kind, file: Path) -> None:
    """Remove what a process killed behind a cell's line has left: what the cell went on from, and its claim."""
    lines = {line["cell"]: line for line in study_lines(study, current_lines(kind, file))}
    for cell in study.cells:
        if cell.name in lines:
            kind.discard(lines[cell.name])
            if not is_claimed(path := claim_file(file, cell)):
                path.unlink(missing_ok=True)


def cell_minutes(study: Study, kind: Kind, cell: Cell, device: str) -> float:
    """How long a cell takes. ValueError, naming the study and the cell, where its fields are wrong."""
    try:
        return kind.minutes(cell, device)
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # fields are a user's, and of any form
        text = f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else error
        raise ValueError(f"the study {study.name}, cell {cell.name}: {text}") from error


def check_words(study: Study, only: Sequence[str]) -> None:
    """ValueError for a word of `only` that is no choice of any cell."""
    words = {str(word) for cell in study.cells for word in (*cell.choices, cell.seed)}
    unknown = [word for word in only if word not in words]
    if unknown:
        raise ValueError(f"no cell has the choice {', '.join(unknown)}; choose among {', '.join(sorted(words))}")


def advance_cell(advance: Advance, cell: Cell, minutes: float, claimed: Path) -> Advance:
    """A cell's own `advance`, in parts of its `minutes`. It is the heartbeat too: it touches the cell's claim."""

    def advance_and_touch(amount: float, text: str = "") -> None:
        with contextlib.suppress(FileNotFoundError):  # someone removed it: that is no reason to stop
            os.utime(claimed)
        advance(amount * minutes, f"{cell.name} {text}")

    return advance_and_touch


def next_unclaimed(study: Study, cells: Sequence[Cell], file: Path) -> Cell | None:
    """The next of these cells that nobody has claimed. A later seed waits for the sweep of its own choices."""
    first = study.cells[0].seed
    unknown = {study.apart_from_sweep(c) for c in cells if c.seed == first} if study.sweep is not None else set()
    ready = (c for c in cells if c.seed == first or study.apart_from_sweep(c) not in unknown)
    return next((c for c in ready if not is_claimed(claim_file(file, c))), None)


def claim_file(file: Path, cell: Cell) -> Path:
    """The file that claims a cell, in a folder beside the results: its hash, and its name for whoever looks there."""
    return file.with_suffix(".claims") / f"{cell.key}.{cell.name.replace('/', '.').replace(' ', '-')}"


def is_claimed(path: Path) -> bool:
    """Whether a process works on a cell."""
    try:
        host, _, process = path.read_text().partition(" ")
        fresh = time.time() - path.stat().st_mtime < ABANDONED
    except FileNotFoundError:
        return False
    if host == platform.node() and process.isdigit():  # this machine knows its own
        return is_alive(int(process))
    # An empty one is being written, or was when its process was killed: `claim` looks again under the lock.
    return bool(host) and fresh


def is_alive(process: int) -> bool:
    """Whether a process of this machine is there."""
    try:
        os.kill(process, 0)  # no signal: it only asks
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


@contextmanager
def claim(file: Path, cell: Cell) -> Iterator[Path | None]:
    """Hold a cell, so that no other process runs it; None where another one holds it."""
    path = claim_file(file, cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(file.with_suffix(".lock")):  # looking and taking are one step
        free = not is_claimed(path)
        if free:
            path.write_text(f"{platform.node()} {os.getpid()}")
    try:
        yield path if free else None
    finally:
        if free:
            path.unlink(missing_ok=True)


def append_line(file: Path, line: Line) -> None:
    """Add a line, on its own also where the last one was cut short, and wait until the disk has it.

    In ASCII, which json.dumps gives unless told."""
    with filelock.FileLock(file.with_suffix(".lock")):
        whole = not file.exists() or file.read_text()[-1:] in ("", "\n")
        append_durably(file, ("" if whole else "\n") + json.dumps(line) + "\n")


def run_cell(study: Study, cell: Cell, kind: Kind, advance: Advance, device: str = "cpu") -> Line:
    """Run one cell: its line, with what it took and where."""
    begun = time.perf_counter()
    scores = kind.run(cell.fields, advance, device)
    return {
        **label(study, cell),
        "result": scores,
        "seconds": round(time.perf_counter() - begun, 1),
        "code": code_version(),
        **({"plugins": records} if (records := plugins.describe(list(plugins.REGISTERED.items()))) else {}),
        "hardware": json.loads(json.dumps(hardware(device), default=str)),
    }


def label(study: Study, cell: Cell) -> Line:
    """Which cell of which study, as a line says it."""
    return {
        "study": study.name,
        "edition": study.edition,
        "kind": study.kind,
        "cell": cell.name,
        "choices": dict(zip(study.axes, cell.choices, strict=True)),
        "seed": cell.seed,
        "key": cell.key,
        "fields": cell.fields,
    }


def find_shared(study: Study, kind: Kind, cell: Cell, file: Path) -> Line | None:
    """A cell's line from that of another study beside `file` with the same fields, which says whose it was."""
    for other in sorted(set(file.parent.glob("*.jsonl")) - {file}):
        for line in reversed(read_lines(other)):  # the newest first
            if line["key"] == cell.key and kind.is_current(line):
                return {**line, **label(study, cell), "from": f"{line['study']}.{line['edition']} {line['cell']}"}
    return None


def run_on_devices(arguments: Sequence[str], devices: Sequence[str]) -> None:
    """`lrt` with these arguments once per device, side by side; they share the cells by their claims, and the cores
    where `cpu` is named more than once. How many threads each of these has is printed, and stands in its lines."""
    environment = dict(os.environ)
    if (processes := list(devices).count("cpu")) > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
        print(f"{processes} processes on cpu, OMP_NUM_THREADS={environment['OMP_NUM_THREADS']} each", flush=True)
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "lrt", *plugins.arguments(), *arguments, "--devices", device], env=environment
        )
        for device in devices
    ]
    try:
        failed = [device for device, process in zip(devices, running, strict=True) if process.wait() != 0]
    except KeyboardInterrupt:
        for process in running:  # they had the signal too, and end by themselves
            process.wait()
        raise
    if failed:
        raise ValueError(f"the study's processes on {', '.join(failed)} failed; what others did is kept")
