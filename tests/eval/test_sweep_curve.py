"""The sweep curve: constructed models whose behaviour is known, and the verdict of hand-made scores."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import random_model
from support.scoring import BYTES, LRT, NONE, SHIFT, V, bpb, on_ranks, text

from lrt import MemoryConfig, ModelConfig, schedules
from lrt.data.windows import windows
from lrt.distributed.single_process import SingleProcess
from lrt.eval.ledger import Ledger
from lrt.eval.scoring import live_scorer, schedule_scorer
from lrt.eval.sweep_curve import SweepCurve, classify_curve, mean_contraction, sweep_curve
from lrt.model.transformer import LatentRecurrentTransformer

LONG = 80
"""A context in which most positions are still swinging after 64 refinements: n of them make n positions exact."""


def curve(model: Any, schedule: Any, context: int = 8, lengths: tuple[int, ...] = (19, 3, 11), **fields: Any) -> Any:
    return sweep_curve(model, windows(text(lengths), context), BYTES, schedule, progress=False, **fields)


def swinging() -> LatentRecurrentTransformer:
    """x_1 = c x_0 - 3 m with one embedding for all tokens: the memory changes its sign from step to step."""
    memory = MemoryConfig(injection="residual")
    config = ModelConfig(depth=1, width=8, heads=1, vocab_size=V, context=LONG, mlp_width=8, memory=memory)
    model = LatentRecurrentTransformer(config).double().eval()
    with torch.no_grad():
        model.embedding.weight.fill_(1.0)
        model.blocks[0].injection.gamma.fill_(-3.0)
        model.head.weight.zero_()
        model.head.weight[0] = 0.5  # one state believes in BOS, which is never right
    return model


def test_a_constructed_two_cycle_gets_its_verdict():
    found = curve(swinging(), schedules.multi_refinement(1), LONG, (400,), groups=(1, 2))
    assert found.verdict == "two-cycle"
    assert abs(found.even_odd) > 0.01
    after = {p.refinements: p for p in found.curves[1]}
    assert after[1].bpb == pytest.approx(after[3].bpb, abs=0.05)  # odd ones alike, but for the positions made exact
    assert abs(after[2].bpb - after[1].bpb) > 0.1
    assert after[64].change > 0.5
    assert found.contraction[1] > 0.95
    # Two subsets in turn swing no more: n strided sweeps make 2 n positions exact, and 40 of them all.
    strided = {p.refinements: p for p in found.curves[2]}
    assert strided[63].distance < 1e-12
    assert strided[64].bpb == pytest.approx(found.live_bpb, abs=1e-12)


@pytest.mark.parametrize("config", [NONE, SHIFT], ids=["none", "source 0"])
def test_what_does_not_recur_is_stable_at_once(config: ModelConfig):
    found = curve(random_model(config), schedules.interleaved(2))
    assert found.verdict == "stable"
    assert found.schedule == "plain()"
    assert set(found.contraction.values()) == {0.0}
    for points in found.curves.values():
        for point in points:
            assert point.bpb == pytest.approx(found.live_bpb, abs=1e-12)
            assert max(point.distance, point.largest, point.change) < 1e-12


def test_the_points_are_the_schedules_scores():
    model = random_model(LRT)
    found = curve(model, schedules.interleaved(2), groups=(1, 2, 4), counts=(0, 1, 2, 3, 7, 8), batch_size=2)
    scored = windows(text((19, 3, 11)), 8)
    assert found.parallel_bpb == bpb(model, schedule_scorer(schedules.interleaved(2)), scored)
    assert found.live_bpb == pytest.approx(bpb(model, live_scorer, scored), abs=1e-12)
    assert found.targets == 33
    for g, points in found.curves.items():
        for n, point in zip((0, 1, 2, 3, 7, 8), points, strict=True):
            assert point.refinements == n
            schedule = schedules.settled(n - 1, g, 1) if n else schedules.plain()
            assert point.bpb == pytest.approx(bpb(model, schedule_scorer(schedule), scored), abs=1e-12), (g, n)
        # 7 positions: n refinements make n positions exact, n strided sweeps n · g.
        assert points[-1].distance < 1e-10
        assert points[0].distance > 0.01
        assert points[0].largest >= points[0].distance
    whole = curve(model, schedules.interleaved(2), groups=(1, 2, 4), counts=(0, 1, 2, 3, 7, 8), batch_size=64)
    assert whole.curves[2][2].bpb == pytest.approx(found.curves[2][2].bpb, abs=1e-12)  # of no batch size's making
    assert whole.curves[2][2].distance == pytest.approx(found.curves[2][2].distance, abs=1e-12)


def test_ranks_share_a_curve_and_a_stopped_one_goes_on(tmp_path: Path):
    model, fields = random_model(LRT), {"groups": (1, 2), "counts": (0, 1, 2, 3), "batch_size": 2}
    whole = curve(model, schedules.interleaved(2), **fields)

    def of_rank(ranks: SingleProcess) -> Any:
        return curve(
            model, schedules.interleaved(2), open_ledger=lambda name: Ledger(tmp_path, name, {}, ranks), **fields
        )

    assert on_ranks(2, of_rank) == [whole, whole]
    (others,) = tmp_path.glob("sweeps-*.rank1.jsonl")
    assert len(others.read_text().splitlines()) == 1  # of three batches
    others.unlink()
    assert on_ranks(1, of_rank) == [whole]


def test_verdicts_of_hand_made_scores():
    assert classify_curve([0.9, 0.5, 0.5, 0.5], 0.5, 1e-5) == "stable"
    assert classify_curve([0.9, 0.5, 0.5015, 0.5019], 0.5, 0.1) == "stable"  # what counts is the score
    # The chess study (spec, section 6): 0.216 / 1.44 / 0.212 / 1.41 nats after 1, 2, 3, 4 updates.
    assert classify_curve([0.3, 0.216, 1.44, 0.212, 1.41], 0.216, 1.0) == "two-cycle"
    assert classify_curve([0.6, 0.5, 0.5, 0.5, 0.5, 0.501, 0.52, 0.6, 0.605], 0.5, 0.3) == "diverges after 5"
    assert classify_curve([0.6, 0.5, 0.51, 0.518, 0.518], 0.5, 1e-6) == "settles elsewhere after 1"
    assert classify_curve([0.6, 0.5, math.inf, math.nan], 0.5, math.nan) == "diverges after 1"
    with pytest.raises(ValueError, match="at least two"):
        classify_curve([0.5], 0.5, 0.0)


def test_contraction_is_the_mean_factor_until_rounding():
    assert mean_contraction([0.5, 0.25, 0.125, 0.0625]) == pytest.approx(0.5)
    assert mean_contraction([0.1, 0.001, 1e-9, 3e-9]) == pytest.approx(0.01)
    assert mean_contraction([1.0, 2.0, 4.0]) == pytest.approx(2.0)
    assert mean_contraction([1e-12, 1e-12]) == 0.0


def test_a_curve_is_plain_data_and_needs_what_a_verdict_needs():
    found = curve(random_model(LRT), schedules.plain(), counts=(0, 1, 2))
    assert isinstance(found, SweepCurve)
    assert json.loads(json.dumps(found.to_dict()))["curves"]["16"][2]["refinements"] == 2
    with pytest.raises(ValueError, match="give no verdict"):
        curve(random_model(LRT), schedules.plain(), counts=(0, 2))
    with pytest.raises(ValueError, match="start with 1"):
        curve(random_model(LRT), schedules.plain(), groups=(2, 4))
