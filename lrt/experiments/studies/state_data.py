"""Cells of data with state: train a model on a program's rows, and score it live by distance and by position.

A cell's fields are plain data:

    benchmark   a name in `benchmarks.BENCHMARKS`
    family, model, schedule, size, widened_to, optim, rate    as in the studies of language
    rows, steps, shortest, longest, by, mastered              as in TrackingRun; steps are the Transformer's
    equal       tokens | wall_clock: what other families share with it; at equal time their steps are divided by `step`
    tests       lengths of the rows that are scored, in order; sequences: how many rows of each

The score is excess nats per token over the floor (docs/state-data.md): 0 is all state known.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure

from lrt.eval.ablations import ablate
from lrt.eval.report.table import Table
from lrt.experiments import rivals
from lrt.experiments.state_data import measure
from lrt.experiments.state_data.measure import Bin, as_task
from lrt.experiments.state_tracking.training import TrackingRun, step_loss, train_tracking
from lrt.experiments.studies import state_data_tables, timing
from lrt.experiments.studies.benchmarks import BENCHMARKS, OpenSplit
from lrt.experiments.studies.grid import Cell, Fields
from lrt.experiments.studies.language import BASELINE, build_model
from lrt.experiments.studies.runner import Line
from lrt.model.size import count_parameters
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.schedules.flops import training_flops
from lrt.schedules.parse import parse
from lrt.training.matching import PAIRS
from lrt.training.optim import OptimConfig, Optimiser
from lrt.utils.progress import Advance
from lrt.utils.timing import Work, alternate
from lrt.utils.validation import check_fields

TRAINING = 0.8
"""The part of a cell's time that training takes, for the bar."""
ABLATED = ("zero", "embedding")
"""What the memory is replaced with, live, in rows of the first test."""
EQUAL = ("tokens", "wall_clock")
MODEL = {"family", "model", "size", "widened_to"}
OWN = {"benchmark", "schedule", "optim", "rate", "equal", "tests", "sequences"}
RUN = {"rows", "steps", "shortest", "longest", "by", "mastered", "seed"}
SEQUENCES = 256


def build_run(fields: Fields) -> TrackingRun:
    """The cell's run, for as many steps as the Transformer's. ValueError for fields that are unknown or wrong."""
    unknown = sorted(set(fields) - MODEL - OWN - RUN)
    if unknown:
        raise ValueError(
            f"a cell of state data has no field {', '.join(unknown)}; it has {', '.join(sorted(MODEL | OWN | RUN))}"
        )
    missing = sorted({"benchmark", "family", "size", "optim", "tests"} - set(fields))
    if missing:
        raise ValueError(f"a cell of state data needs {', '.join(missing)}")
    if fields.get("equal", "tokens") not in EQUAL:
        raise ValueError(f"equal is {fields['equal']!r}; choose one of {', '.join(EQUAL)}")
    check_fields(OptimConfig, fields["optim"], "optim")
    check_fields(TrackingRun, {name: fields[name] for name in RUN & set(fields)}, "the cell")
    BENCHMARKS.check(fields["benchmark"])
    benchmark = BENCHMARKS[fields["benchmark"]]("train")
    model = build_model({name: fields[name] for name in MODEL & set(fields)}, len(benchmark.words))
    optim = OptimConfig(**fields["optim"])
    rates = {name: fields.get("rate", 1) * getattr(optim, name) for name in RATES}
    return TrackingRun(
        as_task(benchmark),
        model,
        dataclasses.replace(optim, **rates),
        fields.get("schedule", rivals.rivals(model.depth)[fields["family"]].schedule),
        **{name: fields[name] for name in RUN & set(fields)},
    )


RATES = ("matrix_lr", "embedding_lr", "head_lr", "scalar_lr")


def baseline_run(fields: Fields) -> TrackingRun:
    """The Transformer's run beside it."""
    plain = {name: value for name, value in fields.items() if name not in ("model", "schedule")}
    return build_run({**plain, "family": BASELINE})


def step_ratio(run: TrackingRun, other: TrackingRun, device: str) -> float:
    """Time of a step at the longest rows over the other run's, optimiser included: the median of alternated pairs.

    Measured once for all seeds, and kept beside those of the studies of language."""
    if run.model == other.model and run.schedule == other.schedule:
        return 1.0

    def measured() -> timing.Ratios:
        times = alternate(
            {"this": steps(run, device), "other": steps(other, device)}, PAIRS, device=device, progress=False
        )
        return {"step": times["this"].ratio(times["other"])[0]}

    return timing.keep(timing.machine_key([describe(run), describe(other)], device), measured)["step"]


def flops(run: TrackingRun) -> float:
    """Of a token's training, at the longest rows: attention costs less on the shorter ones that come first."""
    return training_flops(run.model, parse(run.schedule), run.lengths()[-1])


def describe(run: TrackingRun) -> dict[str, Any]:
    """What decides the time of a step."""
    return {"model": run.model.to_dict(), "schedule": run.schedule, "rows": run.rows, "length": run.lengths()[-1]}


def steps(run: TrackingRun, device: str) -> Work:
    """One training step at the longest rows, whichever part of the schedule is drawn."""
    model = LatentRecurrentTransformer(run.model).to(device).train()
    optimiser = Optimiser(model, run.model.width, run.optim.reference_batch, run.steps, run.optim)
    generator, turn = torch.Generator().manual_seed(0), iter(range(10**9))
    examples = run.source.sample(run.rows, run.lengths()[-1], generator)
    tokens, classes = examples.tokens.to(device), examples.classes.to(device)
    schedule = parse(run.schedule)

    def step() -> None:
        number = next(turn) % run.steps
        step_loss(model, tokens, classes, schedule.at(number, run.steps, run.seed))[0].backward()
        optimiser.step(number)

    return step


class StateData:
    """The cells of the study of data with state."""

    def missing(self, cell: Cell) -> str | None:
        """Nothing: rows are drawn."""
        return None

    def is_current(self, line: Line) -> bool:
        """Always: the key hashes the fields."""
        return True

    def discard(self, line: Line) -> None:
        """Nothing: a cell that is stopped begins anew."""

    def minutes(self, cell: Cell, device: str) -> float:
        """As the study says for the Transformer; of other families as many times that as they take FLOPs, but for those
        that have equal time."""
        run, other = build_run(cell.fields), baseline_run(cell.fields)
        return cell.minutes * (1.0 if cell.fields.get("equal") == "wall_clock" else flops(run) / flops(other))

    def run(self, fields: Fields, advance: Advance, device: str) -> dict[str, Any]:
        run, opened = build_run(fields), BENCHMARKS[fields["benchmark"]]
        ratio = step_ratio(run, baseline_run(fields), device)
        if fields.get("equal", "tokens") == "wall_clock":
            run = dataclasses.replace(run, steps=max(1, round(run.steps / ratio)))
        counts: dict[str, Any] = {
            "parameters": count_parameters(run.model)[0],
            "step_ratio": ratio,
            "steps": run.steps,
            "model": run.model.to_dict(),
            "schedule": run.schedule,
            "chance": None if math.isnan(chance := opened("test").chance) else chance,
        }
        try:
            done = train_tracking(run, lambda n, text: advance(TRAINING * n / run.steps, text), device=device)
        except FloatingPointError as error:
            return {**counts, "diverged": str(error)}
        counts |= {
            "tokens": done.tokens,
            "training_flops": done.tokens * flops(run),
            "train_seconds": round(done.seconds, 1),
            "grown": {str(length): step for length, step in done.grown.items()},
            "loss": statistics.fmean(done.losses[-max(1, run.steps // 20) :]),
        }
        return counts | score_model(done.model, opened, fields, advance)

    def tables(self, lines: Sequence[Line]) -> list[Table]:
        return state_data_tables.tables(lines)

    @property
    def figure(self) -> Callable[[Sequence[Line]], Figure]:
        return state_data_tables.figure


def score_model(
    model: LatentRecurrentTransformer, opened: OpenSplit, fields: Fields, advance: Advance
) -> dict[str, Any]:
    """Live: excess on val, by which choices are made; everything on test; and with the memory replaced."""
    count, first = fields.get("sequences", SEQUENCES), fields["tests"][0]

    def scores_of(scored: LatentRecurrentTransformer, purpose: str, length: int, rows: int) -> dict[str, Any]:
        benchmark = opened(purpose)
        drawn = measure.held_out_rows(benchmark, purpose, rows, length, fields["seed"])
        return summarise(measure.score_rows(scored, drawn), benchmark.bounds)

    share = (1 - TRAINING) / (len(fields["tests"]) + 1)
    val = scores_of(model, "val", first, count)
    tests: dict[str, Any] = {}
    for length in fields["tests"]:
        # As many tokens at each length: long rows take as long as many short ones.
        tests[str(length)] = scores_of(model, "test", length, max(8, count * first // length))
        advance(share, f"length {length}: {over_floor(tests[str(length)]['all']):.4f}")
    ablated = {}
    if model.config.stored_sources:
        ablated = {name: scores_of(ablate(model, name), "test", first, count // 4)["all"] for name in ABLATED}
    advance(share, "scored")
    return {"val_excess": over_floor(val["all"]), "tests": tests, "ablated": ablated}


def over_floor(one: dict[str, Any]) -> float:
    """Excess nats; where no floor is known, nats."""
    return one["nats"] if one["excess"] is None else one["excess"]


def summarise(scores: measure.TokenScores, bounds: Sequence[int]) -> dict[str, Any]:
    """Plain data: all tokens, all answers, answers by distance, tokens by position."""
    return {
        "all": plain(measure.bin_of(scores, scores.rows.counted)),
        "answers": plain(measure.bin_of(scores, scores.rows.asked >= 0)),
        "by_distance": {str(low): plain(one) for low, one in measure.by_distance(scores, bounds).items()},
        "by_position": {str(low): plain(one) for low, one in measure.by_position(scores).items()},
    }


def plain(one: Bin) -> dict[str, Any]:
    """A bin as JSON has it: None where no floor is known."""
    excess = one.excess
    return {
        "tokens": one.tokens,
        "right": one.right,
        "nats": one.nats / one.tokens,
        "excess": excess if math.isfinite(excess) else None,
    }
