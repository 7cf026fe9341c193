"""How a run begins and ends: what is checked before any work, what is scored, what is left behind."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lrt import MemoryConfig, ModelConfig
from lrt.data.prepared import Prepared
from lrt.training import loop, matching, monitor
from lrt.training.config import EvalConfig, RunConfig
from lrt.training.loop import train
from lrt.training.matching import StepTimes, seconds_per_token
from lrt.training.optim_config import OptimConfig
from lrt.training.trainer import Trainer

MODEL = ModelConfig(depth=1, width=16, heads=2, vocab_size=300, context=16, memory=MemoryConfig(source=(0, 1)))
RUN = RunConfig(model=MODEL, optim=OptimConfig(reference_batch=32), schedule="plain()", batch_size=2, horizon="steps=4")


@pytest.mark.parametrize(
    ("evaluation", "targets"),
    [(None, []), (EvalConfig(every=0), []), (EvalConfig(2, 7), [7, 7, 50_000]), (EvalConfig(4, 60_000), [60_000] * 2)],
    ids=["none", "never", "few", "many"],
)
def test_the_end_is_scored_on_fifty_thousand_tokens_at_least(
    data: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evaluation: EvalConfig | None, targets: list[int]
):
    asked: list[int] = []

    def evaluate_step(training: Any, targets: int) -> dict[str, Any]:
        asked.append(targets)
        return {"live_bpb": 1.0, "parallel_bpb": 1.0, "gap": 0.0}

    monkeypatch.setattr(loop, "evaluate_step", evaluate_step)
    train(RUN, data, tmp_path, progress=False, evaluation=evaluation)
    assert asked == targets


def test_an_unknown_logger_is_refused_before_anything_is_written(data: Prepared, tmp_path: Path):
    with pytest.raises(ValueError, match="cannot log to nowhere"):
        train(RUN, data, tmp_path / "out", progress=False, log_to=("nowhere",))
    assert not (tmp_path / "out").exists()


def test_a_closed_trainer_leaves_no_thread_and_goes_on(data: Prepared):
    before = threading.active_count()
    trainer, other = Trainer(RUN, data, "cpu"), Trainer(RUN, data, "cpu")
    losses = []
    for _ in range(3):
        losses.append(trainer.step()["loss"])
        assert threading.active_count() > before
        trainer.close()
        assert threading.active_count() == before
    trainer.close()
    assert losses == [other.step()["loss"] for _ in range(3)]
    other.close()


def test_a_step_time_is_per_token_and_the_mean_of_a_mixtures_parts():
    taken = {"plain()": 2.0, "interleaved(2)": 6.0}
    trainer: Any = SimpleNamespace(
        run=SimpleNamespace(schedule="mixture([(0.25, plain()), (0.75, interleaved(2))])", batch_tokens=40),
        progress=SimpleNamespace(seconds=100.0),
    )

    def step() -> None:
        trainer.progress = SimpleNamespace(seconds=trainer.progress.seconds + taken[repr(trainer.schedule)])

    trainer.step = step
    assert seconds_per_token(trainer) == pytest.approx((0.25 * 2 + 0.75 * 6) / 40)


def test_a_kept_ratio_is_of_this_very_pair():
    other = replace(RUN, seed=5)
    pair = {"run": {**RUN.to_dict(), "horizon": ""}, "beside": other.to_dict()}
    kept = StepTimes(2.0, 12, pair)
    assert kept.is_of(RUN, other)
    assert kept.is_of(replace(RUN, horizon="steps=9"), other)
    assert not kept.is_of(other, RUN)
    assert not kept.is_of(RUN, RUN)
    damaged: list[dict[str, Any]] = [{}, {"run": 1, "beside": 2}, {"run": {}}, {**pair, "run": {"unknown": 1}}]
    for saved in damaged:
        assert not StepTimes(2.0, 12, saved).is_of(RUN, other)


def test_the_sample_over_which_gates_are_averaged(data: Prepared, monkeypatch: pytest.MonkeyPatch):
    shapes = []
    monkeypatch.setattr(monitor, "layer_stats", lambda model, tokens: shapes.append(tuple(tokens.shape)))
    assert "memory_layers" in monitor.memory_by_layer(Trainer(RUN, data, "cpu").model, data)
    monkeypatch.setattr(monitor, "MEMORY_SAMPLE", (3, 5))
    monitor.memory_by_layer(Trainer(RUN, data, "cpu").model, data)
    assert shapes == [(2, 15), (3, 5)]  # inputs of windows of 16 tokens
    plain = replace(RUN, model=replace(MODEL, memory=MemoryConfig(injection="none")))
    assert monitor.memory_by_layer(Trainer(plain, data, "cpu").model, data) == {}


def test_what_a_pair_is_compared_by():
    quantities = matching.quantities(RUN)
    assert (quantities["batch, tokens per step"], quantities["tokens"], quantities["seed"]) == (32, 128, 0)
    assert quantities["depth and width"] == "1 x 16"
    assert "matrix_lr 0.02" in str(quantities["rates"])
