"""What a run keeps on disk while it goes on, and how it is asked to end."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrt.config import require


@dataclass(frozen=True)
class Keeping:
    """What is kept on disk while a run goes on."""

    every: int = 0
    """Save a snapshot every so many steps; 0 saves none before the end. An interruption always saves one."""
    last: int = 2
    """How many snapshots stay, the newest ones."""
    best: bool = True
    """Keep the weights of the best live evaluation so far in best/."""

    def __post_init__(self) -> None:
        require(self.every >= 0, f"every is {self.every}; give a number of steps, or 0 for no snapshot on the way")
        require(self.last >= 1, f"last is {self.last}; keep at least 1 snapshot")


def snapshots(out: Path) -> list[Path]:
    """The snapshots of a run's folder, oldest first."""
    return sorted((out / "snapshots").glob("step-*"))


def snapshot_path(out: Path, step: int) -> Path:
    return out / "snapshots" / f"step-{step:08d}"


def snapshot_step(path: Path) -> int:
    """The step a snapshot was taken after; 0 where the folder is none."""
    number = path.name.removeprefix("step-")
    return int(number) if number.isdigit() else 0


def drop_snapshots(paths: list[Path]) -> None:
    for path in paths:
        shutil.rmtree(path)


def clear_unfinished(out: Path) -> None:
    """Remove what saves that were killed left behind: each may be a whole checkpoint in size."""
    for place in (out, out / "snapshots"):
        for stale in place.glob(".*.saving-*"):
            shutil.rmtree(stale, ignore_errors=True)


def set_aside(out: Path) -> None:
    """Before a fresh start: an old run's results get the ending .old, its snapshots and its report go.

    Nothing of it may pass for this run's when it is interrupted and goes on.
    """
    shutil.rmtree(out / "snapshots", ignore_errors=True)
    (out / "diverged.json").unlink(missing_ok=True)
    for name in ("checkpoint", "best"):
        if (out / name).exists():
            shutil.rmtree(out / f"{name}.old", ignore_errors=True)
            (out / name).rename(out / f"{name}.old")


def read_diary(out: Path, steps: int) -> list[dict[str, Any]]:
    """The first `steps` lines of a run's metrics.jsonl, one per step; empty where there is none."""
    file = out / "metrics.jsonl"
    lines: list[dict[str, Any]] = []
    for number, line in enumerate(file.read_text().splitlines()[:steps] if file.exists() else [], start=1):
        try:
            lines.append(json.loads(line))
        except ValueError:  # numbers are lost, no weights
            print(f"warning: {file}: line {number} is damaged and left out", file=sys.stderr)
    return lines


def rewrite_diary(out: Path, lines: list[dict[str, Any]]) -> None:
    """Make `lines` all of metrics.jsonl: what stands behind a snapshot goes, and a kill now loses none of the rest."""
    rewritten = out / ".metrics.jsonl"
    rewritten.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rewritten.replace(out / "metrics.jsonl")


class Stop:
    """Whether somebody asked the process to end: Ctrl-C or SIGTERM. A second Ctrl-C ends it at once.

    A second SIGTERM does not: a cluster's comes twice, from its scheduler and from torchrun.
    """

    requested = False

    def __call__(self, number: int, frame: object) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True


@contextmanager
def stop_requests() -> Iterator[Stop]:
    """Within the block a first SIGINT or SIGTERM is noted, not obeyed, so that a step can end and be saved."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield stop
        return
    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
