"""What a report says in words follows from the numbers below it."""

from __future__ import annotations

from typing import Any

import pytest

from lrt.eval.report import sentences
from lrt.eval.report.names import NAMES, name_of
from lrt.eval.results import Result
from lrt.eval.scoring import Metrics, every_ablation


def test_every_score_has_a_name_for_people():
    keys = set(Metrics.__dataclass_fields__) - {"registered"} | {f"live_bpb_memory_{n}" for n in every_ablation()[:-1]}
    assert keys <= NAMES.keys()
    assert name_of("live_bpb_memory_my_own") == "memory my own"
    assert not [name for name in map(name_of, keys) if "_" in name]


def test_the_best_comes_first_and_the_others_are_behind_it():
    said = sentences.ranking_sentence({"plain": 2.0, "mine": 1.9, "shift": 1.95}, "books, val")
    assert said == (
        "mine has 1.9000 live bits per byte, the best; shift is 0.0500 (2.6 %) behind; plain is 0.1000 (5.3 %) behind "
        "(books, val)."
    )
    assert sentences.ranking_sentence({"mine": 1.9}, "books") == "mine has 1.9000 live bits per byte (books)."


@pytest.mark.parametrize(
    ("bpb", "low", "high", "said"),
    [
        (0.002, 0.001, 0.003, "Recurrence is worth 0.0020 bits per byte to mine; the 95 % interval excludes zero."),
        (0.002, -0.001, 0.003, "Recurrence is worth 0.0020 bits per byte to mine; the 95 % interval holds zero."),
        (-0.002, -0.003, -0.001, "Recurrence costs 0.0020 bits per byte to mine; the 95 % interval excludes zero."),
        (0.002, None, None, "Recurrence is worth 0.0020 bits per byte to mine."),
        (1e-9, 0.0, 2e-9, "Nothing recurs in mine."),
    ],
)
def test_what_recurrence_is_worth(bpb: float, low: float | None, high: float | None, said: str):
    assert sentences.worth("mine", {"differences": {"off - live": {"bpb": bpb, "low": low, "high": high}}}) == said


def test_the_whole_diagnosis_in_short():
    def result(kind: str, values: dict[str, Any]) -> Result:
        return Result(kind, "books-val", "ab", {}, values)

    bpb = result("bpb", {"differences": {"off - live": {"bpb": 0.002, "low": None, "high": None}}})
    sweeps, memory = result("sweeps", {"verdict": "stable"}), result("memory", {"reach": points(1.0, 0.02, 0.005)})
    assert sentences.in_short("mine", [memory, sweeps, bpb]) == (
        "Recurrence is worth 0.0020 bits per byte to mine; stable; it reaches 2 tokens back."
    )
    assert sentences.in_short("mine", [sweeps]) is None
    assert sentences.in_short("mine", []) is None


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"live_bpb": 2.0, "gap": 0.0012, "live_bpb_memory_zero": 2.5},
            "mine has 2.0000 bits per byte, live; 0.0012 more than in parallel; without its memory 0.5000 (25.0 %) "
            "worse.",
        ),
        ({"live_bpb": 2.0, "gap": -0.3}, "mine has 2.0000 bits per byte, live; 0.3000 less than in parallel."),
        ({"live_bpb": 2.0, "gap": 4e-5}, "mine has 2.0000 bits per byte, live; the same in parallel."),
        ({"live_bpb": 2.0}, "mine has 2.0000 bits per byte, live."),
    ],
)
def test_what_a_score_says(values: dict[str, float], said: str):
    assert sentences.scored("mine", values) == said


def test_what_bfloat16_costs():
    rows = {"bfloat16 control - live": {"bpb": 0.001}, "bfloat16 live - bfloat16 control": {"bpb": -0.0002}}
    assert sentences.rounded("mine", {"differences": rows}) == (
        "bfloat16 costs mine +0.0008 bits per byte, live: +0.0010 by its arithmetic, -0.0002 by errors that go round "
        "the recurrence."
    )


def points(*kl: float) -> list[dict[str, Any]]:
    return [{"back": back, "kl": value} for back, value in enumerate(kl, 1)]


def test_the_reach_is_where_a_hundredth_is_left():
    assert "reaches 2 tokens back" in sentences.reach("mine", points(1.0, 0.02, 0.005))
    assert "reaches 1 token back" in sentences.reach("mine", points(1.0, 0.009))
    assert sentences.reach("mine", points(0.0, 0.0)) == "No memory of mine moves its next token."


def test_what_a_zeroed_memory_costs():
    said = sentences.replaced("mine", {"live_bpb": 2.0, "live_bpb_memory_zero": 2.5})
    assert said == "Without its memory mine is 0.5000 (25.0 %) worse, in bits per byte."
    assert sentences.replaced("plain", {"live_bpb": 2.0}) == "plain has no memory to replace."


def test_how_many_tokens_recurrence_helps():
    assert sentences.helped("mine", {"live": [1.0, 2.0], "off": [2.0, 1.9]}) == (
        "Recurrence makes 50 % of the tokens likelier to mine; on average a token gains +0.450 bits."
    )
    assert "Nothing recurs" in sentences.helped("mine", {"live": [1.0], "off": [1.001]})
