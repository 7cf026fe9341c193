"""The benchmarks of data with state, by name."""

from __future__ import annotations

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


def drawn(benchmark: Benchmark) -> OpenSplit:
    return lambda split: benchmark


BENCHMARKS: Registry[OpenSplit] = Registry(
    "benchmark",
    {
        "repl": drawn(REPL),
        "repl_hidden": drawn(REPL_HIDDEN),
        "log": drawn(LOG),
        "log_and_text": lambda split: half_and_half(open_text(STDLIB), split),
        "bytecode": bytecode_benchmark,
    },
)
"""By name."""
