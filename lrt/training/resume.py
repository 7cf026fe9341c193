"""Where a run is resumed: which snapshot it goes on from, and what may differ from it.

Saved configurations are compared with the run's as values of RunConfig, which fills in what older versions did not
write: a snapshot from before a field existed goes on as long as the field has its default.
"""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from pathlib import Path
from typing import Any

from lrt.model import checkpoint
from lrt.model.checkpoint import snapshots
from lrt.training.config import RunConfig
from lrt.training.loggers import MetricsLog, read_metrics
from lrt.training.snapshots import clear_unfinished, set_later_aside, set_run_aside
from lrt.training.trainer import Trainer
from lrt.utils import files
from lrt.utils.progress import warn

MAY_DIFFER = ("optim", "schedule", "horizon")
"""Fields of RunConfig that may differ from the snapshot that `resume` names; with `auto` all must be the same."""


def resume(trainer: Trainer, out: Path, source: str) -> MetricsLog:
    """Bring a run to where `source` says (`auto`, `never`, a snapshot's folder); returns the metrics log up to there.

    `auto` takes what this very run left that is whole and furthest, and starts anew where there is nothing. A named
    snapshot may have been trained at other rates, under another schedule or for another horizon; once that run has
    snapshots of its own in `out`, the newest of them is taken, so that the same command always goes on. What another
    run left in `out` is set aside.

    All ranks call it. Raises ValueError where only another run's snapshots are there, the data differ, or the horizon
    is passed already; nothing was removed then.
    """
    ranks = trainer.ranks
    with ranks.collective():
        path = choose_snapshot(out, source, trainer.run) if ranks.first else None
    path = ranks.broadcast(path)
    if path is None:
        return []
    with ranks.collective():
        trainer.restore(path, () if source == "auto" else MAY_DIFFER)
        step = trainer.progress.step
        if step > trainer.steps:
            raise ValueError(
                f"{path} stands at step {step:,}, behind the horizon of {trainer.steps:,} steps "
                f"({trainer.run.horizon}); give a horizon that is further, or resume from an earlier snapshot"
            )
        lines = read_metrics(path.parent.parent if path.parent.name == "snapshots" else path.parent, step)
    with ranks.collective():  # when all have read
        if ranks.first:
            set_others_aside(out, path, trainer)
    return lines


def set_others_aside(out: Path, path: Path, trainer: Trainer) -> None:
    """Before a run goes on from `path`: what lies in `out` and is not on the way to it gets the ending .old.

    From elsewhere, that is all that a run leaves; from within, what is later and not of this run.
    """
    if not holds_checkpoint(out, path):
        set_run_aside(out)
        return
    set_later_aside(out, trainer.progress.step)
    tokens = trainer.progress.step * trainer.run.batch_tokens
    for place in (out / "checkpoint", out / "best"):
        with suppress(ValueError):  # damaged, or not there
            about = checkpoint.about(place)
            if tokens_trained(about) > tokens and not is_of_run(about, trainer.run):
                files.set_aside(place)


def holds_checkpoint(out: Path, path: Path) -> bool:
    """Whether `path` is the result of the run in `out`, or lies among its snapshots."""
    snapshot = path.resolve().parent == (out / "snapshots").resolve()
    return snapshot or path.resolve() == (out / "checkpoint").resolve()


def choose_snapshot(out: Path, source: str, run: RunConfig) -> Path | None:
    """The checkpoint to go on from; None to start anew, for which an old result is set aside."""
    clear_unfinished(out)
    if source == "never":
        set_run_aside(out)
        return None
    named, problem = None, None
    try:
        named = None if source == "auto" else checkpoint.verify(Path(source))
    except ValueError as error:  # it may have gone when this run had newer ones of its own
        problem = error
    named_tokens = -1 if named is None else tokens_trained(checkpoint.about(named))
    others = []
    files.recover(out / "checkpoint")
    # A finished run's result first, then its snapshots, newest first.
    for path in [*(out / "checkpoint",) * (out / "checkpoint").exists(), *reversed(snapshots(out))]:
        try:
            about = checkpoint.about(path)
        except ValueError as error:
            warn(f"passing over a damaged snapshot: {error}")
            continue
        if is_of_run(about, run) and tokens_trained(about) >= named_tokens:
            return path
        others.append(path)
    if problem is not None:
        raise problem
    # Nothing of this run: the snapshot that was named, or what `restore` will refuse, saying what differs.
    return named or next(iter(others), None)


def holds_run(out: Path, run: RunConfig, data: str) -> bool:
    """Whether a run's folder holds a whole checkpoint or snapshot of this very run, on data of that fingerprint."""
    files.recover(out / "checkpoint")
    for path in (out / "checkpoint", *snapshots(out)):
        with suppress(ValueError):  # damaged, or not there
            about = checkpoint.about(path)
            if is_of_run(about, run) and about.get("data") == data:
                return True
    return False


def steps_done(out: Path, run: RunConfig, source: str) -> int:
    """Steps that a run resumed from `source` has behind it; 0 where it is yet to begin. It changes nothing.

    ValueError where `source` is a snapshot that cannot be read, and `out` has none of this run.
    """
    if source == "never":
        return 0
    tokens = [0]
    for path in (out / "checkpoint", *snapshots(out)):
        with suppress(ValueError):  # damaged, or not there
            about = checkpoint.about(path)
            if is_of_run(about, run):
                tokens.append(tokens_trained(about))
    if source != "auto" and max(tokens) == 0:
        tokens.append(tokens_trained(checkpoint.about(checkpoint.verify(Path(source)))))
    return max(tokens) // run.batch_tokens


def is_of_run(about: dict[str, Any], run: RunConfig) -> bool:
    """Whether a checkpoint says that it is of this very run, in however many parts its steps were computed."""
    try:
        saved = RunConfig.from_dict(about["run"])
        return dataclasses.replace(saved, device_batch=run.device_batch) == run
    except (KeyError, ValueError):  # it does not say, or not so that this version understands it
        return False


def tokens_trained(about: dict[str, Any]) -> int:
    """Tokens that a checkpoint was trained on, as it says itself."""
    return about.get("trained", {}).get("tokens", 0)
