"""Benchmarks compare what they say: the plain modules are the same model, counters count, rows are complete."""

from __future__ import annotations

import json

import pytest
import torch
from support.models import TOLERANCE, random_model

from lrt import MemoryConfig, ModelConfig, schedules
from lrt.experiments.bench.attention import AttentionBench
from lrt.experiments.bench.baselines import PlainModel
from lrt.experiments.bench.peak import LiveBytes
from lrt.experiments.bench.rows import Row, print_table
from lrt.experiments.bench.train import EVERY, TrainBench
from lrt.schedules.base import SCHEDULES
from lrt.schedules.loss import StepLoss

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
