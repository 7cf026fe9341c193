"""Whether a model copies from its context: the rows that are scored, and what of them counts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lrt import LatentRecurrentTransformer, ModelConfig
from lrt.data.prepared import Documents
from lrt.eval import copying as module
from lrt.eval.copying import Copying, copying

TEXT = Documents(np.random.default_rng(0).integers(1, 30, 3000), np.arange(0, 3001, 100), bos=0)


def model_of(context: int = 64, **changes: object) -> LatentRecurrentTransformer:
    torch.manual_seed(0)
    return LatentRecurrentTransformer(
        ModelConfig(depth=1, width=8, heads=1, vocab_size=30, context=context, **changes)
    ).eval()


def test_rows_are_given_twice_and_first_tokens_do_not_count(monkeypatch: pytest.MonkeyPatch):
    rows: list[torch.Tensor] = []

    def score(model: LatentRecurrentTransformer, tokens: torch.Tensor) -> torch.Tensor:
        rows.append(tokens)
        return torch.arange(tokens.shape[1] - 1).expand(len(tokens), -1).double()

    monkeypatch.setattr(module, "score", score)
    copied = copying(model_of(), TEXT, rows=5, length=10)
    (tokens,) = rows
    assert tokens.shape == (5, 21)
    assert tokens[:, 0].eq(0).all()
    assert tokens[:, 1:11].equal(tokens[:, 11:])
    assert len(tokens[:, 1:11].unique()) > 20
    # Token t + 1 costs t: the first time 1 … 9 without the first, the second time 11 … 19.
    assert copied == Copying(first=5.0, again=15.0)


def test_an_untrained_model_copies_nothing():
    copied = copying(model_of(), TEXT)
    assert copied.first == pytest.approx(math.log(30), rel=0.01)
    assert abs(copied.first - copied.again) < 0.01


def test_rows_fit_the_context(monkeypatch: pytest.MonkeyPatch):
    lengths: list[int] = []

    def score(model: LatentRecurrentTransformer, tokens: torch.Tensor) -> torch.Tensor:
        lengths.append(tokens.shape[1])
        return torch.zeros(len(tokens), tokens.shape[1] - 1)

    monkeypatch.setattr(module, "score", score)
    copying(model_of(context=16), TEXT)
    copying(model_of(context=16, window_pattern="S", window=8), TEXT)
    assert lengths == [15, 201]
    with pytest.raises(ValueError, match="have nothing to copy"):
        copying(model_of(), TEXT, length=1)
