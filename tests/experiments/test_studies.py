"""Studies: grids from YAML, cells run once, results in lines, tables and figures from lines alone."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from lrt.cli.main import main
from lrt.eval.report.table import Table, markdown
from lrt.experiments.studies import grid, runner, state_data
from lrt.experiments.studies.kinds import KINDS, find_kind
from lrt.experiments.studies.language import build_run
from lrt.experiments.studies.state_tracking import StateTracking, mean_and_deviation, recipe, tracking_run
from lrt.utils.progress import Advance

ROOT = Path(__file__).resolve().parents[2]
GRID = """
kind: tracking
editions:
  tiny:
    seeds: [0, 1]
    base: {steps: 5, model: {depth: 2, width: 8}, minutes: 2}
    axes:
      task: {easy: {task: parity}, hard: {task: mod5, steps: 9, minutes: 7.5}}
      model: {lrt: , deep: {model: {depth: 4}}, none: {model: {memory: {injection: none}}}}
    without: [[hard, none]]
"""


@pytest.fixture
def study(tmp_path: Path) -> grid.Study:
    (tmp_path / "mine.yaml").write_text(GRID)
    return grid.read_study(str(tmp_path / "mine.yaml"), "tiny")


class Counting:
    """A kind whose cells say how often any was run."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.ran: list[dict[str, Any]] = []
        self.discarded: list[str] = []
        self.fail_at = fail_at

    def missing(self, cell: grid.Cell) -> str | None:
        return None

    def is_current(self, line: runner.Line) -> bool:
        return True

    def minutes(self, cell: grid.Cell, device: str) -> float:
        return cell.minutes

    def run(self, fields: grid.Fields, advance: Advance, device: str) -> dict[str, Any]:
        if len(self.ran) == self.fail_at:
            raise KeyboardInterrupt
        self.ran.append(fields)
        advance(1, "done")
        return {"steps": fields["steps"]}

    def discard(self, line: runner.Line) -> None:
        self.discarded.append(line["cell"])

    def score(self, line: runner.Line) -> str:
        return f"{line['result']['steps']} steps"

    def tables(self, lines: Sequence[runner.Line]) -> list[Table]:
        return []

    def figure(self, lines: Sequence[runner.Line]) -> Figure:
        raise AssertionError


def test_cells_are_the_product_of_the_axes(study: grid.Study):
    assert study.name == "mine"
    assert study.results == "mine.tiny.jsonl"
    assert [cell.name for cell in study.cells[:5]] == [
        "easy/lrt/0",
        "easy/deep/0",
        "easy/none/0",
        "hard/lrt/0",
        "hard/deep/0",
    ]
    assert len(study.cells) == 2 * 5
    deep = study.cells[4]
    assert deep.fields == {"seed": 0, "steps": 9, "task": "mod5", "model": {"depth": 4, "width": 8}}
    assert (deep.minutes, study.cells[0].minutes) == (7.5, 2.0)
    assert len({cell.key for cell in study.cells}) == 10


def test_a_choice_may_run_with_fewer_seeds(study: grid.Study, tmp_path: Path):
    (tmp_path / "fewer.yaml").write_text(GRID.replace("deep: {", "deep: {seeds: [0, 9], "))
    fewer = grid.read_study(str(tmp_path / "fewer.yaml"), "tiny")
    assert [cell.key for cell in fewer.cells] == [
        cell.key for cell in study.cells if "deep" not in cell.choices or cell.seed == 0
    ]
    (tmp_path / "bad.yaml").write_text(GRID.replace("deep: {", "deep: {seeds: [7], "))
    with pytest.raises(ValueError, match=r"easy/deep has seeds \[7\], none of the edition's"):
        grid.read_study(str(tmp_path / "bad.yaml"), "tiny")


def test_a_cell_keeps_what_it_goes_on_from_until_its_line_is_on_the_disk(study: grid.Study, tmp_path: Path):
    file, kind = tmp_path / study.results, Counting()
    discard = kind.discard

    def check(line: runner.Line) -> None:
        assert line["cell"] in [written["cell"] for written in runner.read_lines(file)]
        discard(line)

    kind.discard = check  # type: ignore[method-assign]
    runner.run_study(study, kind, file, ["0"], progress=False)
    assert kind.discarded == [cell.name for cell in study.cells if cell.seed == 0]
    again = Counting(fail_at=0)
    runner.run_study(study, again, file, ["0"], progress=False)  # killed between the line and the end of its cell
    assert again.discarded == kind.discarded


def test_claims_of_killed_processes_do_not_stay_and_hold_nobody_up(study: grid.Study, tmp_path: Path):
    """Killed between a cell's line and the end of its claim; and while a claim was written, which left it empty."""
    file = tmp_path / study.results
    runner.run_study(study, Counting(), file, ["0"], progress=False)
    done, waiting = study.cells[0], next(cell for cell in study.cells if cell.seed == 1)
    runner.claim_file(file, done).write_text(f"{platform.node()} {2**22 + 1}")  # above the highest process number
    runner.claim_file(file, waiting).write_text("")
    runner.run_study(study, Counting(), file, progress=False)
    assert list(file.with_suffix(".claims").iterdir()) == []


def test_a_stopped_study_goes_on(study: grid.Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "results" / study.results
    stopped = Counting(fail_at=3)
    with pytest.raises(KeyboardInterrupt):
        runner.run_study(study, stopped, file, progress=False)
    assert "10 cells to run, about 42 min in all; 0 are done already" in capsys.readouterr().out
    with file.open("a") as cut:
        cut.write('{"cell": "hard/l')  # the machine went down while writing
    goes_on = Counting()
    lines = runner.run_study(study, goes_on, file, progress=False)
    first, *cells = capsys.readouterr().out.splitlines()
    assert first.startswith("7 cells to run")
    assert re.fullmatch(rf"{lines[3]['cell']}: \d+ steps, in 1 s; 6 cells left, about 1 s", cells[0])
    assert cells[-1].endswith("; that was the last")
    assert len(cells) == 7
    assert [line["cell"] for line in lines] == [cell.name for cell in study.cells]
    assert stopped.ran + goes_on.ran == [cell.fields for cell in study.cells]
    assert runner.run_study(study, Counting(fail_at=0), file, progress=False) == lines


def test_only_some_cells_and_changed_ones_again(study: grid.Study, tmp_path: Path):
    file = tmp_path / study.results
    runner.run_study(study, Counting(), file, only=("hard", "deep"), progress=False)
    assert [line["cell"] for line in runner.read_lines(file)] == ["hard/deep/0", "hard/deep/1"]
    sliced = [dataclasses.replace(cell, choices=(cell.choices[0], "1/2")) for cell in study.cells[:2]]
    assert len(runner.cells_left(dataclasses.replace(study, cells=tuple(sliced)), [], ("1/2", "0"))) == 2
    first = study.cells[4]
    changed = dataclasses.replace(first, fields={**first.fields, "steps": 10})
    other = dataclasses.replace(study, cells=(*study.cells[:4], changed, *study.cells[5:]))
    assert changed.name in [cell.name for cell in runner.cells_left(other, runner.read_lines(file))]


def test_a_cell_that_another_study_ran_is_taken(study: grid.Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "other.yaml").write_text(GRID.replace("[0, 1]", "[0]").replace("deep:", "tall:"))
    other = grid.read_study(str(tmp_path / "other.yaml"), "tiny")
    ran = runner.run_study(other, Counting(), tmp_path / other.results, progress=False)
    capsys.readouterr()
    counting = Counting()
    lines = runner.run_study(study, counting, tmp_path / study.results, progress=False)
    out = capsys.readouterr().out
    assert "10 cells to run, about 21 min in all" in out
    assert ", from other.tiny easy/tall/0; " in out
    assert [fields["seed"] for fields in counting.ran] == [1] * 5
    assert [line["result"] for line in lines[:5]] == [line["result"] for line in ran]
    assert lines[1] == {**ran[1], **runner.label(study, study.cells[1]), "from": "other.tiny easy/tall/0"}
    assert "from" not in lines[5]


def test_the_recipes_of_state_tracking_are_the_studys():
    cell = next(c for c in grid.read_study("state-tracking", "tiny").cells if c.name == "S5 by swaps/sequential/2")
    assert recipe("S5 by swaps", seed=2) == tracking_run(cell.fields)
    with pytest.raises(ValueError, match="has no 'parity' under 'magic'; it has 'parity' 'sequential', "):
        recipe("parity", "magic")


def test_the_python_of_the_page_on_state_tracking_runs(capsys: pytest.CaptureFixture[str]):
    page = (Path(__file__).resolve().parents[2] / "docs" / "state-tracking.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    short = block.replace("steps=300", "steps=2").replace("length=4096", "length=16")
    assert short.count("=2)") == short.count("=16)") == 1
    exec(compile(short, "docs/state-tracking.md", "exec"), {})
    assert re.match(r"\d+ of 1000 last states are right\n(the state|the memory) .*\n", capsys.readouterr().out)


def test_a_users_mistakes(tmp_path: Path):
    with pytest.raises(ValueError, match="unknown study 'nothing'; choose one of injection, onset, rivals"):
        grid.read_study("nothing", "tiny")
    with pytest.raises(ValueError, match="has no edition 'huge'"):
        grid.read_study("state-tracking", "huge")
    (tmp_path / "bad.yaml").write_text("kind: tracking\neditions: {tiny: {seeds: [0], axis: {}}}")
    with pytest.raises(ValueError, match="it needs seeds and axes"):
        grid.read_study(str(tmp_path / "bad.yaml"), "tiny")
    with pytest.raises(ValueError, match="unknown kind of study 'dance'"):
        find_kind("dance")


@pytest.mark.parametrize(("name", "edition"), [(n, e) for n in grid.known_studies() for e in grid.editions(n)])
def test_the_studies_that_come_with_the_library_can_be_run(name: str, edition: str):
    study = grid.read_study(name, edition)
    assert study.kind in KINDS
    assert len({cell.name for cell in study.cells}) == len(study.cells)
    most = (30 if study.kind in ("tracking", "state-data") else 10) if edition == "tiny" else 10_000
    assert all(0 < cell.minutes <= most for cell in study.cells)
    build = {"tracking": tracking_run, "state-data": state_data.build_run}
    for cell in study.cells:
        if study.kind in build:
            build[study.kind](cell.fields)
        else:
            build_run(cell.fields, 2048 if edition == "tiny" else 32768)


def test_a_tracking_cell_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "mine.yaml").write_text("""
kind: tracking
editions:
  tiny:
    seeds: [0, 1]
    base:
      model: {depth: 1, width: 16, heads: 1, context: 32, window_pattern: S, window: 4}
      optim: {matrix_lr: 0.02}
      rows: 4
      steps: 3
      longest: 8
      sequences: 20
      tests: [8, 12]
      reads: {flip_flop_dense: {length: 16, reads: 50}}
    axes:
      task: {flip-flop: {task: flip_flop}}
      model: {lrt: {}, token shift: {schedule: plain(), model: {memory: {source: 0}}}}
""")
    arguments = ["study", str(tmp_path / "mine.yaml"), "--results", str(tmp_path)]
    main(arguments)
    main([*arguments, "--show"])
    out = capsys.readouterr().out
    assert "4 cells to run" in out
    assert re.search(r"^flip-flop/token shift/1: last state [\d.]+ % right at length 12, in ", out, re.MULTILINE)
    main([*arguments, "--format", "json"])
    tables = json.loads(capsys.readouterr().out)
    assert "token shift" in [row["model"] for table in tables for row in table["rows"] if "model" in row]
    main([*arguments, "--show", "--format", "csv"])
    assert "\ntoken shift,2," in capsys.readouterr().out
    assert "### flip-flop: last state right, %, by length; chance 50.0%" in out
    assert "| token shift | 2 |" in out
    lines = [json.loads(text) for text in (tmp_path / "mine.tiny.jsonl").read_text().splitlines()]
    assert [line["cell"] for line in lines] == [f"flip-flop/{m}/{s}" for s in (0, 1) for m in ("lrt", "token shift")]
    assert lines[0]["result"]["last_state"]["12"]["sequences"] == 20
    assert lines[0]["result"]["reads"]["flip_flop_dense"]["reads"] >= 50
    assert (tmp_path / "mine.tiny.svg").read_text().startswith("<?xml")


def test_a_figure_that_cannot_be_saved_is_refused_before_any_cell_runs(
    study: grid.Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as ended:
        main(["study", str(tmp_path / "mine.yaml"), "--results", str(tmp_path), "--figure", str(tmp_path / "x.txt")])
    captured = capsys.readouterr()
    assert (ended.value.code, captured.out) == (2, "")
    assert captured.err.endswith("x.txt; give one that ends in .svg, .png, .pdf\n")
    assert not list(tmp_path.glob("*.jsonl"))


TRACKED: dict[str, Any] = {
    "seed": 0,
    "task": "parity",
    "model": {"depth": 1, "width": 8, "heads": 1, "context": 16},
    "optim": {"matrix_lr": 0.02},
    "steps": 2,
    "rows": 2,
    "longest": 4,
    "sequences": 10,
    "tests": [8, 32],
}


def ignore_progress(amount: float, text: str = "") -> None:
    """Where nobody looks at it."""


def test_a_tracking_cell_measures_what_it_can_read_and_says_when_it_diverges(monkeypatch: pytest.MonkeyPatch):
    """Full attention ends at its context; a loss that is not finite is a result."""
    assert list(StateTracking().run(TRACKED, ignore_progress, "cpu")["last_state"]) == ["8"]
    slid = {**TRACKED, "model": {**TRACKED["model"], "window_pattern": "S", "window": 4}}
    assert list(StateTracking().run(slid, ignore_progress, "cpu")["last_state"]) == ["8", "32"]

    def lost(*_: Any, **__: Any) -> Any:
        raise FloatingPointError("at step 3 the loss is nan")

    monkeypatch.setattr("lrt.experiments.studies.state_tracking.train_tracking", lost)
    assert StateTracking().run(TRACKED, ignore_progress, "cpu")["diverged"] == "at step 3 the loss is nan"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"task": "partiy"}, "unknown task 'partiy'"),
        ({"reads": {"flop": {"length": 8, "reads": 1}}}, "unknown task 'flop'"),
        ({"step": 3}, "a tracking cell has no field step"),
        (
            {"stream": {"symbols": 10, "rows": 1, "compile": "never"}},
            "a stream needs a memory, and in every layer a window",
        ),
    ],
)
def test_mistakes_in_tracking_fields_are_named_before_any_cell_runs(change: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        StateTracking().minutes(grid.Cell(("a",), 0, {**TRACKED, **change}, 1.0), "cpu")


@pytest.mark.slow
def test_two_processes_are_killed_and_the_study_goes_on(tmp_path: Path):
    """Both work at a time, each cell runs to its end once, and the results are those of one process."""
    base = {**TRACKED, "steps": 400}
    del base["seed"]
    seeds = list(range(8))
    (tmp_path / "mine.yaml").write_text(
        json.dumps({"kind": "tracking", "editions": {"tiny": {"seeds": seeds, "base": base, "axes": {"m": {"a": {}}}}}})
    )
    study, out = grid.read_study(str(tmp_path / "mine.yaml"), "tiny"), tmp_path / "out"
    file, claims = out / study.results, (out / study.results).with_suffix(".claims")
    command = [sys.executable, "-m", "lrt", "study", str(tmp_path / "mine.yaml"), "--results", str(out)]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    both: dict[str, Any] = {"cwd": ROOT, "env": environment, "stdout": subprocess.PIPE}
    process = subprocess.Popen([*command, "--devices", "cpu", "cpu"], start_new_session=True, **both)
    try:
        patience = time.monotonic() + 200
        while not (runner.read_lines(file) and claims.exists() and len(list(claims.iterdir())) == 2):
            assert process.poll() is None, "it was done before both were seen at work"
            assert time.monotonic() < patience
            time.sleep(0.01)
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # all of them at once: the plug is pulled
        process.wait()
    before = runner.read_lines(file)
    assert 0 < len(before) < len(seeds)
    assert list(claims.iterdir())
    done = subprocess.run([*command, "--devices", "cpu", "cpu"], timeout=400, text=True, **both)
    assert done.returncode == 0
    assert f"2 processes on cpu, OMP_NUM_THREADS={max(1, (os.cpu_count() or 1) // 2)} each" in done.stdout
    lines = runner.read_lines(file)
    assert lines[: len(before)] == before
    assert sorted(line["seed"] for line in lines) == seeds
    assert {line["hardware"]["threads"] for line in lines} == {max(1, (os.cpu_count() or 1) // 2)}
    assert not list(claims.iterdir())
    alone = runner.run_study(study, StateTracking(), tmp_path / study.results, progress=False)
    assert {line["seed"]: accuracies(line) for line in lines} == {line["seed"]: accuracies(line) for line in alone}


def accuracies(line: runner.Line) -> Any:
    """What a cell of tracking came to, without its times."""
    return line["result"]["loss"], line["result"]["last_state"]


def test_tables_from_lines_alone():
    lines = [
        {
            "choices": {"task": "parity", "model": "lrt"},
            "fields": {"task": "parity", "longest": 40},
            "seed": 0,
            "result": {
                "last_state": {"256": {"sequences": 1000, "accuracy": a}},
                "reads": {"flip_flop_sparse": {"length": 512, "reads": 1000, "errors": 3}},
                "grown": {"2": 0, "16": n, "4": 9},
                "training_flops": 1e9,
                "chance": 0.5,
                "ablated": {"zero": {"accuracy": 0.5}, "embedding": {"accuracy": 0.5}},
                "stream": {"symbols": 100, "accuracy": 1.0, "tenths": [1.0, 0.99]},
            },
        }
        for a, n in ((0.9, 40), (1.0, 50))
    ]
    table = markdown(StateTracking().tables(lines))
    assert mean_and_deviation([0.9, 1.0]) == "95.0 ± 7.1"
    lost = {**lines[0], "seed": 2, "result": {"chance": 0.5, "diverged": "at step 3 the loss is nan"}}
    assert "| lrt | 2, 1 diverged | 95.0 ± 7.1 |" in markdown(StateTracking().tables([*lines, lost]))
    assert "| lrt | 0, 1 diverged |" in markdown(StateTracking().tables([lost]))
    assert not StateTracking().tables(lines)[0].body  # one task: nothing to sum up
    other = {**lines[0], "choices": {"task": "mod 5 flat", "model": "lrt"}}
    at_a_glance = StateTracking().tables([*lines, other])[0].markdown()
    assert "| last state right, % | parity, 256 | mod 5 flat, 256 |" in at_a_glance
    assert "| lrt | 95.0 ± 7.1 | 90.0 (1 seed) |" in at_a_glance
    unnamed = [{**line, "choices": {}, "fields": {**line["fields"], "schedule": "plain()"}} for line in lines]
    assert "| plain() | 2 |" in markdown(StateTracking().tables(unnamed))
    assert "| sequential() | 2 |" in markdown(StateTracking().tables([{**line, "choices": {}} for line in lines]))
    assert "### parity: last state right, %, by length; chance 50.0%" in table
    assert "| lrt | 2 | 95.0 ± 7.1 | 50.0 ± 0.0 | 50.0 ± 0.0 | 16, 16 (40) | 1.0e+09 |" in table
    assert "| parity | lrt | 0 | 100 | 100.0000 | 99.0000 |" in table
    assert "| parity | lrt | flip_flop_sparse | 3 / 1,000, 3 / 1,000 |" in table


@pytest.mark.parametrize("text", ["[1]", "3", "null", "{}", '{"cell": "a", "key": "b", "result": 3}'])
def test_a_line_that_is_no_result_is_named(text: str, tmp_path: Path):
    whole = '{"cell": "a", "key": "b", "result": {}}'
    file = tmp_path / "study.tiny.jsonl"
    file.write_text(f"{whole}\n{text}\n")
    with pytest.raises(ValueError, match=r"study\.tiny\.jsonl: line 2 is no result of a cell"):
        runner.read_lines(file)
    file.write_text(f"{whole}\n{whole[:20]}\n{whole}\n")  # cut short
    assert len(runner.read_lines(file)) == 2
