"""Fair pairs: what is matched is equal, what is not is said, and the published comparison's two traps stay shut."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lrt import MemoryConfig, ModelConfig
from lrt.cli.main import main
from lrt.data.prepared import Prepared
from lrt.distributed.single_process import SINGLE_PROCESS
from lrt.model.size import count_parameters
from lrt.training import recipes
from lrt.training.config import RunConfig
from lrt.training.loop import train
from lrt.training.matching import (
    KINDS,
    PAIRS,
    WARM,
    ReferenceRun,
    compare_runs,
    match,
    match_all,
    seconds_per_token,
    step_time_ratio,
)
from lrt.training.trainer import Trainer


def config(memory: MemoryConfig, **fields: Any) -> RunConfig:
    model = ModelConfig(depth=2, width=32, heads=2, vocab_size=300, context=32, memory=memory, value_embeddings="all")
    return RunConfig(**{"model": model, "batch_size": 2, "horizon": "ratio=0.5", **fields})


LRT = config(MemoryConfig(source=(0, 2), combine="channels", projection="layerwise"), schedule="settled(0, 1, 1)")
TRANSFORMER = config(MemoryConfig(injection="none"), schedule="plain()")


@pytest.fixture(scope="module")
def reference(data: Prepared, tmp_path_factory: pytest.TempPathFactory) -> ReferenceRun:
    out = tmp_path_factory.mktemp("lrt")
    train(LRT, data, out, progress=False)
    return ReferenceRun.read(out)


def mismatches(run: RunConfig, reference: ReferenceRun, data: Prepared) -> set[str]:
    return {c.name for c in compare_runs(run, reference, data, Path()) if not c.equal}


def test_parameters(data: Prepared, reference: ReferenceRun, tmp_path: Path):
    assert "parameters" in mismatches(TRANSFORMER, reference, data)
    run = match(TRANSFORMER, "parameters", reference, data, SINGLE_PROCESS, tmp_path)
    size, wanted = count_parameters(run.model)[0], count_parameters(LRT.model)[0]
    assert abs(size - wanted) <= 0.005 * wanted
    assert replace(run.model, mlp_width=None) == TRANSFORMER.model  # nothing but the MLP
    assert "parameters" not in mismatches(run, reference, data)


def test_the_smaller_model_is_widened_not_the_larger_narrowed(data: Prepared, tmp_path: Path):
    train(TRANSFORMER, data, tmp_path, progress=False)
    with pytest.raises(ValueError, match="the smaller one is widened: train this one first"):
        match(LRT, "parameters", ReferenceRun.read(tmp_path), data, SINGLE_PROCESS, tmp_path)


def test_tokens_shut_the_trap_of_equal_ratios(data: Prepared, reference: ReferenceRun, tmp_path: Path):
    """Trap 5 of spec, section 5: at an equal ratio of tokens to parameters the larger LRT gets more tokens."""
    assert LRT.tokens > TRANSFORMER.tokens
    assert "tokens" in mismatches(TRANSFORMER, reference, data)
    run = match(TRANSFORMER, "tokens", reference, data, SINGLE_PROCESS, tmp_path)
    assert run.tokens == LRT.tokens
    assert "tokens" not in mismatches(run, reference, data)


def test_a_baseline_with_fewer_value_embeddings_is_said(data: Prepared, reference: ReferenceRun):
    """Trap 5 of spec, section 5: the published baseline has them on every other layer, the LRT on all."""
    poorer = replace(TRANSFORMER, model=replace(TRANSFORMER.model, value_embeddings="alternate"))
    assert "value embeddings" in mismatches(poorer, reference, data)


def test_compute_counts_every_pass(data: Prepared, reference: ReferenceRun, tmp_path: Path):
    """Trap 4 of spec, section 5: of FLOPs without the extra passes the baseline would get as many tokens as the LRT."""
    run = match(TRANSFORMER, "compute", reference, data, SINGLE_PROCESS, tmp_path)
    assert run.flops == pytest.approx(LRT.flops, rel=0.5 / run.steps)
    assert run.tokens > 1.3 * LRT.tokens
    assert "training FLOPs" not in mismatches(run, reference, data)


def test_wall_clock_divides_the_tokens_by_the_ratio_of_paired_steps(
    data: Prepared, reference: ReferenceRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seconds = {LRT.schedule: 3.0, TRANSFORMER.schedule: 2.0}
    schedules: list[str] = []

    def measured(trainer: Trainer) -> float:
        schedules.append(trainer.run.schedule)
        return seconds[trainer.run.schedule] * (1 + 0.3 * (len(schedules) // 2 % 3 == 0))  # a clock that drifts

    monkeypatch.setattr("lrt.training.matching.seconds_per_token", measured)
    run = match(TRANSFORMER, "wall_clock", reference, data, SINGLE_PROCESS, tmp_path)
    assert run.horizon == f"tokens={round(LRT.tokens * 1.5)}"
    paired = schedules[2 * WARM :]
    assert paired == [TRANSFORMER.schedule, LRT.schedule] * PAIRS
    # A run that goes on has the horizon that it began with, whatever the clock says by now.
    seconds[TRANSFORMER.schedule] = 9.0
    assert match(TRANSFORMER, "wall_clock", reference, data, SINGLE_PROCESS, tmp_path) == run
    # Also where an older version measured the ratio, which did not know a field that has its default here.
    file = tmp_path / "wall_clock.json"
    saved = json.loads(file.read_text())
    del saved["of"]["run"]["precision"], saved["of"]["beside"]["model"]["memory"]["delay"]
    file.write_text(json.dumps(saved))
    assert match(TRANSFORMER, "wall_clock", reference, data, SINGLE_PROCESS, tmp_path) == run
    other_model = replace(TRANSFORMER, seed=7)
    assert match(other_model, "wall_clock", reference, data, SINGLE_PROCESS, tmp_path).horizon != run.horizon


def test_the_width_comes_before_what_is_measured_of_it(
    data: Prepared, reference: ReferenceRun, tmp_path: Path, monkeypatch
):
    widths: list[int | None] = []

    def measured(trainer: Trainer) -> float:
        widths.append(trainer.run.model.mlp_width)
        return 1.0

    monkeypatch.setattr("lrt.training.matching.seconds_per_token", measured)
    run = match_all(TRANSFORMER, [("wall_clock", reference), ("parameters", reference)], data, SINGLE_PROCESS, tmp_path)
    assert run.model.mlp_width is not None
    assert set(widths) == {run.model.mlp_width, LRT.model.mlp_width}
    assert compare_runs(run, reference, data, tmp_path)[-1].equal
    assert "not measured" in str(compare_runs(run, reference, data, tmp_path / "elsewhere")[-1])


def test_a_step_of_a_mixture_costs_the_mean_of_its_parts(data: Prepared, monkeypatch: pytest.MonkeyPatch):
    cost = {"plain()": 1.0, "interleaved(2)": 2.0}

    def step(self: Trainer) -> dict[str, Any]:
        self.progress = replace(self.progress, seconds=self.progress.seconds + cost[repr(self.schedule)])
        return {}

    monkeypatch.setattr(Trainer, "step", step)
    mixed = replace(LRT, schedule="stages([(0.5, plain()), (0.5, mixture([(0.75, plain()), (0.25, interleaved(2))]))])")
    assert seconds_per_token(Trainer(mixed, data, "cpu")) == pytest.approx((0.875 * 1 + 0.125 * 2) / 64)


def test_two_runs_of_one_kind_take_equal_time(data: Prepared):
    """No clock is judged; that the ratio of a run to itself is near 1 shows that both sides are measured alike."""
    assert 0.2 < step_time_ratio(TRANSFORMER, TRANSFORMER, data, SINGLE_PROCESS) < 5


def test_a_run_of_this_version_is_read_back(reference: ReferenceRun):
    assert reference.run == LRT
    assert RunConfig.from_dict(recipes.RECIPES["d12"]().to_dict()) == recipes.RECIPES["d12"]()


def test_what_cannot_be_matched_is_said(data: Prepared, reference: ReferenceRun, tmp_path: Path):
    with pytest.raises(ValueError, match=f"choose one of {', '.join(KINDS)}"):
        match(TRANSFORMER, "karma", reference, data, SINGLE_PROCESS, tmp_path)
    with pytest.raises(ValueError, match=r"no manifest\.json"):
        ReferenceRun.read(tmp_path)


def test_the_command_line_says_what_is_equal_and_what_is_not(
    data: Prepared, reference: ReferenceRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    size = ("--model.depth", "2", "--model.width", "32", "--model.heads", "2", "--model.context", "32")
    flags = ("--batch-size", "2", "--device-batch", "2", "--horizon", "ratio=0.5", "--device", "cpu")
    matches = ("--match", "parameters", str(reference.path), "--match", "tokens", str(reference.path))
    main(["train", "--data", str(data.path), "--out", str(tmp_path), *matches, "d2-transformer", *size, *flags])
    text = capsys.readouterr().out
    assert f"beside {reference.path}:" in text
    assert "equal     tokens" in text
    assert "equal     parameters" in text
    assert "MISMATCH  training FLOPs" in text
    assert "MISMATCH  rates" in text
    trained = ReferenceRun.read(tmp_path).run
    assert trained.tokens == LRT.tokens
    assert trained.model.mlp_width is not None
