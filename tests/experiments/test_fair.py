"""`lrt fair`: what its flags come to, what its plan keeps, and what it says of lines."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
from support.page import Page

from lrt.cli.main import main
from lrt.data.prepare import prepare
from lrt.data.prepared import Prepared
from lrt.experiments import fair_cells, fair_plan, plans
from lrt.experiments.fair import say_plan
from lrt.experiments.fair_cells import Comparison, Plan
from lrt.experiments.fair_plan import divide_minutes, kept_plan
from lrt.experiments.plans import Plans
from lrt.experiments.studies import language, runner, timing
from lrt.experiments.studies.fair import Fair, difference_figure, narrow_sweeps, terminal_tables, verdict
from lrt.experiments.studies.language import build_model, build_run
from lrt.model.size import count_parameters
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.training.config import RunConfig
from lrt.training.speed import Speed, decode_seconds

TRAINING = {"transformer": 1.0, "token shift": 1.5, "lrt": 2.0, "loop 2": 2.0}
PLAN = Plan(20_000, 100, 1_000_000, TRAINING, dict.fromkeys(TRAINING, 0.25))
TINY = Comparison(("transformer", "lrt"), 1, (1.0,), depth=2, width=32, context=16)
FAST = Speed(1e-5, 1e-4, 1e-4)
FAMILY_FIELDS = fair_cells.family_fields


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
    asked = Comparison(equal="both")
    study = asked.make_study(data, PLAN)
    assert study.axes == ("equal", "rate", "model")
    assert {cell.choices[2] for cell in study.cells} == {"transformer", "token shift", "lrt"}
    # (3 rates + 2 later seeds) of 3 models at equal tokens, and of the 2 that differ at equal time
    assert len(runner.cells_left(study, [])) == 5 * 3 + 5 * 2
    (cell,) = (c for c in study.cells if c.choices == ("wall-clock", "0.5", "lrt") and c.seed == 2)
    assert (cell.fields["family"], cell.fields["equal"], cell.fields["rate"]) == ("recommended", "wall_clock", 0.5)
    assert cell.minutes == 1.25  # as long as the Transformer trains, and its own scores
    assert "20,000 tokens a cell, which at equal wall-clock are the Transformer's tokens" in say_plan(
        study, asked, PLAN
    )


def test_the_transformers_time_is_what_cells_take_at_equal_wall_clock(data: Prepared):
    asked = dataclasses.replace(TINY, models=("lrt", "token-shift"), equal="wall_clock")
    study = asked.make_study(data, dataclasses.replace(PLAN, parameters=50_000))
    assert {cell.minutes for cell in study.cells} == {1.25}
    assert "20,000 are the Transformer's tokens, and the others train for as long, " in say_plan(study, asked, PLAN)
    assert fair_plan.timed_models(asked) == ("lrt", "token-shift", "transformer")


def test_all_models_are_widened_to_the_largest(data: Prepared):
    asked = Comparison(("transformer", "loop-2", "lrt"))
    largest = max(asked.sizes(data).values())
    study = asked.make_study(data, dataclasses.replace(PLAN, parameters=largest))
    sizes = {c.choices[2]: count_parameters(build_run(c.fields, data.vocab_size).model)[0] for c in study.cells}
    assert all(size == pytest.approx(largest, rel=0.005) for size in sizes.values())
    tokens = {build_run(c.fields, data.vocab_size).tokens for c in study.cells}
    assert len(tokens) == 1


def test_an_injection_of_the_table_is_a_model_too():
    fields = fair_cells.family_fields("key_value", 2)
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
        ({"rates": (1.0, 1.0000001)}, "--rates is 1 1; name each rate once"),
        ({"context": 0}, "--context is 0; it must be a whole number of at least 2"),
        ({"depth": 0}, "--depth is 0; it must be a whole number of at least 1"),
        ({"width": 48}, "--width is 48; it must be a multiple of 32, the width of a head"),
        ({"width": -32}, "--width is -32; it must be a whole number of at least 1"),
        ({"minutes": 0.0}, "--minutes is 0; it must be a finite number above 0"),
    ],
)
def test_mistakes_are_a_sentence(change: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as raised:
        Comparison(**change)
    assert message in str(raised.value)


# --- the plan ------------------------------------------------------------------------------------------------------


SPEEDS = {
    "transformer": Speed(1e-3, 1e-3, 1e-3),
    "token shift": Speed(1e-3, 1e-3, 1e-3),
    "lrt": Speed(2e-3, 1e-3, 1e-3),
}


@pytest.mark.parametrize(("equal", "models"), [("tokens", 2), ("wall_clock", 2), ("both", 2), ("both", 3)])
def test_a_plan_fills_the_minutes(
    equal: fair_cells.Equal, models: int, data: Prepared, monkeypatch: pytest.MonkeyPatch
):
    """The plan's own estimate of all cells, and the ratios, come to what was asked for."""
    monkeypatch.setattr(plans, "EPOCHS", 1000)
    names = ("transformer", "lrt", "token-shift")[:models]
    asked = dataclasses.replace(TINY, models=names, seeds=3, minutes=30.0, rates=(1.0, 2.0), equal=equal)
    size = max(asked.sizes(data).values())
    runs = {
        fair_cells.label(name): build_run({"seed": 0, **asked.fields(name, data, 1000, size)}, data.vocab_size)
        for name in names
    }
    tokens, targets = divide_minutes(asked, runs, SPEEDS, data)
    training = {name: tokens * SPEEDS[name].train / 60 for name in runs}
    scoring = {name: targets * fair_plan.score_seconds(SPEEDS[name]) / 60 for name in runs}
    cells = runner.cells_left(asked.make_study(data, Plan(tokens, targets, size, training, scoring)), [])
    ratios = sum(fair_plan.ratio_seconds(runs[name], SPEEDS[name]) for name in runs if name != "transformer")
    assert 60 * sum(cell.minutes for cell in cells) + ratios == pytest.approx(1800, rel=1e-3)
    assert targets <= data.manifest["splits"]["test"]["tokens"]


def test_minutes_in_which_nothing_is_learned_are_refused(data: Prepared):
    size = max(TINY.sizes(data).values())
    fields = {name: {"seed": 0, **TINY.fields(name, data, 1000, size)} for name in TINY.models}
    runs = {name: build_run(of_model, data.vocab_size) for name, of_model in fields.items()}
    asked = dataclasses.replace(TINY, minutes=0.1, seeds=3)
    with pytest.raises(ValueError, match=r"in --minutes 0.1 each of 6 runs sees too little text here; give --minutes"):
        divide_minutes(asked, runs, SPEEDS, data)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The parameters of each model that is timed, which takes no time here."""
    sizes: list[int] = []

    def measure(run: RunConfig, *_: object) -> Speed:
        sizes.append(count_parameters(run.model)[0])
        return FAST

    monkeypatch.setattr(fair_plan, "measure_speed", measure)
    return sizes


def test_a_plan_is_measured_once_and_kept_for_more_seeds_and_models(
    data: Prepared, tmp_path: Path, measured: list[int]
):
    kept = Plans(tmp_path / "plan.json")
    plan = kept_plan(kept, data, TINY, "cpu")
    assert len(measured) == 2
    assert kept_plan(kept, data, TINY, "cpu") == plan
    for change in ({"seeds": 5, "rates": (1.0, 2.0)}, {"equal": "both"}):
        assert kept_plan(kept, data, dataclasses.replace(TINY, **change), "cpu") == plan
    assert len(measured) == 2
    more = kept_plan(kept, data, dataclasses.replace(TINY, models=(*TINY.models, "loop-2")), "cpu")
    assert (more.tokens, more.targets, more.parameters) == (plan.tokens, plan.targets, plan.parameters)
    assert set(more.training) == {"transformer", "lrt", "loop 2"}
    assert len(measured) == 3
    kept_plan(kept, data, dataclasses.replace(TINY, minutes=60.0), "cpu")
    assert len(measured) == 5
    assert kept_plan(kept, data, TINY, "cpu") == more  # other minutes have not removed it
    assert len(measured) == 5


def test_the_plan_of_a_file_that_held_one_is_read(data: Prepared, tmp_path: Path, measured: list[int]):
    """Its tokens stay. What it does not say is counted and timed."""
    key = fair_plan.comparison_key(data, TINY, "cpu")
    old = {"key": key, "plan": {"tokens": 777, "targets": 11, "minutes": {"transformer": 1.0, "lrt": 2.0}}}
    (tmp_path / "plan.json").write_text(json.dumps(old))
    plan = kept_plan(Plans(tmp_path / "plan.json"), data, TINY, "cpu")
    assert (plan.tokens, plan.targets, len(measured)) == (777, 11, 2)
    assert kept_plan(Plans(tmp_path / "plan.json"), data, TINY, "cpu") == plan


def test_more_models_change_no_cell_and_a_larger_one_is_refused(data: Prepared, tmp_path: Path, measured: list[int]):
    kept = Plans(tmp_path / "plan.json")
    plan = kept_plan(kept, data, TINY, "cpu")
    more = dataclasses.replace(TINY, models=(*TINY.models, "token-shift"))
    keys = {cell.key for cell in TINY.make_study(data, plan).cells}
    assert keys < {cell.key for cell in more.make_study(data, kept_plan(kept, data, more, "cpu")).cells}
    larger = dataclasses.replace(TINY, models=(*TINY.models, "short-convolution,-width-4"))
    assert larger.sizes(data)["short convolution, width 4"] > plan.parameters
    with pytest.raises(ValueError, match=rf"are widened to {plan.parameters:,}; compare .*, such as --out .*-2$"):
        kept_plan(kept, data, larger, "cpu")


def test_an_injection_larger_than_every_family_is_what_all_are_widened_to(
    data: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: list[int]
):
    fields = {"family": "shared", "model": {"memory": {"source": (0, 1, 2), "combine": "channels"}}}
    wide = lambda name, depth: fields if name == "own" else FAMILY_FIELDS(name, depth)  # noqa: E731
    monkeypatch.setattr(fair_cells, "family_fields", wide)
    asked = dataclasses.replace(TINY, models=("transformer", "own"))
    plan = kept_plan(Plans(tmp_path / "plan.json"), data, asked, "cpu")
    assert plan.parameters == asked.sizes(data)["own"]
    assert measured == [pytest.approx(plan.parameters, rel=0.005)] * 2


def test_a_cell_does_not_depend_on_where_its_text_lies(text: Path, data: Prepared, tmp_path: Path):
    elsewhere = prepare(tmp_path / "again", [text], 300, progress=False, workers=0)
    plan = dataclasses.replace(PLAN, parameters=max(TINY.sizes(data).values()))
    keys = [[cell.key for cell in TINY.make_study(place, plan).cells] for place in (data, elsewhere)]
    assert keys[0] == keys[1]


@pytest.mark.parametrize("family", ["ponder", "loop-2"])
def test_a_family_that_decodes_otherwise_is_timed(family: str, data: Prepared):
    model = build_model(TINY.plain_fields(family, data, 1000), data.vocab_size)
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


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text that is read once, few scores, and nothing that is timed."""
    monkeypatch.setattr(fair_plan, "measure_speed", lambda *_: FAST)
    monkeypatch.setattr(plans, "FEWEST_STEPS", 1)
    monkeypatch.setattr(plans, "FEWEST_TOKENS", 1)
    monkeypatch.setattr(plans, "EPOCHS", 1)
    monkeypatch.setattr(fair_plan, "TARGETS", 60)
    monkeypatch.setattr(timing, "step_time_ratio", lambda *_: 1.5)
    monkeypatch.setattr(timing, "schedule_ratio", lambda *_: 1.25)
    monkeypatch.setattr(timing, "decode_ratio", lambda *_: 1.1)


def test_a_comparison_from_the_command_line_and_again(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    shrink(monkeypatch)
    size = ["--depth", "2", "--width", "32", "--context", "16"]
    command = ["fair", str(text), "--models", "transformer", "lrt", "--seeds", "1", "--rates", "1", *size]
    command += ["--device", "cpu"]
    main([*command, "--dry-run"])
    assert "2 runs: 2 models, seed 0 at rates 1; " in capsys.readouterr().out
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
    main([*command, "--minutes", "60", "--dry-run"])
    main(command)
    assert "0 cells to run" in capsys.readouterr().out
    main([*command, "--format", "csv"])
    printed = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(printed.out)))
    assert [row["model"] for row in rows] == ["transformer", "lrt"]
    assert rows[1]["parameters"] == f"{lines[1]['result']['parameters']:,}"
    assert "At equal tokens, lrt is " in printed.err
    # Other minutes, tried dry, have removed nothing.
    assert not list(Path("runs/fair").glob("*.old"))
    assert Path("runs/fair/ratios.json").is_file()
    assert [path.name for path in Path("runs").iterdir()] == ["fair"]  # nothing lies beside its folder


def test_the_report_of_another_text_is_set_aside(tmp_path: Path):
    file = tmp_path / "plan.json"
    for key, number in (("one", 1), ("one", 2), ("two", 3)):
        Plans(file).make_room(key, "report.html", "difference.svg")
        (tmp_path / "report.html").write_text(f"{number}")
    assert (tmp_path / "report.html").read_text() == "3"
    assert [path.read_text() for path in tmp_path.glob("*.old*")] == ["2"]
    file.write_text(json.dumps({"key": "two", "plan": {}}))  # of a folder that kept one plan
    Plans(file).make_room("two", "report.html")
    assert len(list(tmp_path.glob("*.old*"))) == 1


def test_no_text_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        main(["fair", "--out", str(tmp_path)])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("lrt: no text is given; name text files")


def test_a_short_text_is_refused_by_its_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """More minutes would not help: a text is read a few times, not longer."""
    file = tmp_path / "short.txt"
    file.write_text("".join(f"{i} {i * i}\n" for i in range(300)))
    with pytest.raises(SystemExit):
        main(["fair", str(file), "--out", str(tmp_path / "fair"), "--device", "cpu"])
    assert capsys.readouterr().err.startswith("lrt: the text is too short to compare models on: ")
    with pytest.raises(ValueError, match=r"at least 20,480 are needed; add more text"):
        plans.check_length(Prepared.open(tmp_path / "fair" / "data"), 8 * 20_480 // 20)
