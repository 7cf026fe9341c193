"""Every way to decode gives the numbers of the model itself, for every configuration, at ragged positions.

B rows, T positions.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.decoding import decoded, raggedly
from support.models import (
    BATCH,
    EACH_DELAY,
    LENGTH,
    NONE,
    PAIRWISE,
    PRODUCT,
    assert_same,
    oracle_rows,
    over,
    random_model,
    random_tokens,
    unaligned,
)

from lrt import ModelConfig
from lrt.inference.decoders import MODES, PackedDecoder, bucket, decoder, fastest

EVERY = {**PAIRWISE, **PRODUCT, **EACH_DELAY, "none": NONE}


@over(EVERY)
@pytest.mark.parametrize("mode", ["eager", "fused"])
def test_each_mode_equals_the_oracle(config: ModelConfig, mode: str):
    model, tokens = random_model(config), random_tokens()
    expected = oracle_rows(model, tokens)
    for way in (decoded, lambda w, t: raggedly(w, t, [0, 3])):
        made = decoder(model, model.empty_state(BATCH, LENGTH + 3), mode)
        assert made.name == mode
        assert_same(way(made, tokens), expected, mode)
        assert torch.equal(made.state.slot_positions[:, :LENGTH], torch.arange(LENGTH).expand(BATCH, -1))
        assert torch.equal(made.state.tokens[:, :LENGTH], tokens)


@over(PAIRWISE, more=EACH_DELAY)
@pytest.mark.parametrize("mode", ["eager", "fused"])
def test_packed_documents(config: ModelConfig, mode: str):
    model, tokens, documents = random_model(config), random_tokens(), unaligned()
    way = decoder(model, model.empty_state(BATCH, LENGTH, documents), mode)
    assert_same(decoded(way, tokens), oracle_rows(model, tokens, documents))


@pytest.mark.parametrize("mode", ["eager", "fused"])
def test_slots_are_reused_where_every_layer_slides(mode: str):
    for config in (c for c in EVERY.values() if c.unlimited_context):
        model, tokens = random_model(config), random_tokens()
        way = decoder(model, model.empty_state(BATCH, config.lookback + 1), mode)
        assert_same(raggedly(way, tokens, [0, 2]), oracle_rows(model, tokens))


@over(PAIRWISE, more=EACH_DELAY)
def test_packed_weights_give_the_same_in_float32(config: ModelConfig):
    model, tokens = random_model(config, torch.float32), random_tokens()
    if not PackedDecoder.covers(model):
        pytest.skip("oneDNN is not there")
    found, expected = (
        raggedly(decoder(model, model.empty_state(BATCH, LENGTH + 3), mode), tokens, [0, 3])
        for mode in ("packed", "eager")
    )
    assert_same(found, expected)
    with pytest.raises(ValueError, match=r"needs float32 on a CPU; this is torch\.float64"):
        decoder(random_model(config), model.empty_state(BATCH, LENGTH).in_place(), "packed")


FIRST, *OTHERS = list(PAIRWISE.items())[::7]


def assert_compiled_equals_the_oracle(config: ModelConfig) -> None:
    model, tokens = random_model(config), random_tokens()
    way = decoder(model, model.empty_state(BATCH, LENGTH + 3), "compiled")
    assert_same(raggedly(way, tokens, [0, 2]), oracle_rows(model, tokens))
    assert way.name == "compiled"


@pytest.mark.slow
def test_the_compiled_step_equals_the_oracle():
    assert_compiled_equals_the_oracle(FIRST[1])


@pytest.mark.slow
@over(dict(OTHERS), more=EACH_DELAY)
def test_the_compiled_step_equals_the_oracle_everywhere(config: ModelConfig):
    assert_compiled_equals_the_oracle(config)


def test_a_state_goes_from_one_mode_to_the_next():
    model, tokens = random_model(next(iter(PAIRWISE.values()))), random_tokens()
    state, expected = model.empty_state(BATCH, LENGTH), oracle_rows(model, tokens)
    for t in range(LENGTH):
        way = decoder(model, state, ("eager", "fused")[t % 2])
        assert_same(way(tokens[:, t], [t] * BATCH), expected[:, t])
        state = way.state


def test_a_model_with_another_recall_is_decoded_too():
    from lrt.eval.scoring import ablate

    model, tokens = random_model(next(iter(PAIRWISE.values()))), random_tokens()
    for name in ("zero", "embedding"):
        other = ablate(model, name)
        hidden = [decoded(decoder(other, other.empty_state(BATCH, LENGTH), m), tokens) for m in ("eager", "fused")]
        assert_same(hidden[1], hidden[0], name)
        with pytest.raises(ValueError, match="not compiled; decode it with mode='fused'"):
            decoder(other, other.empty_state(BATCH, LENGTH), "compiled")


def test_the_fastest_mode_is_found_by_measuring(monkeypatch: pytest.MonkeyPatch):
    model = random_model(NONE)
    state: Any = model.empty_state(BATCH, LENGTH)
    assert fastest(model, state, ["eager", "fused"]) in MODES
    assert decoder(model, state, "best", ["fused"]).name == "fused"
    with pytest.raises(ValueError, match="unknown mode 'warp'; choose one of eager, fused, packed, compiled or best"):
        decoder(model, state, "warp")


def test_a_position_beyond_the_slots_is_an_error():
    model, tokens = random_model(NONE), random_tokens()
    for mode in ("eager", "fused"):
        with pytest.raises(ValueError, match=f"position {LENGTH} exceeds the {LENGTH} slots"):
            decoder(model, model.empty_state(BATCH, LENGTH), mode)(tokens[:, 0], [LENGTH] * BATCH)


def test_buckets_are_few():
    assert [bucket(n) for n in (1, 128, 129, 256, 257, 1000)] == [128, 128, 256, 256, 512, 1024]
