"""Where a model of transformers stands in its training: what a schedule that changes over it comes to now."""

from __future__ import annotations

from lrt.schedules.base import Schedule


class FollowsSchedule:
    """A model that trains by a schedule. `ScheduleCallback` tells it the step."""

    training_step: tuple[int, int, int] | None = None
    """(step, steps of the training, seed); None where nobody says so."""

    def schedule_now(self, schedule: Schedule) -> Schedule:
        """The part that serves at this step; where that is not known, one that is drawn, and the last of `stages`."""
        return schedule.draw() if self.training_step is None else schedule.at(*self.training_step)
