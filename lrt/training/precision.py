"""`--precision auto`: what a run's passes compute in, measured before it is trained.

The precision decides numbers, so it is part of a RunConfig, which is compared when a run goes on. `resolve_precision`
puts float32 or bfloat16 in the place of `auto` first. A run that has begun keeps what it has.
"""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from pathlib import Path
from typing import Literal

from lrt.data.prepared import Prepared
from lrt.distributed.single_process import SINGLE_PROCESS, SingleProcess
from lrt.model import checkpoint
from lrt.model.checkpoint import snapshots
from lrt.model.execution import EAGER, Execution
from lrt.training.config import RunConfig
from lrt.training.matching import step_time_ratio
from lrt.utils import files

PAIRS, WARM = 5, 1
"""Alternated pairs of steps that a precision is chosen by, after so many of each side that are not timed."""
WORTHWHILE = 0.95
"""The most that a step in bfloat16 may take of one in float32 to be chosen: it rounds, and has to pay for that."""


def resolve_precision(
    run: RunConfig,
    data: Prepared,
    out: Path,
    ranks: SingleProcess = SINGLE_PROCESS,
    execution: Execution = EAGER,
    resume_from: str = "auto",
) -> tuple[RunConfig, str]:
    """`run` with float32 or bfloat16 in the place of `auto`, and which of them and why, in words.

    A run that is given its precision comes back as it is, with no words. One that goes on, as `lrt.training.loop.train`
    would with this `out` and `resume_from`, keeps what it began with. Else both are timed, and nothing of that stays:
    the run is the one that the same precision, given, would have been. All ranks call it, and the first one's clock
    decides.
    """
    if run.precision != "auto":
        return run, ""
    with ranks.collective():
        kept = kept_precision(run, out, resume_from) if ranks.first else None
    kept = ranks.broadcast(kept)
    if kept is not None:
        return dataclasses.replace(run, precision=kept), f"{kept}, in which this run has begun"
    ratio = measure_ratio(run, data, ranks, execution)
    measured = f"auto: median of {PAIRS} pairs of steps"
    if ratio <= WORTHWHILE:
        return in_precision(run, "bfloat16"), f"bfloat16, whose steps take {ratio:.2f} of float32's here ({measured})"
    reason = f"float32, as bfloat16's steps take {ratio:.2f} of its own here, more than {WORTHWHILE} ({measured})"
    return in_precision(run, "float32"), reason


def in_precision(run: RunConfig, precision: Literal["float32", "bfloat16"]) -> RunConfig:
    return dataclasses.replace(run, precision=precision)


def kept_precision(run: RunConfig, out: Path, resume_from: str) -> Literal["float32", "bfloat16"] | None:
    """The precision of what `run` would go on from; None where it starts anew.

    That is its own result or newest snapshot. Of another run's, and of a snapshot that was named, it is the precision
    too: with another one they would be refused.
    """
    if resume_from == "never":
        return None
    files.recover(out / "checkpoint")
    named = [] if resume_from == "auto" else [Path(resume_from)]
    saved = []
    for path in (*named, out / "checkpoint", *reversed(snapshots(out))):
        with suppress(ValueError, KeyError):  # damaged, not there, or it does not say
            saved.append(RunConfig.from_dict(checkpoint.about(path)["run"]))
    free = {"device_batch": run.device_batch, "precision": run.precision}
    own = [other for other in saved if dataclasses.replace(other, **free) == run]
    precisions = [other.precision for other in (*own, *saved)]
    return next((precision for precision in precisions if precision != "auto"), None)


def measure_ratio(run: RunConfig, data: Prepared, ranks: SingleProcess, execution: Execution) -> float:
    """Seconds of a step in bfloat16 over those in float32, on models of their own.

    Of one micro-batch: what more of them add is the same share, and the optimisers' time is the same in both, so that
    which of the two is faster does not depend on their number. Compiled or not as the run will be.
    """
    decided, _ = execution.resolve(run.steps, ranks.device)
    small = run.one_micro_batch(ranks.ranks)
    half, single = in_precision(small, "bfloat16"), in_precision(small, "float32")
    return step_time_ratio(half, single, data, ranks, decided, PAIRS, WARM)
