"""What a report says in words follows from the numbers below it."""

from __future__ import annotations

from typing import Any

import pytest

from lrt.eval.report import sentences
from lrt.eval.report.names import NAMES, name_of
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
        "Recurrence makes 50 % of the tokens likelier to mine, by +0.450 bits each."
    )
    assert "Nothing recurs" in sentences.helped("mine", {"live": [1.0], "off": [1.001]})
