"""`lrt train`: a recipe, overridden field by field."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from lrt.model.execution import Execution
from lrt.training import recipes
from lrt.training.config import USUAL_SNAPSHOTS, EvalConfig, RunConfig, SnapshotConfig
from lrt.training.loggers import check_loggers
from lrt.utils.progress import warn

if TYPE_CHECKING:
    from lrt.data.prepared import Prepared
    from lrt.distributed.single_process import SingleProcess
    from lrt.training.speed import Speed
    from lrt.training.trainer import TrainingSummary

    Recipe = RunConfig
else:  # one subcommand per recipe, whose fields the command line overrides
    Recipe = tyro.extras.subcommand_type_from_defaults(
        {name: make() for name, make in recipes.RECIPES.items()}, recipes.DESCRIPTIONS, prefix_names=False
    )
Matches = tyro.conf.UseAppendAction[tuple[tuple[Literal["parameters", "tokens", "compute", "wall_clock"], Path], ...]]


@dataclass(frozen=True)
class Train:
    """Train a recipe, with whatever fields are overridden: `lrt train d4 --optim.matrix-lr 0.01`."""

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    """What to train."""
    data: Path | None = None
    """A folder that `lrt prepare` wrote. None: the standard library, prepared in runs/data/stdlib."""
    out: Path = Path("runs/train")
    """Folder for metrics.jsonl, snapshots and the checkpoint."""
    match: Matches = ()
    """Make the run fair beside another: `--match parameters RUN` widens the MLP, `tokens`, `compute` (training FLOPs)
    and `wall_clock` (paired step times, measured here) set the horizon. May be given several times."""
    minutes: float | None = None
    """Train for as long as this takes here, live scores included, in the place of --horizon. A few timed steps turn it
    into tokens before the run begins; a run that goes on keeps them."""
    resume: str = "auto"
    """auto goes on from the newest snapshot in --out; never starts anew and sets the old run aside; a snapshot's folder
    goes on from that one, also with other rates, schedule or horizon. Nothing in a snapshot is run. Still, it decides
    the weights: resume those whose origin you trust."""
    snapshots: SnapshotConfig = USUAL_SNAPSHOTS
    """What is saved on the way."""
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    """Live scores and the gap while training."""
    log_to: tuple[str, ...] = ()
    """Where numbers go beside metrics.jsonl: tensorboard, wandb, trackio (each to be installed)."""
    execution: Execution = dataclasses.field(default_factory=Execution)
    """Compiling, and recomputing instead of keeping."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    parallel: Literal["fsdp", "fsdp-reshard", "ddp"] = "fsdp"
    """How the processes of torchrun share the model: in shards, gathered once per step or anew for every pass; or each
    has it whole."""

    def __post_init__(self) -> None:
        check_loggers(self.log_to)  # before any work
        if self.minutes is not None:
            self.check_minutes(self.minutes)

    def check_minutes(self, minutes: float) -> None:
        """ValueError where `minutes` are no time to train for, or a match says how long (`flag_names`: --horizon)."""
        from lrt.training.minutes import check_minutes

        check_minutes(minutes)
        others = [f"--match {kind}" for kind, _ in self.match if kind != "parameters"]
        if others:
            raise ValueError(f"--minutes and {others[0]} both say how long to train; leave one of them away")

    def run(self) -> None:
        from lrt.distributed.parallelize import join_ranks
        from lrt.utils.device import choose_device

        if self.recipe.precision == "auto" and any(kind == "wall_clock" for kind, _ in self.match):
            raise ValueError(
                "precision is 'auto', and --match wall_clock times steps in the precision that the run has; give "
                "--precision float32 or bfloat16"
            )
        with join_ranks(self.parallel, choose_device(self.device)) as ranks:
            self.train(ranks)

    def train(self, ranks: SingleProcess) -> None:
        """All of the verb, on each of `ranks`; the first prints."""
        from lrt.data.prepare import prepare
        from lrt.data.prepared import Prepared
        from lrt.model.upcycle import adopt
        from lrt.training.loop import train
        from lrt.training.matching import Launch, ReferenceRun, compare_runs, match_all
        from lrt.training.minutes import with_minutes
        from lrt.training.precision import resolve_precision
        from lrt.training.start import begin_run, with_vocabulary

        data = ranks.rank0_first(
            lambda: prepare(Path("runs/data/stdlib")) if self.data is None else Prepared.open(self.data)
        )
        run, begin = begin_run(with_vocabulary(self.recipe, data), data)
        references = [(kind, ReferenceRun.read(path)) for kind, path in self.match]
        launch = Launch(self.out, ranks, self.execution)
        run = match_all(run, references, data, launch)
        if begin is not None and run.model != adopt(run.model, begin.config):
            raise ValueError(
                "--match parameters widens the MLP, and the model of --init has one of its own; leave one of them away"
            )
        check_memory(run, ranks)
        run, precision = resolve_precision(run, data, self.out, ranks, self.execution, self.resume)
        speed = None
        if self.minutes is not None:
            run, speed = with_minutes(run, self.minutes, data, launch, self.eval, self.resume)
        if ranks.first:
            for reference in {reference.path: reference for _, reference in references}.values():
                print(f"beside {reference.path}:", *map(str, compare_runs(run, reference, data, launch)), sep="\n")
            print_plan(run, data, precision)
        self.print_estimate(run, data, ranks, speed)
        _, summary = train(
            run,
            data,
            self.out,
            ranks.device,
            snapshots=self.snapshots,
            evaluation=self.eval,
            log_to=self.log_to,
            resume_from=self.resume,
            ranks=ranks,
            execution=self.execution,
            begin=begin,
        )
        if ranks.first:
            print_summary(self.out / "checkpoint", summary)

    def print_estimate(self, run: RunConfig, data: Prepared, ranks: SingleProcess, speed: Speed | None) -> None:
        """How long the run takes from here on; nothing where it is done, or too short to be worth measuring.

        `speed` is what was measured for --minutes already. No number of the run depends on it.
        """
        from lrt.training.resume import steps_done
        from lrt.training.speed import estimate_run, validation_tokens
        from lrt.utils.device import describe_device
        from lrt.utils.timing import format_duration

        with ranks.collective():
            done = steps_done(self.out, run, self.resume) if ranks.first else 0
        done = ranks.broadcast(done)
        if done >= run.steps:
            return
        if speed is None:
            seconds = estimate_run(run, data, self.eval, ranks, self.execution, done)
        else:
            seconds = speed.run_seconds(run, self.eval, validation_tokens(data), done)
        if ranks.first and seconds is not None:
            where = describe_device(ranks.device, ranks.ranks)
            hint = "; --minutes 10 for a look" if self.minutes is None and seconds > LONG else ""
            print(f"about {format_duration(seconds)} {where}{hint}", flush=True)


LONG = 20 * 60.0
"""Seconds from which a run's estimate names --minutes."""


def check_memory(run: RunConfig, ranks: SingleProcess) -> None:
    """ValueError where a step cannot fit, whatever the schedule: its tokens, and what the backward needs of each block.

    A lower bound. A step that passes may still need more memory than there is.
    """
    from lrt.utils.device import memory_bytes

    rows = run.batch_size // ranks.ranks
    rows_at_once = rows // run.micro_batches(ranks.ranks)
    numbers_per_token = run.model.depth * run.model.width
    needed = run.model.context * (16 * rows + 2 * rows_at_once * numbers_per_token)  # int64 twice; 2 bytes a number
    available = memory_bytes(ranks.device)
    if available is not None and needed > available:
        raise ValueError(
            f"batch_size is {run.batch_size} and device_batch {run.device_batch}: a step of {rows:,} rows, "
            f"{rows_at_once:,} at once, needs more than {needed / 1e9:,.0f} GB, and {ranks.device} has "
            f"{available / 1e9:,.0f}; give smaller ones"
        )


def print_plan(run: RunConfig, data: Prepared, precision: str) -> None:
    """What is about to be trained, and a warning where the horizon goes more than once through the data.

    `precision` is why it has the one that it has, empty where that was given.
    """
    from lrt.model.size import count_parameters

    total, dense = count_parameters(run.model)
    available = data.manifest["splits"]["train"]["tokens"]
    print(
        f"{total:,} parameters ({dense:,} without tables and head), {run.schedule}, {run.steps:,} steps of "
        f"{run.batch_tokens:,} tokens: {run.tokens:,} tokens ({run.tokens / available:.2f} epochs of {available:,}), "
        f"{run.flops:.3g} training FLOPs{precision and f'; {precision}'}"
    )
    if run.tokens > available:
        warn(f"{run.tokens:,} tokens go {run.tokens / available:.1f} times through the {available:,} of the data")


def print_summary(folder: Path, summary: TrainingSummary) -> None:
    """What a run came to; scores and packing are what its checkpoint says of itself."""
    from lrt.eval.report.result_tables import difference
    from lrt.eval.runs import Run
    from lrt.model import checkpoint
    from lrt.utils.files import place_and_size
    from lrt.utils.timing import format_duration

    print(f"{summary.tokens:,} tokens in {format_duration(summary.seconds)}, loss {summary.loss:.4f} nats per token")
    about = checkpoint.about(folder)
    if scores := about.get("scores"):
        gap = difference(scores["gap"])
        print("live {live_bpb:.4f} bits per byte, parallel {parallel_bpb:.4f}, gap".format(**scores), gap)
        print(f"on {Run.read(folder).scores[0].on.label}")
    packing = about["packing"]
    padded = packing["padded"] / max(1, packing["padded"] + packing["targets"])  # 0 rows: resumed at its end
    print(f"packed: {packing['cropped']:,} of {packing['targets']:,} tokens cropped, {padded:.2%} of positions padded")
    print(place_and_size(folder))
