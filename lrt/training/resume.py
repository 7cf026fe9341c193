"""Where a run is resumed: which snapshot it goes on from, and what may differ from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lrt.model import checkpoint
from lrt.model.checkpoint import drop_snapshots, snapshot_step, snapshots
from lrt.training.config import RunConfig
from lrt.training.loggers import MetricsLog, read_metrics
from lrt.training.snapshots import clear_unfinished, set_aside
from lrt.training.trainer import Trainer
from lrt.utils import files
from lrt.utils.progress import warn

FREE = ("optim", "schedule", "horizon")
"""What may differ from the snapshot that `resume` names; with `auto` everything must be the same."""


def resume(training: Trainer, out: Path, source: str) -> MetricsLog:
    """Bring a run to where `source` says (`auto`, `never`, a snapshot's folder); returns the diary up to there.

    `auto` takes what this very run left that is whole and furthest, and starts anew where there is nothing. A named
    snapshot may have been trained at other rates, under another schedule or for another horizon; once that run has
    snapshots of its own in `out`, the newest of them is taken, so that the same command always goes on.
    """
    ranks = training.ranks
    with ranks.collective():
        found = choose_snapshot(out, source, training.run) if ranks.first else None
    path = ranks.broadcast(found)
    if path is None:
        return []
    with ranks.collective():
        training.restore(path, () if source == "auto" else FREE)
        step = training.progress.step
        if source != "auto" and ranks.first:  # later ones are of a path not taken
            drop_snapshots([s for s in snapshots(out) if snapshot_step(s) > step])
        return read_metrics(path.parent.parent if path.parent.name == "snapshots" else path.parent, step)


def choose_snapshot(out: Path, source: str, run: RunConfig) -> Path | None:
    """The checkpoint to go on from; None to start anew."""
    clear_unfinished(out)
    if source == "never":
        set_aside(out)
        return None
    named = None if source == "auto" else checkpoint.verify(Path(source))
    settings = json.loads(json.dumps(run.to_dict()))
    whole = []
    files.recover(out / "checkpoint")
    for path in [*(out / "checkpoint",) * (out / "checkpoint").exists(), *reversed(snapshots(out))]:
        try:
            about = checkpoint.about(path)
        except ValueError as error:
            warn(f"passing over a damaged snapshot: {error}")
            continue
        if about.get("run") == settings and (named is None or tokens_of(about) > tokens_of(checkpoint.about(named))):
            return path
        whole.append(path)
    # Nothing of this run: the snapshot that was named, or what `restore` will refuse, saying what differs.
    return named or next(iter(whole), None)


def tokens_of(about: dict[str, Any]) -> int:
    """Tokens that a checkpoint was trained on, as it says itself."""
    return about.get("trained", {}).get("tokens", 0)
