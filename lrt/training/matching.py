"""Fair pairs (contract, section 5): set a run's MLP width or horizon so that it matches another run, the reference.

A match of one quantity leaves others apart; `compare_runs` lists all of them, so that no mismatch is silent.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrt.data.prepared import Prepared
from lrt.distributed.single_process import SingleProcess
from lrt.model import checkpoint
from lrt.model.config import MODEL_KINDS
from lrt.model.size import count_parameters
from lrt.schedules.base import SCHEDULES
from lrt.schedules.parse import parse
from lrt.training.config import RunConfig
from lrt.training.recipes import match_parameters
from lrt.training.trainer import Trainer
from lrt.utils import plugins
from lrt.utils.files import replace_atomically

KINDS = ("parameters", "tokens", "compute", "wall_clock")
PAIRS = 12
"""Alternated pairs of steps that a ratio of step times is measured with, after WARM of each side."""
WARM = 2
UNMEASURED = "not measured; --match wall_clock does"
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


def match_all(
    run: RunConfig, references: Sequence[tuple[str, ReferenceRun]], data: Prepared, ranks: SingleProcess, out: Path
) -> RunConfig:
    """`run` after every match, whatever their order: width first, as step times and FLOPs follow from it."""
    for kind, reference in sorted(references, key=lambda pair: KINDS.index(pair[0])):
        run = match(run, kind, reference, data, ranks, out)
    return run


def match(
    run: RunConfig, kind: str, reference: ReferenceRun, data: Prepared, ranks: SingleProcess, out: Path
) -> RunConfig:
    """`run` with its MLP width (`parameters`) or its horizon (the others) set to match `reference`.

    A ratio of step times is measured once and kept in `out`, so that a run that goes on has the same horizon.
    ValueError where the kind is unknown, or `run` is larger than what its parameters are to match.
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
    # Equal wall-clock: as many tokens fewer as a step here takes longer.
    ratio = read_or_measure_ratio(run, reference, data, ranks, out / "wall_clock.json")
    return dataclasses.replace(run, horizon=f"tokens={max(1, round(reference.run.tokens / ratio))}")


def read_or_measure_ratio(
    run: RunConfig, reference: ReferenceRun, data: Prepared, ranks: SingleProcess, file: Path
) -> float:
    """The ratio of step times that `file` has of these two runs; measured, and written there, if it has none."""
    with ranks.collective():
        saved = json.loads(file.read_text()) if ranks.first and file.is_file() else {}
    saved = ranks.broadcast(saved)
    if is_of_pair(saved, run, reference.run):
        return saved["ratio"]
    ratio = step_time_ratio(run, reference.run, data, ranks)
    # The horizon is what the ratio decides, so it does not say which ratio this is.
    pair = {"run": {**run.to_dict(), "horizon": ""}, "beside": reference.run.to_dict()}
    with ranks.collective():
        if ranks.first:
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_atomically(file, json.dumps({"ratio": ratio, "pairs": PAIRS, "of": pair}, indent=2) + "\n")
    return ratio


def is_of_pair(saved: dict[str, Any], run: RunConfig, reference: RunConfig) -> bool:
    """Whether wall_clock.json holds the ratio of these two runs, whatever the horizon of the first."""
    try:
        pair = saved["of"]
        saved_run = RunConfig.from_dict({**pair["run"], "horizon": run.horizon})
        return saved_run == run and RunConfig.from_dict(pair["beside"]) == reference
    except (KeyError, TypeError, ValueError):  # it holds nothing, or nothing that this version understands
        return False


def step_time_ratio(run: RunConfig, reference: RunConfig, data: Prepared, ranks: SingleProcess) -> float:
    """Seconds per token of `run` over those of `reference`, optimiser included: median of alternated pairs of steps."""
    # The vocabulary is a fact of the data, here as in training.
    model = dataclasses.replace(reference.model, vocab_size=data.vocab_size)
    trainers = [Trainer(r, data, ranks.device, ranks) for r in (run, dataclasses.replace(reference, model=model))]
    for trainer in trainers:
        for _ in range(WARM):
            seconds_per_token(trainer)
    # Pairs, since a raw clock on a shared machine drifts: both sides of a pair meet the same load.
    ratios = [seconds_per_token(trainers[0]) / seconds_per_token(trainers[1]) for _ in range(PAIRS)]
    for trainer in trainers:
        trainer.close()
    return ranks.broadcast(statistics.median(ratios))


def seconds_per_token(trainer: Trainer) -> float:
    """One optimiser step, timed: of a mixture or of stages one of each part, weighted by its share of training."""
    total = 0.0
    for share, part in parse(trainer.run.schedule).shares():
        trainer.schedule = part
        before = trainer.progress.seconds
        trainer.step()
        total += share * (trainer.progress.seconds - before)
    return total / trainer.run.batch_tokens


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
        if self.here == UNMEASURED:
            return f"  {'unknown':9} {self.name:24} {UNMEASURED}"
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


def compare_runs(run: RunConfig, reference: ReferenceRun, data: Prepared, out: Path) -> list[Comparison]:
    """What a fair pair has in common, and what it does not: sizes, tokens, FLOPs, time, seed, order of data, rates."""
    here, there = (quantities(config) for config in (run, reference.run))
    here["data"], there["data"] = data.fingerprint[:12], reference.data[:12]
    file = out / "wall_clock.json"
    if file.is_file():  # in units of the reference's step time
        here["tokens x step time"] = round(run.tokens * json.loads(file.read_text())["ratio"])
        there["tokens x step time"] = reference.run.tokens
    else:
        here["tokens x step time"] = there["tokens x step time"] = UNMEASURED
    return [Comparison(name, here[name], there[name]) for name in here]


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
