"""Fair pairs (contract, section 5): set a run's MLP width or horizon so that it matches another run.

A match of one quantity leaves others apart; `compare` lists all of them, so that no mismatch is silent.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lrt.data.prepared import Prepared
from lrt.distributed.single import SingleProcess
from lrt.model import checkpoint
from lrt.model.config import MODEL_KINDS
from lrt.model.size import count_parameters
from lrt.schedules.base import SCHEDULES
from lrt.schedules.parse import parse
from lrt.training.config import RunConfig
from lrt.training.recipes import match_parameters
from lrt.training.trainer import Trainer
from lrt.utils import plugins

KINDS = ("parameters", "tokens", "compute", "wall_clock")
PAIRS = 12
"""Alternated pairs of steps that a ratio of step times is measured with, after WARM of each."""
WARM = 2
UNMEASURED = "not measured; --match wall_clock does"
TOLERANCE = 0.005
"""Relative difference below which two quantities count as equal (contract, section 5)."""


@dataclass(frozen=True)
class Other:
    """The run that is matched: a finished one, or one on its way, which is taken as planned."""

    path: Path
    run: RunConfig
    data: str
    """Fingerprint of its data."""

    @classmethod
    def read(cls, path: Path) -> Other:
        """From a run's folder or a checkpoint. ValueError where that does not say how it was trained."""
        about = checkpoint.about(path)
        plugins.require(about.get("plugins", ()), (*MODEL_KINDS, SCHEDULES.kind))
        if "run" not in about:
            raise ValueError(f"{path} does not say how it was trained; give the folder of a run that `lrt train` made")
        return cls(path, RunConfig.from_dict(about["run"]), about.get("data", ""))


def match_all(
    run: RunConfig, others: Sequence[tuple[str, Other]], data: Prepared, ranks: SingleProcess, out: Path
) -> RunConfig:
    """`run` after every match, whatever their order: width first, as step times and FLOPs follow from it."""
    for kind, other in sorted(others, key=lambda pair: KINDS.index(pair[0])):
        run = match(run, kind, other, data, ranks, out)
    return run


def match(run: RunConfig, kind: str, other: Other, data: Prepared, ranks: SingleProcess, out: Path) -> RunConfig:
    """`run` with its MLP width (`parameters`) or its horizon (the others) set to match `other`.

    A ratio of step times is measured once and kept in `out`, so that a run that goes on has the same horizon.
    """
    if kind not in KINDS:
        raise ValueError(f"cannot match {kind!r}; choose one of {', '.join(KINDS)}")
    if kind == "parameters":
        mine, theirs = (count_parameters(r.model)[0] for r in (run, other.run))
        if mine > theirs * (1 + TOLERANCE):
            raise ValueError(
                f"this model has {mine:,} parameters, more than the {theirs:,} of {other.path}; the smaller one is "
                "widened: train this one first, and match the other to it"
            )
        return dataclasses.replace(run, model=match_parameters(run.model, theirs))
    if kind == "tokens":
        return dataclasses.replace(run, horizon=f"tokens={other.run.tokens}")
    if kind == "compute":
        return dataclasses.replace(run, horizon=f"flops={other.run.flops!r}")
    ratio = kept_ratio(run, other, data, ranks, out / "wall_clock.json")
    return dataclasses.replace(run, horizon=f"tokens={max(1, round(other.run.tokens / ratio))}")


def kept_ratio(run: RunConfig, other: Other, data: Prepared, ranks: SingleProcess, file: Path) -> float:
    """The ratio of step times that `file` has of these two runs; measured, and written there, if it has none."""
    asked = json.loads(json.dumps({"run": {**run.to_dict(), "horizon": ""}, "beside": other.run.to_dict()}))
    with ranks.collective():
        known = json.loads(file.read_text()) if ranks.first and file.is_file() else {}
    known = ranks.broadcast(known)
    if known.get("of") == asked:
        return known["ratio"]
    ratio = step_time_ratio(run, other.run, data, ranks)
    with ranks.collective():
        if ranks.first:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"ratio": ratio, "pairs": PAIRS, "of": asked}, indent=2) + "\n")
    return ratio


def step_time_ratio(run: RunConfig, other: RunConfig, data: Prepared, ranks: SingleProcess) -> float:
    """Seconds per token of `run` over those of `other`, optimiser included: the median of alternated pairs of steps."""
    # The vocabulary is a fact of the data, here as in training.
    other = dataclasses.replace(other, model=dataclasses.replace(other.model, vocab_size=data.vocab_size))
    trainings = [Trainer(r, data, ranks.device, ranks) for r in (run, other)]
    for training in trainings:
        for _ in range(WARM):
            seconds_per_token(training)
    ratios = [seconds_per_token(trainings[0]) / seconds_per_token(trainings[1]) for _ in range(PAIRS)]
    for training in trainings:
        training.close()
    return ranks.broadcast(statistics.median(ratios))


def seconds_per_token(training: Trainer) -> float:
    """One optimiser step, timed: of a mixture or of stages one of each part, weighted by its share of training."""
    total = 0.0
    for share, part in parse(training.run.schedule).shares():
        training.schedule = part
        before = training.progress.seconds
        training.step()
        total += share * (training.progress.seconds - before)
    return total / training.run.batch_tokens


@dataclass(frozen=True)
class Comparison:
    """One quantity of two runs."""

    name: str
    mine: float | str
    theirs: float | str

    @property
    def equal(self) -> bool:
        """Whether they are the same, numbers within TOLERANCE."""
        if isinstance(self.mine, str) or isinstance(self.theirs, str):
            return self.mine == self.theirs
        return abs(self.mine - self.theirs) <= TOLERANCE * abs(self.theirs)

    def __str__(self) -> str:
        if self.mine == UNMEASURED:
            return f"  {'unknown':9} {self.name:24} {UNMEASURED}"
        verdict, sides = (
            "equal" if self.equal else "MISMATCH",
            f"{spell(self.mine)} here, {spell(self.theirs)} there",
        )
        if not self.equal and not isinstance(self.mine, str) and not isinstance(self.theirs, str):
            sides += f" ({self.mine / self.theirs - 1:+.1%})"
        return f"  {verdict:9} {self.name:24} {sides}"


def spell(value: float | str) -> str:
    """A value for people: FLOPs in short, counts in full."""
    if isinstance(value, str):
        return value
    return f"{value:.3e}" if isinstance(value, float) else f"{value:,}"


def compare_runs(run: RunConfig, other: Other, data: Prepared, out: Path) -> list[Comparison]:
    """What a fair pair has in common, and what it does not: sizes, tokens, FLOPs, time, seed, order of data, rates."""
    mine, theirs = (sides(r) for r in (run, other.run))
    mine["data"], theirs["data"] = data.fingerprint[:12], other.data[:12]
    file = out / "wall_clock.json"
    if file.is_file():  # in units of the other run's step time
        mine["tokens x step time"] = round(run.tokens * json.loads(file.read_text())["ratio"])
        theirs["tokens x step time"] = other.run.tokens
    else:
        mine["tokens x step time"] = theirs["tokens x step time"] = UNMEASURED
    return [Comparison(name, mine[name], theirs[name]) for name in mine]


def sides(run: RunConfig) -> dict[str, float | str]:
    """The quantities that are compared."""
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
