"""Scores on data with state, and the study's cells, tables and figure."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.chess_oracle import InventedEngine

from lrt import LatentRecurrentTransformer, MemoryConfig, ModelConfig, score
from lrt.cli.main import main
from lrt.experiments.state_data import measure
from lrt.experiments.state_data.chess_pool import PoolSettings, make_pool
from lrt.experiments.state_data.measure import TokenScores, as_task
from lrt.experiments.state_data.repl import REPL
from lrt.experiments.state_data.rows import Rows
from lrt.experiments.state_tracking.tasks import Examples
from lrt.experiments.state_tracking.training import TrackingRun, train_tracking
from lrt.experiments.studies import benchmarks, state_data, state_data_tables
from lrt.experiments.studies.benchmarks import BENCHMARKS
from lrt.experiments.studies.comparisons import paired_difference, t_half_width
from lrt.training.optim_config import OptimConfig
from lrt.utils.timing import Timing


def model_of(source: int | tuple[int, ...] = 2, **changes: Any) -> LatentRecurrentTransformer:
    torch.manual_seed(0)
    config = ModelConfig(
        depth=2,
        width=16,
        heads=2,
        vocab_size=len(REPL.words),
        context=64,
        memory=MemoryConfig(source=source),
        **changes,
    )
    model = LatentRecurrentTransformer(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.eval()


@pytest.mark.parametrize("changes", [{}, {"window_pattern": "S", "window": 4}], ids=["full", "windows"])
def test_scores_are_those_of_live_decoding(changes: dict[str, Any]):
    rows, model = REPL.sample(5, 40, torch.Generator().manual_seed(0)), model_of(**changes).double()
    scores = measure.score_rows(model, rows, batch=2)
    assert (scores.nats[:, 1:] - score(model, rows.tokens)).abs().max() < 1e-5
    assert scores.nats[:, 0].eq(0).all()
    hidden = measure.live_hidden(model, rows.tokens)
    expected = model.logits(hidden).argmax(-1)[:, :-1] == rows.tokens[:, 1:]
    assert scores.right[:, 1:].equal(expected)
    assert not scores.right[:, 0].any()


def by_hand() -> TokenScores:
    """Two rows, the second with two tokens of padding."""
    tokens = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 6, 7, 8, 0, 0]])
    floor = torch.tensor([[0, 1.0, 0, 0.5, 0, 0], [0, 0.25, 0, 0, 0, 0]])
    asked = torch.tensor([[-1, -1, 0, -1, 5, 2], [-1, -1, 4, -1, -1, -1]])
    nats = torch.tensor([[0, 1.5, 0.25, 0.5, 2.0, 0], [0, 0.25, 1.0, 0.125, 9, 9]])
    right = torch.tensor([[False, True, True, False, False, True], [False, True, False, True, False, False]])
    return TokenScores(Rows(tokens, floor, asked, torch.tensor([6, 4])), nats, right)


def test_bins_by_hand():
    scores = by_hand()
    whole = measure.bin_of(scores, scores.rows.counted)
    assert (whole.tokens, whole.right) == (8, 5)
    assert whole.excess == pytest.approx((5.625 - 1.75) / 8)
    distances = measure.by_distance(scores, (0, 1, 4))
    assert {low: (b.tokens, b.right, b.nats) for low, b in distances.items()} == {
        0: (1, 1, 0.25), 1: (1, 1, 0.0), 4: (2, 0, 3.0),
    }  # fmt: skip
    places = measure.by_position(scores)
    assert {low: (b.tokens, b.excess) for low, b in places.items()} == {1: (2, 0.25), 2: (4, 1.375 / 4), 4: (2, 1.0)}
    assert sum(b.tokens for b in places.values()) == whole.tokens


def test_tokens_without_a_floor_are_counted_apart():
    scores = by_hand()
    scores.rows.floor[1] = math.nan  # its first is BOS, its last two padding
    summary = state_data.summarise(scores, (0, 1, 4))
    assert summary["all"]["tokens"] == 5
    assert summary["all"]["excess"] == pytest.approx((4.25 - 1.5) / 5)
    assert summary["without_floor"] == {"tokens": 3, "right": 2, "nats": pytest.approx(1.375 / 3)}
    assert sum(one["tokens"] for one in summary["by_position"].values()) == 5
    part = scores.first(1)
    assert (part.nats.shape, part.rows.lengths.tolist()) == ((1, 6), [6])


def test_training_predicts_every_token_and_knows_the_floor():
    examples = as_task(REPL).sample(6, 50, torch.Generator().manual_seed(2))
    rows = REPL.sample(6, 50, torch.Generator().manual_seed(2))
    assert examples.tokens.equal(rows.tokens)
    assert examples.classes[:, :-1].equal(rows.tokens[:, 1:])
    assert examples.classes[:, -1].eq(-1).all()
    assert examples.floor == pytest.approx(float(rows.floor.sum()) / (6 * 49), rel=1e-5)
    padded = by_hand().rows
    assert measure.next_tokens(padded).tolist() == [[1, 2, 3, 4, 5, -1], [6, 7, 8, -1, -1, -1]]


@pytest.mark.parametrize("name", ["repl", "repl_hidden", "log"])
def test_training_and_tests_share_no_row(name: str):
    """Of what is drawn from a seed; what is read from files has its own test."""
    benchmark = BENCHMARKS[name]("train")
    task = as_task(benchmark)
    drawn: list[torch.Tensor] = []

    def remember(rows: int, length: int, generator: torch.Generator) -> Examples:
        drawn.append((examples := task.sample(rows, length, generator)).tokens)
        return examples

    config = ModelConfig(depth=1, width=8, heads=1, vocab_size=len(benchmark.words), context=64)
    watched = dataclasses.replace(task, sampler=remember)
    train_tracking(TrackingRun(watched, config, OptimConfig(), "plain()", steps=12, rows=64, shortest=64, longest=64))
    trained = {tuple(row) for tokens in drawn for row in tokens.tolist()}
    assert len(trained) == 12 * 64
    for purpose in ("val", "test"):
        tested = measure.held_out_rows(benchmark, purpose, 256, 64, 0).tokens.tolist()
        assert not trained & {tuple(row) for row in tested}
    one, other = (measure.held_out_rows(benchmark, purpose, 8, 64, 0) for purpose in ("val", "test"))
    assert not one.tokens.equal(other.tokens)


STUDY = """
kind: state-data
editions:
  tiny:
    seeds: [0, 1]
    base:
      benchmark: repl
      size: {depth: 2, width: 16, heads: 2, context: 64}
      widened_to: "token shift, 2 channels, layerwise"
      optim: {matrix_lr: 0.02, embedding_lr: 0.05, head_lr: 0.01, scalar_lr: 0.02}
      rows: 8
      steps: 6
      shortest: 16
      longest: 16
      tests: [24, 48]
      sequences: 16
      minutes: 1
    axes:
      equal: {tokens: {equal: tokens}, wall_clock: {equal: wall_clock}}
      model:
        transformer: {family: transformer}
        "token shift, 2 channels, layerwise": {family: "token shift, 2 channels, layerwise"}
        lrt: {family: recommended, schedule: "settled(0, 1, 1)"}
    without:
      - [wall_clock, transformer]
"""
FIELDS: dict[str, Any] = {
    "benchmark": "repl", "family": "transformer", "size": {"depth": 2, "width": 16, "heads": 2, "context": 64},
    "optim": {}, "rows": 8, "steps": 6, "shortest": 16, "longest": 16, "tests": [24], "seed": 0,
}  # fmt: skip


def test_a_study_from_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(STUDY)
    main(["study", "small.yaml", "--dry-run"])
    assert "10 cells to run, about 11 min in all; 0 are done already" in capsys.readouterr().out
    assert not Path("runs/studies/small.tiny.jsonl").exists()
    with pytest.raises(SystemExit):
        main(["study", "small.yaml", "--dry-run", "--show"])
    assert "give one of them" in capsys.readouterr().err
    main(["study", "small.yaml"])
    lines = [json.loads(line) for line in Path("runs/studies/small.tiny.jsonl").read_text().splitlines()]
    assert len(lines) == 10
    text = capsys.readouterr().out
    assert text.count("vs transformer") == 2  # at equal time it is the same run
    assert "nats per token over the floor; differences at 24" in text
    assert "right answers of rows of 24, %, by updates since a value in plain sight" in text
    svg = Path("runs/studies/small.tiny.svg").read_text()
    assert "position" in svg
    by_cell = {line["cell"]: line["result"] for line in lines}
    plain, timed = by_cell["tokens/lrt/0"], by_cell["wall_clock/lrt/0"]
    assert plain["steps"] == 6
    assert timed["steps"] == max(1, round(6 / timed["step_ratio"]))
    assert {r["step_ratio"] for r in by_cell.values() if r["schedule"] != "plain()"} == {timed["step_ratio"]}
    assert set(plain["ablated"]) == {"intact", "zero", "embedding"}
    assert plain["ablated"]["intact"]["tokens"] == 4 * 23
    assert plain["tests"]["24"]["all"]["tokens"] == 16 * 23
    assert plain["tests"]["48"]["all"]["tokens"] == 8 * 47
    sizes = {r["parameters"] for r in by_cell.values()}
    assert max(sizes) / min(sizes) < 1.01
    # Stopped, it goes on: what is done is not run again.
    Path("runs/studies/small.tiny.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:-1]))
    main(["study", "small.yaml"])
    assert "1 cell to run" in capsys.readouterr().out


def line_of(seed: int, excess: float, gains: dict[int, float]) -> dict[str, Any]:
    def one(nats: float) -> dict[str, Any]:
        return {"tokens": 10, "right": 5, "nats": nats, "excess": nats}

    test = {
        "all": one(excess),
        "without_floor": {"tokens": 10, "right": 5, "nats": 2 * excess},
        "by_distance": {"0": one(0), "4": {**one(0), "right": 9}, "8": {**one(0), "tokens": 30, "right": 3}},
        "by_position": {str(low): one(value) for low, value in gains.items()},
    }
    scores = {"tests": {"64": test}, "val_excess": excess, "far": 4, "distance": "updates", "ablated": {}}
    return {"seed": seed, "fields": {}, "choices": {"model": "x"}, "result": {**COUNTED, **scores}}


COUNTED = {"parameters": 1000, "step_ratio": 1.5, "tokens": 5000}


def test_differences_and_slopes_by_hand():
    own = [line_of(s, 0.9 + 0.01 * s, {1: 9, 8: 1.0, 16: 0.9, 32: 0.8}) for s in range(3)]
    others = [line_of(s, 1.0, {1: 0, 8: 1.0, 16: 1.0 + 0.1 * s, 32: 1.0 + 0.2 * s}) for s in range(3)]
    change = paired_difference(own, others, state_data_tables.excess("64"))
    assert change is not None
    assert change.mean == pytest.approx(-9)
    assert change.half == pytest.approx(t_half_width([-10, -9, -8]))
    slopes = state_data_tables.slopes(own, others, "64")
    assert slopes == pytest.approx([0.1, 0.2, 0.3])
    assert state_data_tables.far_right("64")(own[0]) == pytest.approx(12 / 40)


def test_tables_by_hand():
    gains = {8: 1.0, 16: 1.0, 32: 1.0}
    lines = [
        {**line_of(seed, nats, gains), "choices": {"model": name}}
        for name, nats in (("transformer", 1.0), ("lrt", 0.5))
        for seed in range(3)
    ]
    lost = {**lines[0], "choices": {"model": "lost"}, "result": {**COUNTED, "diverged": "at step 3"}}
    excess, answers, slopes, text = state_data_tables.tables([*lines, lost])
    by_name = {row[0]: row for row in excess.body}
    assert by_name["lrt"][excess.head.index("vs transformer")] == "-50.0 % ± 0.0"
    assert by_name["lost"][excess.head.index("seeds")] == "0, 1 diverged"
    assert by_name["lost"][excess.head.index("vs transformer")] == ""
    assert answers.head == ["model", "0", "4", "8+", "4 and more", "4 and more, less transformer's"]
    assert answers.body[1] == ["lrt", "50.0 (30)", "90.0 (30)", "10.0 (90)", "30.0 ± 0.0", "+0.0 ± 0.0"]
    assert slopes.body[1][1] == "+0.00000 ± 0.00000"
    assert text.body[1] == ["lrt", "1.0000", "-50.0 % ± 0.0"]
    points = state_data_tables.figure([*lines, lost]).axes[0].get_lines()[0].get_xydata()
    assert points is not None
    assert points.tolist() == [[0, 50], [4, 90], [8, pytest.approx(10)]]


@pytest.mark.slow
def test_chess_in_a_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    settings = PoolSettings(train=40, val=8, test=8, plies=14, multipv=3, engine_share=0.5)
    monkeypatch.setattr(benchmarks, "open_pool", lambda: make_pool(tmp_path / "pool", settings, InventedEngine()))
    (tmp_path / "small.yaml").write_text(STUDY.replace("repl", "chess").replace("[24, 48]", "[32]"))
    main(["study", "small.yaml", "--dry-run"])
    assert not (tmp_path / "pool").exists()  # to announce the cells, no game is played
    main(["study", "small.yaml"])
    results = [json.loads(line)["result"] for line in Path("runs/studies/small.tiny.jsonl").read_text().splitlines()]
    assert {result["origin"]["engine"] for result in results} == {"Invented 1.0"}
    first = results[0]
    assert first["tests"]["32"]["all"]["excess"] > 0
    games = list(first["details"].values())
    assert set(first["details"]) == {"engine", "random"}
    assert sum(one["moves"] for plies in games for one in plies.values()) == 16 * 14
    text = capsys.readouterr().out
    assert "engine games by ply, nats of a move over the floor (likeliest squares legal, %)" in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"benchmark": "rpl"}, "unknown benchmark 'rpl'; choose one of repl"),
        ({"color": 1}, "a cell of state data has no field color; it has benchmark"),
        ({"equal": "flops"}, "equal is 'flops'; choose one of tokens, wall_clock"),
        ({"family": "lstm"}, "unknown family 'lstm'; choose one of transformer"),
        ({"steps": 0}, "0 steps of 8 rows"),
        ({"step_ratio": 0}, "step_ratio is 0; give "),
        ({"size": {"dpth": 2}}, "size"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_fields_are_answered_in_a_sentence(change: dict[str, Any], words: str):
    state_data.build_run(FIELDS)
    with pytest.raises(ValueError, match=words):
        state_data.build_run({**FIELDS, **change})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tests": []}, "give lengths of at least 24 tokens"),
        ({"tests": [24, 12]}, "give lengths of at least 24 tokens"),
        ({"tests": [128]}, "tests of 128 tokens are beyond the model's context of 64; raise size.context"),
        ({"sequences": 2}, "give a whole number of at least 4"),
    ],
    ids=["none", "short", "beyond", "few"],
)
def test_wrong_tests_are_refused_before_training(change: dict[str, Any], words: str):
    fields = {**FIELDS, "tests": [24]}
    state_data.build_run(fields)
    with pytest.raises(ValueError, match=words):
        state_data.build_run({**fields, **change})


def test_the_time_of_a_step_is_that_of_all_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    seconds = {"plain()": 1.0, "settled(0, 1, 1)": 2.0, "settled(1, 1, 1)": 4.0}

    def timed(work: dict[str, Any], *_: object, **__: object) -> dict[str, Timing]:
        return {name: Timing((next(s for part, s in seconds.items() if part in name),) * 3) for name in work}

    monkeypatch.setattr(state_data, "alternate", timed)
    lrt = state_data.build_run({**FIELDS, "family": "recommended"})
    assert lrt.schedule == "stages([(0.5, settled(0, 1, 1)), (0.5, settled(1, 1, 1))])"
    assert state_data.step_ratio(lrt, state_data.build_run(FIELDS), "cpu") == pytest.approx(3.0)


def test_seeds_on_several_machines_share_a_ratio(monkeypatch: pytest.MonkeyPatch):
    def no_timing(*_: object, **__: object) -> None:
        raise AssertionError("the ratio is there")

    monkeypatch.setattr(state_data, "alternate", no_timing)
    fields = {**FIELDS, "family": "recommended", "equal": "wall_clock", "step_ratio": 2.0, "sequences": 4}
    scores = state_data.StateData().run(fields, lambda *_: None, "cpu")
    assert (scores["steps"], scores["step_ratio"]) == (3, 2.0)


def test_lines_of_another_generator_do_not_count():
    model = state_data.build_run(FIELDS).model.to_dict()
    result = {"model": model, "schedule": "plain()", "data": state_data.fingerprint(REPL)}
    kind = state_data.StateData()

    def counts(fields: dict[str, Any], result: dict[str, Any]) -> bool:
        return kind.is_current({"fields": fields, "result": result})

    assert counts(FIELDS, result)
    for change in ({"data": "0"}, {"schedule": "interleaved(2)"}, {"model": {**model, "depth": 3}}):
        assert not counts(FIELDS, {**result, **change})
    assert not counts({**FIELDS, "family": "gone"}, result)
    assert not counts(FIELDS, {**result, "model": {**model, "a field of another version": 1}})
