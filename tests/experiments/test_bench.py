"""Benchmarks compare what they say: the plain modules are the same model, counters count, rows are complete."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import TOLERANCE, random_model

from lrt import LatentRecurrentTransformer, MemoryConfig, ModelConfig, schedules
from lrt.experiments.bench.attention import AttentionBench
from lrt.experiments.bench.baselines import PlainModel
from lrt.experiments.bench.peak import LiveBytes
from lrt.experiments.bench.rows import Row, print_table
from lrt.experiments.bench.steps import TrainingSteps, random_data
from lrt.experiments.bench.train import EVERY, TrainBench
from lrt.experiments.rivals import rivals
from lrt.model.checkpoint import save
from lrt.schedules.base import SCHEDULES
from lrt.schedules.loss import StepLoss
from lrt.training.config import RunConfig
from lrt.utils.timing import FEWEST, Timing, alternate

CONFIG = ModelConfig(depth=2, width=32, heads=2, vocab_size=41, context=24)
TINY = {"depth": 1, "width": 32, "context": 16, "batch": 1, "vocab_size": 32, "rounds": 2, "compile": "never"}


def test_plain_modules_are_the_same_model():
    model = random_model(CONFIG)
    modules = PlainModel(CONFIG).double()
    modules.load({name: p.detach() for name, p in model.state_dict().items()})
    text = torch.randint(41, (2, 25), generator=torch.Generator().manual_seed(0))
    tokens, targets = text[:, :-1], text[:, 1:]
    model.zero_grad()
    loss = StepLoss.of(schedules.plain(), [targets])(model, tokens, targets, None)
    other = modules.loss(tokens, targets)
    assert abs(float(loss) - float(other)) <= TOLERANCE[torch.float64] * float(loss)
    loss.backward()
    other.backward()
    grads = {name: p.grad for name, p in modules.named_parameters() if p.grad is not None}
    expected = PlainModel(CONFIG).double()  # the model's gradients, under the modules' names
    expected.load({name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()})
    for name, p in expected.named_parameters():
        grad = grads.get(name, torch.zeros_like(p))
        assert float((p - grad).norm()) <= TOLERANCE[torch.float64] * max(1.0, float(grad.norm())), name
    model.zero_grad()


def test_plain_modules_refuse_another_model():
    with pytest.raises(ValueError, match="written for the shared LRT"):
        PlainModel(ModelConfig(memory=MemoryConfig(projection="layerwise")))


def test_every_schedule_of_the_library_has_its_row():
    assert {schedules.parse(s).name for s in EVERY} == set(SCHEDULES)  # type: ignore[union-attr]
    assert all(repr(schedules.parse(s)) == s for s in EVERY)


def test_live_bytes_counts_what_is_alive():
    with LiveBytes() as seen:
        a = torch.ones(100)  # 400 bytes
        b = a + 1
        assert seen.live == 800
        c = b[10:]  # a view: nothing new
        a.add_(1)
        assert seen.live == 800
        del b
        assert seen.live == 800  # `c` still holds it
        del c
        assert seen.live == 400
        x = torch.ones(50, requires_grad=True)
        y = x.exp().sum()  # exp is kept for the backward, though no name holds it
        assert seen.live == 400 + 200 + 200 + 4
        del y
    assert seen.peak == 804


def test_the_rows_are_the_contracts(capsys: pytest.CaptureFixture[str]):
    TrainBench(("passes",), **TINY, json=True, progress=False).run()  # type: ignore[arg-type]
    head, *lines, last = capsys.readouterr().out.splitlines()[-9:]
    assert head.split()[:2] == ["ratio", "±"]
    printed = json.loads(last)
    assert set(printed) == {"rows", "hardware"}
    assert len(lines) == len(printed["rows"]) == 7
    for line, row in zip(lines, printed["rows"], strict=True):
        assert line.startswith(f"{row['model']}: {row['schedule']}")
        assert {"model", "schedule", "seconds", "ratio", "ideal", "peak_bytes"} <= set(row)
        assert {"spread", "tokens_per_second", "mfu", "peak_ratio"} <= set(row)
        assert row["seconds"] > 0
        assert row["peak_bytes"] > 0
    pairs = {(row["model"], row["schedule"]): row for row in printed["rows"]}
    assert len(pairs) == 7
    assert pairs["lrt-shared", "plain()"]["ratio"] == 1
    assert pairs["lrt-shared", "interleaved(2)"]["ideal"] == 2
    assert pairs["lrt-shared", "settled(0, 1, 1)"]["ideal"] == pytest.approx(4 / 3)
    assert ("lrt-shared, eager plain modules", "plain()") in pairs


def whole_steps(**training: Any) -> list[dict[str, Any]]:
    """Rows of whole steps of tiny models, as JSON has them."""
    small = {"sizes": ("2x32",), "context": 16, "batch": 2, "vocab_size": 300, **training}
    bench = TrainBench(only=("training",), training=TrainingSteps(**small), compile="never", rounds=2, progress=False)
    return [row.to_dict() for row in bench.rows()]


def test_whole_steps_have_rows_beside_the_contracts(capsys: pytest.CaptureFixture[str]):
    rows = whole_steps()
    assert [(row["model"], row["source"], row["over"]) for row in rows] == [
        ("transformer", "none", "transformer: plain()"),
        ("recommended", "0, 2", "transformer: plain()"),
        ("late", "0, 0, 2", "transformer: plain()"),
        ("token shift, 2 channels, layerwise", "0, 0", "transformer: plain()"),
        ("recommended, source 1", "0, 1", "recommended, source 1: plain()"),
        ("recommended, source 1", "0, 1", "recommended, source 1: plain()"),
    ]
    assert [row["schedule"] for row in rows[:4]] == [rivals(2)[row["model"]].schedule for row in rows[:4]]
    assert [row["schedule"] for row in rows[4:]] == ["plain()", "settled(0, 1, 1)"]
    assert {row["optimiser"] for row in rows} == {"Muon, AdamW"}
    assert {row["size"] for row in rows} == {"2x32"}
    for row in rows:
        assert {"seconds", "ratio", "spread", "ideal", "peak_bytes", "recurrent_share"} <= set(row)
        assert sum(part["share"] for part in row["about"]["parts"]) == pytest.approx(1)
    sizes = [row["about"]["parameters"] for row in rows[:4]]
    assert max(sizes) - min(sizes) <= 0.005 * max(sizes)
    assert [rows[i]["ratio"] for i in (0, 4)] == [1, 1]
    assert [rows[i]["recurrent_share"] for i in (0, 1, 2, 3, 5)] == pytest.approx([0, 1, 0.1, 0, 1])
    TrainBench(**TINY, models=("transformer",), modules=False, recompute=(), progress=False,
               training=TrainingSteps((), (1.0,), ("1x32",), 16, 1, 300)).run()  # type: ignore[arg-type]  # fmt: skip
    printed = capsys.readouterr().out
    assert printed.index("Whole steps, optimiser included") < printed.index("Forward and backward")
    assert "recommended, source 1, 1x32: settled(0, 1, 1)" in printed


def test_stages_are_weighted_by_their_share_of_the_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A run of the user's own, which is plain for the first 0.7 of its tokens."""
    seconds = {"transformer: plain()": 1.0, "own: plain()": 1.5, "own: settled(0, 1, 1)": 2.5}
    folder = tmp_path / "own"

    def timed(work: dict[str, Any], *_: Any, **__: Any) -> dict[str, Timing]:
        for step in work.values():
            step()
        named = {name: name.replace(str(folder), "own").rpartition(", ")[0].rpartition(", (")[0] for name in work}
        return {name: Timing((seconds[key], 2 * seconds[key], 3 * seconds[key])) for name, key in named.items()}

    monkeypatch.setattr("lrt.experiments.bench.steps.alternate", timed)
    data = random_data(300, 1000)
    config = ModelConfig(depth=2, width=32, heads=2, vocab_size=300, context=16)
    run = RunConfig(config, schedule="late(0.7, settled(0, 1, 1))", batch_size=2, horizon="steps=9")
    save(folder, LatentRecurrentTransformer(config), data.tokenizer, {"run": run.to_dict(), "schedule": run.schedule})
    base, own = whole_steps(models=(str(folder),), sources=())
    assert (base["ratio"], base["recurrent_share"]) == (1, 0)
    assert own["ratio"] == pytest.approx(0.7 * 1.5 + 0.3 * 2.5)
    assert own["recurrent_share"] == pytest.approx(0.3)
    assert own["ideal"] == pytest.approx((0.7 * 3 + 0.3 * 4) / 3)
    assert own["seconds"] == pytest.approx(2 * own["ratio"])
    assert [part["seconds"] for part in own["about"]["parts"]] == [3, 5]
    assert abs(base["about"]["parameters"] - own["about"]["parameters"]) <= 0.005 * own["about"]["parameters"]


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"sizes": ("large",)}, "write layers x width, for example 4x96"),
        ({"sources": (1.5,)}, "give a share of the depth, above 0 and at most 1"),
        ({"models": ("transformers",)}, "no folder of a run; of families there are transformer, token shift"),
    ],
)
def test_what_is_no_training_step_is_a_sentence(training: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        whole_steps(**training)


def test_rounds_end_when_the_time_is_over():
    calls: list[str] = []
    timings = alternate({"a": lambda: calls.append("a")}, 20, warmup=1, progress=False, limit=0.0)
    assert len(timings["a"].seconds) == FEWEST
    assert len(calls) == 1 + FEWEST
    assert len(alternate({"a": lambda: None}, 5, progress=False, limit=60.0)["a"].seconds) == 5


def test_attention_is_timed_by_pieces_and_by_masks(capsys: pytest.CaptureFixture[str]):
    AttentionBench(schedules=("interleaved(2)",), context=16, batch=1, heads=2, head_size=8, rounds=2, json=True).run()
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert all({"name", "seconds", "ratio", "spread"} <= set(row) for row in printed["rows"])
    assert [row["name"] for row in printed["rows"]] == [
        "plain() by one kernel", "plain() by pieces", "interleaved(2) by pieces", "interleaved(2) by masks",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="neither full nor classes"):
        AttentionBench(schedules=("chunked(4)",), context=16).run()


def test_a_table_has_what_was_measured_beside_its_target(capsys: pytest.CaptureFixture[str]):
    print_table([Row("a / b", 1.23456, 0.1, at_most=1, figures={"bytes": 12345678}), Row("c", 5, at_least=4)], "here")
    assert capsys.readouterr().out.splitlines() == [
        "here",
        "       value      ±       bytes  target",
        "a / b  1.235  0.100  12,345,678     ≤ 1  MISSED",
        "c          5                  -     ≥ 4   holds",
    ]
