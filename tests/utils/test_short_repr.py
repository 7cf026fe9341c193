"""What the library's objects look like: one line with what sets them apart, and configurations as their calls."""

from __future__ import annotations

import pytest
import torch

import lrt
from lrt import MemoryConfig, ModelConfig, Request, RunConfig
from lrt.eval.results import Result
from lrt.eval.scoring import Metrics
from lrt.training.optim_config import OptimConfig
from lrt.training.recipes import RECIPES

TINY = ModelConfig(depth=1, width=8, heads=1, vocab_size=11, context=8)


@pytest.mark.parametrize(
    "config", [ModelConfig(), TINY, *(make() for make in RECIPES.values())], ids=["plain", "tiny", *RECIPES]
)
def test_a_configuration_is_shown_as_the_call_that_makes_it(config: ModelConfig | RunConfig):
    names = {kind.__name__: kind for kind in (ModelConfig, MemoryConfig, OptimConfig, RunConfig)}
    assert eval(repr(config), names) == config


def test_only_what_is_not_usual_is_shown():
    assert repr(ModelConfig()) == "ModelConfig()"
    assert repr(TINY) == "ModelConfig(depth=1, width=8, heads=1, vocab_size=11, context=8)"
    assert repr(RunConfig(TINY, seed=3)) == f"RunConfig(model={TINY!r}, seed=3)"


def test_long_sequences_are_their_beginning_and_their_length():
    assert repr(Request((1, 2))) == "Request(tokens=(1, 2))"
    shown = ", ".join(map(str, range(32)))
    assert repr(Request(tuple(range(1000)), 5)) == f"Request(tokens=({shown}, … 1,000 in all), max_new_tokens=5)"


def test_models_states_and_sessions_are_one_line():
    torch.manual_seed(0)
    model = lrt.LatentRecurrentTransformer(TINY)
    total = sum(weight.numel() for weight in model.parameters())
    assert repr(model) == f"LatentRecurrentTransformer({total:,} parameters, {TINY!r})"
    assert repr(model.empty_state(2, 8)) == "State(batch=2, slots=8, written until 0)"
    assert repr(lrt.Session.start(model, [1, 2, 3], seed=4)) == "Session(3 tokens, seed=4)"


def test_scores_are_shown_with_their_unit():
    scores = Metrics("plain()", 1234, 5000, False, 2.25, 2.5, 0.25)
    assert repr(scores) == "Metrics(live 2.5000, parallel 2.2500, gap +0.2500 bits per byte; 1,234 tokens)"
    alone = Metrics("other()", 10, 50, True, None, 2.5, None, registered={"live_bpb_memory_halved": 3.0})
    assert repr(alone) == "Metrics(live 2.5000 bits per byte; 10 tokens)"
    for one in (scores, alone):
        assert Metrics.from_dict(one.to_dict()) == one
    assert repr(Result("bpb", "books-val", "ab", {}, {"columns": {}, "by_place": []})) == (
        "Result('bpb' of 'books-val': columns, by_place)"
    )
