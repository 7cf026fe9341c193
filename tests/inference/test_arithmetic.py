"""The arithmetic of costs, samples and requests by hand: break-evens, cuts, limits, seeds."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.generation import CONFIGS, CONTEXT, V
from support.models import random_model

from lrt import Sampling
from lrt.inference.cost_model import Calibration, Plan, fallback
from lrt.inference.decoders import decoder
from lrt.inference.engine import Engine
from lrt.inference.prompt import Prompt
from lrt.inference.request import Request
from lrt.inference.sampling import Steering, TokenCounts, draw_rows, generator_at

counts = st.integers(1, 64)


@given(st.floats(0.1, 2000), counts, counts, st.integers(1, 400))
def test_up_to_the_break_even_token_by_token_costs_no_more(overhead: float, groups: int, sweeps: int, rows: int):
    calibration = Calibration(overhead, {})
    plan = Plan(groups, sweeps)
    length = calibration.break_even(plan, rows)

    def saved(n: float) -> float:
        """By sweeping n positions."""
        swept = sweeps * (groups * overhead + n * rows)
        return n * (overhead + rows) - swept

    assert length > 0
    if length == math.inf:
        assert saved(1e9) < 0
    else:
        assert saved(length) == pytest.approx(0, abs=1e-6 * length * (overhead + rows))
        assert saved(2 * length) > 0 > saved(length / 2)


def test_no_length_pays_where_nothing_is_saved_per_position():
    assert Calibration(6.0, {}).break_even(Plan(4, 3), rows=3) == math.inf  # 6 + 3 - 3 · 3
    assert Calibration(6.5, {}).break_even(Plan(4, 3), rows=3) == 4 * 3 * 6.5 / 0.5


def test_costs_count_calls_and_positions():
    calibration = Calibration(10.0, {"converged": Plan(8, 5), "fast": Plan(4, 2)})
    assert calibration.exact_cost(100, 3) == 100 * 13
    assert calibration.sweep_cost(100, 3, 8) == 8 * 10 + 300
    assert calibration.sweep_cost(5, 3, 8) == 5 * 10 + 15  # no more classes than positions
    assert calibration.plan("one_sweep") == Plan(8, 1)
    assert calibration.plan("fast") == Plan(4, 2)
    unmeasured = fallback(torch.device("cpu"))
    assert unmeasured == Calibration(16.0, {"converged": Plan(16, 7), "fast": Plan(16, 4)})
    assert fallback(torch.device("cuda")).overhead == 1000.0


@given(
    st.lists(st.floats(-8, 8), min_size=2, max_size=9),
    st.none() | st.integers(1, 10),
    st.floats(0.05, 1),
    st.none() | st.floats(0.001, 1),
)
def test_cuts_keep_the_likeliest_tokens(numbers: list[float], top_k: int | None, top_p: float, min_p: float | None):
    """Min-p: a share of the likeliest. Top-k: as likely as the k-th. Top-p after them: the fewest that reach p."""
    logits = torch.tensor([numbers], dtype=torch.float32)
    sampling = Sampling(temperature=0.7, top_k=top_k, top_p=top_p, min_p=min_p)
    (kept,) = sampling.probabilities(logits).tolist()
    (whole,) = (logits / 0.7).softmax(-1).tolist()
    share = (min_p or 0.0) * max(whole)
    if any(abs(p / share - 1) < 1e-4 and p != max(whole) for p in whole if share):  # rounding decides
        return
    least = max(sorted(whole, reverse=True)[min(top_k or 99, len(whole)) - 1], share * (1 - 1e-6))
    among = [p if p >= least else 0.0 for p in whole]
    among = [p / sum(among) for p in among]
    order = sorted(range(len(among)), key=lambda i: (-among[i], i))
    before, expected = 0.0, [0.0] * len(among)
    for i in order:
        if abs(before - top_p) < 1e-5:  # rounding decides
            return
        if before < top_p:
            expected[i] = among[i]
        before += among[i]
    assert kept == pytest.approx([p / sum(expected) for p in expected], abs=1e-5)


@pytest.mark.parametrize(
    ("taken", "refused"),
    [
        ({"temperature": 0}, {"temperature": -1e-9}),
        ({"temperature": 5.0}, {"temperature": math.nan}),
        ({"top_k": 1}, {"top_k": 0}),
        ({"top_p": 1}, {"top_p": 1.01}),
        ({"top_p": 1e-6}, {"top_p": 0}),
        ({"min_p": 1e-6}, {"min_p": 0}),
        ({"min_p": 1}, {"min_p": 1.01}),
    ],
    ids=str,
)
def test_sampling_is_taken_up_to_its_limits(taken: dict[str, Any], refused: dict[str, Any]):
    Sampling(**taken)
    with pytest.raises(ValueError, match=next(iter(refused))):
        Sampling(**refused)
    assert dataclasses.astuple(Sampling()) == (1.0, None, None, None)


def counted(prompt: list[int], drawn: list[int], vocabulary: int) -> TokenCounts:
    """As an engine counts: before each token, some of them twice."""
    counts = TokenCounts(prompt, vocabulary)
    for n in range(len(drawn) + 1):
        counts.update(prompt + drawn[:n])
    counts.update(prompt + drawn)
    return counts


def test_an_engine_counts_each_token_once(monkeypatch: pytest.MonkeyPatch):
    """A prompt is not read again for every token behind it."""
    histories: list[list[int]] = []

    class Recorded(TokenCounts):
        def __init__(self, prompt: Sequence[int], *more: Any) -> None:
            super().__init__(prompt, *more)
            histories.append([self.length])

        def update(self, tokens: Sequence[int]) -> None:
            super().update(tokens)
            histories[-1].append(self.length)

    monkeypatch.setattr("lrt.inference.job.TokenCounts", Recorded)
    request = Request((3, 1, 4), 5, Sampling(temperature=0), steering=Steering(repetition=1.5))
    Engine(random_model(CONFIGS["both"])).complete([request])
    assert histories == [[3, 3, 4, 5, 6, 7]]


def test_steering_is_of_what_was_drawn():
    steering = Steering(frequency=0.5, presence=2.0, bias=((3, 1.5),))
    assert not steering.neutral
    assert Steering().neutral
    assert not any(s.neutral for s in (Steering(frequency=1), Steering(presence=1), Steering(bias=((0, 1.0),))))
    steered = steering.apply(torch.zeros(5), counted([], [1, 1, 4], 5))
    assert steered.tolist() == [0, -3.0, 0, 1.5, -2.5]
    with pytest.raises(ValueError, match="frequency is steered by inf"):
        Steering(frequency=math.inf)


@given(
    st.lists(st.floats(-8, 8), min_size=6, max_size=6),
    st.lists(st.integers(0, 5), max_size=5),
    st.lists(st.integers(0, 5), max_size=5),
    st.floats(0.01, 100),
)
def test_repetition_is_of_the_prompt_too(numbers: list[float], prompt: list[int], drawn: list[int], penalty: float):
    """Against a plain loop; the other penalties come after it."""
    steering = Steering(frequency=0.5, bias=((2, 1.5),), repetition=penalty)
    expected = []
    for token, number in enumerate(numbers):
        repeated = token in prompt or token in drawn
        changed = number if not repeated else number / penalty if number > 0 else number * penalty
        expected.append(changed - 0.5 * drawn.count(token) + (1.5 if token == 2 else 0))
    steered = steering.apply(torch.tensor(numbers, dtype=torch.float64), counted(prompt, drawn, len(numbers)))
    assert steered.tolist() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("penalty", [0.0, 0.009, 100.1, -1.0, math.nan, math.inf])
def test_repetition_has_limits(penalty: float):
    assert not Steering(repetition=1.1).neutral
    with pytest.raises(ValueError, match=r"repetition is .*; it must be 0\.01 to 100"):
        Steering(repetition=penalty)


def test_a_draw_depends_on_the_rows_own_seed_and_position():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 50, generator=generator)
    samplings = [Sampling(), Sampling(temperature=0), Sampling(), Sampling(top_k=3), Sampling(), Sampling(top_k=3)]
    seeds = [(i % 4, 7 * i) for i in range(6)]
    together = draw_rows(logits, samplings, seeds)
    for i in range(6):
        assert together[i] == draw_rows(logits[i : i + 1], samplings[i : i + 1], seeds[i : i + 1])[0]
    numbers = {float(torch.rand(1, generator=generator_at(s, p))) for s in range(20) for p in range(20)}
    assert len(numbers) == 400
    assert sum(numbers) / 400 == pytest.approx(0.5, abs=0.05)


REQUEST = Request(tokens=(1, 2, 3), max_new_tokens=4)


@pytest.mark.parametrize(
    ("taken", "refused"),
    [
        ({"tokens": (0,)}, {"tokens": ()}),
        ({"tokens": (V - 1,)}, {"tokens": (V,)}),
        ({"tokens": (0, 1)}, {"tokens": (1, -1)}),
        ({"max_new_tokens": 0}, {"max_new_tokens": -1}),
        ({"max_new_tokens": CONTEXT - 2}, {"max_new_tokens": CONTEXT - 1}),  # the last one is never fed
        ({"tokens": (1,) * CONTEXT, "max_new_tokens": None}, {"tokens": (1,) * (CONTEXT + 1), "max_new_tokens": None}),
        ({"tokens": (1,) * CONTEXT, "max_new_tokens": 0}, {"tokens": (1,) * (CONTEXT + 1), "max_new_tokens": 0}),
        ({"samples": 1}, {"samples": 0}),
        ({"logprobs": 0}, {"logprobs": -1}),
        ({"logprobs": V}, {"logprobs": V + 1}),
        ({"steering": Steering(bias=((V - 1, 1.0),))}, {"steering": Steering(bias=((V, 1.0),))}),
        ({"steering": Steering(bias=((0, 1.0),))}, {"steering": Steering(bias=((-1, 1.0),))}),
        ({"prefill": "exact"}, {"prefill": "other"}),
        ({"stop_sequences": ((1,),)}, {"stop_sequences": ((1,), ())}),
    ],
    ids=str,
)
def test_a_request_is_taken_up_to_its_limits(taken: dict[str, Any], refused: dict[str, Any]):
    config = CONFIGS["both"]
    dataclasses.replace(REQUEST, **taken).check(config, CONTEXT)
    with pytest.raises(ValueError, match=r"\w+"):
        dataclasses.replace(REQUEST, **refused).check(config, CONTEXT)


def test_a_request_says_by_default_only_what_to_continue():
    assert dataclasses.asdict(Request(tokens=(1,))) == {
        "tokens": (1,),
        "max_new_tokens": None,
        "sampling": dataclasses.asdict(Sampling()),
        "seed": 0,
        "samples": 1,
        "stop": frozenset(),
        "stop_sequences": (),
        "logprobs": None,
        "steering": dataclasses.asdict(Steering()),
        "prefill": None,
        "owner": "",
        "grammar": None,
    }


def test_why_an_answer_ends():
    request = Request(tokens=(1, 2), max_new_tokens=3, stop=frozenset({9}), stop_sequences=((4, 5),))
    assert [request.finish_reason(new, 8) for new in ([1], [1, 2], [1, 2, 3])] == [None, None, "length"]
    assert request.finish_reason([1, 9], 8) == request.finish_reason([4, 5], 8) == "stop"
    assert request.finish_reason([9, 1], 8) is request.finish_reason([5, 4], 8) is None
    endless = dataclasses.replace(request, max_new_tokens=None)
    assert [endless.finish_reason([1] * n, 4) for n in (1, 2, 3)] == [None, None, "length"]  # two slots are left
    assert endless.finish_reason([1] * 99, None) is None


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("mode", ["eager", "fused"])
def test_decoding_stays_on_the_models_device(name: str, mode: str):
    """The meta device computes nothing, and refuses tensors of another."""
    model = copy.deepcopy(random_model(CONFIGS[name])).to("meta")
    tokens = torch.zeros(2, dtype=torch.long, device="meta")
    way = decoder(model, model.empty_state(2, CONTEXT), mode)
    for positions in ([0, 0], [1, 0], [3, 3]):
        assert way.logits(way(tokens, positions)).device.type == "meta"
    drawn = draw_rows(torch.zeros(2, V, device="meta"), [Sampling(), Sampling(temperature=0)], [(0, 0), (0, 1)])
    assert drawn.device.type == "meta"
    prompt = Prompt(torch.zeros(2, 4, dtype=torch.long, device="meta"), [2, 4], [0, 1])
    hidden = torch.ones(2, 4, 12, device="meta")
    assert prompt.zero_padding(hidden).device.type == prompt.last_position(hidden).device.type == "meta"
