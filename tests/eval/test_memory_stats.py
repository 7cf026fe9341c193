"""Diagnostics of the memory, against models made by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.models import random_model as shared_model
from support.scoring import BYTES, LRT, NONE, SHIFT, V, configuration, cut

from lrt import schedules
from lrt.data.tokenizer import Tokenizer
from lrt.eval.memory_stats import layer_stats, live_state, longest_inputs, memory_reach, memory_scales, token_pieces
from lrt.model.config import ModelConfig
from lrt.model.transformer import LatentRecurrentTransformer


def random_model(config: ModelConfig) -> Any:
    """A copy that a test may change."""
    return copy.deepcopy(shared_model(config))


def inputs(length: int = 8, rows: int = 2) -> torch.Tensor:
    return torch.randint(1, V, (rows, length), generator=torch.Generator().manual_seed(0))


def test_gates_and_scales_are_what_the_weights_say():
    model = LatentRecurrentTransformer(LRT).double().eval()  # gates start at 1, γ at 0.1
    for row in layer_stats(model, inputs()):
        assert row["gamma"] == pytest.approx([0.1])
        assert torch.tensor(row["gates"]).flatten().tolist() == pytest.approx([1.0] * 4)
        assert max(torch.tensor(row["gate_spread"]).flatten().tolist()) < 1e-6
    one, other = random_model(LRT), random_model(LRT)
    with torch.no_grad():
        for name, p in other.named_parameters():
            if name == "projection.weight":
                p.mul_(2)
    # Twice the projection, not quite twice the ratio: the first position's memory is zero in both, the rest moves too.
    first, second = layer_stats(one, inputs())[0], layer_stats(other, inputs())[0]
    assert second["key_ratio"][0] > 1.3 * first["key_ratio"][0]
    assert memory_scales(other)["projection"][0][0] == pytest.approx(2 * memory_scales(one)["projection"][0][0])


@pytest.mark.parametrize(
    "memory", [{"injection": "residual"}, {"layers": (2,)}, {"source": (0, 2), "combine": "channels"}]
)
def test_every_kind_of_memory_is_described(memory: dict[str, Any]):
    model = random_model(configuration(**memory))
    found = layer_stats(model, inputs())
    assert [row["layer"] for row in found] == [1, 2]
    assert [row["injected"] for row in found] == [memory.get("layers") is None, True]
    assert len(found[1]["gamma"]) == model.config.memory.channels(2)
    assert ("gates" in found[1]) == (memory.get("injection") != "residual")
    assert len(memory_scales(model)["gamma"]) == 2


def test_reach_is_what_a_changed_memory_does():
    model, tokens = random_model(LRT), inputs(8)
    found = {point["back"]: point for point in memory_reach(model, tokens, (1, 2, 4, 6))}
    assert set(found) == {1, 2, 4}  # the place is 5: six tokens ago there is nothing
    assert all(point["kl"] > 0 for point in found.values())
    # γ = 0 and U = 0: nothing arrives, from however far.
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".gamma") or name == "projection.weight":
                p.zero_()
    assert all(point["kl"] < 1e-12 and point["moved"] == 0 for point in memory_reach(model, tokens, (1, 2, 4)))
    assert memory_reach(random_model(NONE), tokens) == []
    assert memory_reach(random_model(SHIFT), tokens) == []


def test_reach_of_delay_two_skips_a_token():
    """Only what is read moves: with one block and no attention to speak of, position t depends on t - 2, t - 4, …."""
    model = random_model(configuration(delay=2, injection="residual"))
    with torch.no_grad():
        for block in model.blocks:
            block.attention.out.weight.zero_()
    found = {point["back"]: point["moved"] for point in memory_reach(model, inputs(8), (1, 2, 3, 4))}
    assert found[1] == found[3] == 0
    assert min(found[2], found[4]) > 0


def test_looking_leaves_no_hooks():
    model = random_model(LRT)
    layer_stats(model, inputs())
    assert all(len(m._forward_hooks) == 0 for m in model.modules())


def test_the_sample_is_whole_windows():
    found = longest_inputs(cut(), 3, torch.device("cpu"))
    assert found.shape == (3, 7)
    hidden, state = live_state(random_model(LRT), found)
    assert hidden.shape[:2] == (3, 7)
    assert state.memory.shape[2] == 1
    assert schedules.plain().passes(7)[0].stop == 7
    assert len(BYTES) == V


def test_pieces_of_a_text_join_to_it():
    tokenizer = Tokenizer.train(["größer 🙂 and more text"] * 3, 300)
    ids = tokenizer.encode("größer 🙂 and")
    found = token_pieces(tokenizer, ids, [1.0] * len(ids), [2.0] * len(ids))
    assert "".join(found["pieces"]) == "größer 🙂 and"
    assert found["off"][0] == pytest.approx(2.8854, abs=1e-4)
