"""Numbers that decide a run: each field up to its limit, the defaults, the recipes, and what is kept of a failure."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from lrt import ModelConfig
from lrt.model.size import count_parameters
from lrt.training import recipes
from lrt.training.config import EvalConfig, Horizon, RunConfig, SnapshotConfig
from lrt.training.monitor import EXPLOSION, PATIENCE, has_exploded, report_divergence
from lrt.training.optim import TABLE
from lrt.training.optim_config import OptimConfig

INF, NAN = math.inf, math.nan
SCHEDULE = "stages([(0.5, settled(0, 1, 1)), (0.5, settled(1, 1, 1))])"
RATE = ([0, 0.5, 1000], [-1e-9, 1001, INF, NAN])
LIMITS: dict[tuple[type, str], tuple[list[Any], list[Any]]] = {
    # what is taken, what is refused
    **{(OptimConfig, f"{name}_lr"): RATE for name in ("matrix", "embedding", "head", "scalar")},
    (OptimConfig, "weight_decay"): RATE,
    (OptimConfig, "momentum_steps"): ([0, 1], [-1]),
    (OptimConfig, "warmdown"): ([0, 0.5, 1], [-0.01, 1.01, NAN]),
    (OptimConfig, "momentum"): ([(0, 0), (0.99, 0.5)], [(1, 0.5), (0.5, 1), (-0.1, 0.5), (0.5,), (0.1, 0.2, 0.3)]),
    (OptimConfig, "reference_batch"): ([1], [0]),
    (OptimConfig, "clip"): ([None, 1e-9], [0, -1, NAN]),
    (SnapshotConfig, "every"): ([0, 1], [-1]),
    (SnapshotConfig, "last"): ([1, 2], [0]),
    (EvalConfig, "every"): ([None, 0, 1], [-1]),
    (EvalConfig, "targets"): ([1], [0]),
    (RunConfig, "batch_size"): ([1], [0]),
    (RunConfig, "seed"): ([0, 2**63 - 1], [-1, 2**63, 1.5]),
    (RunConfig, "device_batch"): ([None, 1, 2, 16, 99], [0, -1, 3]),  # of 16 rows; more are as many
    (RunConfig, "precision"): (["float32", "bfloat16", "auto"], ["float16"]),
    (RunConfig, "horizon"): (["steps=0.5", "tokens=1e-3", "ratio=1", "flops=1"], ["steps=0", "steps=-1", "days=1"]),
}


@pytest.mark.parametrize(("kind", "name"), LIMITS, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_a_field_is_taken_up_to_its_limit(kind: type, name: str):
    taken, refused = LIMITS[kind, name]
    for number in taken:
        assert getattr(kind(**{name: number}), name) == number
    for number in refused:
        with pytest.raises(ValueError, match=name):
            kind(**{name: number})


def test_defaults_are_what_a_file_without_the_field_means():
    assert dataclasses.asdict(OptimConfig()) == {
        "matrix_lr": 0.02,
        "embedding_lr": 0.3,
        "head_lr": 0.004,
        "scalar_lr": 0.5,
        "weight_decay": 0.0,
        "warmdown": 0.5,
        "momentum": (0.85, 0.95),
        "momentum_steps": 300,
        "reference_batch": 524288,
        "clip": None,
    }
    run = dataclasses.asdict(RunConfig())
    del run["model"], run["optim"]
    assert run == {
        "schedule": SCHEDULE,
        "batch_size": 16,
        "device_batch": None,
        "horizon": "tokens=1600000",
        "precision": "float32",
        "seed": 0,
        "init": None,
    }
    assert dataclasses.astuple(SnapshotConfig()) == (0, 2, True)
    assert dataclasses.astuple(EvalConfig()) == (None, 10_000)


def test_the_betas_of_every_row():
    slow = {r"\.(beta|gamma)$", r"^recall\.weights$"}
    assert slow <= {row.pattern for row in TABLE}
    for row in TABLE:
        assert row.betas == ((0.96, 0.95) if row.pattern in slow else (0.8, 0.95))


def test_steps_are_rounded_up_and_those_of_flops_to_the_nearest():
    run = RunConfig(model=ModelConfig(depth=1, width=16, heads=2, vocab_size=9, context=8), batch_size=2)
    cost, weights = run.flops_per_token * 16, run.weights
    for text, steps in {
        "steps=2.1": 3,
        "tokens=16": 1,
        "tokens=17": 2,
        "tokens=1_600": 100,
        "tokens=1,600": 100,
        "ratio=1": math.ceil(weights / 16),
        f"flops={2.4 * cost}": 2,
        f"flops={2.6 * cost}": 3,
        "flops=1": 1,
    }.items():
        assert Horizon.parse(text).steps(run) == steps, text


def test_evaluations_are_due_about_ten_times_and_at_the_end():
    def due(every: int | None, steps: int) -> list[int]:
        return [step for step in range(1, steps + 1) if EvalConfig(every=every).due(step, steps)]

    assert due(0, 10) == []
    assert due(4, 10) == [4, 8, 10]
    assert due(None, 40) == list(range(4, 41, 4))
    assert due(None, 3) == [1, 2, 3]


def test_the_demo_is_what_the_log_measured():
    runs = {name: recipes.RECIPES[f"demo-{name}"]() for name in ("transformer", "token-shift", "lrt")}
    sizes = {count_parameters(run.model)[0] for run in runs.values()}
    assert max(sizes) - min(sizes) <= 0.005 * max(sizes)
    for run in runs.values():
        model = run.model
        assert (model.depth, model.width, model.heads, model.context, model.vocab_size) == (4, 128, 2, 256, 2048)
        assert (run.batch_tokens, run.horizon, run.seed, run.precision) == (2048, "tokens=560000", 0, "float32")
        assert run.optim == OptimConfig(
            matrix_lr=0.02, embedding_lr=0.2, head_lr=0.01, scalar_lr=0.02, momentum_steps=100, reference_batch=2048
        )
    memories = {name: run.model.memory for name, run in runs.items()}
    assert memories["transformer"].injection == "none"
    assert memories["token-shift"].sources(4) == (0,)
    lrt = memories["lrt"]
    assert (lrt.source, lrt.combine, lrt.projection, lrt.initial) == ((0, 4), "channels", "layerwise", "embedding")
    assert [run.schedule for run in runs.values()] == ["plain()", "plain()", SCHEDULE]
    with pytest.raises(ValueError, match="unknown family 'rnn'; choose one of transformer, token_shift, lrt"):
        recipes.demo_recipe("rnn")


@pytest.mark.parametrize(
    ("layers", "tokens", "context", "device_batch", "precision"),
    [
        (2, 4096, 512, 8, "float32"),  # never fewer
        (4, 16384, 512, 16, "float32"),  # 524288 / 27 is 19418
        (6, 65536, 512, 16, "float32"),
        (8, 131072, 2048, 16, "bfloat16"),
        (12, 524288, 2048, 16, "bfloat16"),
        (20, 524288, 2048, 8, "bfloat16"),
        (24, 524288, 2048, 8, "bfloat16"),
    ],
)
def test_every_rung_of_the_ladder(layers: int, tokens: int, context: int, device_batch: int, precision: str):
    run = recipes.RECIPES[f"d{layers}"]()
    assert (run.batch_tokens, run.model.context, run.device_batch) == (tokens, context, device_batch)
    assert (run.precision, run.horizon) == (precision, "ratio=10")
    assert run.optim.weight_decay == pytest.approx(0.2 * (12 / layers) ** 2)
    assert run.optim.reference_batch == min(524288, 8 * tokens)
    assert dataclasses.replace(run.optim, weight_decay=0.0, reference_batch=524288) == OptimConfig()


def test_a_run_has_exploded_after_five_steps_one_nat_above_knowing_nothing():
    assert (EXPLOSION, PATIENCE) == (1.0, 5)
    nothing = math.log(300)

    def exploded(*losses: float) -> bool:
        return has_exploded([{"loss": loss} for loss in losses], 300)

    assert exploded(nothing, *[nothing + 1.001] * 5)
    assert not exploded(nothing, *[nothing + 0.999] * 5)
    assert not exploded(nothing, *[nothing + 1.001] * 4)
    assert not exploded(nothing, nothing + 2, nothing + 0.9, *[nothing + 2] * 4)
    assert not exploded(9.0, *[9.9] * 5)  # the first loss was larger
    assert exploded(9.0, *[10.1] * 5)


def test_the_report_of_a_divergence_has_the_last_fifty_steps(tmp_path: Path):
    lines = [{"step": step} for step in range(70)]
    text = report_divergence(tmp_path, "the loss at step 70 is nan", lines, tmp_path / "step-60", {"seed": 3})
    assert f"--resume {tmp_path / 'step-60'}" in text
    report = json.loads((tmp_path / "diverged.json").read_text())
    assert report == {
        "reason": "the loss at step 70 is nan",
        "snapshot": str(tmp_path / "step-60"),
        "last": lines[20:],
        "run": {"seed": 3},
    }
    assert "--snapshots.every N" in report_divergence(tmp_path, "…", lines, None, {})
