"""What the minutes of `lrt fair` come to: by timed steps of every model, once, and kept beside the results."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lrt.data.prepared import Prepared
from lrt.distributed.single_process import SingleProcess
from lrt.experiments.fair_cells import WALL_CLOCK, Comparison, Plan, label, paced_by
from lrt.experiments.plans import Budget, Plans, plan_key
from lrt.experiments.studies.language import BASELINE, TARGETS, build_run
from lrt.experiments.studies.timing import PAIRS
from lrt.schedules.parse import parse
from lrt.training import recipes
from lrt.training.config import RunConfig
from lrt.training.speed import Speed, measure_speed

SCORING = 0.3
"""The most of the time that live scores may take."""


def comparison_key(data: Prepared, comparison: Comparison, device: str) -> str:
    """Of all calls that train for as long: with more seeds, rates or models, or with something else that is equal."""
    sizes = [comparison.minutes, comparison.depth, comparison.width, comparison.context]
    return plan_key([data.fingerprint, device, *sizes])


def kept_plan(plans: Plans, data: Prepared, comparison: Comparison, device: str) -> Plan:
    """What the minutes come to: as it is kept, or measured now and kept.

    Tokens and parameters stay for more models, seeds and rates; a model that is new is timed. ValueError for one that
    is larger than those before it.
    """
    key, sizes = comparison_key(data, comparison, device), comparison.sizes(data)
    kept = read_plan(plans.find(key), max(sizes.values()))
    parameters = max(sizes.values()) if kept is None else kept.parameters
    for name, size in sizes.items():
        if size > parameters:
            raise ValueError(
                f"{name} has {size:,} parameters, and the models compared in {plans.file.parent} are widened to "
                f"{parameters:,}; compare them again with it in another folder, such as --out {plans.file.parent}-2"
            )
    runs = {
        label(name): build_run(
            {"seed": 0, **comparison.fields(name, data, recipes.DEMO_TOKENS, parameters)}, data.vocab_size
        )
        for name in timed_models(comparison)
        if kept is None or label(name) not in kept.training
    }
    if kept is not None and not runs:
        return kept
    speeds = {name: measure_speed(run, data, SingleProcess(device)) for name, run in runs.items()}
    if kept is None:
        kept = Plan(*divide_minutes(comparison, runs, speeds, data), parameters, {}, {})
    plan = add_times(kept, speeds)
    plans.keep(key, dataclasses.asdict(plan))
    return plan


def add_times(plan: Plan, speeds: Mapping[str, Speed]) -> Plan:
    """The plan with what cells of these models take."""
    training = {name: plan.tokens * speed.train / 60 for name, speed in speeds.items()}
    scoring = {name: plan.targets * score_seconds(speed) / 60 for name, speed in speeds.items()}
    return dataclasses.replace(plan, training=plan.training | training, scoring=plan.scoring | scoring)


def read_plan(saved: Mapping[str, Any] | None, parameters: int) -> Plan | None:
    """A plan that is kept. One that was written before plans had parameters has these, and its models are timed."""
    if saved is None:
        return None
    training, scoring = saved.get("training", {}), saved.get("scoring", {})
    return Plan(saved["tokens"], saved["targets"], saved.get("parameters", parameters), training, scoring)


def timed_models(comparison: Comparison) -> tuple[str, ...]:
    """The models, and the Transformer where its time is what is equal."""
    if WALL_CLOCK in comparison.groups() and BASELINE not in comparison.labels:
        return (*comparison.models, BASELINE)
    return comparison.models


def divide_minutes(
    comparison: Comparison, runs: Mapping[str, RunConfig], speeds: Mapping[str, Speed], data: Prepared
) -> tuple[int, int]:
    """(Tokens to train on, tokens to score at most) with these speeds. ValueError where too little is trained."""
    cells = [(equal, name) for equal, own in comparison.groups().items() for name in own]
    times = len(comparison.rates) + comparison.seeds - 1  # of each of these
    measured = sum(ratio_seconds(runs[name], speeds[name]) for name in comparison.labels if name != BASELINE)
    budget = Budget(
        comparison.minutes,
        60 * comparison.minutes - measured,
        times * sum(speeds[paced_by(equal, name)].train for equal, name in cells),
        times * sum(score_seconds(speeds[name]) for _, name in cells),
        times * len(cells),
        comparison.batch_tokens,
    )
    splits = data.manifest["splits"]
    most = min(splits["val"]["tokens"], splits["test"]["tokens"], TARGETS)
    return budget.divide(data, most, SCORING, ", or fewer models, seeds or rates")


def score_seconds(speed: Speed) -> float:
    """Per token: live on val, live and under its schedule on test, and there twice with another memory."""
    return 4 * speed.live + speed.parallel


def ratio_seconds(run: RunConfig, speed: Speed) -> float:
    """What the paired ratios of a model's times take, about: `studies.timing` measures them once."""
    steps = (PAIRS + 2) * (2 * len(parse(run.schedule).shares()) + 2)
    return steps * run.batch_tokens * speed.train
