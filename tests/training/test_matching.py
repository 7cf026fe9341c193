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
from lrt.model.execution import Execution
from lrt.model.size import count_parameters
from lrt.training import recipes
from lrt.training.config import RunConfig
from lrt.training.loop import train
from lrt.training.matching import (
    KINDS,
    PAIRS,
    WARM,
    Launch,
    ReferenceRun,
    StepTimes,
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
    return {c.name for c in compare_runs(run, reference, data, Launch(Path())) if not c.equal}


def test_parameters(data: Prepared, reference: ReferenceRun, tmp_path: Path):
    assert "parameters" in mismatches(TRANSFORMER, reference, data)
    run = match(TRANSFORMER, "parameters", reference, data, Launch(tmp_path))
    size, wanted = count_parameters(run.model)[0], count_parameters(LRT.model)[0]
    assert abs(size - wanted) <= 0.005 * wanted
    assert replace(run.model, mlp_width=None) == TRANSFORMER.model  # nothing but the MLP
    assert "parameters" not in mismatches(run, reference, data)


def test_the_smaller_model_is_widened_not_the_larger_narrowed(data: Prepared, tmp_path: Path):
    train(TRANSFORMER, data, tmp_path, progress=False)
    with pytest.raises(ValueError, match="the smaller one is widened: train this one first"):
        match(LRT, "parameters", ReferenceRun.read(tmp_path), data, Launch(tmp_path))


def test_tokens_shut_the_trap_of_equal_ratios(data: Prepared, reference: ReferenceRun, tmp_path: Path):
    """Trap 5 of spec, section 5: at an equal ratio of tokens to parameters the larger LRT gets more tokens."""
    assert LRT.tokens > TRANSFORMER.tokens
    assert "tokens" in mismatches(TRANSFORMER, reference, data)
    run = match(TRANSFORMER, "tokens", reference, data, Launch(tmp_path))
    assert run.tokens == LRT.tokens
    assert "tokens" not in mismatches(run, reference, data)


def test_a_baseline_with_fewer_value_embeddings_is_said(data: Prepared, reference: ReferenceRun):
    """Trap 5 of spec, section 5: the published baseline has them on every other layer, the LRT on all."""
    poorer = replace(TRANSFORMER, model=replace(TRANSFORMER.model, value_embeddings="alternate"))
    assert "value embeddings" in mismatches(poorer, reference, data)


def test_compute_counts_every_pass(data: Prepared, reference: ReferenceRun, tmp_path: Path):
    """Trap 4 of spec, section 5: of FLOPs without the extra passes the baseline would get as many tokens as the LRT."""
    run = match(TRANSFORMER, "compute", reference, data, Launch(tmp_path))
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
    run = match(TRANSFORMER, "wall_clock", reference, data, Launch(tmp_path))
    assert run.horizon == f"tokens={round(LRT.tokens * 1.5)}"
    paired = schedules[2 * WARM :]
    assert paired == [TRANSFORMER.schedule, LRT.schedule] * PAIRS
    # A run that goes on has the horizon that it began with, whatever the clock says by now.
    seconds[TRANSFORMER.schedule] = 9.0
    assert match(TRANSFORMER, "wall_clock", reference, data, Launch(tmp_path)) == run
    # Also where an older version measured the ratio, which did not know a field that has its default here.
    file = tmp_path / "wall_clock.json"
    saved = json.loads(file.read_text())
    del saved["of"]["run"]["precision"], saved["of"]["beside"]["model"]["memory"]["delay"]
    file.write_text(json.dumps(saved))
    assert match(TRANSFORMER, "wall_clock", reference, data, Launch(tmp_path)) == run
    other_model = replace(TRANSFORMER, seed=7)
    assert match(other_model, "wall_clock", reference, data, Launch(tmp_path)).horizon != run.horizon


MODES = [
    (Execution("always"), "float32", ("always", "nothing")),
    (Execution("never", "passes"), "float32", ("never", "passes")),
    (Execution("auto"), "bfloat16", ("never", "nothing")),
]


@pytest.mark.parametrize(("execution", "precision", "mode"), MODES)
def test_steps_are_timed_in_the_mode_that_the_run_has(
    data: Prepared, reference: ReferenceRun, tmp_path: Path, monkeypatch, execution, precision, mode
):
    timed: set[tuple[str, ...]] = set()

    def measured(trainer: Trainer) -> float:
        run, execution = trainer.run, trainer.execution
        timed.add((run.schedule, execution.compile, execution.recompute, run.precision))
        return 1.0

    monkeypatch.setattr("lrt.training.matching.seconds_per_token", measured)
    transformer = replace(TRANSFORMER, precision=precision)
    run = match(transformer, "wall_clock", reference, data, Launch(tmp_path, execution=execution))
    assert timed == {(TRANSFORMER.schedule, *mode, precision), (LRT.schedule, *mode, LRT.precision)}
    trainer = Trainer(run, data, "cpu", execution=execution)
    assert (trainer.execution.compile, trainer.execution.recompute) == mode


def timed_by_mode(monkeypatch: pytest.MonkeyPatch, seconds: dict[tuple[str, str], float]) -> list[str]:
    """Steps that take these seconds by schedule and compilation; returns the modes of TRANSFORMER that are timed."""
    modes: list[str] = []

    def measured(trainer: Trainer) -> float:
        if trainer.run.schedule == TRANSFORMER.schedule:
            modes.append(trainer.execution.compile)
        return seconds.get((trainer.run.schedule, trainer.execution.compile), 1.0)

    monkeypatch.setattr("lrt.training.matching.seconds_per_token", measured)
    monkeypatch.setattr("lrt.model.execution.LONG", round(1.5 * LRT.tokens / TRANSFORMER.batch_tokens))
    monkeypatch.setattr("lrt.utils.torch_private.missing_compiler", lambda device: None)
    return modes


def test_a_horizon_that_turns_compiling_on_is_measured_with_it(
    data: Prepared, reference: ReferenceRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Uncompiled steps are twice as fast as the reference's, so that the run is long enough to be compiled."""
    modes = timed_by_mode(monkeypatch, {("plain()", "never"): 0.5, ("plain()", "always"): 0.25})
    launch = Launch(tmp_path, execution=Execution("auto"))
    run = match(TRANSFORMER, "wall_clock", reference, data, launch)
    assert modes == ["never"] * (WARM + PAIRS) + ["always"] * (WARM + PAIRS)
    assert run.horizon == f"tokens={4 * LRT.tokens}"
    modes.clear()
    assert match(TRANSFORMER, "wall_clock", reference, data, launch) == run
    assert modes == []


def test_a_horizon_that_no_mode_agrees_with_is_an_error(
    data: Prepared, reference: ReferenceRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    timed_by_mode(monkeypatch, {("plain()", "never"): 0.5, ("plain()", "always"): 2.0})
    with pytest.raises(ValueError, match=r"give --execution\.compile always or never"):
        match(TRANSFORMER, "wall_clock", reference, data, Launch(tmp_path, execution=Execution("auto")))


def test_a_ratio_of_another_run_mode_or_version_is_not_used(
    data: Prepared, reference: ReferenceRun, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("lrt.training.matching.seconds_per_token", lambda trainer: 1.0)
    launch, file = Launch(tmp_path), tmp_path / "wall_clock.json"
    run = match(TRANSFORMER, "wall_clock", reference, data, launch)
    right = json.loads(file.read_text()) | {"ratio": 2.0}
    wrong = {
        "is not of this run": {"of": {"run": LRT.to_dict(), "beside": LRT.to_dict()}},
        "with other mode:": {"conditions": right["conditions"] | {"mode": {"compile": "always"}}},
        "with other hardware:": {"conditions": right["conditions"] | {"hardware": {"torch": "2.0"}}},
        "with other code:": {"conditions": right["conditions"] | {"code": "0.1"}},
        "with other mode, mode beside, processes, hardware, code:": {"conditions": {}},
    }
    for said, change in wrong.items():
        file.write_text(json.dumps(right | change))
        row = compare_runs(run, reference, data, launch)[-1]
        assert "not measured so" in str(row)
        capsys.readouterr()
        assert match(TRANSFORMER, "wall_clock", reference, data, launch) == run
        assert said in capsys.readouterr().err
        assert compare_runs(run, reference, data, launch)[-1].equal
    file.write_text("{")
    assert "not measured so" in str(compare_runs(run, reference, data, launch)[-1])
    assert match(TRANSFORMER, "wall_clock", reference, data, launch) == run
    # A run that has begun rests on its ratio, however that was measured; the row says that it was not as now.
    (tmp_path / "snapshots" / "step-00000010").mkdir(parents=True)
    old = {name: right[name] for name in ("ratio", "pairs", "of")}  # as version 0.1 wrote it
    file.write_text(json.dumps(old))
    capsys.readouterr()
    begun = match(TRANSFORMER, "wall_clock", reference, data, launch)
    assert begun.horizon == f"tokens={LRT.tokens // 2}"
    assert "the run has begun, and keeps its horizon" in capsys.readouterr().err
    assert "not measured so" in str(compare_runs(begun, reference, data, launch)[-1])
    assert StepTimes.read(tmp_path) == StepTimes(**old)


def test_the_width_comes_before_what_is_measured_of_it(
    data: Prepared, reference: ReferenceRun, tmp_path: Path, monkeypatch
):
    widths: list[int | None] = []

    def measured(trainer: Trainer) -> float:
        widths.append(trainer.run.model.mlp_width)
        return 1.0

    monkeypatch.setattr("lrt.training.matching.seconds_per_token", measured)
    run = match_all(TRANSFORMER, [("wall_clock", reference), ("parameters", reference)], data, Launch(tmp_path))
    assert run.model.mlp_width is not None
    assert set(widths) == {run.model.mlp_width, LRT.model.mlp_width}
    assert compare_runs(run, reference, data, Launch(tmp_path))[-1].equal
    assert "not measured" in str(compare_runs(run, reference, data, Launch(tmp_path / "elsewhere"))[-1])


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
        match(TRANSFORMER, "karma", reference, data, Launch(tmp_path))
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
