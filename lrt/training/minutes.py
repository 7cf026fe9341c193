"""`--minutes`: a horizon by the clock, turned into tokens once by timed steps and kept in the run's folder.

The tokens are what the run is configured with: its rates fall over them, and it goes on with them on any machine. So
they are measured before a run begins and never again.
"""

from __future__ import annotations

import bisect
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrt.data.prepared import Prepared
from lrt.training.config import EvalConfig, RunConfig
from lrt.training.matching import Launch, has_begun
from lrt.training.speed import Speed, measure_speed, validation_tokens
from lrt.utils.files import replace_atomically, set_aside
from lrt.utils.provenance import hardware
from lrt.utils.timing import format_duration
from lrt.utils.validation import Limits

FILE = "minutes.json"
"""In a run's folder: the horizon that its minutes came to."""
LIMITS = Limits(0, 10**7, above=True)
"""What minutes may be."""
TRAINING = 0.5
"""The least part of the minutes that has to be left for training, beside live scores."""


@dataclass(frozen=True)
class MeasuredHorizon:
    """What some minutes came to, as its file has it."""

    minutes: float
    tokens: int
    run: dict[str, Any]
    """The run. Its horizon is what was measured, so it is not compared."""
    data: str
    """Fingerprint of its data."""
    speed: dict[str, float]
    """`Speed`, in seconds per token."""
    hardware: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> MeasuredHorizon | None:
        """What a run's folder has; None where there is nothing, or nothing that this version understands."""
        try:
            return cls(**json.loads((folder / FILE).read_text(encoding="utf-8")))
        except (OSError, TypeError, ValueError):
            return None

    def is_of(self, run: RunConfig, minutes: float, data: Prepared) -> bool:
        """Whether this is the horizon of this run for these minutes, wherever it was measured."""
        try:
            saved = RunConfig.from_dict({**self.run, "horizon": run.horizon, "device_batch": run.device_batch})
        except ValueError:
            return False
        return saved == run and self.minutes == minutes and self.data == data.fingerprint


def with_minutes(
    run: RunConfig, minutes: float, data: Prepared, launch: Launch, evaluation: EvalConfig, resume_from: str = "auto"
) -> tuple[RunConfig, Speed]:
    """`run` for as many tokens as it trains on, live scores included, in `minutes` here; and the speed that this is.

    A run that has begun keeps its horizon. All ranks call it, and the first one's clock decides. ValueError where
    `launch.out` holds another run, where a snapshot is named, or where live scores leave too little time to train.
    """
    check_minutes(minutes)
    if resume_from not in ("auto", "never"):
        raise ValueError(
            f"--minutes {minutes:g} counts from a run's beginning, and --resume {resume_from} goes on from a snapshot; "
            "give --horizon in the place of --minutes"
        )
    ranks = launch.ranks
    with ranks.collective():
        kept = kept_horizon(run, minutes, data, launch.out) if ranks.first and resume_from == "auto" else None
    kept = ranks.broadcast(kept)
    if kept is not None:
        return with_tokens(run, kept.tokens), Speed(**kept.speed)
    run, speed = measure_horizon(run, minutes, data, launch, evaluation)
    with ranks.collective():
        if ranks.first:
            launch.out.mkdir(parents=True, exist_ok=True)
            set_aside(launch.out / FILE)  # an old run's, which --resume never keeps
            measured = MeasuredHorizon(
                minutes, run.tokens, run.to_dict(), data.fingerprint, dataclasses.asdict(speed), hardware(ranks.device)
            )
            replace_atomically(launch.out / FILE, json.dumps(dataclasses.asdict(measured), indent=2) + "\n")
    return run, speed


def check_minutes(minutes: float) -> None:
    """ValueError for minutes that are no time to train for."""
    if not LIMITS.allow(minutes):
        raise ValueError(f"--minutes is {minutes:g}; it must be {LIMITS}")


def kept_horizon(run: RunConfig, minutes: float, data: Prepared, out: Path) -> MeasuredHorizon | None:
    """What these minutes came to before; None where it is still to be measured. ValueError for another run's folder."""
    saved = MeasuredHorizon.read(out)
    if saved is not None and saved.is_of(run, minutes, data):
        return saved
    if has_begun(out):
        raise ValueError(
            f"{out} holds a run that was not begun with these settings and --minutes {minutes:g}; choose another "
            "--out, give what it was begun with, or start anew with --resume never"
        )
    return None


def measure_horizon(
    run: RunConfig, minutes: float, data: Prepared, launch: Launch, evaluation: EvalConfig
) -> tuple[RunConfig, Speed]:
    """`run` with the horizon that `minutes` come to, and the speed that this rests on.

    Whether steps are compiled may follow from the horizon. It is timed as a short run would be first, since compiling
    takes long; where a horizon comes out that is to be compiled, it is timed once more.
    """

    def measure(timed: RunConfig) -> tuple[RunConfig, Speed]:
        speed = measure_speed(timed, data, launch.ranks, launch.execution)
        return with_tokens(run, affordable_tokens(run, speed, minutes, evaluation, validation_tokens(data))), speed

    short = dataclasses.replace(run, horizon="steps=1")
    measured, speed = measure(short)
    modes = [launch.execution.resolve(r.steps, launch.ranks.device)[0] for r in (short, measured)]
    return (measured, speed) if modes[0] == modes[1] else measure(measured)


def affordable_tokens(run: RunConfig, speed: Speed, minutes: float, evaluation: EvalConfig, available: int) -> int:
    """Tokens of the longest run that ends within `minutes`. ValueError where scoring takes more than half of them."""
    budget = 60 * minutes

    def seconds(steps: int) -> float:
        return speed.run_seconds(dataclasses.replace(run, horizon=f"steps={steps}"), evaluation, available)

    step = speed.train * run.batch_tokens
    scoring = seconds(10) - 10 * step  # about as many live scores as any run has
    if scoring > (1 - TRAINING) * budget:
        raise ValueError(
            f"--minutes {minutes:g} is too short: live scores alone take about {format_duration(scoring)} here; give "
            f"--minutes {scoring / (1 - TRAINING) / 60:.1f} or more, or --eval.every 0"
        )
    longest = 1 + int(budget / step)
    fitting = bisect.bisect_right(range(1, longest + 1), budget, key=seconds)
    if fitting == 0:
        raise ValueError(
            f"--minutes {minutes:g} is too short: a step takes about {format_duration(seconds(1))} here; give more "
            "minutes, or a smaller batch"
        )
    return fitting * run.batch_tokens


def with_tokens(run: RunConfig, tokens: int) -> RunConfig:
    """`run` for so many tokens."""
    return dataclasses.replace(run, horizon=f"tokens={tokens}")
