"""Train a small model to track a state: fresh rows every step, longer ones once it has mastered the shorter.

The trainer of `lrt train` reads prepared text in rows of one length; here rows are drawn, and they grow, so that this
loop is its own. Model, schedules, losses and optimisers are the same. The next length is earned (the mean loss of ten
steps falls below a bound), not scheduled: a model that has not learned to carry a state two positions learns nothing
from forty (docs/log.md).

Shapes: B rows, T positions, D width.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from lrt.data.batch import IGNORED
from lrt.distributed.single_process import clip_gradients
from lrt.experiments.state_tracking.measure import HELD_OUT
from lrt.experiments.state_tracking.tasks import TASKS, Task
from lrt.model.config import ModelConfig
from lrt.model.cross_entropy import summed_nats, token_nats
from lrt.model.execution import EAGER, Execution
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.schedules import unrolled
from lrt.schedules.base import Schedule, Simple
from lrt.schedules.loss import StepLoss
from lrt.schedules.parse import parse
from lrt.schedules.refinement import refine
from lrt.training.optim import Optimiser
from lrt.training.optim_config import OptimConfig

PATIENCE = 10
"""Steps at one length, at least."""
STRIDE = 10_000_000
"""Between the seeds of two runs' rows: more than any run has steps."""
Model = TypeVar("Model", bound=nn.Module)
LossOfStep = Callable[[int, Tensor, Tensor], tuple[Tensor, float]]
"""(step, tokens, classes (B, T)) -> what is minimised, and the nats per asked position by which rows grow."""


@dataclass(frozen=True)
class TrackingRun:
    """Everything that decides such a run."""

    task: str | Task
    """A name in `tasks.TASKS`, or what rows are drawn from."""
    model: ModelConfig
    optim: OptimConfig
    """Rates as they are: no scaling with the batch, but with the width as everywhere."""
    schedule: str = "sequential()"
    steps: int = 1000
    rows: int = 64
    """Fresh sequences per step."""
    shortest: int = 2
    """Length of the rows at first."""
    longest: int = 40
    """Length that the rows grow to."""
    by: int = 2
    """How much they grow at a time."""
    mastered: float = 0.3
    """Rows grow when the mean loss of the last `PATIENCE` steps at this length is below so many nats over the floor."""
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.task, str):
            TASKS.check(self.task)
        if not 1 <= self.shortest <= self.longest or min(self.by, self.steps, self.rows) < 1 or (not self.mastered > 0):
            raise ValueError(
                f"lengths {self.shortest} to {self.longest} by {self.by}, {self.steps} steps of {self.rows} rows, "
                f"mastered below {self.mastered}: lengths must not fall, and the others are at least 1 or above 0"
            )
        if self.seed < 0 or STRIDE * (self.seed + 1) > HELD_OUT or self.steps > STRIDE:
            raise ValueError(
                f"seed {self.seed}, {self.steps} steps: seeds go from 0 to {HELD_OUT // STRIDE - 1}, steps to "
                f"{STRIDE:,}; rows of training and of tests are drawn from different seeds"
            )
        parse(self.schedule)

    @property
    def source(self) -> Task:
        """What rows are drawn from."""
        return TASKS[self.task] if isinstance(self.task, str) else self.task

    def lengths(self) -> list[int]:
        """The lengths of the rows, in order; those of the task's format."""
        task = self.source
        steps = [*range(self.shortest, self.longest, self.by), self.longest]
        return list(dict.fromkeys(task.length(max(task.shortest, wanted)) for wanted in steps))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, where the task is a name."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class TrainedTracker(Generic[Model]):
    """A trained model, and the course of its training."""

    model: Model
    losses: list[float] = field(repr=False)
    """One per step, in nats per asked position over the rows' floor, under what the schedule leaves in the end."""
    grown: dict[int, int]
    """The step at which rows of each length were first drawn."""
    tokens: int
    seconds: float


def train_tracking(
    run: TrackingRun,
    advance: Callable[[float, str], object] = lambda *_: None,
    execution: Execution = EAGER,
    device: str = "cpu",
) -> TrainedTracker[LatentRecurrentTransformer]:
    """Train from nothing. Raises FloatingPointError where a loss or gradient is not finite."""
    torch.manual_seed(run.seed)
    model = LatentRecurrentTransformer(run.model).to(device).train()
    # The rates are the run's own: at the reference batch nothing is scaled.
    optimiser = Optimiser(model, run.model.width, run.optim.reference_batch, run.steps, run.optim)
    schedule = parse(run.schedule)

    def loss_of(step: int, tokens: Tensor, classes: Tensor) -> tuple[Tensor, float]:
        return step_loss(model, tokens, classes, schedule.at(step, run.steps, run.seed), execution)

    return train_on_rows(run, model, optimiser, loss_of, advance, device)


def train_on_rows(
    run: TrackingRun,
    model: Model,
    optimiser: Optimiser,
    loss_of: LossOfStep,
    advance: Callable[[float, str], object] = lambda *_: None,
    device: str = "cpu",
) -> TrainedTracker[Model]:
    """Train any module on the run's rows; of the run's own model and schedule nothing is used here.

    Raises FloatingPointError where a loss or gradient is not finite.
    """
    task = run.source
    lengths, reached = run.lengths(), [0]  # the steps at which a length was reached, the first at once
    losses, trained_tokens, begun = [], 0, time.perf_counter()
    for step in range(run.steps):
        generator = torch.Generator().manual_seed(STRIDE * run.seed + step)  # a function of the seed and the step
        examples = task.sample(run.rows, lengths[len(reached) - 1], generator)
        tokens, classes = examples.tokens.to(device), examples.classes.to(device)
        loss, final = loss_of(step, tokens, classes)
        loss.backward()
        norm = float(clip_gradients(model, run.optim.clip))
        if not math.isfinite(norm + final + float(loss.detach())):
            raise FloatingPointError(f"at step {step} the loss is {float(loss.detach())}, the gradient's norm {norm}")
        optimiser.step(step)
        losses.append(final - examples.floor)
        trained_tokens += tokens.numel()
        # Losses of shorter rows do not count towards the next length.
        recent = losses[reached[-1] :][-PATIENCE:]
        if len(reached) < len(lengths) and len(recent) == PATIENCE and statistics.fmean(recent) < run.mastered:
            reached.append(step + 1)
        advance(1, f"length {tokens.shape[1]} loss {statistics.fmean(losses[-20:]):.3f}")
    grown = dict(zip(lengths, reached, strict=False))
    return TrainedTracker(model.eval(), losses, grown, trained_tokens, time.perf_counter() - begun)


def step_loss(
    model: LatentRecurrentTransformer, tokens: Tensor, classes: Tensor, schedule: Schedule, execution: Execution = EAGER
) -> tuple[Tensor, float]:
    """(Loss of a step over tokens, classes (B, T), mean nats of its last pass). Sequential passes run in chunks.

    The second shows mastery: it is the loss under what the schedule leaves, whose earlier passes need not be good.
    """
    count = max(1, int((classes != IGNORED).sum()))
    if isinstance(schedule, Simple) and schedule.name == "sequential" and unrolled.reason_uncovered(model) is None:
        (backprop,) = schedule.arguments or (None,)
        hidden = unrolled.over(model, tokens, backprop, execution)
        loss = summed_nats(model, hidden, classes, execution=execution) / count
        return loss, float(loss.detach())
    step = StepLoss.of(schedule, [classes], execution=execution)
    out = refine(model, tokens, schedule, execution=execution)
    with torch.no_grad():
        final = float(token_nats(model, out.hidden, classes).sum()) / count
    return step.over(model, [hidden for _, _, hidden in out.passes], classes), final
