"""Train a model: batches, an objective, an optimiser, a diary. It knows an objective, not recurrence."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lrt import checkpoint, schedules
from lrt.config import ModelConfig, require
from lrt.data.loader import Batch, Position, Rows, prefetch
from lrt.data.prepared import Prepared
from lrt.distributed import ALONE, Alone, load_optimisers
from lrt.loss import StepLoss
from lrt.model.flops import training_flops
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.optim import OptimConfig, Optimiser
from lrt.progress import bar


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a training run, apart from the data."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The architecture. `vocab_size` is the prepared data's."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Rates and their schedule."""
    schedule: str = "interleaved(2)"
    """The training schedule as Python would write it: plain(), settled(0, 1, 1), mixture([(0.5, …), …])."""
    batch_size: int = 16
    """Rows of `context` tokens per optimiser step."""
    micro_batches: int = 1
    """Parts in which a step's batch goes through the model; must divide batch_size."""
    tokens: int = 1_600_000
    """Training horizon in tokens, rounded up to whole steps."""
    seed: int = 0
    """Seed of weights, data order and schedule draws."""

    def __post_init__(self) -> None:
        schedules.parse(self.schedule)
        for name in ("batch_size", "micro_batches", "tokens"):
            value = {"batch_size": self.batch_size, "micro_batches": self.micro_batches, "tokens": self.tokens}[name]
            require(value >= 1, f"{name} is {value}; it must be at least 1")
        require(
            self.batch_size % self.micro_batches == 0,
            f"micro_batches is {self.micro_batches}; it must divide batch_size ({self.batch_size})",
        )

    @property
    def batch_tokens(self) -> int:
        return self.batch_size * self.model.context

    @property
    def steps(self) -> int:
        return math.ceil(self.tokens / self.batch_tokens)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Trained:
    """What a run came to."""

    tokens: int
    seconds: float
    """Wall-clock of the training steps, without scoring and saving."""
    flops: float
    """Training FLOPs, all passes counted."""
    loss: float
    """Mean of the last 5 % of the steps' losses."""


@dataclass(frozen=True)
class Keeping:
    """What is kept on disk while a run goes on."""

    every: int = 0
    """Save a snapshot every so many steps; 0 saves none before the end. An interruption always saves one."""
    last: int = 2
    """How many snapshots stay, the newest ones."""
    resume: bool = True
    """Go on from the newest whole snapshot in the run's folder, if there is one; else its snapshots are removed."""

    def __post_init__(self) -> None:
        require(self.every >= 0, f"every is {self.every}; give a number of steps, or 0 for no snapshot on the way")
        require(self.last >= 1, f"last is {self.last}; keep at least 1 snapshot")


@dataclass(frozen=True)
class Progress:
    """Where a run stands; with the weights and the optimisers, all there is to know of it."""

    step: int = 0
    """Optimiser steps done."""
    position: Position = field(default_factory=Position)
    """The next row of data."""
    seconds: float = 0.0
    flops: float = 0.0


class Session:
    """A run in memory: model, optimiser, data, progress. Each of `ranks` has one; their methods are called by all."""

    def __init__(self, run: RunConfig, data: Prepared, device: str | torch.device, ranks: Alone = ALONE) -> None:
        torch.manual_seed(run.seed)
        self.run, self.data, self.device, self.ranks = run, data, device, ranks
        self.batch_size = rows_at_once(run, ranks)
        self.model = LatentRecurrentTransformer(run.model).to(device).train()
        self.objective = ranks.parallelise(self.model)
        self.optimiser = Optimiser(self.model, run.model.width, run.batch_tokens, run.steps, run.optim, ranks)
        self.rows = Rows(data.split("train"), run.model.context, run.seed, ranks.rank, ranks.ranks)
        self.schedule = schedules.parse(run.schedule)
        self.progress = Progress()
        self.loader: Generator[tuple[Batch, Position], None, None] | None = None
        """Batches from `progress` on, read in advance; begun by the first step."""
        self.costs: dict[schedules.Schedule, float] = {}

    def step(self) -> dict[str, Any]:
        """One optimiser step; returns its line of the diary."""
        run, done, begun = self.run, self.progress, time.perf_counter()
        current = self.schedule.at(done.step, run.steps, run.seed)
        if self.loader is None:
            self.loader = prefetch(self.rows, done.position, self.batch_size)
        batches, position = [], done.position
        for _ in range(run.micro_batches):
            batch, position = next(self.loader)
            batches.append(batch.to(self.device))
        step_loss = StepLoss.of(current, [b.targets for b in batches], self.ranks)
        loss = 0.0
        for batch in batches:
            with self.ranks.accumulating(self.objective, last=batch is batches[-1]):
                share = self.objective(step_loss, batch.tokens, batch.targets, batch.documents)
                share.backward()
            loss += float(share.detach())
        (loss,) = self.ranks.sum([loss])
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss at step {done.step} is {loss}; lower the rates (--optim.matrix-lr, …)")
        rate = self.optimiser.step(done.step)
        if current not in self.costs:
            self.costs[current] = training_flops(run.model, current, run.model.context)
        self.progress = Progress(
            done.step + 1,
            position,
            done.seconds + time.perf_counter() - begun,
            done.flops + self.costs[current] * run.batch_tokens,
        )
        return {
            "step": done.step,
            "tokens": self.progress.step * run.batch_tokens,
            "loss": loss,
            "rate": rate,
            "seconds": self.progress.seconds,
            "flops": self.progress.flops,
            "schedule": repr(current),
        }

    def save(self, path: Path, loss: float) -> None:
        """A checkpoint that can be trained on."""
        done = Trained(self.progress.step * self.run.batch_tokens, self.progress.seconds, self.progress.flops, loss)
        about = {
            "run": self.run.to_dict(),
            "schedule": self.run.schedule,
            "trained": dataclasses.asdict(done),
            "packing": dataclasses.asdict(self.rows.packing),  # of the shards read since the run was last begun
        }
        training = {
            "run": json.dumps(self.run.to_dict(), sort_keys=True),
            "data": self.data.fingerprint,
            "progress": dataclasses.asdict(self.progress),
        }
        checkpoint.save(path, self.model, self.data.tokenizer, about, training, self.optimiser.parts, self.ranks)

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint that `save` wrote. Raises ValueError where it is of another run, or of other data."""
        training = checkpoint.load_training(path, self.model, self.ranks)
        mine = json.loads(json.dumps(self.run.to_dict()))
        theirs = json.loads(training["run"])
        differing = [f"{k}: {theirs.get(k)} there, {mine.get(k)} here" for k in mine if mine.get(k) != theirs.get(k)]
        require(not differing, f"{path} is of another run ({'; '.join(differing)}); choose another --out")
        require(training["data"] == self.data.fingerprint, f"{path} was trained on other data; choose another --out")
        load_optimisers(path, training, self.model, self.optimiser.parts, self.ranks)
        saved = training["progress"]
        self.progress = Progress(**{**saved, "position": Position(**saved["position"])})
        self.loader = None


def rows_at_once(run: RunConfig, ranks: Alone) -> int:
    """Rows of one rank's micro-batch. Raises ValueError where the batch cannot be shared evenly."""
    parts = run.micro_batches * ranks.ranks
    require(
        run.batch_size % parts == 0,
        f"batch_size is {run.batch_size}; it must be divisible by micro_batches times ranks "
        f"({run.micro_batches} x {ranks.ranks}), so that all ranks get equal parts",
    )
    return run.batch_size // parts


def snapshots(out: Path) -> list[Path]:
    """The snapshots of a run's folder, oldest first."""
    return sorted((out / "snapshots").glob("step-*"))


def resume(session: Session, out: Path) -> list[dict[str, Any]]:
    """Restore the newest snapshot that is whole; returns the diary up to there. Nothing happens where there is none."""
    with session.ranks.together():
        newest = newest_whole(out) if session.ranks.first else None
    newest = session.ranks.agreed(newest)
    if newest is None:
        return []
    with session.ranks.together():
        session.restore(newest)
        lines = (out / "metrics.jsonl").read_text().splitlines()[: session.progress.step]
        return [json.loads(line) for line in lines]


def newest_whole(out: Path) -> Path | None:
    """The newest snapshot that its manifest confirms."""
    for path in reversed(snapshots(out)):
        try:
            return checkpoint.verified(path)
        except ValueError as error:
            print(f"passing over a damaged snapshot: {error}", file=sys.stderr)
    return None


class Stop:
    """Whether somebody asked the process to end: Ctrl-C or SIGTERM. A second Ctrl-C ends it at once.

    A second SIGTERM does not: a cluster's comes twice, from its scheduler and from torchrun.
    """

    requested = False

    def __call__(self, number: int, frame: object) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True


@contextmanager
def stop_requests() -> Iterator[Stop]:
    """Within the block a first SIGINT or SIGTERM is noted, not obeyed, so that a step can end and be saved."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield stop
        return
    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def train(
    run: RunConfig,
    data: Prepared,
    out: Path,
    device: str | torch.device = "cpu",
    progress: bool = True,
    title: str = "training",
    keeping: Keeping | None = None,
    ranks: Alone = ALONE,
) -> tuple[LatentRecurrentTransformer, Trained]:
    """Train into folder `out`: metrics.jsonl (a line per step), snapshots/ on the way, checkpoint/ at the end.

    Interrupted (Ctrl-C, SIGTERM), it ends its step, saves a snapshot and raises KeyboardInterrupt; called again, it
    goes on from the newest snapshot, bit for bit on a CPU. A loss that is not finite raises FloatingPointError, naming
    the step; the snapshots stay.

    All `ranks` call it, with one folder on a disk they share; the first writes. The model that comes back is this
    rank's, under FSDP2 its shards.
    """
    require(
        run.model.vocab_size == data.vocab_size,
        f"the model's vocab_size is {run.model.vocab_size}, the data's {data.vocab_size}; make them equal",
    )
    keeping = keeping or Keeping()
    session = Session(run, data, device, ranks)
    with ranks.together():
        out.mkdir(parents=True, exist_ok=True)
        if not keeping.resume and ranks.first:  # an old run's later snapshot would pass for this one's newest
            shutil.rmtree(out / "snapshots", ignore_errors=True)
    lines = resume(session, out)

    def recent() -> float:
        last = lines[-max(1, len(lines) // 20) :]
        return sum(line["loss"] for line in last) / max(1, len(last))

    def snapshot() -> None:
        session.save(out / "snapshots" / f"step-{session.progress.step:08d}", recent())
        for old in snapshots(out)[: -keeping.last] if ranks.first else []:
            shutil.rmtree(old)

    if ranks.first:
        rewritten = out / ".metrics.jsonl"  # the lines behind the snapshot go; a kill now loses none of the others
        rewritten.write_text("".join(json.dumps(line) + "\n" for line in lines))
        rewritten.replace(out / "metrics.jsonl")
    with (
        (out / "metrics.jsonl" if ranks.first else Path(os.devnull)).open("a") as diary,
        bar(title, run.steps, progress and ranks.first) as advance,
        stop_requests() as stop,
    ):
        advance(len(lines))
        while session.progress.step < run.steps:
            line = session.step()
            lines.append(line)
            diary.write(json.dumps(line) + "\n")
            advance(1, f"loss {recent():.3f}  {line['tokens'] / line['seconds']:,.0f} tokens/s")
            due = keeping.every and session.progress.step % keeping.every == 0
            stopping = ranks.any(stop.requested)
            if stopping or due:
                diary.flush()  # the diary is never behind a snapshot
                snapshot()
            if stopping:
                raise KeyboardInterrupt
    session.save(out / "checkpoint", recent())
    if ranks.first:
        shutil.rmtree(out / "snapshots", ignore_errors=True)
    done = session.progress
    return session.model, Trained(done.step * run.batch_tokens, done.seconds, done.flops, recent())
