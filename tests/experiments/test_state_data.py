"""Scores on data with state, and the study's cells, tables and figure."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lrt import LatentRecurrentTransformer, MemoryConfig, ModelConfig, score
from lrt.cli.main import main
from lrt.experiments.state_data import measure
from lrt.experiments.state_data.measure import TokenScores, as_task
from lrt.experiments.state_data.repl import REPL
from lrt.experiments.state_data.rows import NOTHING, Rows
from lrt.experiments.studies import state_data, state_data_tables
from lrt.experiments.studies.benchmarks import BENCHMARKS
from lrt.experiments.studies.comparisons import t_half_width


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


def test_who_knows_the_state_has_no_excess():
    rows = REPL.sample(20, 100, torch.Generator().manual_seed(1))
    scores = TokenScores(rows, rows.floor, rows.counted)
    for one in (*measure.by_distance(scores, REPL.bounds).values(), *measure.by_position(scores).values()):
        assert one.excess == 0
        assert one.accuracy == 1


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
    trained = {
        tuple(row)
        for step in range(20)
        for row in task.sample(64, 64, torch.Generator().manual_seed(step)).tokens.tolist()
    }
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
"""


def test_a_study_from_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(STUDY)
    main(["study", "small.yaml", "--dry-run"])
    assert "12 cells to run, about 13 minutes in all; 0 are done already" in capsys.readouterr().out
    assert not Path("runs/studies/small.tiny.jsonl").exists()
    main(["study", "small.yaml"])
    lines = [json.loads(line) for line in Path("runs/studies/small.tiny.jsonl").read_text().splitlines()]
    assert len(lines) == 12
    text = capsys.readouterr().out
    assert "nats per token over the floor; differences at 24" in text
    assert "right answers, %, by distance" in text
    svg = Path("runs/studies/small.tiny.svg").read_text()
    assert "position" in svg
    by_cell = {line["cell"]: line["result"] for line in lines}
    plain, timed = by_cell["tokens/lrt/0"], by_cell["wall_clock/lrt/0"]
    assert plain["steps"] == 6
    assert timed["steps"] == max(1, round(6 / timed["step_ratio"]))
    assert {r["step_ratio"] for r in by_cell.values() if r["schedule"] != "plain()"} == {timed["step_ratio"]}
    assert set(plain["ablated"]) == {"zero", "embedding"}
    assert plain["tests"]["24"]["all"]["tokens"] == 16 * 23
    assert plain["tests"]["48"]["all"]["tokens"] == 8 * 47
    sizes = {r["parameters"] for r in by_cell.values()}
    assert max(sizes) / min(sizes) < 1.01
    # Stopped, it goes on: what is done is not run again.
    Path("runs/studies/small.tiny.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:-1]))
    main(["study", "small.yaml"])
    assert "1 cells to run" in capsys.readouterr().out


def line_of(seed: int, excess: float, gains: dict[int, float]) -> dict[str, Any]:
    def one(nats: float) -> dict[str, Any]:
        return {"tokens": 10, "right": 5, "nats": nats, "excess": nats}

    test = {
        "all": one(excess),
        "by_distance": {"0": one(0), "4": {**one(0), "right": 9}, "8": {**one(0), "tokens": 30, "right": 3}},
        "by_position": {str(low): one(value) for low, value in gains.items()},
    }
    return {"seed": seed, "fields": {}, "choices": {"model": "x"}, "result": {"tests": {"64": test}, "val_excess": 0}}


def test_differences_and_slopes_by_hand():
    own = [line_of(s, 0.9 + 0.01 * s, {1: 9, 8: 1.0, 16: 0.9, 32: 0.8}) for s in range(3)]
    others = [line_of(s, 1.0, {1: 0, 8: 1.0, 16: 1.0 + 0.1 * s, 32: 1.0 + 0.2 * s}) for s in range(3)]
    change = state_data_tables.difference(own, others, lambda line: state_data_tables.excess(line, "64"))
    assert change is not None
    assert change.mean == pytest.approx(-9)
    assert change.half == pytest.approx(t_half_width([-10, -9, -8]))
    slopes = state_data_tables.slopes(own, others, "64")
    assert slopes == pytest.approx([0.1, 0.2, 0.3])
    assert state_data_tables.exact(own[0], "64", 4) == pytest.approx(12 / 40)
    assert state_data_tables.exact(own[0], "64", 9) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"benchmark": "rpl"}, "unknown benchmark 'rpl'; choose one of repl"),
        ({"color": 1}, "a cell of state data has no field color; it has benchmark"),
        ({"equal": "flops"}, "equal is 'flops'; choose one of tokens, wall_clock"),
        ({"family": "lstm"}, "unknown family 'lstm'; choose one of transformer"),
        ({"steps": 0}, "0 steps of 8 rows"),
        ({"size": {"dpth": 2}}, "size"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_fields_are_answered_in_a_sentence(change: dict[str, Any], words: str):
    fields = {
        "benchmark": "repl", "family": "transformer", "size": {"depth": 2, "width": 16, "heads": 2, "context": 64},
        "optim": {}, "rows": 8, "steps": 6, "shortest": 16, "longest": 16, "tests": [24], "seed": 0,
    }  # fmt: skip
    state_data.build_run(fields)
    with pytest.raises(ValueError, match=words):
        state_data.build_run({**fields, **change})


def test_distances_are_nothing_where_nothing_is_asked():
    rows = REPL.sample(4, 64, torch.Generator().manual_seed(3))
    assert int(rows.asked.min()) == NOTHING
    assert math.isclose(float(rows.floor[rows.asked >= 0].sum()), 0.0)
