"""Train a small model to track a state: fresh rows every step, longer ones as training goes on.

The trainer of `lrt train` reads prepared text in rows of one length; here rows are drawn, and they grow. Model,
schedules, losses and optimisers are the same. All of a step follows from (seed, step).

Shapes: B rows, T positions, D width.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lrt import schedules
from lrt.config import IGNORED, ModelConfig, require
from lrt.distributed import clip
from lrt.execution import EAGER, Execution
from lrt.loss import StepLoss, summed_nats
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.optim import OptimConfig, Optimiser
from lrt.schedules import Schedule, Simple
from lrt.tracking import exact
from lrt.tracking.tasks import TASKS


@dataclass(frozen=True)
class TrackingRun:
    """Everything that decides such a run."""

    task: str
    """A name in `tasks.TASKS`."""
    model: ModelConfig
    optim: OptimConfig
    """Rates as they are: no scaling with the batch, but with the width as everywhere."""
    schedule: str = "sequential()"
    steps: int = 1000
    rows: int = 64
    """Fresh sequences per step."""
    shortest: int = 8
    """Length of the rows at first."""
    longest: int = 40
    """Length of the rows from `growth` of the steps on."""
    growth: float = 0.5
    """The fraction of the steps over which rows grow from the shortest to the longest; 0: they are long at once."""
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.task in TASKS, f"unknown task {self.task!r}; choose one of {', '.join(TASKS)}")
        require(
            1 <= self.shortest <= self.longest and 0 <= self.growth <= 1 and self.steps >= 1 and self.rows >= 1,
            f"lengths {self.shortest} to {self.longest}, growth {self.growth}, {self.steps} steps of {self.rows} rows: "
            "lengths must not fall, growth lies in 0 … 1, the others are at least 1",
        )
        schedules.parse(self.schedule)

    def length(self, step: int) -> int:
        """Tokens of a row at `step`: a multiple of 8 on the way, so that few sizes are compiled."""
        grown = 1.0 if self.growth == 0 else min(1.0, step / (self.growth * self.steps))
        wanted = self.shortest + grown * (self.longest - self.shortest)
        return TASKS[self.task].length(min(self.longest, 8 * math.ceil(wanted / 8)))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class TrainedTracker:
    """What training came to."""

    model: LatentRecurrentTransformer
    losses: list[float] = field(repr=False)
    """One per step, in nats per asked position."""
    tokens: int
    seconds: float


def train(
    run: TrackingRun, advance: Callable[[float, str], object] = lambda *_: None, execution: Execution = EAGER
) -> TrainedTracker:
    """Train from nothing. Raises FloatingPointError where a loss or gradient is not finite."""
    task = TASKS[run.task]
    torch.manual_seed(run.seed)
    model = LatentRecurrentTransformer(run.model).train()
    # The rates are the run's own: at the reference batch nothing is scaled.
    optimiser = Optimiser(model, run.model.width, run.optim.reference_batch, run.steps, run.optim)
    schedule = schedules.parse(run.schedule)
    losses, tokens, begun = [], 0, time.perf_counter()
    for step in range(run.steps):
        generator = torch.Generator().manual_seed(1_000_003 * (run.seed + 1) + step)
        drawn, asked = task.sample(run.rows, run.length(step), generator)
        loss = objective(model, drawn, asked, schedule.at(step, run.steps, run.seed), execution)
        loss.backward()
        norm, nats = float(clip(model, run.optim.clip)), float(loss.detach())
        if not math.isfinite(norm + nats):
            raise FloatingPointError(f"at step {step} the loss is {nats}, the gradient's norm {norm}")
        optimiser.step(step)
        losses.append(nats)
        tokens += drawn.numel()
        advance(1, f"length {drawn.shape[1]} loss {sum(losses[-20:]) / len(losses[-20:]):.3f}")
    return TrainedTracker(model.eval(), losses, tokens, time.perf_counter() - begun)


def objective(
    model: LatentRecurrentTransformer, tokens: Tensor, asked: Tensor, schedule: Schedule, execution: Execution = EAGER
) -> Tensor:
    """The loss of a step over tokens, asked (B, T): `StepLoss`, or the fast way for sequential passes."""
    if isinstance(schedule, Simple) and schedule.name == "sequential" and exact.uncovered(model.config) is None:
        (backprop,) = schedule.arguments or (None,)
        hidden = exact.over(model, tokens, backprop, execution)
        return summed_nats(model, hidden, asked, execution=execution) / max(1, int((asked != IGNORED).sum()))
    return StepLoss.of(schedule, [asked], execution=execution)(model, tokens, asked, None)
