"""A run in memory: model, objective, optimiser, data and progress; its steps, what it saves and restores."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lrt.data.batch import Batch
from lrt.data.loader import Position, Rows, prefetch
from lrt.data.prepared import Prepared
from lrt.distributed.single import SINGLE_PROCESS, SingleProcess, clip, load_optimisers
from lrt.model import checkpoint
from lrt.model.execution import EAGER, Execution
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.schedules.base import Schedule, plugin_uses
from lrt.schedules.flops import training_flops
from lrt.schedules.loss import StepLoss
from lrt.schedules.parse import parse
from lrt.training.config import RunConfig
from lrt.training.optim import Optimiser
from lrt.utils import plugins
from lrt.utils.progress import warn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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
class Progress:
    """Where a run stands; with the weights and the optimisers, all there is to know of it."""

    step: int = 0
    """Optimiser steps done."""
    position: Position = field(default_factory=Position)
    """The next row of data."""
    seconds: float = 0.0
    flops: float = 0.0


class Trainer:
    """A run in memory. Each of `ranks` has one; their methods are called by all."""

    def __init__(
        self,
        run: RunConfig,
        data: Prepared,
        device: str | torch.device,
        ranks: SingleProcess = SINGLE_PROCESS,
        execution: Execution = EAGER,
    ) -> None:
        torch.manual_seed(run.seed)
        self.run, self.data, self.device, self.ranks = run, data, device, ranks
        unproved = "bfloat16" if run.precision != "float32" else "several processes" if ranks.ranks > 1 else None
        self.execution, self.path = execution.resolve(run.steps, device, unproved)
        self.micro_batches = run.micro_batches(ranks.ranks)
        self.model = LatentRecurrentTransformer(run.model).to(device).train()
        self.objective = ranks.parallelise(self.model, DTYPES[run.precision])
        self.optimiser = Optimiser(self.model, run.model.width, run.batch_tokens, run.steps, run.optim, ranks)
        self.rows = Rows(data.split("train"), run.model.context, run.seed, ranks.rank, ranks.ranks)
        self.schedule = parse(run.schedule)
        self.steps = run.steps
        self.progress = Progress()
        self.loader: Generator[tuple[Batch, Position], None, None] | None = None
        """Batches from `progress` on, read in advance; begun by the first step."""
        self.costs: dict[Schedule, float] = {}

    def step(self) -> dict[str, Any]:
        """One optimiser step; returns its line of the diary. Raises Diverged, weights untouched, if it cannot be."""
        run, done, begun = self.run, self.progress, time.perf_counter()
        current = self.schedule.at(done.step, self.steps, run.seed)
        batches, position = self._batches()
        step_loss = StepLoss.of(current, [b.targets for b in batches], self.ranks, self.execution)
        shares = []
        for batch in batches:
            with self.ranks.accumulating(self.objective, last=batch is batches[-1]):
                share = self.objective(step_loss, batch.tokens, batch.targets, batch.documents)
                share.backward()
            shares.append(share.detach())
        (loss,) = self.ranks.sum([float(torch.stack(shares).sum())])
        norm = float(clip(self.model, run.optim.clip, self.ranks))
        # A loss that is not finite says that the weights are spoilt already; a gradient only, that they must be kept.
        for name, value, good in (("loss", loss, done.step - 1), ("norm of the gradient", norm, done.step)):
            if not math.isfinite(value):
                self.optimiser.zero_grad()
                raise Diverged(f"the {name} at step {done.step} is {value}", good)
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
            "gradient_norm": norm,
            "seconds": self.progress.seconds,
            "flops": self.progress.flops,
            "schedule": repr(current),
        }

    def _batches(self) -> tuple[list[Batch], Position]:
        """This rank's micro-batches of the next step, and the position after them."""
        if self.loader is None:
            rows = self.run.batch_size // (self.ranks.ranks * self.micro_batches)
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

    def trained(self, loss: float) -> Trained:
        done = self.progress
        return Trained(done.step * self.run.batch_tokens, done.seconds, done.flops, loss)

    def about(self, loss: float) -> dict[str, Any]:
        """How the weights came to be: what a checkpoint says of itself."""
        records = plugins.describe([*self.run.model.memory.plugin_uses(), *plugin_uses(parse(self.run.schedule))])
        return {
            "run": self.run.to_dict(),
            "schedule": self.run.schedule,
            "trained": dataclasses.asdict(self.trained(loss)),
            "data": self.data.fingerprint,
            "packing": dataclasses.asdict(self.rows.packing),  # of the shards read since the run was last begun
            **({"plugins": records} if records else {}),
        }

    def save(self, path: Path, about: dict[str, Any]) -> None:
        """A checkpoint that can be trained on."""
        training = {
            "run": json.dumps(self.run.to_dict(), sort_keys=True),
            "data": self.data.fingerprint,
            "progress": dataclasses.asdict(self.progress),
        }
        checkpoint.save(path, self.model, self.data.tokenizer, about, training, self.optimiser.parts, self.ranks)

    def restore(self, path: Path, may_differ: tuple[str, ...] = ()) -> None:
        """Go on from a checkpoint that `save` wrote. Raises ValueError where it is of another run, or of other data."""
        training = checkpoint.load_training(path, self.model, self.ranks)
        mine = json.loads(json.dumps(self.run.to_dict()))
        theirs = json.loads(training["run"])
        differing = [k for k in mine if mine[k] != theirs.get(k)]
        spelled = "; ".join(checkpoint.differences(theirs.get(k), mine[k], k) for k in differing)
        if not set(differing) <= set(may_differ):
            raise ValueError(
                f"{path} is of another run ({spelled}); choose another --out, or start anew with --resume never"
            )
        if differing and self.ranks.first:
            warn(f"going on from {path} with other settings ({spelled})")
        if training["data"] != self.data.fingerprint:
            raise ValueError(f"{path} was trained on other data; choose another --out")
        load_optimisers(path, training, self.model, self.optimiser.parts, self.ranks)
        saved = training["progress"]
        self.close()
        self.progress = Progress(**{**saved, "position": Position(**saved["position"])})


class Diverged(FloatingPointError):
    """A run that cannot go on: its loss or gradient is not finite, or has exploded."""

    def __init__(self, reason: str, good: int) -> None:
        super().__init__(reason)
        self.good = good
        """Steps after which the weights still gave a finite, sensible loss; later ones may be spoilt."""
