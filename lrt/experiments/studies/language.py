"""Language cells: train a model on a text, score it live on held-out text, and time it beside the Transformer.

A cell's fields are plain data:

    family      a name in `recipes.rivals(depth)`, and `model`, `schedule` that replace what it says
    size        fields of the ModelConfig that all families share (depth, width, heads, context, …)
    widened_to  a family whose number of parameters every MLP is widened to (contract, section 5); none: as it is
    text        a prepared folder's name under TEXTS; stdlib is prepared where it is missing
    horizon     of the Transformer, as in RunConfig; equal: tokens | compute | wall_clock says what others share with it
    rate        a factor on all learning rates; optim, batch_size, device_batch and precision as in RunConfig
    targets     tokens scored on val and on test; settling: tokens on which 64 refinements are run, 0 for none
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lrt.data.prepared import Prepared
from lrt.data.windows import Windows, windows
from lrt.eval.report.table import Table
from lrt.eval.scoring import bits_per_byte, evaluate, live_scorer
from lrt.eval.sweep_curve import sweep_curve
from lrt.experiments import rivals
from lrt.experiments.studies import comparisons, figures, texts, timing
from lrt.experiments.studies.grid import Cell, Fields
from lrt.experiments.studies.runner import Line
from lrt.experiments.studies.texts import prepared_text
from lrt.model.config import ModelConfig
from lrt.model.size import count_parameters
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.schedules.flops import forward_flops
from lrt.schedules.parse import parse
from lrt.training import recipes
from lrt.training.config import RunConfig
from lrt.training.optim import OptimConfig
from lrt.training.trainer import Diverged, Trainer, TrainingSummary
from lrt.utils import files
from lrt.utils.progress import Advance

BASELINE = "transformer"
"""The family that horizons and ratios of times refer to."""
EQUAL = ("tokens", "compute", "wall_clock")
FIELDS = {
    "seed", "family", "model", "schedule", "size", "widened_to", "text", "horizon", "equal", "rate", "optim",
    "batch_size", "device_batch", "precision", "targets", "settling",
}  # fmt: skip
TARGETS = 50_000
"""Tokens scored on val and on test, at least (contract, section 4)."""
TRAINING = 0.8
"""The part of a cell's time that training takes, for the bar."""
KEEP_EVERY = 600.0
"""Seconds between two snapshots of a cell's training, by which a long one goes on after an interruption."""


def model_of(fields: Fields, vocab_size: int) -> ModelConfig:
    """The cell's model, widened where that is asked for."""
    base = ModelConfig.from_dict({**fields["size"], "vocab_size": vocab_size})
    families = rivals.rivals(base.depth)
    if fields["family"] not in families:
        raise ValueError(f"unknown family {fields['family']!r}; choose one of {', '.join(families)}")
    model = families[fields["family"]].model(base)
    changes = fields.get("model", {})
    memory = {**dataclasses.asdict(model.memory), **changes.get("memory", {})}
    model = ModelConfig.from_dict({**model.to_dict(), **changes, "memory": memory})
    if (widest := fields.get("widened_to")) is not None:
        model = recipes.match_parameters(model, count_parameters(families[widest].model(base))[0])
    return model


def run_of(fields: Fields, vocab_size: int) -> RunConfig:
    """The cell's run, for as many tokens as the Transformer's."""
    unknown = sorted(set(fields) - FIELDS)
    if unknown:
        raise ValueError(f"a language cell has no field {', '.join(unknown)}; it has {', '.join(sorted(FIELDS))}")
    model = model_of(fields, vocab_size)
    optim = OptimConfig(**fields.get("optim", {}))
    factor = fields.get("rate", 1)
    rates = {name: factor * getattr(optim, name) for name in ("matrix_lr", "embedding_lr", "head_lr", "scalar_lr")}
    run = RunConfig(
        model=model,
        optim=dataclasses.replace(optim, **rates),
        schedule=fields.get("schedule", rivals.rivals(model.depth)[fields["family"]].schedule),
        batch_size=fields["batch_size"],
        device_batch=fields.get("device_batch"),
        precision=fields.get("precision", "float32"),
        horizon=fields["horizon"],
        seed=fields["seed"],
    )
    return (
        run
        if fields["family"] == BASELINE
        else dataclasses.replace(run, horizon=f"tokens={baseline(run, fields).tokens}")
    )


def baseline(run: RunConfig, fields: Fields) -> RunConfig:
    """The Transformer's run beside this one."""
    plain = {k: v for k, v in fields.items() if k not in ("model", "schedule")}
    return run_of({**plain, "family": BASELINE}, run.model.vocab_size)


def match_wall_clock(run: RunConfig, other: RunConfig, equal: str, ratio: float) -> RunConfig:
    """`run` for as many tokens, FLOPs or seconds as `other`; `ratio` is its time of a step over the other's."""
    if equal not in EQUAL:
        raise ValueError(f"equal is {equal!r}; choose one of {', '.join(EQUAL)}")
    if equal == "compute":
        return dataclasses.replace(run, horizon=f"flops={other.flops!r}")
    if equal == "wall_clock":
        return dataclasses.replace(run, horizon=f"tokens={max(1, round(other.tokens / ratio))}")
    return run


class Language:
    """The cells of the studies of language; what they show is `comparisons`'."""

    def __init__(self, figure: figures.Draw = figures.frontier) -> None:
        self.figure = figure

    def missing(self, cell: Cell) -> str | None:
        """A text that is not prepared here."""
        name = cell.fields.get("text", texts.STDLIB)
        if name == texts.STDLIB or texts.is_here(name):
            return None
        return texts.how_to(name)

    def current(self, line: Line) -> bool:
        """Whether the line's run is what its fields come to now, and its text, where that is here, the same."""
        return is_current(
            json.dumps(line["fields"], sort_keys=True), json.dumps(line["result"]["run"]), line["result"]["data"]
        )

    def minutes(self, cell: Cell, device: str) -> float:
        """From a few timed steps and decoded tokens; seeds and rates take as long as each other."""
        return estimate_cell(json.dumps({**cell.fields, "seed": 0, "rate": 1}, sort_keys=True), device)

    def run(self, fields: Fields, advance: Advance, device: str) -> dict[str, Any]:
        data = prepared_text(fields.get("text", texts.STDLIB))
        run = run_of(fields, data.vocab_size)
        other = baseline(run, fields)
        ratios = timing.ratios(run, other, data, device)
        run = match_wall_clock(run, other, fields.get("equal", "tokens"), ratios["step"])
        result = {"run": run.to_dict(), "data": data.fingerprint, **count_costs(run)}
        result |= {f"{name}_ratio": value for name, value in ratios.items()}
        try:
            model, trained = train_cell(run, data, device, advance)
        except Diverged as error:
            shutil.rmtree(unfinished_step(run, data), ignore_errors=True)
            return {**result, "diverged": str(error)}
        result |= {
            "loss": trained.loss,
            "tokens": trained.tokens,
            "training_flops": trained.flops,
            "train_seconds": round(trained.seconds, 1),
        }
        result |= score_run(model, data, run, fields)
        shutil.rmtree(unfinished_step(run, data), ignore_errors=True)
        advance(1 - TRAINING, f"live {result['test']['live_bpb']:.4f}")
        return result

    def tables(self, lines: Sequence[Line]) -> list[Table]:
        return comparisons.tables(lines)


class Rivals(Language):
    """The same, at a glance first, with the published values beside."""

    def tables(self, lines: Sequence[Line]) -> list[Table]:
        return [*comparisons.glances(lines), *comparisons.tables(lines, comparisons.PUBLISHED)]


class Scaling(Language):
    """The same, with power laws below the table."""

    def tables(self, lines: Sequence[Line]) -> list[Table]:
        return [*comparisons.tables(lines), comparisons.scaling_table(lines)]


@functools.cache
def is_current(cell: str, run: str, data: str) -> bool:
    """See `Language.current`. Horizons may differ: a measured ratio of times is in some."""
    fields, found = json.loads(cell), json.loads(run)
    name = fields.get("text", texts.STDLIB)
    if texts.is_here(name) and prepared_text(name).fingerprint != data:
        return False
    try:
        now = json.loads(json.dumps(run_of(fields, found["model"]["vocab_size"]).to_dict()))
    except ValueError:
        return False
    return {**now, "horizon": ""} == {**found, "horizon": ""}


def count_costs(run: RunConfig) -> dict[str, Any]:
    """What a model costs, counted."""
    total, dense = count_parameters(run.model)
    return {
        "parameters": total,
        "parameters_without_tables": dense,
        "forwards": run.model.forwards,
        "flops_per_generated_token": sum(forward_flops(run.model, run.model.context)),
    }


def unfinished_step(run: RunConfig, data: Prepared) -> Path:
    """Where a long training's newest snapshot is kept, until its cell is scored or has diverged: beside the texts."""
    about = json.dumps([run.to_dict(), data.fingerprint], sort_keys=True)
    return texts.TEXTS.parent / "unfinished" / hashlib.sha256(about.encode()).hexdigest()[:16]


def train_cell(
    run: RunConfig, data: Prepared, device: str, advance: Advance
) -> tuple[LatentRecurrentTransformer, TrainingSummary]:
    """A run from where it was left to its end; what it came to has the losses since then."""
    training = Trainer(run, data, device)
    kept = unfinished_step(run, data)
    files.recover(kept)
    if kept.exists():
        training.restore(kept)
    begun, saved, losses = training.progress.step, time.monotonic(), []
    advance(TRAINING * begun / run.steps, f"goes on after step {begun}" if begun else "begins")
    try:
        for step in range(begun, run.steps):
            losses.append(training.step()["loss"])
            advance(TRAINING / run.steps, f"step {step + 1} of {run.steps}, loss {losses[-1]:.3f}")
            if time.monotonic() - saved >= KEEP_EVERY and step + 1 < run.steps:
                training.save(kept, training.about(losses[-1]))
                saved = time.monotonic()
    finally:
        training.close()
    last = losses[-max(1, run.steps // 20) :]
    return training.model, training.summary(sum(last) / len(last))


def score_run(model: LatentRecurrentTransformer, data: Prepared, run: RunConfig, fields: Fields) -> dict[str, Any]:
    """Live on val, by which a rate is chosen; everything on test, which is reported; and whether it settles."""
    count, size, prefix = fields.get("targets", TARGETS), data.tokenizer.token_bytes(), data.tokenizer.prefix_bytes("a")
    schedule = parse(run.schedule)

    def chosen(split: str, targets: int) -> Windows:
        return windows(data.split(split), run.model.context, targets)

    val, _ = bits_per_byte(model, chosen("val", count), size, live_scorer, progress=False, prefix_bytes=prefix)
    test = evaluate(model, chosen("test", count), size, schedule, progress=False, prefix_bytes=prefix)
    found: dict[str, Any] = {"val_live_bpb": val, "test": test.to_dict()}
    settling = fields.get("settling", 0)
    if settling and model.config.stored_sources:
        curve = sweep_curve(
            model, chosen("val", settling), size, schedule, groups=(1,), progress=False, prefix_bytes=prefix
        )
        found |= {"verdict": curve.verdict, "even_odd": curve.even_odd}
    return found


@functools.cache
def estimate_cell(cell: str, device: str) -> float:
    """Minutes of a cell, by its fields in JSON; its ratio of step times is taken as that of the FLOPs."""
    fields: Fields = json.loads(cell)
    data = prepared_text(fields.get("text", texts.STDLIB))
    run = run_of(fields, data.vocab_size)
    other = baseline(run, fields)
    run = match_wall_clock(run, other, fields.get("equal", "tokens"), run.flops_per_token / other.flops_per_token)
    return timing.estimate_minutes(run, data, fields.get("targets", TARGETS), fields.get("settling", 0), device)
