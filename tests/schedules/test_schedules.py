"""Schedules are data: their passes, costs and spelling, and what one optimiser step draws."""

from __future__ import annotations

import dataclasses
import itertools
import math
import pickle
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrt import schedules
from lrt.schedules.base import SCHEDULES, Pass
from lrt.schedules.library import (
    chunked,
    interleaved,
    mixture,
    multi_refinement,
    plain,
    sequential,
    settled,
    stages,
    strided,
)
from lrt.schedules.parse import EXAMPLES, names, parse


def free(start: int, stop: int, stride: int = 1) -> Pass:
    """A pass without gradient and loss."""
    return Pass(start, stop, stride, loss_weight=0.0, grad=False)


# (schedule, T, its passes written by hand)
EXPANDED: list[tuple[Any, int, list[Pass]]] = [
    (plain(), 1, [Pass(0, 1)]),
    (plain(), 5, [Pass(0, 5)]),
    (interleaved(2), 6, [Pass(0, 6), Pass(0, 6, 2), Pass(1, 6, 2)]),
    (interleaved(2), 5, [Pass(0, 5), Pass(0, 5, 2), Pass(1, 5, 2)]),
    (interleaved(3), 2, [Pass(0, 2), Pass(0, 2, 3), Pass(1, 2, 3)]),  # a third subset would be empty
    (interleaved(2), 1, [Pass(0, 1), Pass(0, 1, 2)]),
    (interleaved(1), 4, [Pass(0, 4), Pass(0, 4)]),
    (interleaved(2, (1, 0, 0.5)), 4, [Pass(0, 4, 1, 1), Pass(0, 4, 2, 0), Pass(1, 4, 2, 0.5)]),
    (interleaved(2, (1, 2, 3)), 1, [Pass(0, 1, 1, 1), Pass(0, 1, 2, 2)]),  # the weight goes with its pass
    (multi_refinement(0), 3, [Pass(0, 3)]),
    (multi_refinement(2), 3, [Pass(0, 3)] * 3),
    (multi_refinement(2, [0, 0, 1]), 3, [Pass(0, 3, 1, 0), Pass(0, 3, 1, 0), Pass(0, 3, 1, 1)]),
    (
        multi_refinement(2, detach=True),
        3,
        [Pass(0, 3, detach_memory=True), Pass(0, 3, detach_memory=True), Pass(0, 3)],
    ),
    (chunked(2), 5, [Pass(0, 2), Pass(2, 4), Pass(4, 5)]),
    (chunked(2), 4, [Pass(0, 2), Pass(2, 4)]),
    (chunked(9), 4, [Pass(0, 4)]),
    (strided(2, 2), 5, [Pass(0, 5, 2), Pass(1, 5, 2), Pass(0, 5, 2), Pass(1, 5, 2)]),
    (strided(1, 2), 3, [Pass(0, 3), Pass(0, 3)]),
    (strided(4, 1), 3, [Pass(0, 3, 4), Pass(1, 3, 4), Pass(2, 3, 4)]),
    (sequential(), 3, [Pass(0, 1), Pass(1, 2), Pass(2, 3)]),
    (
        sequential(2),
        5,
        [Pass(0, 1), Pass(1, 2, detach_memory=True), Pass(2, 3), Pass(3, 4, detach_memory=True), Pass(4, 5)],
    ),
    (settled(0, 1, 1), 4, [free(0, 4), Pass(0, 4)]),
    (settled(1, 2, 1), 5, [free(0, 5), free(0, 5, 2), free(1, 5, 2), Pass(0, 5, 2), Pass(1, 5, 2)]),
    (settled(2, 1, 2), 3, [free(0, 3), free(0, 3), free(0, 3), Pass(0, 3), Pass(0, 3)]),
    (settled(1, 3, 1), 2, [free(0, 2), free(0, 2, 3), free(1, 2, 3), Pass(0, 2, 3), Pass(1, 2, 3)]),
]


@pytest.mark.parametrize(("schedule", "length", "expected"), EXPANDED, ids=[f"{s!r}-T={t}" for s, t, _ in EXPANDED])
def test_passes_as_written_by_hand(schedule: Any, length: int, expected: list[Pass]):
    assert list(schedule.passes(length)) == expected


def test_the_examples_are_of_every_schedule():
    assert {schedule.name for schedule, _, _ in EXPANDED} == set(SCHEDULES)


@pytest.mark.parametrize("schedule", [s for s, _, _ in EXPANDED], ids=repr)
@pytest.mark.parametrize("length", [1, 2, 3, 7, 12])
def test_every_position_is_computed_and_no_pass_is_empty(schedule: Any, length: int):
    passes = schedule.passes(length)
    assert isinstance(passes, tuple)
    assert all(len(p.positions) > 0 for p in passes)
    assert {t for p in passes for t in p.positions} == set(range(length))
    assert all(list(range(length))[p.slice] == list(p.positions) for p in passes)


@pytest.mark.parametrize("length", [12, 240])
def test_costs(length: int):
    # Forward 1, backward 2.
    assert plain().cost(length) == 3
    assert interleaved(2).cost(length) == 6
    assert interleaved(4).cost(length) == 6
    assert settled(0, 1, 1).cost(length) == 4
    assert settled(2, 3, 2).cost(length) == 1 + 2 + 6
    assert [multi_refinement(k).cost(length) for k in range(4)] == [3, 6, 9, 12]
    assert chunked(5).cost(length) == 3
    assert strided(3, 2).cost(length) == 6
    assert sequential().cost(length) == 3
    assert mixture([(0.25, plain()), (0.75, settled(0, 1, 1))]).cost(length) == 0.25 * 3 + 0.75 * 4
    assert stages([(0.9, plain()), (0.1, interleaved(2))]).cost(length) == pytest.approx(0.9 * 3 + 0.1 * 6)


NESTED = stages(
    [
        (0.25, plain()),
        (0.5, mixture([(0.3, interleaved(2, (1.0, 0.5, 0.5))), (0.7, stages([(0.5, plain()), (0.5, chunked(8))]))])),
        (0.25, settled(0, 1, 1)),
    ]
)
SPELLED: list[tuple[Any, str]] = [
    (plain(), "plain()"),
    (interleaved(2), "interleaved(2)"),
    (interleaved(subsets=2, weights=[1, 0.5, 0]), "interleaved(2, (1, 0.5, 0))"),
    (multi_refinement(2), "multi_refinement(2)"),
    (multi_refinement(2, detach=True), "multi_refinement(2, None, True)"),
    (multi_refinement(2, detach=False), "multi_refinement(2)"),
    (chunked(16), "chunked(16)"),
    (strided(4, 2), "strided(4, 2)"),
    (sequential(), "sequential()"),
    (sequential(backprop=8), "sequential(8)"),
    (settled(0, 1, 1), "settled(0, 1, 1)"),
    (mixture([(0.5, plain()), (0.5, interleaved(2))]), "mixture([(0.5, plain()), (0.5, interleaved(2))])"),
    (stages([(1, plain())]), "stages([(1.0, plain())])"),
    (
        NESTED,
        "stages([(0.25, plain()), (0.5, mixture([(0.3, interleaved(2, (1.0, 0.5, 0.5))), "
        "(0.7, stages([(0.5, plain()), (0.5, chunked(8))]))])), (0.25, settled(0, 1, 1))])",
    ),
]
every_spelling = pytest.mark.parametrize(("schedule", "text"), SPELLED, ids=[text for _, text in SPELLED])


@every_spelling
def test_a_schedule_reads_back_as_it_is_written(schedule: Any, text: str):
    assert repr(schedule) == text
    assert parse(text) == schedule
    assert eval(text, {name: getattr(schedules, name) for name in schedules.names()}) == schedule  # as Python writes it


@every_spelling
def test_a_schedule_is_a_frozen_value(schedule: Any, text: str):
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert len({schedule, parse(text)}) == 1  # hashable, and equal schedules hash alike
    assert hash(pickle.loads(pickle.dumps(schedule))) == hash(schedule)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(schedule, dataclasses.fields(schedule)[0].name, ())
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(plain().passes(3)[0], "stop", 9)  # noqa: B010


@pytest.mark.parametrize(
    ("text", "schedule"),
    [
        ("plain", plain()),
        (" interleaved( subsets = 2 )\n", interleaved(2)),
        ("interleaved(2, [1, 0, 1])", interleaved(2, (1, 0, 1))),
        ("multi_refinement(1, detach=True)", multi_refinement(1, detach=True)),
        ("mixture([(0.5, plain), (0.5, chunked(2))])", mixture([(0.5, plain()), (0.5, chunked(2))])),
        ("mixture(((0.5, plain()), (0.5, chunked(2))))", mixture([(0.5, plain()), (0.5, chunked(2))])),
    ],
)
def test_other_spellings_of_the_same(text: str, schedule: Any):
    assert parse(text) == schedule


BAD_TEXTS = [
    "",
    "plain(",
    "plain();plain()",
    "waves(2)",
    "wave",
    "interleaved",
    "interleaved()",
    "interleaved(2, 3, 4)",
    "interleaved(0)",
    "interleaved(2.0)",
    "interleaved('2')",
    "interleaved(True)",
    "interleaved(groups=2)",
    "interleaved(2, subsets=3)",
    "interleaved(subsets=2, subsets=3)",
    "interleaved(10**9)",
    "interleaved(1000000000)",
    "interleaved(2, (1, 1e400, 1))",
    "interleaved(2, (1, True, 1))",
    "multi_refinement(2, detach='no')",
    "settled(100000, 100000, 1)",
    "interleaved(2, weights=5)",
    "interleaved(2, weights=(1, 1))",
    "interleaved(2, weights=(0, 0, 0))",
    "interleaved(2, weights=(2, -1, 1))",
    "plain(3)",
    "multi_refinement(-1)",
    "chunked(0)",
    "strided(2)",
    "strided(2, 0)",
    "sequential(0)",
    "settled(-1, 1, 1)",
    "settled(0, 0, 1)",
    "settled(0, 1, 0)",
    "mixture([])",
    "mixture(5)",
    "mixture([(0.5, plain())])",
    "mixture([(1.5, plain()), (-0.5, chunked(2))])",
    "mixture([plain(), chunked(2)])",
    "mixture([(1.0, 3)])",
    "mixture([(1e400, plain())])",
    "mixture([(1e400 - 1e400, plain())])",
    "mixture([('1', plain())])",
    "mixture([(True, plain())])",
    "mixture([(1.0, plain(), 2)])",
    f"mixture([({10**400}, plain())])",
    "stages([(0.5, plain()), (0.4, chunked(2))])",
    # Values that are no schedule.
    "3",
    "'plain()'",
    "None",
    "[plain()]",
    # More than the language of calls and literals.
    "interleaved(1 + 1)",
    "interleaved(*[2])",
    "interleaved(**{'subsets': 2})",
    "schedules.plain()",
    "plain().passes(3)",
    "lambda: plain()",
]


@pytest.mark.parametrize("text", BAD_TEXTS)
def test_what_is_no_schedule_is_a_value_error(text: str):
    with pytest.raises(ValueError, match=r"\w"):
        parse(text)


@pytest.mark.parametrize("text", ["waves(2)", "interleaved(1 + 1)", "schedules.plain()", "plain("])
def test_an_unreadable_schedule_is_named_in_the_error(text: str):
    with pytest.raises(ValueError, match=re.escape(text.removesuffix("(2)"))):
        parse(text)


def test_an_unknown_schedule_is_an_error_that_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'waves'; choose one of") as caught:
        parse("waves(2)")
    assert all(name in str(caught.value) for name in [*SCHEDULES, "mixture", "stages"])


@pytest.mark.parametrize(
    "text",
    [
        "__import__('pathlib').Path({path!r}).touch()",
        "plain(__import__('pathlib').Path({path!r}).touch())",
        "(lambda p: open(p, 'w'))({path!r})",
        "interleaved([open({path!r}, 'w') for _ in range(1)])",
        "mixture([(1.0, open({path!r}, 'w'))])",
        "open({path!r}, 'w')",
        "plain(x := open({path!r}, 'w'))",
        "interleaved(f\"{{open({path!r}, 'w')}}\")",
    ],
)
def test_parse_never_executes_code(text: str, tmp_path: Path):
    path = tmp_path / "executed"
    code = text.format(path=str(path))
    with pytest.raises(ValueError, match=r"\w"):
        parse(code)
    assert not path.exists()
    with pytest.raises(Exception, match=r"\w"):  # the same text, executed, does make the file: the test can fail
        raise RuntimeError(repr(eval(code, {"plain": plain, "interleaved": interleaved, "mixture": mixture})))
    assert path.exists()


def test_mistakes_in_a_call_are_value_errors():
    for make, named in (
        (
            lambda: parse("interleaved(subsets=2, subsets=3)"),
            "interleaved is given subsets more than once; give it once",
        ),
        (
            lambda: mixture([(math.nan, plain()), (1.0, plain())]),
            "probabilities of a mixture are [nan, 1.0]; they must",
        ),
        (lambda: stages([(math.inf, plain())]), "fractions of stages are [inf]; they must sum to 1"),
        (lambda: stages(plain()), "the parts of stages are plain(); give pairs"),  # type: ignore[arg-type]
        (
            lambda: multi_refinement(10**12),
            "makes 1,000,000,000,001 passes over 1 positions; at most 131,072 can be run",
        ),
        (lambda: interleaved(0), "subsets is 0; it must be a whole number of at least 1"),
        (lambda: interleaved(2, [1, 1]), "give 3 numbers >= 0 (one per pass)"),
        (lambda: interleaved(2, [1, 1, math.nan]), "weights"),
        (lambda: interleaved(2, 3), "weights"),  # type: ignore[arg-type]
        (lambda: interleaved(), "interleaved needs subsets"),  # type: ignore[call-arg]
        (lambda: plain(1), "plain takes ()"),  # type: ignore[call-arg]
        (lambda: mixture([(0.5, plain())]), "probabilities of a mixture are [0.5], in sum 0.5; they must sum to 1"),
        (lambda: stages([(2.0, plain())]), "fractions of stages are [2.0], in sum 2; they must sum to 1"),
    ):
        with pytest.raises(ValueError, match=re.escape(named)):
            make()


# One step


def test_simple_schedules_are_the_same_at_every_step():
    for schedule, _, _ in EXPANDED:
        assert schedule.at(7, 10, 3) is schedule
        assert schedule.draw() is schedule
        assert schedule.scoring_parts() == ((1.0, schedule),)


THREE = {plain(): 0.2, interleaved(2): 0.5, settled(0, 1, 1): 0.3}
MIXED = mixture([(p, s) for s, p in THREE.items()])
STEPS = 2000


def draws(seed: int) -> list[Any]:
    return [MIXED.at(step, STEPS, seed) for step in range(STEPS)]


def test_a_mixture_is_a_function_of_seed_and_step_only():
    first = draws(5)
    torch.manual_seed(1)  # no generator has a say, nor do the horizon or the order of asking
    assert first == [parse(repr(MIXED)).at(step, 10 * STEPS, 5) for step in reversed(range(STEPS))][::-1]
    assert all(draw in THREE for draw in first)


@pytest.mark.parametrize("seed", [0, 1, 2**31])
def test_a_mixture_draws_with_its_probabilities(seed: int):
    counts = Counter(draws(seed))
    for schedule, probability in THREE.items():
        # Five standard deviations of a binomial.
        assert abs(counts[schedule] / STEPS - probability) < 5 * math.sqrt(probability * (1 - probability) / STEPS)


def test_seeds_and_neighbouring_steps_draw_independently():
    # Two independent sequences agree where both draw the same: 0.2² + 0.5² + 0.3² = 0.38.
    sequences = [draws(seed) for seed in (0, 1, 2)]
    pairs = [(sequences[0], sequences[1]), (sequences[1], sequences[2]), (sequences[0], sequences[0][1:])]
    for a, b in [*pairs, (sequences[1], sequences[0][1:])]:
        agree = sum(x == y for x, y in zip(a, b, strict=False)) / min(len(a), len(b))
        assert abs(agree - 0.38) < 5 * math.sqrt(0.38 * 0.62 / STEPS)


def test_a_part_of_probability_0_is_never_drawn():
    never = mixture([(0.0, chunked(1)), (1.0, plain()), (0.0, chunked(2))])
    assert {never.at(step, STEPS, 0) for step in range(STEPS)} == {plain()}


def test_stages_change_at_their_fractions():
    three = stages([(0.1, plain()), (0.2, chunked(4)), (0.7, interleaved(2))])
    served = [three.at(step, 10, 0) for step in range(10)]
    assert served == [plain()] + [chunked(4)] * 2 + [interleaved(2)] * 7  # 0.1 + 0.2 is 0.3 here
    assert [three.at(step, 2, 0) for step in range(2)] == [plain(), interleaved(2)]
    assert three.at(0, 1, 0) == plain()
    assert three.at(10, 10, 0) == three.at(99, 10, 0) == interleaved(2)  # past the end
    halves = stages([(0.5, plain()), (0.5, chunked(4))])
    assert [halves.at(step, 5, 0) for step in range(5)] == [plain()] * 3 + [chunked(4)] * 2  # 2/5 < 1/2 <= 3/5


def test_an_inner_mixture_draws_anew():
    halves = mixture([(0.5, plain()), (0.5, mixture([(0.5, chunked(2)), (0.5, chunked(4))]))])
    outer = [halves.at(step, STEPS, 0) == plain() for step in range(STEPS)]
    flat = mixture([(0.5, plain()), (0.5, chunked(2))])
    assert outer == [
        flat.at(step, STEPS, 0) == plain() for step in range(STEPS)
    ]  # what is inside changes no outer draw
    counts = Counter(halves.at(step, STEPS, 0) for step in range(STEPS))
    for part in (chunked(2), chunked(4)):
        assert abs(counts[part] / STEPS - 0.25) < 5 * math.sqrt(0.25 * 0.75 / STEPS)


def test_draws_of_a_lone_mixture_are_those_of_version_0_1():
    halves = mixture([(0.5, plain()), (0.5, chunked(2))])
    drawn = "".join("01"[halves.at(step, 32, 7) == plain()] for step in range(32))
    staged = stages([(0.25, plain()), (0.75, halves)])
    assert drawn == "01111101010010011111101011000111"
    assert [staged.at(step, 32, 7) for step in range(8, 32)] == [halves.at(step, 32, 7) for step in range(8, 32)]


def test_late_is_a_spelling_of_stages():
    spelled = parse("late(0.7, settled(1, 1, 1))")
    assert repr(spelled) == "stages([(0.7, plain()), (0.3, settled(1, 1, 1))])"
    assert spelled == schedules.late(0.7, settled(1, 1, 1)) == parse(repr(spelled))
    assert [repr(spelled.at(step, 10, 0)) for step in (0, 6, 7, 9)] == ["plain()"] * 2 + ["settled(1, 1, 1)"] * 2
    for onset in (-0.1, 1.1, math.nan, True, "half"):
        with pytest.raises(ValueError, match="onset is"):
            schedules.late(onset, settled(1, 1, 1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no schedule"):
        schedules.late(0.5, 3)  # type: ignore[arg-type]


def test_inner_stages_see_their_own_share_as_their_whole():
    second = stages([(0.5, plain()), (0.5, stages([(0.25, chunked(2)), (0.75, chunked(4))]))])
    served = [second.at(step, 16, 0) for step in range(18)]
    assert served == [plain()] * 8 + [chunked(2)] * 2 + [chunked(4)] * 8  # the last two lie past the end
    deep = stages([(0.3, second), (0.7, interleaved(2))])  # of 30 steps 9 are of `second`
    assert [deep.at(step, 30, 0) for step in range(10)] == [
        *[plain()] * 5, *[chunked(2)], *[chunked(4)] * 3, interleaved(2)
    ]  # fmt: skip


def test_stages_in_a_mixture_have_its_clock_and_mixtures_in_stages_its_draws():
    inner = stages([(0.5, plain()), (0.5, MIXED)])
    both = mixture([(0.5, chunked(8)), (0.5, inner)])
    assert {both.at(step, STEPS, 0) for step in range(STEPS // 2)} == {chunked(8), plain()}
    assert {both.at(step, STEPS, 0) for step in range(STEPS // 2, STEPS)} == {chunked(8), *THREE}
    assert stages([(1.0, plain()), (0.0, inner)]).at(9, 8, 0) in THREE  # past the end: the last of the last


def composed(parts: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Mixtures and stages of one to three parts with weights in sixteenths."""
    weights = st.lists(st.integers(0, 15), min_size=0, max_size=2).map(
        lambda cuts: [b - a for a, b in itertools.pairwise([0, *sorted(cuts), 16])]
    )
    return st.builds(
        lambda make, weights, schedules: make([(w / 16, s) for w, s in zip(weights, schedules, strict=False)]),
        st.sampled_from([mixture, stages]), weights, st.lists(parts, min_size=3, max_size=3),
    )  # fmt: skip


@settings(max_examples=25)
@given(
    schedule=composed(st.recursive(st.integers(1, 6).map(chunked), composed, max_leaves=12)),
    seed=st.integers(0, 2**32),
)
def test_any_nesting_serves_each_part_for_its_share(schedule: Any, seed: int):
    served = Counter(schedule.at(step, STEPS, seed) for step in range(STEPS))
    shares: Counter[Any] = Counter()
    for share, part in schedule.shares():
        shares[part] += share  # type: ignore[assignment]
    assert served.keys() <= {part for part, share in shares.items() if share > 0}
    for part, share in shares.items():
        # Six standard deviations of a binomial, which stages only make smaller; and a step for each of their borders.
        margin = 6 * math.sqrt(share * (1 - min(1, share)) / STEPS) + 40 / STEPS
        assert abs(served[part] / STEPS - share) <= margin, part


def test_without_a_step_a_mixture_draws_from_torch_and_stages_give_their_last():
    torch.manual_seed(0)
    first = [MIXED.draw() for _ in range(STEPS)]
    torch.manual_seed(0)
    assert first == [MIXED.draw() for _ in range(STEPS)]
    counts = Counter(first)
    for schedule, p in THREE.items():
        assert abs(counts[schedule] / STEPS - p) < 5 * math.sqrt(p * (1 - p) / STEPS)
    assert NESTED.draw() == settled(0, 1, 1)
    assert stages([(0.5, plain()), (0.5, MIXED)]).draw() in THREE


def test_a_mixture_is_scored_in_proportion_and_stages_by_their_last():
    assert MIXED.scoring_parts() == tuple((p, s) for s, p in THREE.items())
    assert NESTED.scoring_parts() == ((1.0, settled(0, 1, 1)),)
    assert stages([(0.5, plain()), (0.5, MIXED)]).scoring_parts() == MIXED.scoring_parts()
    nested = mixture([(0.25, MIXED), (0.75, plain())])
    assert nested.scoring_parts() == (*((0.25 * p, s) for s, p in THREE.items()), (0.75, plain()))


def test_passes_of_a_mixture_need_a_step():
    for schedule in (MIXED, NESTED):
        with pytest.raises(ValueError, match=r"\.at\(step, steps, seed\), or \.draw\(\)"):
            schedule.passes(4)


def test_an_error_shows_a_schedule_of_its_kind():
    assert set(EXAMPLES) == set(names())
    for name, example in EXAMPLES.items():
        parse(example)
        with pytest.raises(ValueError, match=f"write for example {re.escape(example)}$"):
            parse(f"{name}(1, 2, 3, 4, 5)")
    with pytest.raises(ValueError, match=r"write for example interleaved\(2\)$"):
        parse("[")


@pytest.mark.parametrize(
    "text",
    [
        "x" * 5000,
        "9" * 5000,
        f"interleaved({'9' * 5000})",
        f"plain('{'a' * 5000}')",
        f"settled('{'a' * 5000}', 1, 1)",
        f"stages([{'(1, plain()), ' * 400}])",
        f"mixture([(0.5, '{'a' * 5000}')])",
        f"late({'8' * 900}, plain())",
    ],
    ids=lambda text: text[:12],
)
def test_an_error_repeats_no_long_text(text: str):
    with pytest.raises(ValueError, match="cannot read the schedule") as refused:
        parse(text)
    assert len(str(refused.value)) < 800
    assert "set_int_max_str_digits" not in str(refused.value)
