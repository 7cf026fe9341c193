"""The benchmarks of data with state, by name."""

from __future__ import annotations

from lrt.experiments.state_data.repl import REPL, REPL_HIDDEN
from lrt.experiments.state_data.rows import Benchmark
from lrt.utils.registry import Registry

BENCHMARKS: Registry[Benchmark] = Registry("benchmark", {one.name: one for one in (REPL, REPL_HIDDEN)})
"""By name."""
