"""Fair pairs (contract, section 5): set a run's MLP width or horizon so that it matches another run, the reference.

A match of one quantity leaves others apart; `compare_runs` lists all of them, so that no mismatch is silent.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lrt.data.prepared import Prepared
from lrt.distributed.single_process import SINGLE_PROCESS, SingleProcess
from lrt.model import checkpoint
from lrt.model.checkpoint import snapshots
from lrt.model.execution import EAGER, Execution
from lrt.model.memory_config import MODEL_KINDS
from lrt.model.size import count_parameters
from lrt.schedules.base import SCHEDULES, Schedule
from lrt.schedules.parse import parse
from lrt.training.config import RunConfig
from lrt.training.recipes import match_parameters
from lrt.training.trainer import Trainer
from lrt.utils import plugins
from lrt.utils.files import replace_atomically
from lrt.utils.progress import warn
from lrt.utils.provenance import code_version, hardware

KINDS = ("parameters", "tokens", "compute", "wall_clock")
PAIRS = 12
"""Alternated pairs of steps that a ratio of step times is measured with, after WARM of each side."""
WARM = 2
UNMEASURED = "not measured; --match wall_clock does"
NOT_OF_THESE = "not measured so: wall_clock.json is of other runs, or was measured in another way"
RATIO_FILE = "wall_clock.json"
"""In a run's folder: the ratio of step times that its horizon rests on."""
TOLERANCE = 0.005
"""Relative difference below which two quantities count as equal (contract, section 5)."""


@dataclass(frozen=True)
class ReferenceRun:
    """The run that is matched: a finished one, or one on its way, which is taken as planned."""

    path: Path
    run: RunConfig
    data: str
    """Fingerprint of its data."""

    @classmethod
    def read(cls, path: Path) -> ReferenceRun:
        """From a run's folder or a checkpoint. ValueError where that does not say how it was trained."""
        about = checkpoint.about(path)
        plugins.require(about.get("plugins", ()), (*MODEL_KINDS, SCHEDULES.kind))
        if "run" not in about:
            raise ValueError(f"{path} does not say how it was trained; give the folder of a run that `lrt train` made")
        return cls(path, RunConfig.from_dict(about["run"]), about.get("data", ""))


@dataclass(frozen=True)
class Launch:
    """How a command runs what it trains: what step times depend on beside the two runs."""

    out: Path
    """The run's folder."""
    ranks: SingleProcess = SINGLE_PROCESS
    execution: Execution = EAGER

    def conditions(self, run: RunConfig, reference: RunConfig) -> dict[str, Any]:
        """What two runs' steps are timed under, as plain data: each one's mode, the machine, the versions."""
        modes = [self.execution.resolve(r.steps, self.ranks.device)[0] for r in (run, reference)]
        return {
            "mode": dataclasses.asdict(modes[0]),
            "mode beside": dataclasses.asdict(modes[1]),
            "processes": f"{self.ranks.ranks}, {type(self.ranks).__name__}",
            "hardware": hardware(self.ranks.device),
            "code": code_version(),
        }


def match_all(
    run: RunConfig, references: Sequence[tuple[str, ReferenceRun]], data: Prepared, launch: Launch
) -> RunConfig:
    """`run` after every match, whatever their order: width first, as step times and FLOPs follow from it."""
    for kind, reference in sorted(references, key=lambda pair: KINDS.index(pair[0])):
        run = match(run, kind, reference, data, launch)
    return run


def match(run: RunConfig, kind: str, reference: ReferenceRun, data: Prepared, launch: Launch) -> RunConfig:
    """`run` with its MLP width (`parameters`) or its horizon (the others) set to match `reference`.

    A ratio of step times is measured once and kept in the run's folder, so that a run that goes on has the same
    horizon. ValueError where the kind is unknown, or `run` is larger than what its parameters are to match.
    """
    if kind not in KINDS:
        raise ValueError(f"cannot match {kind!r}; choose one of {', '.join(KINDS)}")
    if kind == "parameters":
        size, wanted = (count_parameters(config.model)[0] for config in (run, reference.run))
        if size > wanted * (1 + TOLERANCE):
            raise ValueError(
                f"this model has {size:,} parameters, more than the {wanted:,} of {reference.path}; the smaller one is "
                "widened: train this one first, and match the other to it"
            )
        return dataclasses.replace(run, model=match_parameters(run.model, wanted))
    if kind == "tokens":
        return dataclasses.replace(run, horizon=f"tokens={reference.run.tokens}")
    if kind == "compute":
        return dataclasses.replace(run, horizon=f"flops={reference.run.flops!r}")
    with launch.ranks.collective():
        ratio = usable_ratio(run, reference, launch) if launch.ranks.first else None
    ratio = launch.ranks.broadcast(ratio)
    return measure_and_match(run, reference, data, launch) if ratio is None else with_ratio(run, reference, ratio)


def with_ratio(run: RunConfig, reference: ReferenceRun, ratio: float) -> RunConfig:
    """`run` at equal wall-clock: as many tokens fewer than the reference as its step takes longer."""
    return dataclasses.replace(run, horizon=f"tokens={max(1, round(reference.run.tokens / ratio))}")


@dataclass(frozen=True)
class StepTimes:
    """A measured ratio of step times, as its file has it."""

    ratio: float
    pairs: int
    of: dict[str, Any]
    """The two runs. The horizon of the first is what the ratio decides, so it does not say which ratio this is."""
    conditions: dict[str, Any] = field(default_factory=dict)
    """`Launch.conditions`; older versions noted none."""

    @classmethod
    def read(cls, folder: Path) -> StepTimes | None:
        """What a run's folder has; None where there is nothing, or nothing that this version understands."""
        try:
            return cls(**json.loads((folder / RATIO_FILE).read_text()))
        except (OSError, TypeError, ValueError):
            return None

    def is_of(self, run: RunConfig, reference: RunConfig) -> bool:
        """Whether this is the ratio of these two runs, whatever the horizon of the first."""
        try:
            saved_run = RunConfig.from_dict({**self.of["run"], "horizon": run.horizon})
            return saved_run == run and RunConfig.from_dict(self.of["beside"]) == reference
        except (KeyError, TypeError, ValueError):
            return False


def usable_ratio(run: RunConfig, reference: ReferenceRun, launch: Launch) -> float | None:
    """The ratio in the run's folder, if it is of this very pair, timed as the run will be run; what is not is said.

    A run that has begun keeps its horizon, however its ratio was timed: with another it would be another run.
    """
    file, saved = launch.out / RATIO_FILE, StepTimes.read(launch.out)
    if saved is None or not saved.is_of(run, reference.run):
        if file.is_file():
            warn(f"{file} is not of this run beside {reference.path}: it is not used, step times are measured anew")
        return None
    conditions = launch.conditions(with_ratio(run, reference, saved.ratio), reference.run)
    different = [name for name, here in conditions.items() if saved.conditions.get(name) != here]
    if different and not has_begun(launch.out):
        warn(f"{file} was measured with other {', '.join(different)}: it is not used, step times are measured anew")
        return None
    if different:
        warn(f"{file} was measured with other {', '.join(different)}; the run has begun, and keeps its horizon")
    return saved.ratio


def has_begun(folder: Path) -> bool:
    """Whether a run's folder holds anything that a run goes on from."""
    return bool(snapshots(folder)) or (folder / "checkpoint").exists()


def measure_and_match(run: RunConfig, reference: ReferenceRun, data: Prepared, launch: Launch) -> RunConfig:
    """`run` at equal wall-clock, its steps timed in the mode in which it will be run; the ratio is kept.

    ValueError where that mode follows from the horizon (`auto`), and the horizon measured in each asks for the other.
    """
    matched = with_ratio(run, reference, 1.0)
    for _ in range(2):
        conditions = launch.conditions(matched, reference.run)
        ratio = step_time_ratio(matched, reference.run, data, launch.ranks, launch.execution)
        matched = with_ratio(run, reference, ratio)
        if launch.conditions(matched, reference.run) == conditions:
            write_ratio(
                StepTimes(ratio, PAIRS, {"run": run.to_dict(), "beside": reference.run.to_dict()}, conditions), launch
            )
            return matched
    raise ValueError(
        f"--execution.compile auto compiles this run at the horizon that uncompiled steps give it, and not at that of "
        f"compiled ones ({matched.steps:,} steps); give --execution.compile always or never"
    )


def write_ratio(times: StepTimes, launch: Launch) -> None:
    """Keep a ratio in the run's folder. All ranks call it."""
    with launch.ranks.collective():
        if launch.ranks.first:
            launch.out.mkdir(parents=True, exist_ok=True)
            replace_atomically(launch.out / RATIO_FILE, json.dumps(dataclasses.asdict(times), indent=2) + "\n")


def step_time_ratio(
    run: RunConfig,
    reference: RunConfig,
    data: Prepared,
    ranks: SingleProcess,
    execution: Execution = EAGER,
    pairs: int = PAIRS,
    warm: int = WARM,
) -> float:
    """Seconds per token of `run` over those of `reference`, optimiser included: median of alternated pairs of steps.

    Each in the mode that `execution` means for it: what is compiled is compiled in the `warm` steps before them.
    """
    # The vocabulary is a fact of the data, here as in training.
    model = dataclasses.replace(reference.model, vocab_size=data.vocab_size)
    reference = dataclasses.replace(reference, model=model)
    trainers = [Trainer(r, data, ranks.device, ranks, execution) for r in (run, reference)]
    for trainer in trainers:
        for _ in range(warm):
            seconds_per_token(trainer)
    # Pairs, since a raw clock on a shared machine drifts: both sides of a pair meet the same load.
    ratios = [seconds_per_token(trainers[0]) / seconds_per_token(trainers[1]) for _ in range(pairs)]
    for trainer in trainers:
        trainer.close()
    return ranks.broadcast(statistics.median(ratios))


def seconds_per_token(trainer: Trainer) -> float:
    """One optimiser step, timed: of a mixture or of stages one of each part, weighted by its share of training."""
    total = 0.0
    for share, part in parse(trainer.run.schedule).shares():
        before = trainer.progress.seconds
        step_under(trainer, part)
        total += share * (trainer.progress.seconds - before)
    return total / trainer.run.batch_tokens


def step_under(trainer: Trainer, part: Schedule) -> None:
    """One optimiser step under one part of the run's schedule, wherever in training that would serve."""
    trainer.schedule = part
    trainer.step()


@dataclass(frozen=True)
class Comparison:
    """One quantity of two runs: `here`, of the run itself, and `there`, of the reference."""

    name: str
    here: float | str
    there: float | str

    @property
    def equal(self) -> bool:
        """Whether they are the same, numbers within TOLERANCE."""
        if isinstance(self.here, str) or isinstance(self.there, str):
            return self.here == self.there
        return abs(self.here - self.there) <= TOLERANCE * abs(self.there)

    def __str__(self) -> str:
        if self.here in (UNMEASURED, NOT_OF_THESE):
            return f"  {'unknown':9} {self.name:24} {self.here}"
        verdict = "equal" if self.equal else "MISMATCH"
        text = f"{format_quantity(self.here)} here, {format_quantity(self.there)} there"
        if not self.equal and not isinstance(self.here, str) and not isinstance(self.there, str):
            text += f" ({self.here / self.there - 1:+.1%})"
        return f"  {verdict:9} {self.name:24} {text}"


def format_quantity(quantity: float | str) -> str:
    """A quantity for people: FLOPs in short, counts in full."""
    if isinstance(quantity, str):
        return quantity
    return f"{quantity:.3e}" if isinstance(quantity, float) else f"{quantity:,}"


def compare_runs(run: RunConfig, reference: ReferenceRun, data: Prepared, launch: Launch) -> list[Comparison]:
    """What a fair pair has in common, and what it does not: sizes, tokens, FLOPs, time, seed, order of data, rates."""
    here, there = (quantities(config) for config in (run, reference.run))
    here["data"], there["data"] = data.fingerprint[:12], reference.data[:12]
    here["tokens x step time"], there["tokens x step time"] = wall_clocks(run, reference, launch)
    return [Comparison(name, here[name], there[name]) for name in here]


def wall_clocks(run: RunConfig, reference: ReferenceRun, launch: Launch) -> tuple[float | str, float | str]:
    """Tokens by step time of both, in units of the reference's step time; else why they are not known."""
    if not (launch.out / RATIO_FILE).is_file():
        return UNMEASURED, UNMEASURED
    saved = StepTimes.read(launch.out)
    if (
        saved is None
        or not saved.is_of(run, reference.run)
        or saved.conditions != launch.conditions(run, reference.run)
    ):
        return NOT_OF_THESE, NOT_OF_THESE
    return round(run.tokens * saved.ratio), reference.run.tokens


def quantities(run: RunConfig) -> dict[str, float | str]:
    """What is compared of a run, by the name that it is shown under."""
    total, dense = count_parameters(run.model)
    optim = dataclasses.asdict(run.optim)
    return {
        "parameters": total,
        "without tables and head": dense,
        "depth and width": f"{run.model.depth} x {run.model.width}",
        "value embeddings": run.model.value_embeddings,
        "tokens": run.tokens,
        "training FLOPs": run.flops,
        "forwards per generated token": run.model.forwards,
        "context": run.model.context,
        "batch, tokens per step": run.batch_tokens,
        "seed": run.seed,
        "precision": run.precision,
        "rates": ", ".join(f"{k} {v}" for k, v in optim.items()),
    }
