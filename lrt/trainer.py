"""Train a model: batches, an objective, an optimiser, a diary. It knows an objective, not recurrence."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lrt import checkpoint, schedules
from lrt.config import ModelConfig, require
from lrt.data.loader import Position, Rows, prefetch
from lrt.data.prepared import Prepared
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


def train(
    run: RunConfig,
    data: Prepared,
    out: Path,
    device: str | torch.device = "cpu",
    progress: bool = True,
    title: str = "training",
) -> tuple[LatentRecurrentTransformer, Trained]:
    """Train from scratch into folder `out`: metrics.jsonl (a line per step), checkpoint/.

    Interrupted (Ctrl-C), it saves what it has and raises KeyboardInterrupt. A loss that is not finite raises
    FloatingPointError, naming the step.
    """
    require(
        run.model.vocab_size == data.vocab_size,
        f"the model's vocab_size is {run.model.vocab_size}, the data's {data.vocab_size}; make them equal",
    )
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(run.seed)
    model = LatentRecurrentTransformer(run.model).to(device).train()
    optimiser = Optimiser(model, run.model.width, run.batch_tokens, run.steps, run.optim)
    rows = Rows(data.split("train"), run.model.context, run.seed)
    losses: list[float] = []
    done = Trained(0, 0.0, 0.0, math.nan)

    def save() -> None:
        about = {
            "run": run.to_dict(),
            "schedule": run.schedule,
            "trained": dataclasses.asdict(done),
            "packing": dataclasses.asdict(rows.packing),
        }
        checkpoint.save(out / "checkpoint", model, data.tokenizer, about)

    try:
        with (out / "metrics.jsonl").open("w") as diary, bar(title, run.steps, progress) as advance:
            for line in _steps(run, model, optimiser, rows, device):
                losses.append(line["loss"])
                recent = losses[-max(1, len(losses) // 20) :]
                done = Trained(line["tokens"], line["seconds"], line["flops"], sum(recent) / len(recent))
                diary.write(json.dumps(line) + "\n")
                advance(1, f"loss {done.loss:.3f}  {line['tokens'] / line['seconds']:,.0f} tokens/s")
    except KeyboardInterrupt:
        if done.tokens:
            save()
        raise
    save()
    return model, done


def _steps(
    run: RunConfig,
    model: LatentRecurrentTransformer,
    optimiser: Optimiser,
    rows: Rows,
    device: str | torch.device,
) -> Iterator[dict[str, Any]]:
    """The optimiser steps; yields one line of the diary after each."""
    schedule = schedules.parse(run.schedule)
    loader = prefetch(rows, Position(), run.batch_size // run.micro_batches)
    seconds, flops = 0.0, 0.0
    costs: dict[schedules.Schedule, float] = {}
    for step in range(run.steps):
        begun = time.perf_counter()
        current = schedule.at(step, run.steps, run.seed)
        batches = []
        for _ in range(run.micro_batches):
            batch, _ = next(loader)
            batches.append(batch.to(device))
        step_loss = StepLoss.of(current, [b.targets for b in batches])
        loss = 0.0
        for batch in batches:
            share = step_loss(model, batch.tokens, batch.targets, batch.documents)
            share.backward()
            loss += float(share.detach())
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss at step {step} is {loss}; lower the rates (--optim.matrix-lr, …)")
        rate = optimiser.step(step)
        seconds += time.perf_counter() - begun
        if current not in costs:
            costs[current] = training_flops(run.model, current, run.model.context)
        flops += costs[current] * run.batch_tokens
        yield {
            "step": step,
            "tokens": (step + 1) * run.batch_tokens,
            "loss": loss,
            "rate": rate,
            "seconds": seconds,
            "flops": flops,
            "schedule": repr(current),
        }
