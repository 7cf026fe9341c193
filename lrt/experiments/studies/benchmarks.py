"""The benchmarks of data with state, by name."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from lrt.experiments.state_data.bytecode import bytecode_benchmark
from lrt.experiments.state_data.chess_games import chess_words
from lrt.experiments.state_data.chess_measures import describe_moves
from lrt.experiments.state_data.chess_pool import (
    MissingEngineError,
    Pool,
    PoolSettings,
    chess_benchmark,
    make_pool,
    open_engine,
)
from lrt.experiments.state_data.log import LOG, half_and_half
from lrt.experiments.state_data.repl import REPL, REPL_HIDDEN
from lrt.experiments.state_data.rows import Benchmark, Rows
from lrt.experiments.studies.texts import STDLIB, open_text
from lrt.utils.progress import bar, warn
from lrt.utils.registry import Registry

CHESS = Path("runs/studies/chess")
"""Games of the engine, or random ones alone where there is none; made once."""
OpenSplit = Callable[[str], Benchmark]
"""The benchmark whose rows are of a split: train, val or test. What is drawn from a seed is the same for all three: its
rows are told apart by their seeds."""


def for_every_split(benchmark: Benchmark) -> OpenSplit:
    return lambda split: benchmark


@functools.cache  # the pieces of text, too, are cut once
def log_and_text(split: str) -> Benchmark:
    """The log, half and half with the standard library's text."""
    text = open_text(STDLIB)
    return dataclasses.replace(half_and_half(text, split), origin=lambda: {"text": text.fingerprint})


@functools.cache
def open_pool() -> Pool:
    """The study's games of chess, made where they are not there: with the engine about 40 minutes of one core.

    Without an engine the games are random ones, and that is said.
    """
    settings = PoolSettings()
    with bar("games of chess", settings.train + settings.val + settings.test, True) as advance:
        try:
            with open_engine() as engine:
                return make_pool(CHESS / "engine", settings, engine, advance)
        except MissingEngineError as error:
            warn(f"{error}; the games of this study are random ones alone")
        return make_pool(CHESS / "random", settings, None, advance)


def chess(split: str) -> Benchmark:
    """Rows of games from the pool, which is opened when rows are drawn."""

    def sample(rows: int, length: int, generator: torch.Generator) -> Rows:
        return chess_benchmark(open_pool(), split).sample(rows, length, generator)

    def origin() -> Mapping[str, Any]:
        pool = open_pool()
        return {"engine": pool.engine, "games": pool.sha256, "settings": dataclasses.asdict(pool.settings)}

    return dataclasses.replace(chess_words("chess", sample), origin=origin, details=describe_moves)


BENCHMARKS: Registry[OpenSplit] = Registry(
    "benchmark",
    {
        "repl": for_every_split(REPL),
        "repl_hidden": for_every_split(REPL_HIDDEN),
        "log": for_every_split(LOG),
        "log_and_text": log_and_text,
        "bytecode": bytecode_benchmark,
        "chess": chess,
    },
)
"""By name."""
