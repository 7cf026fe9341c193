"""What a run saves on disk while it goes on, and what a fresh start removes or sets aside.

A snapshot is a checkpoint in snapshots/step-… that the run can go on from; best/ holds the weights with the best live
score so far. Where they lie is `lrt.model.checkpoint`'s knowledge; what is in them, `Trainer.save`'s.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from lrt.utils.validation import Limits, check_numbers

LIMITS = {
    "every": Limits(0, 10**12, whole=True),
    "last": Limits(1, 10**6, whole=True),
}


@dataclass(frozen=True)
class SnapshotConfig:
    """What is saved on disk while a run goes on. Nothing of it changes what is trained."""

    every: int = 0
    """Save a snapshot every so many steps; 0 saves none before the end. An interruption always saves one."""
    last: int = 2
    """How many snapshots stay, the newest ones."""
    best: bool = True
    """Keep the weights of the best live evaluation so far in best/."""

    def __post_init__(self) -> None:
        check_numbers(self, LIMITS)


def clear_unfinished(out: Path) -> None:
    """Remove what saves that were killed left behind: each may be a whole checkpoint in size."""
    for folder in (out, out / "snapshots"):
        for unfinished in folder.glob(".*.saving-*"):
            shutil.rmtree(unfinished, ignore_errors=True)


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
