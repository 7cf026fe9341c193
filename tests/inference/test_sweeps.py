"""A class of a sweep, computed on the path of decoding, is what the model itself gives: values and State, float64.

B rows, T positions, g classes.
"""

from __future__ import annotations

import dataclasses

import torch
from support.models import EACH_DELAY, NONE, PAIRWISE, PRODUCT, VOCABULARY, assert_same, over, random_model
from torch import Tensor

from lrt import ModelConfig
from lrt.inference.fused_step import SHORTEST
from lrt.inference.fused_weights import fuse_weights, packed_layout, transposed_layout
from lrt.inference.sweeps import forward_fused
from lrt.model.state import State
from lrt.model.state_protocol import Positions

ROWS, GROUPS = 2, 3
LENGTH = 5 * SHORTEST * GROUPS + 1  # classes of unequal size, in several runs of queries
EVERY = {**PAIRWISE, **PRODUCT, **EACH_DELAY, "none": NONE}


def tokens_of(length: int) -> Tensor:
    return torch.randint(VOCABULARY, (ROWS, length), generator=torch.Generator().manual_seed(3))


def longer(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(config, context=2 * LENGTH)


def assert_same_state(actual: State, expected: State) -> None:
    assert torch.equal(actual.slot_positions, expected.slot_positions)
    assert torch.equal(actual.tokens, expected.tokens)
    assert actual.written_until == expected.written_until
    for name in ("keys", "values"):
        for ours, its in zip(getattr(actual, name), getattr(expected, name), strict=True):
            assert_same(ours, its, name)
    if expected.memory.shape[2]:
        assert_same(actual.memory, expected.memory, "memory")


@over(EVERY)
@torch.no_grad()
def test_sweeps_equal_the_model(config: ModelConfig):
    model, tokens = random_model(longer(config)), tokens_of(LENGTH)
    weights = fuse_weights(model)
    ours, its = (model.empty_state(ROWS, LENGTH + 7, tokens=padded(tokens, 7)).in_place() for _ in range(2))
    for _ in range(2):  # the first sweep finds nothing written, the second what the first one left
        for first in range(GROUPS):
            positions, some = range(first, LENGTH, GROUPS), tokens[:, first::GROUPS]
            actual, ours = forward_fused(model, weights, some, positions, ours)
            expected, its = model(some, positions, its)
            assert_same(actual, expected, f"class {first}")
    assert_same_state(ours, its)


@over(PAIRWISE, more=EACH_DELAY)
@torch.no_grad()
def test_rows_that_stand_at_different_positions(config: ModelConfig):
    model, tokens = random_model(longer(config)), tokens_of(LENGTH)
    starts = torch.tensor([[0], [11]])
    weights = fuse_weights(model)
    everywhere = starts + torch.arange(LENGTH)
    ours, its = (model.empty_state(ROWS, 2 * LENGTH).in_place().write_tokens(everywhere, tokens) for _ in range(2))
    for first in range(GROUPS):
        positions: Positions = starts + torch.arange(first, LENGTH, GROUPS)
        some = tokens[:, first::GROUPS]
        actual, ours = forward_fused(model, weights, some, positions, ours)
        expected, its = model(some, positions, its)
        assert_same(actual, expected, f"class {first}")
    assert_same_state(ours, its)


@torch.no_grad()
def test_slots_that_are_reused():
    sliding = [c for c in EVERY.values() if c.unlimited_context]
    assert sliding
    for config in sliding:
        model, tokens = random_model(config), tokens_of(40)
        weights, slots = fuse_weights(model), 20 + config.lookback
        ours, its = (model.empty_state(ROWS, slots).in_place() for _ in range(2))
        for begin in (0, 20):
            ours, its = (
                state.write_tokens(range(begin, begin + 20), tokens[:, begin : begin + 20]) for state in (ours, its)
            )
            for first in range(begin, begin + GROUPS):
                positions, some = range(first, begin + 20, GROUPS), tokens[:, first : begin + 20 : GROUPS]
                actual, ours = forward_fused(model, weights, some, positions, ours)
                expected, its = model(some, positions, its)
                assert_same(actual, expected, f"class {first}")
        assert_same_state(ours, its)


@over(PAIRWISE, step=4)
@torch.no_grad()
def test_packed_weights_give_the_same_in_float32(config: ModelConfig):
    model, tokens = random_model(longer(config), torch.float32), tokens_of(LENGTH)
    hidden = [
        forward_fused(
            model,
            fuse_weights(model, layout),
            tokens,
            range(LENGTH),
            model.empty_state(ROWS, LENGTH, tokens=tokens).in_place(),
        )[0]
        for layout in (transposed_layout, packed_layout(128))
    ]
    assert_same(hidden[1], hidden[0])


def padded(tokens: Tensor, more: int) -> Tensor:
    return torch.nn.functional.pad(tokens, (0, more), value=-1)
