"""`lrt fair`: what its flags come to, what its plan keeps, and what it says of lines."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from support.page import Page

from lrt.cli.main import main
from lrt.data.prepare import prepare
from lrt.data.prepared import Prepared
from lrt.experiments import fair
from lrt.experiments.fair import Comparison, Plan, kept_plan, make_plan
from lrt.experiments.studies import language, runner, timing
from lrt.experiments.studies.fair import Fair, difference_figure, narrow_sweeps, terminal_tables, verdict
from lrt.experiments.studies.language import build_model, build_run
from lrt.model.size import count_parameters
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.training.speed import Speed, decode_seconds

PLAN = Plan(20_000, 100, {"transformer": 1.0, "token shift": 1.0, "lrt": 2.0, "loop 2": 2.0})
TINY = Comparison(("transformer", "lrt"), 1, (1.0,), depth=2, width=32, context=16)
FAST = Speed(1e-5, 1e-4, 1e-4)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("fair") / "text.txt"
    file.write_text("".join(f"line {i}: {i * i} is the square of {i}\n" for i in range(400)))
    return file


@pytest.fixture(scope="module")
def data(text: Path) -> Prepared:
    return prepare(text.parent / "data", [text], 300, progress=False, workers=0)


# --- what is run ---------------------------------------------------------------------------------------------------


def test_a_comparison_is_a_study_swept_with_the_first_seed(data: Prepared):
    study = Comparison(equal="both").make_study(str(data.path), data, PLAN)
    assert study.axes == ("equal", "rate", "model")
    assert {cell.choices[2] for cell in study.cells} == {"transformer", "token shift", "lrt"}
    # (3 rates + 2 later seeds) of 3 models at equal tokens, and of the 2 that differ at equal time
    assert len(runner.cells_left(study, [])) == 5 * 3 + 5 * 2
    (cell,) = (c for c in study.cells if c.choices == ("wall-clock", "0.5", "lrt") and c.seed == 2)
    assert (cell.fields["family"], cell.fields["equal"], cell.fields["rate"]) == ("recommended", "wall_clock", 0.5)
    assert cell.minutes == 2.0


def test_all_models_are_widened_to_the_largest(data: Prepared):
    study = Comparison(("transformer", "loop-2", "lrt")).make_study(str(data.path), data, PLAN)
    sizes = {c.choices[2]: count_parameters(build_run(c.fields, data.vocab_size).model)[0] for c in study.cells}
    assert max(sizes.values()) - min(sizes.values()) <= 0.01 * min(sizes.values())
    tokens = {build_run(c.fields, data.vocab_size).tokens for c in study.cells}
    assert len(tokens) == 1


def test_an_injection_of_the_table_is_a_model_too():
    fields = fair.family_fields("key_value", 2)
    assert fields["model"] == {"memory": {"injection": "key_value"}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": ("transformer", "lstm")}, "unknown model 'lstm'; choose among lrt, transformer, token-shift, "),
        ({"models": ("lrt",)}, "--models is lrt; name at least two, each once"),
        ({"models": ("token-shift", "token shift")}, "name at least two, each once"),
        ({"seeds": 0}, "--seeds is 0; it must be a whole number of at least 1"),
        ({"rates": (1.0, 0.0)}, "--rates is 0; it must be a finite number above 0"),
        ({"rates": ()}, "--rates names none"),
        ({"minutes": 0.0}, "--minutes is 0; it must be a finite number above 0"),
    ],
)
def test_mistakes_are_a_sentence(change: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as raised:
        Comparison(**change)
    assert message in str(raised.value)


# --- the plan ------------------------------------------------------------------------------------------------------


def test_a_plan_fills_the_minutes(data: Prepared, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fair, "EPOCHS", 1000)
    runs = {
        name: build_run({"seed": 0, **TINY.fields(name, "a/b", data, 1000)}, data.vocab_size) for name in TINY.models
    }
    speeds = {"transformer": Speed(1e-3, 1e-3, 1e-3), "lrt": Speed(2e-3, 1e-3, 1e-3)}
    asked = dataclasses.replace(TINY, seeds=3, minutes=30.0, rates=(1.0, 2.0))
    plan = make_plan(asked, runs, speeds, data)
    ratios = fair.ratio_seconds(runs["lrt"], speeds["lrt"])
    assert plan.tokens < fair.EPOCHS * data.manifest["splits"]["train"]["tokens"]
    assert 4 * 60 * sum(plan.minutes.values()) + ratios == pytest.approx(1800, rel=1e-3)
    assert plan.targets <= data.manifest["splits"]["test"]["tokens"]
    with pytest.raises(ValueError, match=r"in --minutes 0.1 each of 8 runs sees too little text here; give --minutes"):
        make_plan(dataclasses.replace(asked, minutes=0.1), runs, speeds, data)


def test_a_plan_is_measured_once_and_kept_for_more_seeds_and_models(
    data: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    measured: list[int] = []
    monkeypatch.setattr(fair, "measure_speed", lambda run, *_: measured.append(run.tokens) or FAST)
    plan = kept_plan(tmp_path, data, "a/b", TINY, "cpu")
    assert len(measured) == 2
    assert kept_plan(tmp_path, data, "a/b", TINY, "cpu") == plan
    assert kept_plan(tmp_path, data, "a/b", dataclasses.replace(TINY, seeds=5, rates=(1.0, 2.0)), "cpu") == plan
    assert len(measured) == 2
    more = kept_plan(tmp_path, data, "a/b", dataclasses.replace(TINY, models=(*TINY.models, "loop-2")), "cpu")
    assert (more.tokens, more.targets) == (plan.tokens, plan.targets)
    assert set(more.minutes) == {"transformer", "lrt", "loop 2"}
    assert len(measured) == 5
    kept_plan(tmp_path, data, "a/b", dataclasses.replace(TINY, minutes=60.0), "cpu")
    assert len(measured) == 7


@pytest.mark.parametrize("family", ["ponder", "loop-2"])
def test_a_family_that_decodes_otherwise_is_timed(family: str, data: Prepared):
    model = build_model(TINY.plain_fields(family, "a/b", 1000), data.vocab_size)
    assert decode_seconds(LatentRecurrentTransformer(model).eval(), rows=2) > 0


# --- what lines say ------------------------------------------------------------------------------------------------


def line(model: str, seed: int, live: float, rate: str = "1") -> runner.Line:
    """A finished cell at equal tokens."""
    scores = {"val_live_bpb": live, "step_ratio": 1.5 if model == "lrt" else 1.0, "parameters": 1000}
    return {
        "cell": f"tokens/{rate}/{model}/{seed}",
        "choices": {"equal": "tokens", "rate": rate, "model": model},
        "seed": seed,
        "fields": {"rate": float(rate)},
        "result": {**scores, "test": {"live_bpb": live}},
    }


BASE = [line("transformer", seed, 2.0 + 0.01 * seed) for seed in range(3)]


def of_lrt(*factors: float) -> list[runner.Line]:
    return [line("lrt", seed, factor * (2.0 + 0.01 * seed)) for seed, factor in enumerate(factors)]


@pytest.mark.parametrize(
    ("factors", "words"),
    [
        (
            (0.95, 0.951, 0.949),
            "lrt is 5.0 % ± 0.3 better than transformer, live (3 seeds; the interval excludes zero)",
        ),
        ((1.05, 1.051, 1.049), "lrt is 5.0 % ± 0.2 worse than transformer"),
        ((0.95, 1.05, 1.0), "lrt cannot be told apart from transformer ("),
        ((0.9, 0.9), "lrt is 10.0 % better than transformer, live (2 seeds: too few for an interval)"),
    ],
)
def test_the_verdict_says_only_what_the_interval_allows(factors: tuple[float, ...], words: str):
    (sentence,) = verdict([*BASE, *of_lrt(*factors)])
    assert sentence.startswith("At equal tokens, ")
    assert words in sentence


def diverged(line: runner.Line) -> runner.Line:
    """The same cell, whose loss was not finite."""
    counted = {"step_ratio": 1.5, "parameters": 1000, "diverged": "the loss at step 3 is nan"}
    return {**line, "result": counted}


def test_a_model_that_diverged_is_said_to_have():
    lines = [*BASE, diverged(of_lrt(1.0)[0])]
    assert verdict(lines) == ["At equal tokens, lrt has no seed to compare: lrt diverged with seed 0."]
    (table,) = Fair().tables(lines)
    assert [row[1] for row in table.body] == ["2.0100", "diverged"]
    difference_figure(lines)


def test_seeds_that_diverged_are_named_beside_a_difference():
    first, second, third = of_lrt(0.9, 0.9, 0.9)
    (sentence,) = verdict([BASE[0], BASE[1], diverged(BASE[2]), first, diverged(second), third])
    words = "lrt is 10.0 % better than transformer, live (1 seed: too few for an interval), and lrt diverged with seed "
    assert sentence == f"At equal tokens, {words}1 and transformer diverged with seed 2."


def test_a_first_model_that_diverged_is_what_the_verdict_says():
    lines = [*map(diverged, BASE), *of_lrt(0.9, 0.9, 0.9)]
    assert verdict(lines) == [
        "At equal tokens, nothing can be compared with transformer: transformer diverged with seeds 0, 1, 2."
    ]
    assert [row[2:4] for row in Fair().tables(lines)[0].body] == [["", ""], ["", "1.00"]]  # of the first one's steps
    difference_figure(lines)


def test_the_first_model_is_the_reference_at_equal_time_too():
    """Where the Transformer has no cell of its own there, it stands behind what was named before it."""
    beside = [{**line, "choices": {**line["choices"], "equal": "wall-clock"}} for line in of_lrt(0.9)]
    sentences = verdict([*of_lrt(0.9), BASE[0], *beside])
    assert [sentence.partition(", ")[2][:33] for sentence in sentences] == ["transformer is 11.1 % worse than "] * 2


def test_tables_have_the_paired_difference_from_the_first():
    (table,) = terminal_tables([*BASE, *of_lrt(0.95, 0.951, 0.949)])
    assert table.title == "At equal tokens"
    assert table.body[0] == ["transformer", "2.0100", "", "1.00"]
    assert table.body[1] == ["lrt", "1.9095", "-5.0 % ± 0.3", "1.50"]


def test_a_best_rate_at_the_edge_is_said():
    lines = [*BASE, line("transformer", 0, 2.5, "0.5"), line("transformer", 0, 2.5, "2")]
    assert narrow_sweeps([*lines, *of_lrt(1.0)]) == []  # in the middle, and tried at one only
    (sentence,) = narrow_sweeps([*lines, line("lrt", 0, 1.0, "2"), line("lrt", 0, 1.1, "1")])
    assert "the best rate of lrt is at the edge of what was tried" in sentence


# --- from the command line -----------------------------------------------------------------------------------------


def test_a_comparison_from_the_command_line_and_again(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fair, "measure_speed", lambda *_: FAST)
    monkeypatch.setattr(fair, "FEWEST_STEPS", 1)
    monkeypatch.setattr(fair, "EPOCHS", 1)
    monkeypatch.setattr(fair, "TARGETS", 60)
    ratios = {"step": 1.5, "schedule": 1.25, "decode": 1.1}
    monkeypatch.setattr(timing, "paired_ratios", lambda *_: ratios)
    size = ["--depth", "2", "--width", "16", "--context", "16"]
    command = ["fair", str(text), "--models", "transformer", "lrt", "--seeds", "1", "--rates", "1", *size]
    command += ["--device", "cpu"]
    main([*command, "--dry-run"])
    assert "2 cells: 2 models, seed 0 at rates 1; " in capsys.readouterr().out
    assert not Path("runs/fair/fair.own.jsonl").exists()
    main(command)
    shown = capsys.readouterr().out
    assert "At equal tokens, lrt is " in shown
    page = Page(Path("runs/fair/report.html").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in Path("runs/fair/fair.own.jsonl").read_text().splitlines()]
    assert [line["cell"] for line in lines] == ["tokens/1/transformer/0", "tokens/1/lrt/0"]
    assert f"{lines[1]['result']['test']['live_bpb']:.4f}" in page.cells
    assert [place for place in page.loaded if not place.startswith(("#", "data:"))] == []
    assert "<svg" in Path("runs/fair/difference.svg").read_text()
    monkeypatch.setattr(language, "train_cell", lambda *_: pytest.fail("run again"))
    main(command)
    assert "0 cells to run" in capsys.readouterr().out


def test_no_text_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        main(["fair", "--out", str(tmp_path)])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("lrt: no text is given; name text files")
