"""What a run saves on disk while it goes on, and what a fresh start sets aside.

A snapshot is a checkpoint in snapshots/step-… that the run can go on from; best/ holds the weights with the best live
score so far. Where they lie is `lrt.model.checkpoint`'s knowledge; what is in them, `Trainer.save`'s.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

from lrt.model.checkpoint import snapshot_step, snapshots
from lrt.utils import files


def clear_unfinished(out: Path) -> None:
    """Remove what saves that were killed left behind: each may be a whole checkpoint in size."""
    for folder in (out, out / "snapshots"):
        for unfinished in folder.glob(".*.saving-*"):
            if unfinished.is_dir():
                shutil.rmtree(unfinished, ignore_errors=True)
            else:
                unfinished.unlink(missing_ok=True)


def set_run_aside(out: Path) -> None:
    """Before a fresh start, or one from elsewhere: all that an old run left gets the ending .old, and stays.

    Nothing of it may pass for this run's when it is interrupted and goes on, and nothing of it is lost: its snapshots
    may be all there is of its weights.
    """
    for name in ("checkpoint", "best", "snapshots", "metrics.jsonl", "diverged.json", "tensorboard", "wandb-id"):
        files.set_aside(out / name)


def set_later_aside(out: Path, step: int) -> None:
    """Before a run goes on from `step`: later snapshots, of another path or damaged, go to snapshots.old/.

    As the newest ones they would stay in the place of those that the run is about to save.
    """
    later = [snapshot for snapshot in snapshots(out) if snapshot_step(snapshot) > step]
    aside = out / "snapshots.old"
    if later:
        aside.mkdir(exist_ok=True)
    for snapshot in later:
        snapshot.rename(files.free_name(aside / snapshot.name))


def drop_finished(out: Path) -> None:
    """Remove the snapshots that a run went on from, when its checkpoint is whole. What was set aside stays."""
    folder = out / "snapshots"
    for snapshot in (*folder.glob("step-*"), *folder.glob(".step-*")):  # also what a kill left of one
        shutil.rmtree(snapshot, ignore_errors=True)
    with suppress(OSError):  # something else lies there
        folder.rmdir()
