"""Everything is computed where the model is: the meta device computes nothing, and refuses tensors of another."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.models import BATCH, LENGTH, random_model
from torch import Tensor

from lrt import MemoryConfig, ModelConfig, schedules
from lrt.model.cross_entropy import summed_nats, token_nats
from lrt.model.visibility import additive
from lrt.schedules.refinement import refine

META = torch.device("meta")


def on_meta(config: ModelConfig) -> tuple[Any, Tensor]:
    """A model, and tokens (B, T)."""
    return copy.deepcopy(random_model(config)).to(META), torch.zeros(BATCH, LENGTH, dtype=torch.long, device=META)


EVERYTHING = ModelConfig(
    depth=2,
    width=12,
    heads=2,
    kv_heads=1,
    vocab_size=31,
    context=16,
    value_embeddings="all",
    window_pattern="SL",
    window=3,
    mlp_width=20,
    memory=MemoryConfig(source=(0, 2), initial="embedding", delay=2),
)


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
def test_passes_losses_and_gradients_stay_on_the_models_device(packed: bool):
    model, tokens = on_meta(EVERYTHING)
    documents = tokens if packed else None
    state = model.empty_state(BATCH, LENGTH, documents, tokens)
    hidden, state = model(tokens[:, :2], range(2), state)
    hidden, state = model(tokens[:, 2:4], torch.tensor([2, 3]), state)
    hidden, state = model(tokens[:, :1], torch.tensor([[4], [2]], device=META), state)
    for passes in (schedules.chunked(4), schedules.strided(2, 2)):  # by masks, by classes
        hidden = refine(model, tokens, passes, documents).hidden
        nats = summed_nats(model, hidden, tokens)
        assert {nats.device, token_nats(model, hidden, tokens).device, hidden.device} == {META}
        nats.backward()
    assert {p.grad.device for p in model.parameters() if p.grad is not None} == {META}
    assert state.intact(torch.ones(BATCH, dtype=torch.long, device=META), 2).device == META
    assert additive(torch.ones(2, dtype=torch.bool, device=META), hidden).device == META
