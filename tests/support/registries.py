"""Tables as they were before a test registered something."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from lrt.data.records import SOURCES
from lrt.eval.ablations import ABLATIONS
from lrt.experiments.state_tracking.tasks import TASKS
from lrt.model.memory import GROUPS, READERS
from lrt.model.memory_config import COMBINATIONS, INJECTIONS
from lrt.schedules.base import SCHEDULES
from lrt.utils import plugins
from lrt.utils.registry import Registry

TABLES: tuple[Registry, ...] = (INJECTIONS, COMBINATIONS, SCHEDULES, TASKS, ABLATIONS, SOURCES)


@contextmanager
def restored() -> Iterator[None]:
    """A block after which every table has what it had."""
    objects = [(vars(table), copy.deepcopy(table._names), dict(table._entries)) for table in TABLES]
    known = [(box, copy.copy(box)) for box in (GROUPS, READERS, plugins.REGISTERED, plugins.KNOWN)]
    files = list(plugins.FILES)
    try:
        yield
    finally:
        for fields, names, entries in objects:
            fields["_names"], fields["_entries"] = names, entries
        for name in set(plugins.KNOWN) - set(known[-1][1]):
            if plugins.KNOWN[name] in plugins.FILES:
                del sys.modules[name]
        for box, before in known:
            box.clear()
            box.update(before)  # type: ignore[arg-type]
        plugins.FILES[:] = files
