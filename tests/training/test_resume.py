"""One promise: an interrupted run goes on, and ends with the weights of the uninterrupted one, bit for bit."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_saver import save as save_shards

from lrt import MemoryConfig, ModelConfig
from lrt.data.prepare import prepare
from lrt.data.prepared import Prepared
from lrt.model import checkpoint
from lrt.model.checkpoint import snapshot_path, snapshots
from lrt.training.config import EvalConfig, RunConfig, SnapshotConfig
from lrt.training.loop import train
from lrt.training.resume import choose_snapshot
from lrt.training.trainer import Trainer
from lrt.utils.files import sha256

MIXTURE = "mixture([(0.5, interleaved(2)), (0.5, settled(0, 1, 1))])"


def run_config(tokens: int = 32 * 64) -> RunConfig:
    """64-token steps of a tiny LRT under a mixture, in two micro-batches; 32 steps."""
    model = ModelConfig(
        depth=2, width=32, heads=2, vocab_size=300, context=32, memory=MemoryConfig(source=(0, 2), combine="channels")
    )
    return RunConfig(model=model, schedule=MIXTURE, batch_size=2, device_batch=1, horizon=f"tokens={tokens}", seed=3)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(path)[0].state_dict()


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def stop_after(trainer: Trainer, steps: int, out: Path) -> None:
    """What a kill after `steps` steps leaves: a snapshot of then, and a metrics log that has gone further."""
    lines = [json.dumps(trainer.step()) for _ in range(steps)]
    trainer.save(snapshot_path(out, steps), {})
    lines.append(json.dumps(trainer.step()))
    (out / "metrics.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def whole(data: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    train(run_config(), data, out, progress=False)
    return out


def test_resuming_anywhere_gives_the_same_weights_and_metrics(data: Prepared, whole: Path, tmp_path: Path) -> None:
    stop_after(Trainer(run_config(), data, "cpu"), 11, tmp_path)
    train(run_config(), data, tmp_path, progress=False)
    assert_same(weights(tmp_path), weights(whole))
    compared = ("step", "tokens", "loss", "rate", "flops", "schedule")  # all but the clock
    metrics_logs = [(out / "metrics.jsonl").read_text().splitlines() for out in (whole, tmp_path)]
    one, other = ([{k: json.loads(line)[k] for k in compared} for line in lines] for lines in metrics_logs)
    assert one == other
    assert len(one) == 32


def test_a_run_without_resume_starts_again(data: Prepared, whole: Path, tmp_path: Path) -> None:
    other = replace(run_config(), seed=9)
    stop_after(Trainer(other, data, "cpu"), 5, tmp_path)
    train(run_config(), data, tmp_path, progress=False, resume_from="never")
    assert_same(weights(tmp_path), weights(whole))


def test_a_fresh_start_sets_the_old_run_aside_for_good(
    data: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(Trainer(replace(run_config(), seed=9), data, "cpu"), 5, tmp_path)
    (old,) = snapshots(tmp_path)
    kept, metrics = weights(old), (tmp_path / "metrics.jsonl").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        for _ in range(2):  # the second start has a .old in its way
            with pytest.raises(KeyboardInterrupt):
                train(run_config(), data, tmp_path, progress=False, resume_from="never")
    assert snapshots(tmp_path) == []
    assert_same(weights(tmp_path / "snapshots.old" / old.name), kept)
    assert (tmp_path / "metrics.jsonl.old").read_text() == metrics
    train(run_config(), data, tmp_path, progress=False, resume_from="never")
    assert len(weights(tmp_path / "checkpoint")) > 0
    assert_same(weights(tmp_path / "snapshots.old" / old.name), kept)  # the old run has no other weights
    assert [path.name for path in tmp_path.glob("snapshots*")] == ["snapshots.old"]


def test_a_finished_run_removes_its_snapshots_only(data: Prepared, tmp_path: Path) -> None:
    run, folders = stop_at_the_end(data, tmp_path), ("snapshots.old-keep", "snapshots.old", "snapshots/copy")
    for folder in folders:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "note.txt").write_text("a user's own")
    train(run, data, tmp_path, progress=False)
    assert len(weights(tmp_path / "checkpoint")) > 0
    assert snapshots(tmp_path) == []
    assert [(tmp_path / folder / "note.txt").read_text() for folder in folders] == ["a user's own"] * 3


def contents(path: Path) -> dict[str, bytes]:
    """The files of a folder, or a file by itself."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def interrupt_once(monkeypatch: pytest.MonkeyPatch, at: int) -> list[int]:
    """A kill before step `at`, the first time only; returns the list of steps, which grows as they are taken."""
    steps: list[int] = []
    step = Trainer.step

    def counted_step(self: Trainer) -> dict[str, Any]:
        steps.append(self.progress.step)
        if self.progress.step == at and steps.count(at) == 1:
            raise KeyboardInterrupt  # as a kill: nothing is saved here
        return step(self)

    monkeypatch.setattr(Trainer, "step", counted_step)
    return steps


LEFT = ("checkpoint", "best", "metrics.jsonl", "snapshots", "wandb-id")
"""What a run may leave in its folder."""


def test_going_on_from_elsewhere_sets_another_run_in_the_folder_aside(
    data: Prepared, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, other = tmp_path / "out", replace(run_config(tokens=6 * 64), seed=9)
    train(other, data, out, progress=False, evaluation=EvalConfig(3, 100))
    stop_after(Trainer(other, data, "cpu"), 2, out)
    (out / "wandb-id").write_text("of the other run")
    left = {name: contents(out / name) for name in LEFT}
    trainer = Trainer(run_config(), data, "cpu")
    stop_after(trainer, 4, tmp_path / "source")
    trainer.close()
    arguments: dict[str, Any] = {
        "progress": False, "snapshots": SnapshotConfig(every=3, last=1), "evaluation": EvalConfig(4, 100),
        "resume_from": str(snapshot_path(tmp_path / "source", 4)),
    }  # fmt: skip
    steps = interrupt_once(monkeypatch, at=8)
    with pytest.raises(KeyboardInterrupt):
        train(run_config(), data, out, **arguments)
    train(run_config(), data, out, **arguments)
    assert steps.count(5) == 1  # the second start went on from the snapshot of step 6
    train(run_config(), data, out, **arguments)  # finished
    assert_same(weights(out), weights(whole))
    assert {name: contents(out / f"{name}.old") for name in LEFT} == left
    assert not list(out.glob("*.old-2"))
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 32


def test_a_source_at_the_last_step_is_finished_once(data: Prepared, tmp_path: Path) -> None:
    run = stop_at_the_end(data, tmp_path / "source")
    for _ in range(2):
        train(run, data, tmp_path / "out", progress=False, resume_from=str(snapshot_path(tmp_path / "source", 6)))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["checkpoint", "metrics.jsonl"]


def test_a_source_that_is_refused_moves_nothing(data: Prepared, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stop_after(Trainer(run_config(), data, "cpu"), 2, out)
    before = contents(out)
    with pytest.raises(ValueError, match="another run"):
        train(replace(run_config(), seed=9), data, out, progress=False, resume_from=str(whole / "checkpoint"))
    assert contents(out) == before


def test_a_later_result_in_the_folder_of_the_source_is_set_aside(data: Prepared, tmp_path: Path) -> None:
    """As after a kill between the final save and the removal of snapshots: they lie beside the result."""
    run = run_config(tokens=6 * 64)
    train(run, data, tmp_path, progress=False, evaluation=EvalConfig(3, 100))
    stop_after(Trainer(run, data, "cpu"), 2, tmp_path)
    left = {name: contents(tmp_path / name) for name in ("checkpoint", "best")}
    gentle = replace(run, optim=replace(run.optim, matrix_lr=0.001))
    named = str(snapshot_path(tmp_path, 2))
    train(gentle, data, tmp_path, progress=False, evaluation=EvalConfig(3, 100), resume_from=named)
    assert {name: contents(tmp_path / f"{name}.old") for name in left} == left
    assert checkpoint.about(tmp_path / "checkpoint")["run"]["optim"]["matrix_lr"] == 0.001


@pytest.mark.parametrize("problem", ["damaged", "another path"])
def test_later_snapshots_do_not_stand_in_the_place_of_new_ones(
    data: Prepared, whole: Path, tmp_path: Path, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one snapshot to stay, the newest name was kept, whatever it held, and the whole ones went."""
    run, named = run_config(), "auto"
    trainer = Trainer(run, data, "cpu")
    stop_after(trainer, 4, tmp_path)
    trainer.save(snapshot_path(tmp_path, 30), trainer.about(1.0))
    if problem == "damaged":
        (snapshot_path(tmp_path, 30) / "training.pt").write_bytes(b"")
    else:
        run, named = replace(run, horizon="steps=31"), str(snapshot_path(tmp_path, 4))
    steps = interrupt_once(monkeypatch, at=9)
    keeping = SnapshotConfig(every=3, last=1)
    with pytest.raises(KeyboardInterrupt):
        train(run, data, tmp_path, progress=False, snapshots=keeping, resume_from=named)
    assert [path.name for path in snapshots(tmp_path)] == ["step-00000006", "step-00000009"]
    assert snapshot_path(tmp_path / "x", 30).name in [path.name for path in (tmp_path / "snapshots.old").iterdir()]
    train(run, data, tmp_path, progress=False, snapshots=keeping, resume_from=named)  # step 4 has gone by now
    assert steps.count(8) == 1
    if problem == "damaged":
        assert_same(weights(tmp_path), weights(whole))


def interrupted(self: Trainer) -> dict[str, object]:
    raise KeyboardInterrupt


@pytest.mark.parametrize("field", [{"every": -1}, {"last": 0}])
def test_the_snapshot_config_is_checked(field: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(field))):
        SnapshotConfig(**field)


def test_optimiser_state_matters(data: Prepared, whole: Path, tmp_path: Path) -> None:
    """The guard of the tests above: weights alone do not give the same run."""
    trainer = Trainer(run_config(), data, "cpu")
    for _ in range(11):
        trainer.step()
    fresh = Trainer(run_config(), data, "cpu")
    fresh.model.load_state_dict(trainer.model.state_dict())
    fresh.progress = trainer.progress
    while fresh.progress.step < run_config().steps:
        fresh.step()
    final = weights(whole)
    assert any(not torch.equal(p, final[name]) for name, p in fresh.model.state_dict().items())


def test_another_run_or_other_data_is_refused(data: Prepared, tmp_path: Path) -> None:
    stop_after(Trainer(run_config(), data, "cpu"), 2, tmp_path / "a")
    with pytest.raises(ValueError, match=r"seed: 3 there, 4 here.*--out"):
        train(replace(run_config(), seed=4), data, tmp_path / "a", progress=False)
    text = tmp_path / "other.txt"
    text.write_text("".join(f"{i} and {i + 1}\n" for i in range(400)))
    other = prepare(tmp_path / "other", [text], tokenizer=data.path / "tokenizer.json", progress=False)
    with pytest.raises(ValueError, match="other data"):
        train(run_config(), other, tmp_path / "a", progress=False)


def defaults(config: Any, *path: str) -> list[tuple[str, ...]]:
    """The fields of a configuration, and of those inside it, that are at their default: what could be missing."""
    paths: list[tuple[str, ...]] = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            paths += defaults(value, *path, field.name)
        elif value == getattr(type(config)(), field.name):
            paths.append((*path, field.name))
    return paths


def without(tree: dict[str, Any], *path: str) -> dict[str, Any]:
    """A copy of plain data without one entry."""
    name, *rest = path
    return {k: without(v, *rest) if k == name else v for k, v in tree.items() if rest or k != name}


def test_a_field_that_a_saved_run_lacks_has_its_default() -> None:
    run = run_config()
    plain = json.loads(json.dumps(run.to_dict()))
    missing = defaults(run)
    assert {("precision",), ("optim", "clip"), ("model", "loops"), ("model", "memory", "delay")} <= set(missing)
    for path in missing:
        assert RunConfig.from_dict(without(plain, *path)) == run, path
    assert RunConfig.from_dict(without(plain, "seed")) == replace(run, seed=0) != run
    with pytest.raises(ValueError, match=r"describes no run of this version.*karma"):
        RunConfig.from_dict({**plain, "karma": 1})


def rewrite(snapshot: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change what a snapshot says of its run and its model, everywhere that it does, and its manifest with it."""
    config = json.loads((snapshot / "config.json").read_text())
    config["about"]["run"] = change(config["about"]["run"])
    config["model"] = config["about"]["run"]["model"]
    (snapshot / "config.json").write_text(json.dumps(config))
    training = torch.load(snapshot / "training.pt", weights_only=True)
    torch.save({**training, "run": json.dumps(change(json.loads(training["run"])))}, snapshot / "training.pt")
    manifest = {
        name: {"bytes": (snapshot / name).stat().st_size, "sha256": sha256(snapshot / name)}
        for name in json.loads((snapshot / "manifest.json").read_text())
    }
    (snapshot / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("source", ["auto", "named"])
def test_a_snapshot_from_before_a_field_existed_goes_on(
    data: Prepared, whole: Path, tmp_path: Path, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """All fields at their default are missing, of the run, of its rates, its model and its memory."""
    trainer = Trainer(run_config(), data, "cpu")
    stop_after(trainer, 4, tmp_path)
    snapshot = snapshot_path(tmp_path, 5)
    trainer.save(snapshot, trainer.about(1.0))
    missing = defaults(run_config())
    rewrite(snapshot, lambda run: functools.reduce(lambda tree, path: without(tree, *path), missing, run))
    assert "clip" not in (snapshot / "config.json").read_text()
    assert choose_snapshot(tmp_path, "auto", run_config()) == snapshot
    train(run_config(), data, tmp_path, progress=False, resume_from="auto" if source == "auto" else str(snapshot))
    assert "other settings" not in capsys.readouterr().err
    assert_same(weights(tmp_path), weights(whole))


def test_a_missing_field_is_not_every_value(data: Prepared, tmp_path: Path) -> None:
    trainer = Trainer(run_config(), data, "cpu")
    stop_after(trainer, 2, tmp_path)
    trainer.save(snapshot_path(tmp_path, 3), trainer.about(1.0))
    rewrite(snapshot_path(tmp_path, 3), lambda run: without(run, "seed"))  # 3 here, 0 by default
    with pytest.raises(ValueError, match=r"seed: 0 there, 3 here.*--out"):
        train(run_config(), data, tmp_path, progress=False)


def test_a_damaged_snapshot_is_passed_over(
    data: Prepared, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = Trainer(run_config(), data, "cpu")
    stop_after(trainer, 4, tmp_path)
    trainer.save(snapshot_path(tmp_path, 5), {})
    damaged = tmp_path / "snapshots" / "step-00000005" / "training.pt"
    damaged.write_bytes(damaged.read_bytes()[:-7])
    train(run_config(), data, tmp_path, progress=False)
    assert "training.pt" in capsys.readouterr().err
    assert_same(weights(tmp_path), weights(whole))


def test_old_snapshots_go_and_none_is_left_at_the_end(
    data: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    save = Trainer.save

    def counting_save(self: Trainer, path: Path, about: dict[str, object]) -> None:
        save(self, path, about)
        counts.append(len(snapshots(tmp_path)))

    monkeypatch.setattr(Trainer, "save", counting_save)
    train(run_config(), data, tmp_path, progress=False, snapshots=SnapshotConfig(every=5, last=2))
    assert max(counts) == 3  # two, and the newest before the oldest goes
    assert snapshots(tmp_path) == []
    assert (tmp_path / "checkpoint" / "manifest.json").is_file()


def command(data: Prepared, out: Path, steps: int) -> list[str]:
    script = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import test_resume as t;"
        "from lrt.data.prepared import Prepared; from lrt.training.config import SnapshotConfig;"
        "from lrt.training.loop import train;"
        "import torch; torch.set_num_threads(1);"
        "train(t.run_config(int(sys.argv[4]) * 64), Prepared.open(sys.argv[2]), Path(sys.argv[3]),"
        " progress=False, snapshots=SnapshotConfig(every=3))"
    )
    return [sys.executable, "-c", script, str(Path(__file__).parent), str(data.path), str(out), str(steps)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_end_cleanly(data: Prepared, tmp_path: Path, number: int) -> None:
    process = subprocess.Popen(command(data, tmp_path, 100_000), stderr=subprocess.PIPE, text=True)
    metrics_file = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not snapshots(tmp_path):  # at work
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    error = process.communicate(timeout=60)[1]
    assert "KeyboardInterrupt" in error
    newest = int(snapshots(tmp_path)[-1].name.removeprefix("step-"))
    assert len(metrics_file.read_text().splitlines()) == newest  # nothing done was lost


@pytest.mark.slow
def test_killed_at_twenty_random_moments_a_run_ends_with_identical_weights(data: Prepared, tmp_path: Path) -> None:
    steps = 2000  # far more than twenty kills get through
    torch.set_num_threads(1)
    train(run_config(steps * 64), data, tmp_path / "whole", progress=False)
    out, generator, kills = tmp_path / "killed", random.Random(0), 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    while not (out / "checkpoint").is_dir():
        process = subprocess.Popen(command(data, out, steps), env=environment)
        before = len(snapshots(out)) and snapshots(out)[-1].name
        while process.poll() is None and kills < 20:
            now = snapshots(out)
            if now and now[-1].name != before:  # it got further; any moment will do, also in the middle of a save
                time.sleep(generator.uniform(0, 0.15))
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills += 1
            time.sleep(0.002)
        process.wait()
    assert kills == 20
    assert_same(weights(out), weights(tmp_path / "whole"))


# --- nothing is lost at the end -----------------------------------------------------------------------------------


def stop_at_the_end(data: Prepared, out: Path) -> RunConfig:
    """What a kill after the last step and before the final save leaves: the last step's snapshot, no checkpoint."""
    run = run_config(tokens=6 * 64)
    stop_after_all(Trainer(run, data, "cpu"), out)
    return run


def stop_after_all(trainer: Trainer, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(trainer.step()) for _ in range(trainer.steps)]
    (out / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    trainer.save(snapshot_path(out, trainer.steps), trainer.about(1.0))
    trainer.close()


def test_a_run_that_was_killed_before_its_final_save_is_scored_and_saved(data: Prepared, tmp_path: Path) -> None:
    run = stop_at_the_end(data, tmp_path / "killed")
    train(run, data, tmp_path / "killed", progress=False, evaluation=EvalConfig(targets=200))
    train(run, data, tmp_path / "whole", progress=False, evaluation=EvalConfig(targets=200))
    assert_same(weights(tmp_path / "killed" / "checkpoint"), weights(tmp_path / "whole" / "checkpoint"))
    scores = [checkpoint.about(tmp_path / name)["scores"] for name in ("killed", "whole")]
    assert scores[0] == scores[1]
    assert scores[0]["live_bpb"] > 0
    assert not (tmp_path / "killed" / "snapshots").exists()


def test_a_damaged_result_is_made_again_before_snapshots_go(data: Prepared, tmp_path: Path) -> None:
    run = stop_at_the_end(data, tmp_path)
    train(run, data, tmp_path, progress=False)
    expected = weights(tmp_path / "checkpoint")
    stop_after_all(Trainer(run, data, "cpu"), tmp_path)  # the snapshot is there again, as the kill left it
    file = tmp_path / "checkpoint" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    train(run, data, tmp_path, progress=False)
    assert_same(weights(tmp_path / "checkpoint"), expected)


def test_a_full_disk_at_the_final_save_loses_no_snapshot(
    data: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stop_at_the_end(data, tmp_path)

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("lrt.training.loop.save_result", full)
        with pytest.raises(OSError, match="no space left"):
            train(run, data, tmp_path, progress=False)
    assert len(snapshots(tmp_path)) == 1
    train(run, data, tmp_path, progress=False)
    assert len(weights(tmp_path / "checkpoint")) > 0


def test_a_horizon_that_is_passed_is_an_error_and_removes_nothing(data: Prepared, tmp_path: Path) -> None:
    stop_at_the_end(data, tmp_path)
    (named,) = snapshots(tmp_path)
    with pytest.raises(ValueError, match=r"stands at step 6, behind the horizon of 2 steps .*; give a horizon"):
        train(run_config(tokens=2 * 64), data, tmp_path, progress=False, resume_from=str(named))
    assert snapshots(tmp_path) == [named]
    assert weights(named)


# --- out of memory ------------------------------------------------------------------------------------------------


def test_a_run_goes_on_with_a_smaller_device_batch(
    data: Prepared, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_after(Trainer(replace(run_config(), device_batch=2), data, "cpu"), 11, tmp_path)
    train(run_config(), data, tmp_path, progress=False)  # device_batch=1
    assert "device_batch: 2 there, 1 here); numbers may differ in their last bits" in capsys.readouterr().err
    expected = weights(whole)
    for name, weight in weights(tmp_path).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-5)
    saved = (tmp_path / "checkpoint" / "config.json").stat().st_mtime_ns
    train(replace(run_config(), device_batch=2), data, tmp_path, progress=False)  # a finished run stays finished
    assert (tmp_path / "checkpoint" / "config.json").stat().st_mtime_ns == saved


FULL = {
    "GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "CPU": RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried …"),
    "Python": MemoryError(),
}


@pytest.mark.parametrize("error", FULL.values(), ids=FULL)
def test_out_of_memory_names_a_smaller_device_batch_and_loses_no_step(
    data: Prepared, tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, gradients = replace(run_config(6 * 256), batch_size=8, device_batch=None), Trainer._accumulate_gradients

    def full_at_step_3(self: Trainer, *arguments: Any) -> float:
        if self.progress.step == 3 and self.micro_batches == 1:
            raise error
        return gradients(self, *arguments)

    monkeypatch.setattr(Trainer, "_accumulate_gradients", full_at_step_3)
    with pytest.raises(ValueError, match=r"out of memory at step 3, with 8 rows .* give --device-batch 4,"):
        train(run, data, tmp_path, progress=False)
    assert [path.name for path in snapshots(tmp_path)] == ["step-00000003"]
    train(replace(run, device_batch=4), data, tmp_path, progress=False)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 6


def fail_after(function: Callable[..., Any], calls: int, error: Exception) -> Callable[..., Any]:
    """`function`, which fails after so many calls."""
    done: list[None] = []

    def counted(*arguments: Any, **options: Any) -> Any:
        if len(done) == calls:
            raise error
        done.append(None)
        return function(*arguments, **options)

    return counted


@pytest.mark.parametrize("step", [0, 3])
def test_out_of_memory_in_an_update_saves_no_half_updated_weights(
    data: Prepared, whole: Path, tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeping = SnapshotConfig(every=2)
    with monkeypatch.context() as patch:
        # Muon has updated its matrices by then.
        patch.setattr(torch.optim.AdamW, "step", fail_after(torch.optim.AdamW.step, step, FULL["GPU"]))
        with pytest.raises(ValueError, match=rf"out of memory in the update of step {step} .* not saved"):
            train(run_config(), data, tmp_path, progress=False, snapshots=keeping)
    assert [path.name for path in snapshots(tmp_path)] == ["step-00000002"] * (step > 2)
    train(run_config(), data, tmp_path, progress=False, snapshots=keeping)
    assert_same(weights(tmp_path), weights(whole))


@pytest.mark.parametrize(("every", "scorings", "steps"), [(5, 0, 5), (40, 1, 32)], ids=["on the way", "at the end"])
def test_out_of_memory_in_scoring_loses_no_step(
    data: Prepared, whole: Path, tmp_path: Path, every: int, scorings: int, steps: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    scores = {"live_bpb": 1.0, "parallel_bpb": 1.0, "gap": 0.0, "targets": 100}
    with monkeypatch.context() as patch:
        patch.setattr("lrt.training.loop.live_scores", fail_after(lambda *_: dict(scores), scorings, FULL["CPU"]))
        with pytest.raises(ValueError, match=rf"scoring live after {steps} steps on cpu; give --eval.every 0"):
            train(run_config(), data, tmp_path, progress=False, evaluation=EvalConfig(every, 100))
    assert [path.name for path in snapshots(tmp_path)] == [f"step-{steps:08d}"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == steps
    train(run_config(), data, tmp_path, progress=False)
    assert_same(weights(tmp_path), weights(whole))
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").open()] == list(range(32))


def test_one_row_that_does_not_fit_has_another_remedy(data: Prepared, tmp_path: Path) -> None:
    trainer = Trainer(run_config(), data, "cpu")
    assert "--execution.recompute passes" in trainer._advise_memory()
    trainer.close()


# --- a crafted snapshot runs nothing ------------------------------------------------------------------------------


class Touch:
    """Touches a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def sharded_snapshot(trainer: Trainer, path: Path, **entries: Any) -> None:
    """A snapshot as FSDP2 writes it, by one process: the optimisers' state in shards. `entries` replace a group's."""
    trainer.save(path, trainer.about(1.0))
    state = torch.load(path / "training.pt", weights_only=True)
    optimisers = get_optimizer_state_dict(trainer.model, list(trainer.optimiser.parts))
    optimisers["param_groups"][0] |= entries
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_shards({"optimisers": optimisers}, checkpoint_id=path / "optimisers")
    torch.save({k: v for k, v in state.items() if k != "optimisers"}, path / "training.pt")
    rewrite_manifest(path)


def rewrite_manifest(path: Path) -> None:
    files = [file for file in path.rglob("*") if file.is_file() and file.name != "manifest.json"]
    manifest = {str(f.relative_to(path)): {"bytes": f.stat().st_size, "sha256": sha256(f)} for f in files}
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_shards_are_read_without_unpickling_what_they_like(data: Prepared, whole: Path, tmp_path: Path) -> None:
    trainer = Trainer(run_config(), data, "cpu")
    stop_after(trainer, 7, tmp_path)
    sharded_snapshot(trainer, snapshot_path(tmp_path, 8))
    train(run_config(), data, tmp_path, progress=False)
    assert_same(weights(tmp_path), weights(whole))


@pytest.mark.parametrize("place", ["index", "entry", "training.pt"])
def test_a_crafted_snapshot_runs_nothing(data: Prepared, tmp_path: Path, place: str) -> None:
    touched = tmp_path / "touched"
    trainer = Trainer(run_config(), data, "cpu")
    stop_after(trainer, 3, tmp_path)
    snapshot = snapshot_path(tmp_path, 4)
    # An entry that is no tensor, such as a rate, is pickled by itself.
    sharded_snapshot(trainer, snapshot, **({"weight_decay": Touch(touched)} if place == "entry" else {}))
    trainer.close()
    if place == "index":
        (snapshot / "optimisers" / ".metadata").write_bytes(pickle.dumps(Touch(touched)))
    if place == "training.pt":
        torch.save({"run": Touch(touched)}, snapshot / "training.pt")
    rewrite_manifest(snapshot)
    with pytest.raises(ValueError, match=r"(optimisers|training.pt) cannot be read: .*; nothing in it was run"):
        train(run_config(), data, tmp_path / "out", progress=False, resume_from=str(snapshot))
    assert not touched.exists()
