"""Cells of data with state: train a model on a program's rows, and score it live by distance and by position.

A cell's fields are plain data:

    benchmark   a name in `benchmarks.BENCHMARKS`
    family, model, schedule, size, widened_to, optim, rate    as in the studies of language
    rows, steps, shortest, longest, by, mastered              as in TrackingRun; steps are the Transformer's
    equal       tokens | wall_clock: what other families share with it; at equal time their steps are divided by
    step_ratio  the time of their step over the Transformer's; measured where it is not given, but seeds that run on
                several machines have to share one
    tests       lengths of the rows that are scored, in order; sequences: how many rows of each

The score is excess nats per token over the floor (docs/state-data.md): 0 is all state known.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
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
from lrt.experiments.state_data.measure import Bin, TokenScores, as_task
from lrt.experiments.state_data.rows import Benchmark
from lrt.experiments.state_tracking.training import TrackingRun, step_loss, train_tracking
from lrt.experiments.studies import state_data_tables, timing
from lrt.experiments.studies.benchmarks import BENCHMARKS, OpenSplit
from lrt.experiments.studies.grid import Cell, Fields
from lrt.experiments.studies.language import BASELINE, build_model
from lrt.experiments.studies.runner import Line
from lrt.model.config import ModelConfig
from lrt.model.execution import EAGER, Execution
from lrt.model.size import count_parameters
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.schedules.base import Schedule
from lrt.schedules.flops import training_flops
from lrt.schedules.parse import parse
from lrt.training.matching import PAIRS
from lrt.training.optim import Optimiser
from lrt.training.optim_config import OptimConfig
from lrt.utils.progress import Advance
from lrt.utils.timing import Work, alternate, weighted
from lrt.utils.validation import Limits, check_fields

TRAINING = 0.8
"""The part of a cell's time that training takes, for the bar."""
ABLATED = ("zero", "embedding")
"""What the memory is replaced with, live, in rows of the first test."""
EQUAL = ("tokens", "wall_clock")
MODEL = {"family", "model", "size", "widened_to"}
OWN = {"benchmark", "schedule", "optim", "rate", "equal", "step_ratio", "tests", "sequences"}
RUN = {"rows", "steps", "shortest", "longest", "by", "mastered", "seed"}
SEQUENCES = 256
STEP_RATIO = Limits(0, 1000, above=True)
SHORTEST_TEST = 24
"""Tokens: of shorter rows there is no gain by position."""
READ = {"log_and_text", "bytecode", "chess"}
"""Benchmarks that are read from files, and not only drawn."""


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
    if not STEP_RATIO.allow(fields.get("step_ratio", 1.0)):
        raise ValueError(f"step_ratio is {fields['step_ratio']!r}; give {STEP_RATIO}, or leave it out to measure it")
    check_fields(OptimConfig, fields["optim"], "optim")
    check_fields(TrackingRun, {name: fields[name] for name in RUN & set(fields)}, "the cell")
    BENCHMARKS.check(fields["benchmark"])
    benchmark = BENCHMARKS[fields["benchmark"]]("train")
    model = build_model({name: fields[name] for name in MODEL & set(fields)}, len(benchmark.words))
    check_tests(fields, model)
    return TrackingRun(
        as_task(benchmark),
        model,
        OptimConfig(**fields["optim"]).times(fields.get("rate", 1)),
        fields.get("schedule", rivals.rivals(model.depth)[fields["family"]].schedule),
        **{name: fields[name] for name in RUN & set(fields)},
    )


def baseline_run(fields: Fields) -> TrackingRun:
    """The Transformer's run beside it."""
    plain = {name: value for name, value in fields.items() if name not in ("model", "schedule")}
    return build_run({**plain, "family": BASELINE})


def step_ratio(run: TrackingRun, other: TrackingRun, device: str, execution: Execution = EAGER) -> float:
    """Time of a step at the longest rows over the other run's, optimiser included: the median of alternated rounds.

    Parts of a schedule count by their shares. Measured once for all seeds, and kept beside the studies of language's.
    """
    if run.model == other.model and run.schedule == other.schedule:
        return 1.0

    def measure_steps() -> timing.Ratios:
        runs = {"this": run, "other": other}
        work = {
            (name, repr(part)): steps(one, part, device, execution)
            for name, one in runs.items()
            for _, part in parse(one.schedule).shares()
        }
        times = alternate({str(key): step for key, step in work.items()}, PAIRS, device=device, progress=False)
        this, beside = (
            weighted([(share, times[str((name, repr(part)))]) for share, part in parse(one.schedule).shares()])
            for name, one in runs.items()
        )
        return {"step": this.ratio(beside)[0]}

    key = timing.machine_key([describe(run), describe(other), {"compile": execution.compile}], device)
    return timing.keep(key, measure_steps)["step"]


def describe(run: TrackingRun) -> dict[str, Any]:
    """What decides the time of a step."""
    return {"model": run.model.to_dict(), "schedule": run.schedule, "rows": run.rows, "length": run.lengths()[-1]}


def steps(run: TrackingRun, schedule: Schedule, device: str, execution: Execution) -> Work:
    """One training step at the longest rows under one part of the run's schedule."""
    model = LatentRecurrentTransformer(run.model).to(device).train()
    optimiser = Optimiser(model, run.model.width, run.optim.reference_batch, run.steps, run.optim)
    examples = run.source.sample(run.rows, run.lengths()[-1], torch.Generator().manual_seed(0))
    tokens, classes = examples.tokens.to(device), examples.classes.to(device)

    def step() -> None:
        step_loss(model, tokens, classes, schedule, execution)[0].backward()
        optimiser.step(0)

    return step


def flops(run: TrackingRun) -> float:
    """Of a token's training, at the longest rows: attention costs less on the shorter ones that come first."""
    return training_flops(run.model, parse(run.schedule), run.lengths()[-1])


class StateData:
    """The cells of the study of data with state."""

    def missing(self, cell: Cell) -> str | None:
        """Nothing: rows are drawn."""
        return None

    def is_current(self, line: Line) -> bool:
        """Whether model, schedule and rows of the line are those that its fields come to now."""
        return matches_fields(json.dumps(line["fields"], sort_keys=True), json.dumps(line["result"]))

    def discard(self, line: Line) -> None:
        """Nothing: a cell that is stopped begins anew."""

    def score(self, line: Line) -> str:
        """Live, on val."""
        scores = line["result"]
        return "diverged" if "diverged" in scores else f"{scores['val_excess']:.4f} nats above the floor on val"

    def minutes(self, cell: Cell, device: str) -> float:
        """As the study says for the Transformer; of other families as many times that as they take FLOPs, but for those
        that have equal time."""
        run, other = build_run(cell.fields), baseline_run(cell.fields)
        return cell.minutes * (1.0 if cell.fields.get("equal") == "wall_clock" else flops(run) / flops(other))

    def run(self, fields: Fields, advance: Advance, device: str) -> dict[str, Any]:
        run, opened = build_run(fields), BENCHMARKS[fields["benchmark"]]
        execution, path = Execution().resolve(run.steps, device)
        advance(0, path)
        ratio = fields.get("step_ratio") or step_ratio(run, baseline_run(fields), device, execution)
        if fields.get("equal", "tokens") == "wall_clock":
            run = dataclasses.replace(run, steps=max(1, round(run.steps / ratio)))
        counts: dict[str, Any] = {
            "parameters": count_parameters(run.model)[0],
            "step_ratio": ratio,
            "steps": run.steps,
            "execution": path,
            "model": run.model.to_dict(),
            "schedule": run.schedule,
            "data": fingerprint(opened("train")),
            "distance": opened("test").distance,
            "far": opened("test").far,
            "origin": dict(opened("test").origin()),
        }
        try:
            done = train_tracking(run, lambda n, text: advance(TRAINING * n / run.steps, text), execution, device)
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


def check_tests(fields: Fields, model: ModelConfig) -> None:
    """ValueError where what is measured after training is wrong: better before it."""
    tests, sequences = fields["tests"], fields.get("sequences", SEQUENCES)
    if not isinstance(tests, list) or not tests or not all(type(n) is int and n >= SHORTEST_TEST for n in tests):
        raise ValueError(f"tests is {tests!r}; give lengths of at least {SHORTEST_TEST} tokens, such as [128, 512]")
    if type(sequences) is not int or sequences < 4:
        raise ValueError(f"sequences is {sequences!r}; give a whole number of at least 4")
    if not model.unlimited_context and max(tests) > model.context:
        raise ValueError(
            f"tests of {max(tests)} tokens are beyond the model's context of {model.context}; raise size.context"
        )


@functools.cache
def fingerprint(benchmark: Benchmark) -> str:
    """A hash of the words and of a few rows: another generator, or another text behind it, has another."""
    rows = benchmark.sample(4, 64, torch.Generator().manual_seed(0))
    content = json.dumps([benchmark.words, rows.tokens.tolist(), rows.asked.tolist()])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


@functools.cache  # by JSON, as lines are no keys: a study asks again before every cell
def matches_fields(cell: str, result: str) -> bool:
    """See `StateData.is_current`. What is read from files counts where these are others: its lines are shown there."""
    fields, written = json.loads(cell), json.loads(result)
    try:
        run, model = build_run(fields), ModelConfig.from_dict(written["model"])
    except ValueError:
        return False
    same_rows = fields["benchmark"] in READ or fingerprint(BENCHMARKS[fields["benchmark"]]("train")) == written["data"]
    return same_rows and model == run.model and written["schedule"] == run.schedule


def count_test_rows(fields: Fields, length: int) -> int:
    """Rows of a test. As many tokens at each length: long rows take as long as many short ones."""
    return max(8, fields.get("sequences", SEQUENCES) * fields["tests"][0] // length)


def score_model(
    model: LatentRecurrentTransformer, opened: OpenSplit, fields: Fields, advance: Advance
) -> dict[str, Any]:
    """Live: excess on val, by which choices are made; everything on test; and with the memory replaced, on some rows of
    the first test."""
    count, first = fields.get("sequences", SEQUENCES), fields["tests"][0]

    def scores_of(scored: LatentRecurrentTransformer, purpose: str, length: int, rows: int) -> TokenScores:
        return measure.score_rows(scored, measure.held_out_rows(opened(purpose), purpose, rows, length, fields["seed"]))

    bounds, share = opened("test").bounds, (1 - TRAINING) / (len(fields["tests"]) + 1)
    val = summarise(scores_of(model, "val", first, count), bounds)
    tests: dict[str, Any] = {}
    ablated: dict[str, Any] = {}
    details: dict[str, Any] = {}
    for length in fields["tests"]:
        scores = scores_of(model, "test", length, count_test_rows(fields, length))
        tests[str(length)] = summarise(scores, bounds)
        if length == first and (measured := opened("test").details) is not None:
            details = {"details": dict(measured(scores.rows, measure.live_logits(model, scores.rows)))}
        if length == first and model.config.stored_sources:
            part = scores.first(count // 4)
            ablated["intact"] = plain(measure.bin_of(part, part.known))
            for name in ABLATED:
                replaced = measure.score_rows(ablate(model, name), part.rows)
                ablated[name] = plain(measure.bin_of(replaced, replaced.known))
        advance(share, f"length {length}: {tests[str(length)]['all']['excess']:.4f}")
    advance(share, "scored")
    return {"val_excess": val["all"]["excess"], "tests": tests, "ablated": ablated, **details}


def summarise(scores: TokenScores, bounds: Sequence[int]) -> dict[str, Any]:
    """Plain data: tokens with a floor, in all, and by position; answers by distance; tokens without a floor."""
    without = scores.rows.counted & ~scores.known
    return {
        "all": plain(measure.bin_of(scores, scores.known)),
        "answers": plain(measure.bin_of(scores, scores.rows.asked >= 0)),
        "by_distance": {str(low): plain(one) for low, one in measure.by_distance(scores, bounds).items()},
        "by_position": {str(low): plain(one) for low, one in measure.by_position(scores).items()},
        **({"without_floor": plain(measure.bin_of(scores, without))} if without.any() else {}),
    }


def plain(one: Bin) -> dict[str, Any]:
    """A bin as JSON has it; no excess where no floor is known."""
    excess = {} if math.isnan(one.floor) else {"excess": one.excess}
    return {"tokens": one.tokens, "right": one.right, "nats": one.nats / one.tokens, **excess}
