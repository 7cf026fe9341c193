"""Stages of a schedule under transformers' Trainer, and so under TRL."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lrt.integrations.hf.schedule_step import FollowsSchedule


class ScheduleCallback(TrainerCallback):
    """Tells an LRT, or a retrofitted model, the step of a Trainer: `Trainer(…, callbacks=[ScheduleCallback()])`.

    With it `stages` and `late` follow the training from their first part to the last, and `mixture` draws one schedule
    per step. Without it a model trains by its last stage throughout, and `mixture` draws for every call. It is for
    losses on tokens: the reference of a preference loss stands still, and would be scored by another schedule.
    """

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        tell(model, (state.global_step, state.max_steps, args.seed))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        tell(model, None)


def tell(model: Any, step: tuple[int, int, int] | None) -> None:
    """Every model in there that follows a schedule: adapters stand around it. ValueError where there is none.

    By name: a folder's own code, which transformers loads, has a class of its own under it.
    """
    following = [module for module in model.modules() if follows(module)]
    if not following:
        raise ValueError(f"{type(model).__name__} has no schedule that a step could decide; leave ScheduleCallback out")
    for module in following:
        module.training_step = step


def follows(module: Any) -> bool:
    """Whether it is a model that trains by a schedule."""
    return FollowsSchedule.__name__ in [kind.__name__ for kind in type(module).__mro__]
