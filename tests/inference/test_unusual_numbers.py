"""Every way to decode and to prefill follows the numbers of the configuration, also those that no default has."""

from __future__ import annotations

import pytest
import torch
from support.models import UNUSUAL, assert_same, difference, oracle_rows, random_model, random_tokens

from lrt.inference.decoders import MODES, decoder
from lrt.inference.prefill import prefill


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode in ("eager", "fused")])
def test_decoded_states_are_the_oracles_and_logits_are_capped_at_the_models_number(mode: str):
    model, tokens = random_model(UNUSUAL), random_tokens()
    way = decoder(model, model.empty_state(*tokens.shape), mode)
    assert way.name == mode
    hidden = torch.stack([way(tokens[:, t], [t, t]) for t in range(tokens.shape[1])], 1)
    assert_same(hidden, oracle_rows(model, tokens))
    logits = way.logits(hidden[:, -1])
    assert_same(logits, 2.5 * torch.tanh(hidden[:, -1] @ model.head.weight.T / 2.5))
    assert float(logits.detach().abs().max()) > 1.25  # the cap is felt


@pytest.mark.parametrize("mode", ["exact", "converged"])
def test_a_prefilled_prompt_ends_where_the_oracle_does(mode: str):
    model, tokens = random_model(UNUSUAL), random_tokens()
    state = model.empty_state(*tokens.shape, tokens=tokens)
    with torch.no_grad():
        hidden = prefill(model, tokens, state, mode=mode).hidden  # type: ignore[arg-type]
    assert difference(hidden, oracle_rows(model, tokens)[:, -1:].detach()) < 1e-4
