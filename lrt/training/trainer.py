"""A run in memory: model, objective, optimiser, data and progress; its steps, what it saves and restores.

A snapshot is a checkpoint with training.pt: the optimisers' state and where the run stands, tensors and plain data,
read with `weights_only=True`. There is no other state, since schedule draws and data order are functions of the seed
and the step. So a run goes on from a snapshot bit for bit on a CPU.

Gates and scores over training are in the metrics log, not read off snapshots: those go when a run ends.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lrt.data.batch import Batch
from lrt.data.loader import Position, Rows, prefetch
from lrt.data.prepared import Prepared
from lrt.distributed.single_process import SINGLE_PROCESS, SingleProcess, clip_gradients, load_optimisers
from lrt.model import checkpoint
from lrt.model.execution import EAGER, Execution
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.model.upcycle import begin_with
from lrt.schedules.base import Schedule, plugin_uses
from lrt.schedules.flops import training_flops
from lrt.schedules.loss import StepLoss
from lrt.schedules.parse import parse
from lrt.training.config import RunConfig
from lrt.training.optim import Optimiser
from lrt.utils import plugins
from lrt.utils.device import is_out_of_memory, without_autocast
from lrt.utils.progress import warn


@dataclass(frozen=True)
class TrainingSummary:
    """What a run came to: tokens, time, compute and loss."""

    tokens: int
    seconds: float
    """Wall-clock of the training steps, without scoring and saving."""
    flops: float
    """Training FLOPs, all passes counted."""
    loss: float
    """Mean of the last 5 % of the steps' losses, in nats per token."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands; with the weights and the optimisers, all there is to know of it."""

    step: int = 0
    """Optimiser steps done."""
    position: Position = field(default_factory=Position)
    """The next row of data."""
    seconds: float = 0.0
    """Wall-clock of the steps."""
    flops: float = 0.0
    """Training FLOPs, all passes counted, of the schedules that were drawn."""


class Trainer:
    """A run in memory. Each of `ranks` has one; their methods are called by all."""

    def __init__(
        self,
        run: RunConfig,
        data: Prepared,
        device: str | torch.device,
        ranks: SingleProcess = SINGLE_PROCESS,
        execution: Execution = EAGER,
        begin: LatentRecurrentTransformer | None = None,
    ) -> None:
        """`begin` is the model whose weights it begins with, where `run.init` names one."""
        torch.manual_seed(run.seed)  # for the weights; data order and schedule draws take the seed themselves
        self.run, self.data, self.device, self.ranks = run, data, device, ranks
        self.execution, self.path = execution.resolve(run.steps, device)
        self.micro_batches = run.micro_batches(ranks.ranks)
        self.model = LatentRecurrentTransformer(run.model).to(device).train()
        if begin is not None:
            begin_with(self.model, begin)
        # Shards the model in place, so that the optimisers below see what they are to update.
        self.objective = ranks.parallelise(self.model, run.dtype)
        self.optimiser = Optimiser(self.model, run.model.width, run.batch_tokens, run.steps, run.optim, ranks)
        self.rows = Rows(data.split("train"), run.model.context, run.seed, ranks.rank, ranks.ranks)
        self.schedule = parse(run.schedule)
        self.steps = run.steps
        self.progress = Progress()
        self.loader: Generator[tuple[Batch, Position], None, None] | None = None
        """Batches from `progress` on, read in advance; begun by the first step."""
        self._flops_per_token: dict[Schedule, float] = {}
        """Of the schedules that were drawn so far."""

    def step(self) -> dict[str, Any]:
        """One optimiser step; returns its line of the metrics log.

        Loss and gradient norm are looked at before the update: nothing that is not finite reaches the weights. Raises
        Diverged then, weights untouched; OutOfMemory, weights untouched, where the gradient takes more than there is,
        and with weights that may be half updated where the update does.
        """
        run, before, started = self.run, self.progress, time.perf_counter()
        schedule = self.schedule.at(before.step, self.steps, run.seed)
        with self.memory_errors(self._advise_memory()), without_autocast(self.device):
            batches, position = self._batches()
            loss = self._accumulate_gradients(schedule, batches)
            norm = float(clip_gradients(self.model, run.optim.clip, self.ranks))
        self._check_finite(loss, norm)
        with self.memory_errors(self._advise_update_memory(), weights_whole=False), without_autocast(self.device):
            rate = self.optimiser.step(before.step)
        self.progress = Progress(
            before.step + 1,
            position,
            before.seconds + time.perf_counter() - started,
            before.flops + self._training_flops(schedule) * run.batch_tokens,
        )
        return {
            "step": before.step,
            "tokens": self.progress.step * run.batch_tokens,
            "loss": loss,
            "rate": rate,
            "gradient_norm": norm,
            "seconds": self.progress.seconds,
            "flops": self.progress.flops,
            "schedule": repr(schedule),
        }

    def _accumulate_gradients(self, schedule: Schedule, batches: list[Batch]) -> float:
        """Forward and backward of all micro-batches; returns the step's loss, over all ranks."""
        step_loss = StepLoss.of(schedule, [batch.targets for batch in batches], self.ranks.sum, self.execution)
        shares = []  # each micro-batch's share of the step's loss, whose targets are counted once: sums, not means
        for batch in batches:
            with self.ranks.gradient_sync(self.objective, last=batch is batches[-1]):
                share = self.objective(step_loss, batch.tokens, batch.targets, batch.documents)
                share.backward()
            shares.append(share.detach())
        (loss,) = self.ranks.sum([float(torch.stack(shares).sum())])
        return loss

    @contextmanager
    def memory_errors(self, message: str, weights_whole: bool = True) -> Iterator[None]:
        """Within the block, an error that says that memory is full becomes OutOfMemory with `message`.

        Gradients are dropped then. `weights_whole` is false where the block changes weights.
        """
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self.optimiser.zero_grad()
            raise OutOfMemory(message, weights_whole) from error

    def _advise_memory(self) -> str:
        """What to tell a user whose memory does not suffice for a micro-batch."""
        ranks = self.ranks.ranks
        share = self.run.batch_size // ranks
        rows = share // self.micro_batches
        smaller = next((n for n in range(rows // 2, 0, -1) if share % n == 0), None)
        remedy = (
            "it is one row already: take --execution.recompute passes, a shorter context or a smaller model"
            if smaller is None
            else f"give --device-batch {smaller}, which is the same step in more parts"
        )
        return (
            f"out of memory at step {self.progress.step}, with {rows} rows of {self.run.model.context} tokens at once "
            f"on {self.device}; {remedy}, and the same command goes on"
        )

    def _advise_update_memory(self) -> str:
        """What to tell a user whose memory does not suffice for the optimisers' update."""
        return (
            f"out of memory in the update of step {self.progress.step} on {self.device}; the weights may be half "
            "updated and are not saved, earlier snapshots stay. What the optimisers keep depends on the model, not on "
            "the batch: free memory there or take more GPUs (--parallel fsdp), and the same command goes on; else take "
            "a smaller model"
        )

    def _check_finite(self, loss: float, norm: float) -> None:
        """Raise Diverged unless both are finite."""
        step = self.progress.step
        # A loss that is not finite says that the weights are spoilt already; a gradient only, that they must be kept.
        for name, number, last_good_step in (("loss", loss, step - 1), ("norm of the gradient", norm, step)):
            if not math.isfinite(number):
                self.optimiser.zero_grad()
                raise Diverged(f"the {name} at step {step} is {number}", last_good_step)

    def _training_flops(self, schedule: Schedule) -> float:
        """Training FLOPs per token of a step's schedule."""
        if schedule not in self._flops_per_token:
            self._flops_per_token[schedule] = training_flops(self.run.model, schedule, self.run.model.context)
        return self._flops_per_token[schedule]

    def _batches(self) -> tuple[list[Batch], Position]:
        """This rank's micro-batches of the next step, and the position after them."""
        if self.loader is None:
            rows = self.run.batch_size // (self.ranks.ranks * self.micro_batches)  # of one micro-batch
            self.loader = prefetch(self.rows, self.progress.position, rows)
        batches, position = [], self.progress.position
        for _ in range(self.micro_batches):
            batch, position = next(self.loader)
            batches.append(batch.to(self.device))
        return batches, position

    def close(self) -> None:
        """End the thread that reads ahead. The run can go on afterwards."""
        if self.loader is not None:
            self.loader.close()
            self.loader = None

    def summary(self, loss: float) -> TrainingSummary:
        """What the run has come to so far; `loss` is the mean that it is reported with."""
        progress = self.progress
        return TrainingSummary(progress.step * self.run.batch_tokens, progress.seconds, progress.flops, loss)

    def about(self, loss: float) -> dict[str, Any]:
        """How the weights came to be: what a checkpoint says of itself in its config.json."""
        records = plugins.describe([*self.run.model.memory.plugin_uses(), *plugin_uses(parse(self.run.schedule))])
        return {
            "run": self.run.to_dict(),
            "schedule": self.run.schedule,
            "trained": dataclasses.asdict(self.summary(loss)),
            "data": self.data.fingerprint,
            "corpus": self.data.path.resolve().name,
            "packing": dataclasses.asdict(self.rows.packing),  # of the shards read since the run was last begun
            **({"plugins": records} if records else {}),
        }

    def save(self, path: Path, about: dict[str, Any]) -> None:
        """Write a checkpoint that can be trained on. All ranks call it; OSError, on all, where the disk is full."""
        training = {
            "run": json.dumps(self.run.to_dict(), sort_keys=True),
            "data": self.data.fingerprint,
            "progress": dataclasses.asdict(self.progress),
        }
        checkpoint.save(path, self.model, self.data.tokenizer, about, training, self.optimiser.parts, self.ranks)

    def restore(self, path: Path, may_differ: tuple[str, ...] = ()) -> None:
        """Go on from a checkpoint that `save` wrote.

        Raises ValueError where it is of other data, or of a run that differs in other fields of RunConfig than
        `may_differ` and device_batch, and says in which.
        """
        training = checkpoint.load_training(path, self.model, self.ranks)
        self._check_same_run(path, RunConfig.from_dict(json.loads(training["run"])), may_differ)
        if training["data"] != self.data.fingerprint:
            raise ValueError(f"{path} was trained on other data; choose another --out")
        # Onto any number of ranks, whatever number saved it.
        load_optimisers(path, training, self.model, self.optimiser.parts, self.ranks)
        progress = training["progress"]
        self.close()
        self.progress = Progress(**{**progress, "position": Position(**progress["position"])})

    def _check_same_run(self, path: Path, saved: RunConfig, may_differ: tuple[str, ...]) -> None:
        """ValueError unless the run saved in `path` is this one but for `may_differ`, of which it warns."""
        names = [field.name for field in dataclasses.fields(RunConfig)]
        differing = [name for name in names if getattr(saved, name) != getattr(self.run, name)]
        there, here = (json.loads(json.dumps(run.to_dict())) for run in (saved, self.run))
        differences = "; ".join(checkpoint.differences(there[name], here[name], name) for name in differing)
        if not set(differing) <= {*may_differ, "device_batch"}:  # which only splits a step
            raise ValueError(
                f"{path} is of another run ({differences}); choose another --out, or start anew with --resume never"
            )
        if differing and self.ranks.first:
            last_bits = "; numbers may differ in their last bits" if differing == ["device_batch"] else ""
            warn(f"going on from {path} with other settings ({differences}){last_bits}")


class OutOfMemory(ValueError):
    """A micro-batch, an update or a scoring that does not fit."""

    def __init__(self, message: str, weights_whole: bool = True) -> None:
        super().__init__(message)
        self.weights_whole = weights_whole
        """Whether weights and optimisers are those of the last whole step. An update may have changed some of them."""


class Diverged(FloatingPointError):
    """A run that cannot go on: its loss or gradient is not finite, or has exploded."""

    def __init__(self, reason: str, last_good_step: int) -> None:
        super().__init__(reason)
        self.last_good_step = last_good_step
        """Steps after which the weights still gave a finite, sensible loss; later ones may be spoilt."""
