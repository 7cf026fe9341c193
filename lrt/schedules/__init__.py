"""How a model is trained in passes: schedules as data (`library`, `parse`), and `refine`, which runs them."""

from lrt.schedules.base import SCHEDULES, Mixture, Pass, Passes, Schedule, Simple, Stages, schedule
from lrt.schedules.library import (
    DEFAULT,
    LATE,
    STATE,
    chunked,
    interleaved,
    late,
    mixture,
    multi_refinement,
    plain,
    sequential,
    settled,
    stages,
    strided,
)
from lrt.schedules.parse import names, parse

__all__ = [
    "DEFAULT",
    "LATE",
    "SCHEDULES",
    "STATE",
    "Mixture",
    "Pass",
    "Passes",
    "Schedule",
    "Simple",
    "Stages",
    "chunked",
    "interleaved",
    "late",
    "mixture",
    "multi_refinement",
    "names",
    "parse",
    "plain",
    "schedule",
    "sequential",
    "settled",
    "stages",
    "strided",
]
