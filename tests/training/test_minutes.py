"""A horizon in minutes, and how long a run takes: measured once, kept, and of no effect on numbers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from support.runs import TINY

from lrt.cli.main import main
from lrt.data.prepared import Prepared
from lrt.model import checkpoint
from lrt.model.config import ModelConfig
from lrt.model.execution import Execution
from lrt.training import minutes, speed
from lrt.training.config import EvalConfig, RunConfig
from lrt.training.matching import Launch
from lrt.training.minutes import MeasuredHorizon, affordable_tokens, with_minutes
from lrt.training.monitor import FINAL_TARGETS, scored_tokens
from lrt.training.resume import steps_done
from lrt.training.speed import Speed, estimate_run, measure_speed
from lrt.utils.timing import format_duration

SILENT = EvalConfig(every=0)
SPEED = Speed(train=1e-3, live=2e-3, parallel=1e-3)


@pytest.fixture
def run(data: Prepared) -> RunConfig:
    model = ModelConfig(depth=2, width=16, heads=2, context=32, vocab_size=data.vocab_size)
    return RunConfig(model=model, schedule="plain()", batch_size=4, horizon="steps=60")


def count_measuring(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Horizons of the runs whose speed was measured: it is SPEED."""
    measured: list[str] = []

    def measure(run: RunConfig, *_: object) -> Speed:
        measured.append(run.horizon)
        return SPEED

    monkeypatch.setattr(minutes, "measure_speed", measure)
    return measured


# --- what is counted -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "steps", "done", "times"),
    [(None, 100, 0, 10), (None, 100, 50, 5), (None, 105, 0, 11), (40, 100, 0, 3), (None, 3, 0, 3)],
)
def test_scored_tokens_are_those_of_every_evaluation_that_is_due(every: int | None, steps: int, done: int, times: int):
    config = EvalConfig(every, targets=7)
    assert sum(config.due(step, steps) for step in range(done + 1, steps + 1)) == times
    assert scored_tokens(config, steps, 10**6, done) == 7 * times + FINAL_TARGETS
    assert scored_tokens(config, steps, 5, done) == 5 * times + 5
    assert scored_tokens(EvalConfig(every=0), steps, 10**6, done) == 0


def test_seconds_of_a_run_are_training_and_scores(run: RunConfig):
    assert SPEED.run_seconds(run, SILENT, 1000) == pytest.approx(60 * 128 * 1e-3)
    assert SPEED.run_seconds(run, SILENT, 1000, done=50) == pytest.approx(10 * 128 * 1e-3)
    scored = EvalConfig(every=30, targets=100)
    assert SPEED.run_seconds(run, scored, 1000) == pytest.approx(60 * 128 * 1e-3 + (200 + 1000) * 3e-3)


def test_the_longest_run_that_ends_in_time_is_taken(run: RunConfig):
    config = EvalConfig(every=30, targets=100)
    tokens = affordable_tokens(run, SPEED, 1.0, config, 1000)
    longest = dataclasses.replace(run, horizon=f"tokens={tokens}")
    longer = dataclasses.replace(run, horizon=f"tokens={tokens + run.batch_tokens}")
    assert SPEED.run_seconds(longest, config, 1000) <= 60 < SPEED.run_seconds(longer, config, 1000)
    with pytest.raises(
        ValueError, match=r"--minutes 0.1 is too short: live scores alone take about 9 s here; give --minutes 0.3"
    ):
        affordable_tokens(run, SPEED, 0.1, EvalConfig(every=5, targets=1000), 1000)


def test_minutes_in_which_no_step_ends_are_refused(run: RunConfig):
    slow = dataclasses.replace(SPEED, train=10.0)
    with pytest.raises(ValueError, match=r"--minutes 0\.1 is too short: a step takes about 21 min here"):
        affordable_tokens(run, slow, 0.1, SILENT, 1000)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 s"), (89, "89 s"), (91, "2 min"), (8400, "2 h 20 min"), (7200, "2 h"), (3 * 86400 + 7200, "3 d 2 h")],
)
def test_durations_are_of_two_units_at_most(seconds: float, text: str):
    assert format_duration(seconds) == text


def test_speed_is_measured_of_steps_and_decoding(run: RunConfig, data: Prepared):
    measured = measure_speed(run, data, rounds=1)
    assert 0 < measured.train < 1
    assert 0 < measured.live < 1
    # Scored in parallel is one forward of the two or three that a step has, and no update.
    assert 0 < measured.parallel < measured.train
    assert estimate_run(dataclasses.replace(run, horizon="steps=39"), data, SILENT) is None


# --- measured once -------------------------------------------------------------------------------------------------


def test_minutes_are_measured_once_and_kept(
    run: RunConfig, data: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    measured, launch = count_measuring(monkeypatch), Launch(tmp_path / "run")
    first, kept_speed = with_minutes(run, 1.0, data, launch, SILENT)
    assert first.horizon == f"tokens={int(60 / (128e-3)) * 128}"
    assert len(measured) == 1
    monkeypatch.setattr(minutes, "measure_speed", lambda *_: pytest.fail("measured again"))
    assert with_minutes(run, 1.0, data, launch, SILENT) == (first, kept_speed)
    # In other parts it is the same run, and at another horizon of the recipe too.
    again = dataclasses.replace(run, device_batch=2, horizon="steps=9")
    assert with_minutes(again, 1.0, data, launch, SILENT)[0].horizon == first.horizon


@pytest.mark.parametrize("change", ["minutes", "seed", "file"])
def test_a_run_that_has_begun_otherwise_is_no_place_for_it(
    run: RunConfig, data: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
):
    measured, launch = count_measuring(monkeypatch), Launch(tmp_path)
    with_minutes(run, 1.0, data, launch, SILENT)
    (tmp_path / "snapshots" / "step-00000001").mkdir(parents=True)
    before = (tmp_path / minutes.FILE).read_bytes()
    if change == "file":
        (tmp_path / minutes.FILE).write_text("[]")
    other = dataclasses.replace(run, seed=1) if change == "seed" else run
    wanted = 2.0 if change == "minutes" else 1.0
    with pytest.raises(ValueError, match="holds a run that was not begun with these settings and --minutes"):
        with_minutes(other, wanted, data, launch, SILENT)
    assert len(measured) == 1
    if change != "file":
        assert (tmp_path / minutes.FILE).read_bytes() == before
    assert with_minutes(other, wanted, data, launch, SILENT, "never")[0].tokens > 0
    assert len(measured) == 2


def test_what_is_to_be_compiled_is_timed_compiled(
    run: RunConfig, data: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    measured = count_measuring(monkeypatch)
    monkeypatch.setattr("lrt.utils.torch_private.missing_compiler", lambda device: None)
    launch = Launch(tmp_path, execution=Execution(compile="auto"))
    with_minutes(run, 1.0, data, launch, SILENT)
    assert measured == ["steps=1"]
    (tmp_path / minutes.FILE).unlink()
    long, _ = with_minutes(run, 10.0, data, launch, SILENT)
    assert long.steps > 1000
    assert measured == ["steps=1", "steps=1", f"tokens={long.tokens}"]


# --- the verb ------------------------------------------------------------------------------------------------------


def test_a_run_of_some_minutes_goes_on_with_the_horizon_it_began_with(
    data: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    tiny = [word for word in TINY if word not in ("--horizon", "tokens=4000")]
    command = ["train", "--data", str(data.path), "--out", str(tmp_path), "--device", "cpu", "--eval.every", "0"]
    command += ["--minutes", "0.05", "d2-transformer", *tiny]
    count_measuring(monkeypatch)
    main(command)
    saved = MeasuredHorizon.read(tmp_path)
    assert saved is not None
    assert saved.tokens == 23 * 128  # 3 s at a millisecond a token
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 23
    assert "about 3 s on this CPU" in capsys.readouterr().out
    monkeypatch.setattr(minutes, "measure_speed", lambda *_: pytest.fail("measured again"))
    main(command)
    assert "on this CPU" not in capsys.readouterr().out  # it is done


def test_an_estimate_changes_no_number(
    data: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """40 steps of one part: 4 of them may be timed."""
    settings = [*TINY[:-1], "steps=40"]
    losses, said = [], []
    for share in (speed.SHARE, 0.0):
        monkeypatch.setattr(speed, "SHARE", share)
        out = tmp_path / str(share)
        main(["train", "--data", str(data.path), "--out", str(out), "--eval.every", "0", "d2-transformer", *settings])
        losses.append([json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()])
        said.append("on this CPU" in capsys.readouterr().out)
    assert said == [True, False]
    assert losses[0] == losses[1]
    run = RunConfig.from_dict(checkpoint.about(out / "checkpoint")["run"])
    assert [steps_done(out, run, source) for source in ("auto", "never")] == [40, 0]
    assert steps_done(out, dataclasses.replace(run, seed=1), "auto") == 0
    assert steps_done(tmp_path / "new", run, str(out / "checkpoint")) == 40
    with pytest.raises(ValueError, match="no-such-snapshot"):
        steps_done(tmp_path / "new", run, "no-such-snapshot")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--minutes", "0"], "--minutes is 0; it must be a finite number above 0"),
        (["--minutes", "1", "--horizon", "steps=7"], "--minutes and --horizon both say how long to train"),
        (["--minutes", "1", "--horizon=ratio=10"], "--minutes and --horizon both say how long to train"),
        (["--minutes=1", "--max-steps", "7"], "--minutes and --horizon both say how long to train"),
        (["--minutes", "1", "--match", "tokens", "RUN"], "--minutes and --match tokens both say how long"),
        (["--minutes", "1", "--resume", "RUN"], "--minutes 1 counts from a run's beginning, and --resume"),
    ],
)
def test_what_minutes_do_not_go_with(
    words: list[str], message: str, data: Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = [str(tmp_path / "run") if word == "RUN" else word for word in words]
    with pytest.raises(SystemExit) as ended:
        main(["train", "--data", str(data.path), "--out", str(tmp_path / "out"), "d2", *words])
    assert ended.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())  # tyro wraps lines
    assert not (tmp_path / "out").exists()
