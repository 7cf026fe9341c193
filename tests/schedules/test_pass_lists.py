"""Schedules as data: passes written out, arguments up to their limits, shares, draws and costs by counting."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from lrt import MemoryConfig, ModelConfig, schedules
from lrt.schedules.base import Pass
from lrt.schedules.flops import forward_flops, mean_visible_keys, training_flops
from lrt.schedules.loss import StepLoss
from lrt.schedules.parse import parse
from lrt.schedules.refinement import last_written
from lrt.schedules.work import CLASSES, common_stride

T = 5
QUIET = Pass(0, T, 1, 0.0, False)
WRITTEN_OUT: dict[str, list[Pass]] = {
    "plain()": [Pass(0, T, 1, 1.0, True, False)],
    "interleaved(1)": [Pass(0, T), Pass(0, T)],
    "interleaved(2)": [Pass(0, T), Pass(0, T, 2), Pass(1, T, 2)],
    "interleaved(2, (0.0, 2.0, 0.5))": [Pass(0, T, 1, 0.0), Pass(0, T, 2, 2.0), Pass(1, T, 2, 0.5)],
    "multi_refinement(0)": [Pass(0, T)],
    "multi_refinement(2)": [Pass(0, T)] * 3,
    "multi_refinement(1, (1.0, 3.0), True)": [Pass(0, T, 1, 1.0, True, True), Pass(0, T, 1, 3.0, True, False)],
    "chunked(1)": [Pass(t, t + 1) for t in range(T)],
    "chunked(2)": [Pass(0, 2), Pass(2, 4), Pass(4, 5)],
    "strided(1, 2)": [Pass(0, T)] * 2,
    "strided(2, 1)": [Pass(0, T, 2), Pass(1, T, 2)],
    "sequential()": [Pass(t, t + 1) for t in range(T)],
    "sequential(1)": [Pass(t, t + 1, 1, 1.0, True, True) for t in range(T)],
    "sequential(2)": [Pass(t, t + 1, 1, 1.0, True, t in (1, 3)) for t in range(T)],
    "settled(0, 1, 1)": [QUIET, Pass(0, T)],
    "settled(2, 1, 2)": [QUIET] * 3 + [Pass(0, T)] * 2,
    "settled(1, 2, 1)": [QUIET, Pass(0, T, 2, 0.0, False), Pass(1, T, 2, 0.0, False), Pass(0, T, 2), Pass(1, T, 2)],
}
REFUSED = [
    "interleaved(0)",
    "interleaved(1.0)",
    "interleaved(True)",
    "interleaved(2,(1.0,1.0))",
    "interleaved(1,(0.0,0.0))",
    "interleaved(1,(-1.0,2.0))",
    "multi_refinement(-1)",
    "multi_refinement(1,(1.0,))",
    "chunked(0)",
    "strided(0,1)",
    "strided(1,0)",
    "sequential(0)",
    "settled(-1,1,1)",
    "settled(0,0,1)",
    "settled(0,1,0)",
    "plain(1)",
    "interleaved()",
    "settled(0,1)",
    "mixture([])",
    "mixture([(0.5,plain())])",
    "mixture([(-0.5,plain()),(1.5,plain())])",
    "stages([(0.9,plain())])",
]


@pytest.mark.parametrize("text", WRITTEN_OUT)
def test_the_passes_written_out(text: str):
    made = parse(text)
    assert list(made.passes(T)) == WRITTEN_OUT[text]
    assert parse(repr(made)) == made


@pytest.mark.parametrize("text", REFUSED)
def test_arguments_beyond_the_limit_are_refused(text: str):
    with pytest.raises(ValueError, match=r"\w+"):
        parse(text).passes(T) if not text.startswith(("mixture", "stages")) else parse(text)


def test_stages_serve_their_fractions_and_the_last_one_the_rest():
    plain, one, two = schedules.plain(), schedules.interleaved(1), schedules.interleaved(2)
    curriculum = schedules.stages([(0.1, plain), (0.2, one), (0.7, two)])
    assert [curriculum.at(step, 10, 0) for step in range(11)] == [plain, one, one, *[two] * 8]
    assert curriculum.at(0, 0, 0) is plain
    assert curriculum.draw() is two
    assert {s: w for w, s in curriculum.shares()} == {plain: 0.1, one: 0.2, two: 0.7}
    nested = schedules.stages([(0.5, schedules.mixture([(0.25, plain), (0.75, two)])), (0.5, one)])
    assert nested.shares() == ((0.125, plain), (0.375, two), (0.5, one))
    assert nested.cost(T) == pytest.approx(0.125 * 3 + 0.875 * 6)


def test_a_mixture_is_drawn_by_its_probabilities_seed_and_step():
    plain, two = schedules.plain(), schedules.interleaved(2)
    mixed = schedules.mixture([(0.25, plain), (0.75, two)])
    draws = [[mixed.at(step, 1000, seed) for step in range(1000)] for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert Counter(draws[0])[plain] == pytest.approx(250, abs=50)
    torch.manual_seed(0)
    assert Counter(mixed.draw() for _ in range(1000))[plain] == pytest.approx(250, abs=50)
    assert schedules.mixture([(0.0, plain), (1.0, two)]).at(3, 9, 0) is two


@pytest.mark.parametrize("length", [1, 4, 9])
def test_visible_keys_on_average_by_counting(length: int):
    for window in (None, *range(1, 12)):
        counted = [min(t + 1, window or length) for t in range(length)]
        assert mean_visible_keys(length, window) == pytest.approx(sum(counted) / length)


def test_flops_by_counting_products():
    memory = MemoryConfig(source=(0, 2), combine="channels", projection="layerwise")
    config = ModelConfig(
        depth=2, width=8, heads=2, kv_heads=1, vocab_size=11, context=6, mlp_width=10, memory=memory, loops=3
    )
    # Per block: queries 8·8, keys and values 8·4 each, out 8·8, MLP 2·8·10, gates 8·(1 + 2 channels), α, β, γ (2).
    block = 64 + 2 * 32 + 64 + 160 + 24 + 2 + 2
    projections = 2 * 2 * 2 * 4 * 8  # layers, channels, keys and values
    attention = 6 * 4 * 8 * 3.5
    stack, head = forward_flops(config, 6)
    assert stack == 2 * (3 * 2 * block + projections) + attention
    assert head == 2 * 8 * 11
    # A first pass, here a full one without gradient or a class with one, goes without the state's channel: it is zeros.
    state = 2 * projections / 2
    settled = (2 + 3 * 2) * stack + 2 * 3 * head - state
    assert training_flops(config, parse("settled(1, 1, 2)"), 6) == pytest.approx(settled)
    assert training_flops(config, parse("strided(2, 1)"), 6) == pytest.approx(3 * stack + 3 * head - 3 / 2 * state)


def test_the_loss_is_the_weighted_mean_of_each_passs_mean():
    targets = torch.tensor([[3, -1, 3, 3, -1], [3, 3, -1, 3, 3]])  # two of the odd positions count, five of the even
    loss = StepLoss.of(parse("interleaved(2, (0.0, 1.0, 3.0))"), [targets])
    valid = [[int((targets[:, r::2] != -1).sum())] for r in (0, 1)]
    assert valid == [[4], [3]]
    assert loss.scales == pytest.approx((0.0, 1 / (4 * 4), 3 / (3 * 4)))
    with pytest.raises(ValueError, match="no pass with a loss weight has a valid target"):
        StepLoss.of(schedules.plain(), [torch.full((1, 3), -1)])


def test_which_passes_are_classes_of_one_stride():
    def stride(*passes: Pass, length: int = 48) -> int | None:
        return common_stride(passes, length)

    assert stride(Pass(0, 48)) == 1
    assert stride(Pass(0, 48), Pass(0, 48, 2), Pass(1, 48, 2)) == 2
    assert stride(*(Pass(r, 48, CLASSES) for r in range(CLASSES))) == CLASSES
    for passes in (
        (Pass(0, 47),),
        (Pass(1, 48),),
        (Pass(2, 48, 2),),
        (Pass(0, 48, 2), Pass(0, 48, 3)),
        (Pass(0, 48, CLASSES + 1),),
        (Pass(0, 40, 2),),
    ):
        assert stride(*passes) is None


def test_what_remains_is_each_positions_last_pass():
    def ran(*passes: Pass) -> list[tuple[Pass, Any, torch.Tensor]]:
        return [(p, None, torch.full((1, len(p.positions), 1), float(i))) for i, p in enumerate(passes)]

    def remains(*passes: Pass) -> list[float]:
        return last_written(ran(*passes), 4)[0, :, 0].tolist()

    assert remains(Pass(0, 4)) == [0, 0, 0, 0]
    assert remains(Pass(0, 4), Pass(0, 4, 2)) == [1, 0, 1, 0]
    assert remains(Pass(0, 4), Pass(1, 4, 2), Pass(0, 2)) == [2, 2, 0, 1]
    assert remains(Pass(1, 2), Pass(0, 1), Pass(3, 4), Pass(2, 3)) == [1, 0, 3, 2]
    assert remains(Pass(0, 4, 2), Pass(0, 4)) == [1, 1, 1, 1]
    whole = torch.ones(1, 4, 1)
    assert last_written([(Pass(0, 4), None, whole)], 4) is whole
