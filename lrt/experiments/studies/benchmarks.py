"""The benchmarks of data with state, by name."""

from __future__ import annotations

import functools
from collections.abc import Callable

from lrt.experiments.state_data.bytecode import bytecode_benchmark
from lrt.experiments.state_data.log import LOG, half_and_half
from lrt.experiments.state_data.repl import REPL, REPL_HIDDEN
from lrt.experiments.state_data.rows import Benchmark
from lrt.experiments.studies.texts import STDLIB, open_text
from lrt.utils.registry import Registry

OpenSplit = Callable[[str], Benchmark]
"""The benchmark whose rows are of a split: train, val or test. What is drawn from a seed is the same for all three: its
rows are told apart by their seeds."""


def for_every_split(benchmark: Benchmark) -> OpenSplit:
    return lambda split: benchmark


@functools.cache  # the pieces of text, too, are cut once
def log_and_text(split: str) -> Benchmark:
    """The log, half and half with the standard library's text."""
    return half_and_half(open_text(STDLIB), split)


BENCHMARKS: Registry[OpenSplit] = Registry(
    "benchmark",
    {
        "repl": for_every_split(REPL),
        "repl_hidden": for_every_split(REPL_HIDDEN),
        "log": for_every_split(LOG),
        "log_and_text": log_and_text,
        "bytecode": bytecode_benchmark,
    },
)
"""By name."""
