"""Stages of a schedule under transformers' Trainer, and so under TRL."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lrt.integrations.hf.schedule_step import FollowsSchedule


class ScheduleCallback(TrainerCallback):
    """Tells an LRT, or a retrofitted model, the step of a Trainer: `Trainer(…, callbacks=[ScheduleCallback()])`.

    With it `stages` and `late` follow the training from their first part to the last, and `mixture` draws one schedule
    per step; a training that goes on from a checkpoint goes on where it was. Without it a model trains by its last
    stage throughout.
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
    """Every model in there that follows a schedule: adapters stand around it."""
    for module in model.modules():
        if isinstance(module, FollowsSchedule):
            module.training_step = step
