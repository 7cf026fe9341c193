"""Every number of a configuration reaches the model: values that no default has, against the oracle and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from support.models import UNUSUAL, VOCABULARY, assert_same, decode, oracle_rows, random_model, random_tokens
from torch import nn
from torch.nn import functional as F

from lrt import LatentRecurrentTransformer, MemoryConfig, ModelConfig
from lrt.data.batch import IGNORED
from lrt.model.cross_entropy import summed_nats, token_nats


def test_hidden_states_at_unusual_numbers_are_the_oracles():
    model, tokens = random_model(UNUSUAL), random_tokens()
    assert_same(decode(model, tokens, model.empty_state(*tokens.shape)), oracle_rows(model, tokens))


def test_token_0_is_remembered_like_any_other():
    model, tokens = random_model(UNUSUAL), torch.zeros(2, 9, dtype=torch.long)
    assert_same(decode(model, tokens, model.empty_state(2, 9)), oracle_rows(model, tokens))


@pytest.mark.parametrize("cap", [0.5, 2.5, 40.0])
def test_logits_and_losses_are_soft_capped_at_the_models_own_number(cap: float):
    model = random_model(ModelConfig(depth=1, width=20, heads=2, vocab_size=VOCABULARY, softcap=cap))
    generator = torch.Generator().manual_seed(0)
    hidden = (4 * torch.randn(2, 5, 20, generator=generator, dtype=torch.float64)).requires_grad_()
    targets = torch.randint(VOCABULARY, (2, 5), generator=generator)
    targets[1, 3] = IGNORED
    logits = cap * torch.tanh(hidden @ model.head.weight.T / cap)
    nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none").view(2, 5)
    assert_same(model.logits(hidden), logits)
    assert_same(token_nats(model, hidden, targets), nats)
    assert_same(summed_nats(model, hidden, targets), nats.sum())
    (actual,), (expected,) = (torch.autograd.grad(x, hidden) for x in (summed_nats(model, hidden, targets), nats.sum()))
    assert_same(actual, expected, "gradient")


def test_nats_of_a_bfloat16_model_are_float32():
    model = random_model(UNUSUAL, torch.bfloat16)
    hidden = torch.randn(3, 20, generator=torch.Generator().manual_seed(0)).bfloat16()
    nats = token_nats(model, hidden, torch.tensor([1, 2, 3]))
    expected = F.cross_entropy(model.logits(hidden).float(), torch.tensor([1, 2, 3]), reduction="none")
    assert nats.dtype == torch.float32
    assert torch.equal(nats, expected)


def test_initial_values():
    torch.manual_seed(0)
    model = LatentRecurrentTransformer(UNUSUAL)
    uniform = 1 / math.sqrt(UNUSUAL.width)
    deviations = {"embedding.weight": 1.0, "head.weight": 0.001, "projection.weight": uniform}
    for name, weights in model.named_parameters():
        parameter = weights.detach()
        kind = name.split(".", 2)[-1] if name.startswith("blocks.") else name
        exact = {"alpha": 1.0, "beta": 0.3, "injection.gamma": -0.2}
        if kind in exact:
            assert (parameter == torch.tensor(exact[kind])).all(), name
        elif kind.endswith(("out.weight", "down.weight", "gate.weight")):
            assert not parameter.any(), name
        else:
            expected = deviations.get(kind, uniform)
            assert float(parameter.std()) == pytest.approx(expected, rel=0.15), name
            assert float(parameter.mean()) == pytest.approx(0, abs=0.25 * expected), name
            if expected == uniform:  # √3 standard deviations to either side, and no further
                assert float(parameter.abs().max()) == pytest.approx(math.sqrt(3) * uniform, rel=0.05), name


def test_weights_of_summed_sources_start_equal():
    memory = MemoryConfig(source=(0, 1, 2), combine="sum")
    model = LatentRecurrentTransformer(ModelConfig(depth=2, width=8, heads=2, vocab_size=9, context=8, memory=memory))
    assert isinstance(model.recall.weights, nn.Parameter)
    assert torch.equal(model.recall.weights, torch.full((3,), 1 / 3))
