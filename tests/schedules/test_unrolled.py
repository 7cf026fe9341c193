"""Exact passes in compiled chunks: what they cover, and that they are sequential(), gradients and cuts included."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.models import VOCABULARY, assert_same, assert_same_gradients, random_model, random_tokens

from lrt import MemoryConfig, ModelConfig, refine, schedules
from lrt.schedules import unrolled

MEMORY = MemoryConfig(source=(1, 2), combine="channels", projection="layerwise", initial="embedding")
CONFIG = ModelConfig(
    depth=2,
    width=12,
    heads=2,
    kv_heads=1,
    vocab_size=VOCABULARY,
    context=16,
    window_pattern="S",
    window=3,
    value_embeddings="alternate",
    memory=MEMORY,
)


def gradients_of(model: Any, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
    direction = torch.randn(hidden.shape, dtype=hidden.dtype, generator=torch.Generator().manual_seed(5))
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad((hidden * direction).sum(), parameters, allow_unused=True)
    return {name: g for name, g in zip(names, gradients, strict=True) if g is not None}


@pytest.mark.parametrize("backprop", [None, 1, 4])
@pytest.mark.parametrize("chunk", [3, 64])
def test_chunks_are_the_sequence(backprop: int | None, chunk: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(unrolled, "CHUNK", chunk)
    model, tokens = random_model(CONFIG), random_tokens()
    hidden = unrolled.over(model, tokens, backprop)
    expected = refine(model, tokens, schedules.sequential(backprop)).hidden
    assert_same(hidden, expected)
    assert_same_gradients(gradients_of(model, hidden), gradients_of(model, expected))


@pytest.mark.parametrize(
    "fields",
    [
        {"memory": replace(MEMORY, source=0, combine="sum")},
        {"memory": replace(MEMORY, source=(0, 2))},
        {"memory": replace(MEMORY, delay=2)},
        {"memory": replace(MEMORY, source=(2, 2), delay=(1, 2))},
        {"memory": MemoryConfig(injection="none")},
        {"window_pattern": "SL"},
        {"window": unrolled.CHUNK + 2, "context": 4 * unrolled.CHUNK},
        {"loops": 2},
    ],
    ids=str,
)
def test_what_is_not_covered_is_said(fields: dict[str, Any]):
    model = random_model(replace(CONFIG, **fields))
    with pytest.raises(ValueError, match=r"do not cover .*; use refine with sequential\(\)"):
        unrolled.over(model, random_tokens())
    widest = replace(CONFIG, window=unrolled.CHUNK + 1, context=4 * unrolled.CHUNK)
    assert unrolled.reason_uncovered(random_model(widest)) is None
