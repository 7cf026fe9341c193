"""Language cells: train a model on a text, score it live on held-out text, and time it beside the Transformer.

A cell's fields are plain data:

    family      a name in `rivals.rivals(depth)`, and `model`, `schedule` that replace what it says
    size        fields of the ModelConfig that all families share (depth, width, heads, context, …)
    widened_to  what every MLP is widened to (contract, section 5): a number of parameters, or the family that has as
                many; none: as it is
    text        a prepared folder's name under TEXTS, or its path; stdlib and packages are prepared where missing
    horizon     of the Transformer, as in RunConfig; equal: tokens | compute | wall_clock says what others share with it
    rate        a factor on all learning rates; optim, batch_size, device_batch and precision as in RunConfig
    targets     tokens scored on val and on test; settling: tokens on which 64 refinements are run, 0 for none
    copying     steps between two scores of copying from the context (`lrt.eval.copying`); 0 for none

A cell resolves its family when it runs. Its key hashes the fields; its line keeps the whole RunConfig and the text's
fingerprint, and counts as long as the fields come to the same run (`Language.is_current`). So a changed recipe runs its
cells again.
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
from lrt.eval.copying import copying
from lrt.eval.report.table import Table
from lrt.eval.scoring import bits_per_byte, evaluate, live_scorer
from lrt.eval.sweep_curve import sweep_curve
from lrt.experiments import rivals
from lrt.experiments.studies import comparisons, copying_tables, figures, texts, timing
from lrt.experiments.studies.grid import Cell, Fields
from lrt.experiments.studies.runner import Line
from lrt.model import checkpoint
from lrt.model.config import ModelConfig
from lrt.model.memory_config import MemoryConfig
from lrt.model.size import count_parameters
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.schedules.base import plugin_uses
from lrt.schedules.flops import forward_flops
from lrt.schedules.parse import parse
from lrt.training import recipes
from lrt.training.config import RunConfig
from lrt.training.optim_config import OptimConfig
from lrt.training.trainer import Diverged, Trainer, TrainingSummary
from lrt.utils import files, plugins
from lrt.utils.progress import Advance
from lrt.utils.validation import check_fields

BASELINE = "transformer"
"""The family that horizons and ratios of times refer to."""
EQUAL = ("tokens", "compute", "wall_clock")
FIELDS = {
    "seed", "family", "model", "schedule", "size", "widened_to", "text", "horizon", "equal", "rate", "optim",
    "batch_size", "device_batch", "precision", "targets", "settling", "copying",
}  # fmt: skip
TARGETS = 50_000
"""Tokens scored on val and on test, at least (contract, section 4)."""
TRAINING = 0.8
"""The part of a cell's time that training takes, for the bar."""
KEEP_EVERY = 600.0
"""Seconds between two snapshots of a cell's training, by which a long one goes on after an interruption."""


def build_model(fields: Fields, vocab_size: int) -> ModelConfig:
    """The cell's model, widened where that is asked for."""
    check_fields(ModelConfig, fields["size"], "size")
    check_fields(ModelConfig, fields.get("model", {}), "model")
    check_fields(MemoryConfig, fields.get("model", {}).get("memory", {}), "model.memory")
    # A Transformer, whatever its memory: every family replaces that.
    base = ModelConfig.from_dict({**fields["size"], "vocab_size": vocab_size})
    families = rivals.rivals(base.depth)
    if fields["family"] not in families:
        raise ValueError(f"unknown family {fields['family']!r}; choose one of {', '.join(families)}")
    model = families[fields["family"]].model(base)
    changes = fields.get("model", {})
    # Of the memory only what the fields name is replaced: the rest is the family's.
    memory = {**dataclasses.asdict(model.memory), **changes.get("memory", {})}
    model = ModelConfig.from_dict({**model.to_dict(), **changes, "memory": memory})
    if (widest := fields.get("widened_to")) is None:
        return model
    wanted = widest if isinstance(widest, int) else count_parameters(families[widest].model(base))[0]
    return recipes.match_parameters(model, wanted)


def build_run(fields: Fields, vocab_size: int) -> RunConfig:
    """The cell's run, for as many tokens as the Transformer's. ValueError for fields that are unknown or wrong."""
    unknown = sorted(set(fields) - FIELDS)
    if unknown:
        raise ValueError(f"a language cell has no field {', '.join(unknown)}; it has {', '.join(sorted(FIELDS))}")
    missing = sorted({"family", "size", "batch_size", "horizon"} - set(fields))
    if missing:
        raise ValueError(f"a language cell needs {', '.join(missing)}")
    own = {"schedule", "batch_size", "device_batch", "precision", "horizon", "seed"}
    check_fields(RunConfig, {name: field for name, field in fields.items() if name in own}, "the cell")
    check_fields(OptimConfig, fields.get("optim", {}), "optim")
    if fields.get("precision") == "auto":
        raise ValueError("precision is 'auto', which depends on the machine, as no cell may; give float32 or bfloat16")
    model = build_model(fields, vocab_size)
    run = RunConfig(
        model=model,
        optim=OptimConfig(**fields.get("optim", {})).times(fields.get("rate", 1)),  # of a sweep: all rates together
        schedule=fields.get("schedule", rivals.rivals(model.depth)[fields["family"]].schedule),
        batch_size=fields["batch_size"],
        device_batch=fields.get("device_batch"),
        precision=fields.get("precision", "float32"),
        horizon=fields["horizon"],
        seed=fields["seed"],
    )
    if fields["family"] == BASELINE:
        return run
    # `ratio` counts a model's own weights: the Transformer's decide for all, so that all families see equal tokens.
    return dataclasses.replace(run, horizon=f"tokens={baseline_run(run, fields).tokens}")


def baseline_run(run: RunConfig, fields: Fields) -> RunConfig:
    """The Transformer's run beside this one."""
    plain = {k: v for k, v in fields.items() if k not in ("model", "schedule")}
    return build_run({**plain, "family": BASELINE}, run.model.vocab_size)


def match_horizon(run: RunConfig, other: RunConfig, equal: str, ratio: float) -> RunConfig:
    """`run` for as many tokens, FLOPs or seconds as `other`; `ratio` is its time of a step over the other's."""
    if equal not in EQUAL:
        raise ValueError(f"equal is {equal!r}; choose one of {', '.join(EQUAL)}")
    if equal == "compute":
        return dataclasses.replace(run, horizon=f"flops={other.flops!r}")
    if equal == "wall_clock":
        return dataclasses.replace(run, horizon=f"tokens={max(1, round(other.tokens / ratio))}")
    return run


class Language:
    """The cells of the studies of language; their tables are in `comparisons`, their figures in `figures`."""

    folder: Path | None = None
    """Where ratios of times and unfinished trainings are kept (`texts.study_folder`)."""

    def __init__(self, figure: figures.MakeFigure = figures.frontier_figure) -> None:
        self.figure = figure

    def open_text(self, fields: Fields) -> Prepared:
        """A cell's text. ValueError where it is not here."""
        return texts.open_text(fields.get("text", texts.STDLIB))

    def fingerprint(self, fields: Fields) -> str | None:
        """The fingerprint of a cell's text; None where it is not here."""
        return self.open_text(fields).fingerprint if texts.is_prepared(fields.get("text", texts.STDLIB)) else None

    def missing(self, cell: Cell) -> str | None:
        """A text that is not prepared here."""
        name = cell.fields.get("text", texts.STDLIB)
        if name in texts.MADE_HERE or texts.is_prepared(name):
            return None
        return texts.missing_text(name)

    def is_current(self, line: Line) -> bool:
        """Whether the line's run is what its fields come to now, with the same plugins, and its text, where that is
        here, the same.

        Lines of a text that is not here count: they are shown where it is not.
        """
        fields, scores = line["fields"], line["result"]
        if self.fingerprint(fields) not in (None, scores["data"]):
            return False
        return matches_fields(json.dumps(fields, sort_keys=True), json.dumps(scores["run"])) and has_same_plugins(line)

    def minutes(self, cell: Cell, device: str) -> float:
        """From a few timed steps and decoded tokens; seeds and rates take as long as each other."""
        return estimate_cell(json.dumps({**cell.fields, "seed": 0, "rate": 1}, sort_keys=True), device)

    def run(self, fields: Fields, advance: Advance, device: str) -> dict[str, Any]:
        data = self.open_text(fields)
        run = build_run(fields, data.vocab_size)
        other = baseline_run(run, fields)
        # The horizon decides the learning-rate schedule too, so it is set before anything is trained.
        ratios = timing.paired_ratios(run, other, data, device, self.folder)
        run = match_horizon(run, other, fields.get("equal", "tokens"), ratios["step"])
        costs = {"run": run.to_dict(), "data": data.fingerprint, **count_costs(run)}
        costs |= {f"{name}_ratio": ratio for name, ratio in ratios.items()}
        try:
            model, trained, curve = train_cell(run, data, device, advance, fields.get("copying", 0), self.folder)
        except Diverged as error:
            return {**costs, "diverged": str(error)}
        scores = score_run(model, data, run, fields)
        advance(1 - TRAINING, f"live {scores['test']['live_bpb']:.4f}")
        return {
            **costs,
            "loss": trained.loss,
            "tokens": trained.tokens,
            "training_flops": trained.flops,
            "train_seconds": round(trained.seconds, 1),
            **({"copying": curve} if curve else {}),
            **scores,
        }

    def discard(self, line: Line) -> None:
        scores = line["result"]
        shutil.rmtree(snapshot_folder(scores["run"], scores["data"], self.folder), ignore_errors=True)

    def score(self, line: Line) -> str:
        """Live, on test."""
        scored = "test" in line["result"]
        return f"live {comparisons.test_bpb(line):.4f} bits per byte on test" if scored else "diverged"

    def tables(self, lines: Sequence[Line]) -> list[Table]:
        return comparisons.comparison_tables(lines)


class Rivals(Language):
    """The same, with an overview first and the published values beside."""

    def tables(self, lines: Sequence[Line]) -> list[Table]:
        overview = comparisons.overview_tables(lines)
        return [*overview, *comparisons.comparison_tables(lines, comparisons.PUBLISHED)]


class Copying(Language):
    """The same, and below when each family learned to copy (the field `copying`)."""

    def tables(self, lines: Sequence[Line]) -> list[Table]:
        return [*comparisons.comparison_tables(lines), *copying_tables.copying_tables(lines)]


class Scaling(Language):
    """The same, with power laws below the table."""

    def tables(self, lines: Sequence[Line]) -> list[Table]:
        return [*comparisons.comparison_tables(lines), comparisons.scaling_table(lines)]


@functools.cache  # by JSON, as lines are no keys: a study asks again before every cell
def matches_fields(cell: str, run: str) -> bool:
    """See `Language.is_current`: a cell's fields and its line's run, as JSON."""
    fields: Fields = json.loads(cell)
    try:
        written = RunConfig.from_dict(json.loads(run))  # a field that it lacks means that field's default
        return plain_run(written) == plain_run(build_run(fields, written.model.vocab_size))
    except ValueError:
        return False


def has_same_plugins(line: Line) -> bool:
    """Whether the plugins that a line's run needs are, by their hashes, what they were when it ran."""
    recorded = {use: record["sha256"] for record in line.get("plugins", ()) for use in record["provides"]}
    if not recorded:
        return True
    run = RunConfig.from_dict(line["result"]["run"])
    needed = plugins.describe([*run.model.memory.plugin_uses(), *plugin_uses(parse(run.schedule))])
    return all(recorded.get(use) == record["sha256"] for record in needed for use in record["provides"])


def plain_run(run: RunConfig) -> dict[str, Any]:
    """A run as plain data to compare, without its horizon: at equal wall-clock a measured ratio is in that."""
    return {**json.loads(json.dumps(run.to_dict())), "horizon": ""}


def count_costs(run: RunConfig) -> dict[str, Any]:
    """Parameters, forwards and FLOPs per generated token: counted, not measured."""
    total, dense = count_parameters(run.model)
    return {
        "parameters": total,
        "parameters_without_tables": dense,
        "forwards": run.model.forwards,
        "flops_per_generated_token": sum(forward_flops(run.model, run.model.context)),
    }


def snapshot_folder(run: dict[str, Any], data: str, folder: Path | None = None) -> Path:
    """Where the newest snapshot of a long training is kept, until its cell's line is on the disk: in `folder`
    (`texts.study_folder`).

    `run` is a RunConfig as plain data, `data` the text's fingerprint.
    """
    about = json.dumps([run, data], sort_keys=True)
    return texts.study_folder(folder) / "unfinished" / hashlib.sha256(about.encode()).hexdigest()[:16]


CopyingCurve = list[list[float]]
"""[steps, nats per token the first time, the second time], one after another."""


def train_cell(
    run: RunConfig,
    data: Prepared,
    device: str,
    advance: Advance,
    copying_every: int = 0,
    folder: Path | None = None,
) -> tuple[LatentRecurrentTransformer, TrainingSummary, CopyingCurve]:
    """Train a run from its snapshot, or from nothing, to its end. Its loss is the mean of the last twentieth of the
    steps; how well it copies is scored on val every so many of them, and at the end. Raises Diverged where a loss or a
    gradient is not finite."""
    trainer = Trainer(run, data, device)
    snapshot = snapshot_folder(run.to_dict(), data.fingerprint, folder)
    files.recover(snapshot)
    losses: list[float] = []
    curve: CopyingCurve = []
    if snapshot.exists():
        trainer.restore(snapshot)
        about = checkpoint.about(snapshot)
        losses += about.get("losses", [])  # of the last twentieth before it
        curve += about.get("copying", [])
    begun, saved, counted = trainer.progress.step, time.monotonic(), max(1, run.steps // 20)
    advance(TRAINING * begun / run.steps, f"goes on after step {begun}" if begun else "begins")
    try:
        for step in range(begun, run.steps):
            losses.append(trainer.step()["loss"])
            advance(TRAINING / run.steps, f"step {step + 1} of {run.steps}, loss {losses[-1]:.3f}")
            if copying_every and ((step + 1) % copying_every == 0 or step + 1 == run.steps):
                copied = copying(trainer.model, data.split("val"))
                curve.append([step + 1, copied.first, copied.again])
            if time.monotonic() - saved >= KEEP_EVERY and step + 1 < run.steps:
                kept = {"losses": losses[-counted:], "copying": curve}
                trainer.save(snapshot, trainer.about(losses[-1]) | kept)
                saved = time.monotonic()
    finally:
        trainer.close()
    last = losses[-counted:]
    return trainer.model, trainer.summary(sum(last) / len(last)), curve


def score_run(model: LatentRecurrentTransformer, data: Prepared, run: RunConfig, fields: Fields) -> dict[str, Any]:
    """Live on val, by which a rate is chosen; everything on test, which is reported; and whether it settles."""
    count, sizes = fields.get("targets", TARGETS), data.tokenizer.token_bytes()
    prefix, schedule = data.tokenizer.prefix_bytes("a"), parse(run.schedule)

    def split_windows(split: str, targets: int) -> Windows:
        return windows(data.split(split), run.model.context, targets)

    val, _ = bits_per_byte(model, split_windows("val", count), sizes, live_scorer, progress=False, prefix_bytes=prefix)
    test = evaluate(model, split_windows("test", count), sizes, schedule, progress=False, prefix_bytes=prefix)
    scores: dict[str, Any] = {"val_live_bpb": val, "test": test.to_dict()}
    settling = fields.get("settling", 0)
    # Nothing settles where nothing recurs.
    if settling and model.config.stored_sources:
        val_windows = split_windows("val", settling)
        curve = sweep_curve(model, val_windows, sizes, schedule, groups=(1,), progress=False, prefix_bytes=prefix)
        scores |= {"verdict": curve.verdict, "even_odd": curve.even_odd}
    return scores


@functools.cache
def estimate_cell(cell: str, device: str) -> float:
    """Minutes of a cell, by its fields in JSON; its ratio of step times is taken as that of the FLOPs."""
    fields: Fields = json.loads(cell)
    data = texts.open_text(fields.get("text", texts.STDLIB))
    run = build_run(fields, data.vocab_size)
    other = baseline_run(run, fields)
    run = match_horizon(run, other, fields.get("equal", "tokens"), run.flops_per_token / other.flops_per_token)
    return timing.estimate_minutes(run, data, fields.get("targets", TARGETS), fields.get("settling", 0), device)
