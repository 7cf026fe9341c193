"""`--precision auto`: measured before training, said, kept, and otherwise as if it had been given."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lrt import MemoryConfig, ModelConfig
from lrt.cli.main import main
from lrt.data.prepared import Prepared
from lrt.model import checkpoint
from lrt.model.checkpoint import snapshot_path
from lrt.model.execution import Execution
from lrt.training import precision
from lrt.training.config import RunConfig, SnapshotConfig
from lrt.training.loop import train
from lrt.training.optim_config import OptimConfig
from lrt.training.precision import resolve_precision
from lrt.training.trainer import Trainer

MODEL = ModelConfig(depth=2, width=32, heads=2, vocab_size=300, context=32, memory=MemoryConfig(source=(0, 2)))
AUTO = RunConfig(
    MODEL, OptimConfig(reference_batch=256), "settled(0, 1, 1)", batch_size=8, device_batch=2, horizon="steps=4",
    precision="auto",
)  # fmt: skip
COMMAND = (
    "d2", "--model.depth", "1", "--model.width", "32", "--model.heads", "1", "--model.context", "32",
    "--model.memory.source", "1", "--batch-size", "4", "--horizon", "steps=2", "--precision", "auto",
    "--device", "cpu", "--eval.every", "0",
)  # fmt: skip


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What bfloat16's steps take of float32's, and how often that was asked."""
    state: dict[str, Any] = {"ratio": 0.5, "asked": []}

    def measured(*arguments: Any) -> float:
        state["asked"].append(arguments)
        return state["ratio"]

    monkeypatch.setattr(precision, "step_time_ratio", measured)
    return state


def saved_precision(path: Path) -> str:
    assert "auto" not in (path / "config.json").read_text()
    assert json.loads(torch.load(path / "training.pt", weights_only=True)["run"])["precision"] != "auto"
    return checkpoint.about(path)["run"]["precision"]


@pytest.mark.parametrize(
    ("ratio", "chosen", "words"),
    [
        (0.54, "bfloat16", "bfloat16, whose steps take 0.54 of float32's here (auto: median of 5 pairs of steps)"),
        (0.95, "bfloat16", "bfloat16, whose steps take 0.95 of float32's here"),
        (0.96, "float32", "float32, as bfloat16's steps take 0.96 of its own here, more than 0.95"),
    ],
)
def test_the_faster_one_is_chosen_if_it_pays(
    data: Prepared, tmp_path: Path, clock: dict[str, Any], ratio: float, chosen: str, words: str
):
    clock["ratio"] = ratio
    run, reason = resolve_precision(AUTO, data, tmp_path, execution=Execution("never", "passes"))
    assert run == replace(AUTO, precision=chosen)
    assert reason.startswith(words)
    ((half, single, *_, execution, _, _),) = clock["asked"]
    assert (half.precision, single.precision) == ("bfloat16", "float32")
    assert half.model == single.model == AUTO.model
    assert half.batch_size == single.batch_size == AUTO.device_batch  # one micro-batch
    assert execution == Execution("never", "passes")


def test_what_is_given_is_not_measured(data: Prepared, tmp_path: Path, clock: dict[str, Any]):
    for given in ("float32", "bfloat16"):
        run = replace(AUTO, precision=given)
        assert resolve_precision(run, data, tmp_path) == (run, "")
    assert clock["asked"] == []


def test_a_run_is_the_one_that_its_precision_would_have_given(
    data: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Measured for real, with a limit that takes whatever the clock says."""
    monkeypatch.setattr(precision, "WORTHWHILE", 1e9)
    model, _ = train(AUTO, data, tmp_path / "auto", progress=False)
    said = capsys.readouterr().err
    assert "training: uncompiled passes (compile is never); bfloat16, whose steps take " in said
    expected, _ = train(replace(AUTO, precision="bfloat16"), data, tmp_path / "given", progress=False)
    assert capsys.readouterr().err == "training: uncompiled passes (compile is never)\n"
    for actual, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(actual, wanted)
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("auto", "given")]
    assert [json.loads(line)["loss"] for line in lines[0]] == [json.loads(line)["loss"] for line in lines[1]]
    assert saved_precision(tmp_path / "auto" / "checkpoint") == "bfloat16"


@pytest.mark.parametrize("source", ["auto", "named"])
def test_a_run_that_goes_on_keeps_its_precision(
    data: Prepared, tmp_path: Path, clock: dict[str, Any], monkeypatch: pytest.MonkeyPatch, source: str
):
    def interrupted(self: Trainer) -> dict[str, object]:
        if self.progress.step == 2:
            raise KeyboardInterrupt
        return step(self)

    step = Trainer.step
    monkeypatch.setattr(Trainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(AUTO, data, tmp_path, progress=False, snapshots=SnapshotConfig(every=1))
    monkeypatch.setattr(Trainer, "step", step)
    assert len(clock["asked"]) == 1
    clock["ratio"] = 2.0  # by now
    snapshot = snapshot_path(tmp_path, 2)
    assert saved_precision(snapshot) == "bfloat16"
    resume_from = "auto" if source == "auto" else str(snapshot)
    resolved = resolve_precision(AUTO, data, tmp_path, resume_from=resume_from)
    assert resolved == (replace(AUTO, precision="bfloat16"), "bfloat16, in which this run has begun")
    train(AUTO, data, tmp_path, progress=False, resume_from=resume_from)
    train(AUTO, data, tmp_path, progress=False)  # of a finished run nothing is done again
    assert len(clock["asked"]) == 1
    assert saved_precision(tmp_path / "checkpoint") == "bfloat16"
    assert resolve_precision(AUTO, data, tmp_path, resume_from="never")[0].precision == "float32"


def test_beside_a_run_of_the_other_precision_one_goes_on_from_its_own(
    data: Prepared, tmp_path: Path, clock: dict[str, Any]
):
    """Of two snapshots in a folder, the older is of this run, the newer of another seed."""
    for step, seed, kept in ((1, AUTO.seed, "bfloat16"), (2, 7, "float32")):
        trainer = Trainer(replace(AUTO, seed=seed, precision=kept), data, "cpu")
        trainer.save(snapshot_path(tmp_path, step), trainer.about(1.0))
    assert resolve_precision(AUTO, data, tmp_path)[0].precision == "bfloat16"
    assert resolve_precision(replace(AUTO, seed=7), data, tmp_path)[0].precision == "float32"
    assert clock["asked"] == []


def test_nothing_computes_in_a_precision_that_is_still_open(data: Prepared):
    with pytest.raises(ValueError, match="precision is 'auto', which `lrt train` measures; here give float32 or"):
        Trainer(AUTO, data, "cpu")


def test_the_plan_says_what_was_chosen(
    data: Prepared, tmp_path: Path, clock: dict[str, Any], capsys: pytest.CaptureFixture[str]
):
    main(["train", "--data", str(data.path), "--out", str(tmp_path / "run"), *COMMAND])
    plan = capsys.readouterr().out.splitlines()[0]
    assert plan.endswith(
        "training FLOPs; bfloat16, whose steps take 0.50 of float32's here (auto: median of 5 pairs of steps)"
    )
    assert len(clock["asked"]) == 1


def test_precision_and_horizon_are_not_measured_in_one_another(
    data: Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        main(["train", "--data", str(data.path), *COMMAND, "--match", "wall_clock", str(tmp_path)])
    assert "precision is 'auto', and --match wall_clock times steps in the precision" in capsys.readouterr().err
