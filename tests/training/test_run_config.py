"""What decides a run is checked when it is made: numbers, horizons, and how many passes a schedule makes."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
from support.limits import refuses_absurd_numbers

from lrt import ModelConfig
from lrt.training import config, optim_config
from lrt.training.config import EvalConfig, Horizon, RunConfig, SnapshotConfig
from lrt.training.optim_config import OptimConfig

TABLES: tuple[tuple[Any, dict[str, Any], tuple[str, ...]], ...] = (
    (RunConfig, config.LIMITS, ()),
    (OptimConfig, optim_config.LIMITS, ("momentum",)),
    (EvalConfig, config.EVAL_LIMITS, ()),
    (SnapshotConfig, config.SNAPSHOT_LIMITS, ()),
)


@pytest.mark.parametrize(("kind", "limits", "elsewhere"), TABLES, ids=[kind.__name__ for kind, _, _ in TABLES])
def test_numbers_have_limits(kind: Any, limits: dict[str, Any], elsewhere: tuple[str, ...]):
    refuses_absurd_numbers(kind, limits, elsewhere)


@pytest.mark.parametrize("momentum", [(0.9,), 0.9, None, "ab", (0.9, 1), (0.9, math.nan), (-0.1, 0.9), (True, 0.9)])
def test_momentum_is_two_numbers_below_1(momentum: Any):
    with pytest.raises(ValueError, match=r"momentum is .* give two numbers from 0 to below 1"):
        OptimConfig(momentum=momentum)


@pytest.mark.parametrize("text", ["steps=1e13", "tokens=1e19", "ratio=1e300", "flops=1e40", "flops=inf", "steps=nan"])
def test_a_horizon_beyond_reason_is_refused_when_it_is_read(text: str):
    with pytest.raises(ValueError, match=f"horizon is '{text}'"):
        RunConfig(horizon=text)
    unit, most = text.partition("=")[0], {"steps": 1e12, "tokens": 1e18, "ratio": 1e9, "flops": 1e36}
    assert Horizon(unit, most[unit]).steps(RunConfig()) > 0  # a whole number, and no overflow


@pytest.mark.parametrize(
    "schedule",
    [
        "multi_refinement(1_000_000_000_000)",
        "interleaved(10_000_000)",
        "strided(5_000, 5_000)",
        "settled(10_000_000, 1, 1)",
        "settled(0, 1_000, 1_000)",
        "mixture([(0.5, plain()), (0.5, stages([(1, settled(0, 1, 200_000))]))])",
        "sequential()",
        "chunked(2)",
    ],
)
def test_millions_of_passes_are_refused_at_once(schedule: str):
    model = ModelConfig(context=1_000_000)
    begin = time.process_time()
    with pytest.raises(ValueError, match=r"passes over [\d,]+ positions; at most 131,072 can be run: take fewer"):
        RunConfig(model=model, schedule=schedule)
    assert time.process_time() - begin < 1
    assert RunConfig(model=model, schedule="chunked(1_000)").steps > 0
