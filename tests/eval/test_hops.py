"""Hops that a state survives: against passes by hand, against live, and of models that carry a bit or do not."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.models import NONE as WITHOUT
from support.models import UNUSUAL, oracle_rows, random_model, random_tokens
from support.scoring import BYTES, LRT, NONE, SHIFT, V, on_ranks, text

from lrt import MemoryConfig, ModelConfig, score
from lrt.data.batch import IGNORED
from lrt.data.windows import windows
from lrt.distributed.single_process import SingleProcess
from lrt.eval import hops
from lrt.eval.hops import HopCurve, HopPoint, hop_counts, hops_of_rows, hops_of_windows, surviving_hops
from lrt.eval.ledger import Ledger
from lrt.eval.sweep_curve import sweep_curve
from lrt.experiments.state_tracking.tasks import TASKS
from lrt.experiments.state_tracking.training import TrackingRun, train_tracking
from lrt.schedules.library import interleaved
from lrt.training.optim_config import OptimConfig

RECURRENT = {
    "final layer": LRT,
    "two channels": dataclasses.replace(LRT, memory=MemoryConfig(source=(0, 2), combine="channels")),
    "embedding at first": dataclasses.replace(LRT, memory=MemoryConfig(source=(1, 2), initial="embedding")),
    "delay 2": dataclasses.replace(LRT, memory=MemoryConfig(delay=2)),
    "every field": dataclasses.replace(UNUSUAL, vocab_size=V),
}


def tokens_of(rows: int, length: int) -> torch.Tensor:
    return torch.randint(1, V, (rows, length), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def losses_by_hand(model: Any, tokens: torch.Tensor, most: int) -> list[list[float]]:
    """[hops][row] nats, each row by itself and no pass shared: h + 1 times all positions on one State, then softmax."""
    losses = []
    for h in range(most + 1):
        nats = []
        for row in tokens:
            inputs = row[None, :-1]
            state = model.empty_state(1, inputs.shape[1], tokens=inputs)
            for _ in range(h + 1):
                hidden, state = model(inputs, range(inputs.shape[1]), state)
            chances = model.logits(hidden)[0].softmax(-1)
            nats.append(-sum(math.log(float(chances[t, row[t + 1]])) for t in range(len(row) - 1)))
        losses.append(nats)
    return losses


@pytest.mark.parametrize("name", RECURRENT)
@torch.no_grad()
def test_losses_are_those_of_passes_by_hand_and_end_at_live(name: str):
    model, tokens = random_model(RECURRENT[name]), tokens_of(3, 8)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    nats = hops.score_rows(model, inputs, targets, range(7))
    by_hand = losses_by_hand(model, tokens, 6)
    for h in range(7):
        assert nats[str(h)] == pytest.approx(by_hand[h], abs=1e-10), h
    expected = torch.gather(
        -model.logits(oracle_rows(model, inputs)).log_softmax(-1), 2, targets[..., None]
    )  # shares no code with the model
    assert nats["live"] == pytest.approx(expected.sum((1, 2)).tolist(), abs=1e-9)
    assert nats["6"] == pytest.approx(nats["live"], abs=1e-10)  # 7 positions are exact after 6 hops,
    assert abs(nats["0"][0] - nats["live"][0]) > 1e-3  # and not before


def test_the_curve_is_made_of_those_losses():
    """Errors by the jackknife's formula for a ratio, written with sums: rows differ in how much they ask."""
    model, tokens = random_model(LRT), tokens_of(5, 8)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[0, 4:] = IGNORED
    targets[3, ::2] = IGNORED
    curve = hops_of_rows(model, inputs, targets)
    assert [point.hops for point in curve.points] == [0, 1, 2, 4, 6]
    asked = [4, 7, 7, 3, 7]
    assert (curve.targets, curve.rows) == (28, 5)
    nats = hops.score_rows(model, inputs, targets, [2])
    gaps = [a - b for a, b in zip(nats["2"], nats["live"], strict=True)]
    point = curve.points[2]
    assert curve.live == pytest.approx(sum(nats["live"]) / 28)
    assert (point.nats, point.gap) == (pytest.approx(sum(nats["2"]) / 28), pytest.approx(sum(gaps) / 28))
    left = [g - n * sum(gaps) / 28 for g, n in zip(gaps, asked, strict=True)]
    assert point.error == pytest.approx((5 / 4 * sum(v * v for v in left)) ** 0.5 / 28)
    assert abs(curve.points[-1].gap) < 1e-12


def test_of_equal_rows_the_error_is_that_of_a_mean():
    sums = np.array([1.0, 3.0, 2.0, 6.0])
    ratio, error = hops.ratio_and_error(sums, [4, 4, 4, 4])
    assert (ratio, error) == (0.75, pytest.approx(np.std(sums / 4, ddof=1) / 2))
    assert hops.ratio_and_error(sums[:1], [4]) == (0.25, None)


def test_windows_give_what_rows_give_whatever_the_batches():
    model, found = random_model(LRT), windows(text((19, 3, 11, 1)), 8)
    whole = hops_of_windows(model, found, progress=False)
    assert whole == hops_of_windows(model, found, batch_size=64, progress=False)
    assert (whole.targets, whole.rows) == (34, 7)
    small = hops_of_windows(model, found, batch_size=2, progress=False)
    for a, b in zip(whole.points, small.points, strict=True):
        assert dataclasses.astuple(a) == pytest.approx(dataclasses.astuple(b), abs=1e-12)
    batches = list(found.batches(1))
    by_hand: dict[int, float] = dict.fromkeys((0, 1, 2, 4, 6), 0.0)
    for batch in batches:
        tokens = batch.tokens
        losses = losses_by_hand(model, tokens, 6)
        for h in by_hand:
            by_hand[h] += losses[h][0]
    live = sum(float(score(model, batch.tokens).sum()) for batch in batches)
    assert whole.live == pytest.approx(live / 34, abs=1e-12)
    for point in whole.points:
        assert point.nats == pytest.approx(by_hand[point.hops] / 34, abs=1e-12)
    # The sweep curve has the same losses, in bits per byte.
    swept = sweep_curve(model, found, BYTES, interleaved(2), (1,), (0, 1, 2, 3, 4), progress=False)
    unit = whole.live / swept.live_bpb
    for point in whole.points[:4]:
        bpb = next(p.bpb for p in swept.curves[1] if p.refinements == point.hops)
        assert bpb * unit == pytest.approx(point.nats, abs=1e-12)


def test_passes_end_where_nothing_moves_any_more():
    """With a weak memory the iteration comes to rest long before the row ends; the rest is not computed."""
    config = dataclasses.replace(LRT, context=64)
    model = random_model(config)
    model = type(model)(config).double().eval()
    model.load_state_dict(random_model(config).state_dict())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gamma" in name or name.startswith("projection"):
                parameter.mul_(1e-3)
    called: list[int] = []
    handle = model.blocks[0].register_forward_pre_hook(lambda module, inputs: called.append(inputs[0].shape[1]))
    tokens = tokens_of(2, 41)
    curve = hops_of_rows(model, tokens[:, :-1], tokens[:, 1:])
    handle.remove()
    full = [n for n in called if n > 1]  # the others are live decoding
    assert full == list(range(40, 40 - len(full), -1))  # the positions that are exact are not computed again
    assert 2 < len(full) < 10
    assert abs(curve.points[-1].gap) < 1e-6
    assert [point.hops for point in curve.points] == [0, 1, 2, 4, 8, 16, 32, 39]


def test_ranks_share_the_windows_and_a_stopped_measurement_goes_on(tmp_path: Path):
    model, found = random_model(LRT), windows(text((19, 3, 11)), 8)
    whole = hops_of_windows(model, found, 2, progress=False)

    def of_rank(ranks: SingleProcess) -> Any:
        return hops_of_windows(model, found, 2, False, lambda name: Ledger(tmp_path, name, {}, ranks))

    assert on_ranks(2, of_rank) == [whole, whole]
    (others,) = tmp_path.glob("hops-*.rank1.jsonl")
    assert len(others.read_text().splitlines()) == 1  # of three batches
    others.unlink()
    assert on_ranks(1, of_rank) == [whole]


# --- verdicts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [NONE, SHIFT], ids=["none", "source 0"])
def test_what_does_not_recur_is_told_so(config: ModelConfig):
    curve = hops_of_windows(random_model(config), windows(text(), 8), progress=False)
    assert (curve.verdict, curve.survives, curve.how) == (hops.NOTHING_RECURS, None, "")
    assert [point.hops for point in curve.points] == [0]
    assert abs(curve.points[0].gap) < 1e-12


def test_latent_thoughts_recur_too():
    model = random_model(dataclasses.replace(WITHOUT, thoughts=2))
    tokens = random_tokens(2, 7)
    curve = hops_of_rows(model, tokens[:, :-1], tokens[:, 1:])
    assert (curve.points[0].error or 0) > 0.1  # one pass is far from live, row by row
    assert abs(curve.points[-1].gap) < 1e-12


def points_of(gaps: dict[int, float], error: float | None = 0.0) -> list[HopPoint]:
    return [HopPoint(h, 2 + gap, gap, error) for h, gap in gaps.items()]


def test_verdicts_of_hand_made_curves():
    falling = {0: 1.0, 1: 0.5, 2: 0.2, 4: 0.0101, 8: 0.0099, 16: 0.001, 31: 0.0}
    assert surviving_hops(points_of(falling)) == (8, "about", "the state survives about 8 hops")
    # Noise is worth more than a hundredth: two errors of 0.006.
    assert surviving_hops(points_of(falling, 0.006)) == (
        *(4, "at least"),
        "the state survives at least 4 hops: what more of them bring is within the error of the measurement",
    )
    assert surviving_hops(points_of(falling, 0.001))[:2] == (8, "about")
    assert surviving_hops(points_of(falling, None))[:2] == (8, "about")
    # What swings passes live without staying there.
    assert surviving_hops(points_of({0: 1.0, 1: 0.0, 2: 0.4, 4: -0.3, 8: 0.0, 16: 0.0, 31: 0.0}))[:2] == (8, "about")
    never = {0: 1.0, 1: 0.9, 2: 0.8, 4: 0.5, 8: 0.3, 15: 0.0}
    assert surviving_hops(points_of(never)) == (
        *(8, "more than"),
        "the state survives more than 8 hops: as many as these rows can tell",
    )
    assert surviving_hops(points_of({**never, 8: math.nan}))[:2] == (8, "more than")
    assert surviving_hops(points_of(dict.fromkeys((0, 1, 3), 0.01), 0.006)) == (None, "", hops.NOT_USED)
    assert surviving_hops(points_of({0: 1e-7, 1: 0.0, 3: 0.0}, None))[2] == hops.NOT_USED
    assert surviving_hops(points_of({0: -0.1, 1: 0.0, 3: 0.0}, 0.04)) == (None, "", hops.HARMFUL)
    assert surviving_hops(points_of({0: -0.1, 1: 0.0, 3: 0.0}, 0.06))[2] == hops.NOT_USED


def test_a_curve_is_plain_data():
    curve = hops_of_windows(random_model(LRT), windows(text(), 8), progress=False)
    assert isinstance(curve, HopCurve)
    assert json.loads(json.dumps(curve.to_dict()))["points"][1]["hops"] == 1


def test_counts_double_up_to_the_end_of_the_row():
    model = random_model(LRT)
    assert hop_counts(model, 1) == (0, 1)  # a window of one position has no hop, and its memory gives nothing
    assert hop_counts(model, 2) == (0, 1)
    assert hop_counts(model, 9) == (0, 1, 2, 4, 8)
    assert hop_counts(model, 512) == (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 511)
    assert hop_counts(random_model(NONE), 512) == (0,)


# --- trained models --------------------------------------------------------------------------------------------------

OPTIM = OptimConfig(matrix_lr=0.02, embedding_lr=0.05, head_lr=0.01, scalar_lr=0.02, momentum_steps=100, clip=1.0)


def parity_curve(schedule: str, **fields: Any) -> HopCurve:
    model = ModelConfig(
        depth=1, width=32, heads=1, vocab_size=2, context=64, window_pattern="S", window=4, mlp_ratio=2.0
    )
    run = TrackingRun("parity", model, OPTIM, schedule=schedule, steps=120, rows=64, longest=16, **fields)
    trained = train_tracking(run).model
    rows = TASKS["parity"].sample(100, 64, torch.Generator().manual_seed(2**31))
    return hops_of_rows(trained, rows.tokens, rows.classes)


def test_a_bit_that_is_carried_survives_every_hop_of_the_row():
    curve = parity_curve("sequential()")
    assert curve.live < 0.05
    assert (curve.survives, curve.how) == (32, "more than")
    # After h hops the parity is known of as many bits; and a window of 4 shows the block no more than 3 others.
    assert curve.points[0].gap > 0.55
    assert [p.gap for p in curve.points] == sorted((p.gap for p in curve.points), reverse=True)
    assert curve.points[5].gap > 0.3  # 16 hops


def test_few_passes_teach_a_bit_that_does_not_survive():
    """The same rows to the end, mastered or not: the memory gives little, or live is worse than without."""
    curve = parity_curve("interleaved(2)", mastered=1000.0)
    assert curve.live > 0.4
    assert curve.how != "more than"
    assert curve.survives is None or curve.survives <= 16
