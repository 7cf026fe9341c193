"""One promise: whatever State a model runs on, it computes the same recurrence, values and gradients.

The protocol is `lrt.model.state_protocol.ModelState`. Whoever writes another State adds it to `STATES`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support.models import (
    EACH_DELAY,
    PAIRWISE,
    VOCABULARY,
    assert_same,
    assert_same_gradients,
    gradients,
    oracle_rows,
    over,
    random_model,
    random_tokens,
    weights_of,
)
from support.oracle import simulate
from support.paged import PagedEngine
from torch import Tensor
from transformers import DynamicCache

from lrt import MemoryConfig, ModelConfig, refine, schedules
from lrt.integrations.hf.cache import Columns, append, read_cache
from lrt.integrations.vllm.paged_state import PagedState
from lrt.integrations.vllm.spans import Spans
from lrt.model.rolling_state import RollingState
from lrt.model.state import State
from lrt.model.state_protocol import ModelState
from lrt.model.strided_state import StridedState

LENGTH = 9
Call = Callable[[Tensor, range], Tensor]
"""(tokens (B, n), positions) -> hidden (B, n, D): the model over a State that the call keeps."""


def over_state(model: Any, state: Any) -> Call:
    """The model over a State, which each call replaces."""

    def call(tokens: Tensor, positions: range) -> Tensor:
        nonlocal state
        hidden, state = model(tokens, positions, state)
        return hidden

    return call


def over_cache(model: Any, batch: int) -> Call:
    """The model over a Hugging Face cache: read into slots before a call, written back to the cache after it."""
    cache = DynamicCache()

    def call(tokens: Tensor, positions: range) -> Tensor:
        columns = Columns.of(torch.ones_like(tokens, dtype=torch.bool))
        state, start = read_cache(cache, model.config, tokens, columns, model.embedding.weight)
        assert start.tolist() == [positions.start] * batch
        with torch.no_grad():
            hidden, state = model(tokens, positions, state)
            append(cache, model.config, state, start, tokens, columns)
        return hidden

    return call


def over_pages(model: Any, batch: int) -> Call:
    """The model over pages that vLLM keeps: first all positions from where the last call ended, then any of them."""
    engine, known = PagedEngine(model, batch, LENGTH), 0

    def call(tokens: Tensor, positions: range) -> Tensor:
        nonlocal known
        again = positions.stop <= known
        assert again or (positions.start, positions.step) == (known, 1)
        chunks = engine.step(list(tokens), [positions.start] * batch)
        engine.everywhere = torch.tensor(positions).repeat(batch)
        hidden, _ = engine(Spans.every(chunks, 0, 1), swept=again)
        known = max(known, positions.stop)
        return hidden.view(batch, len(positions), -1)

    return call


SEQUENTIAL = schedules.sequential()
CONTIGUOUS = (SEQUENTIAL, schedules.plain(), schedules.chunked(4))
PASS_FIRST = (*CONTIGUOUS, schedules.interleaved(2), schedules.settled(1, 3, 1))
ANY = (*PASS_FIRST, schedules.strided(2, 2))


@dataclass(frozen=True)
class Implementation:
    """A State, which models it serves, and which passes."""

    make: Callable[[Any, Tensor], Call]
    schedules: Sequence[Any]
    gradients: bool = True
    covers: Callable[[ModelConfig], bool] = lambda config: True


def classes(model: Any, tokens: Tensor) -> StridedState:
    return StridedState.of(model.empty_state(*tokens.shape, tokens=tokens), 2)


def slides(config: ModelConfig) -> bool:
    return config.unlimited_context and 0 not in config.sources and config.sources != () and set(config.delays) == {1}


STATES = {
    "slots": Implementation(lambda m, t: over_state(m, m.empty_state(*t.shape, tokens=t)), ANY),
    "slots, overwritten": Implementation(
        lambda m, t: over_state(m, m.empty_state(*t.shape, tokens=t).in_place()), ANY, gradients=False
    ),
    "residue classes": Implementation(
        lambda m, t: over_state(m, classes(m, t)), (schedules.plain(), schedules.interleaved(2))
    ),
    "rolling": Implementation(
        lambda m, t: over_state(m, RollingState.of(m.empty_state(len(t), 1), m.config.windows)),
        (SEQUENTIAL,),
        covers=slides,
    ),
    "Hugging Face cache": Implementation(lambda m, t: over_cache(m, len(t)), CONTIGUOUS, gradients=False),
    "vLLM's pages": Implementation(lambda m, t: over_pages(m, len(t)), PASS_FIRST, gradients=False),
}
SLIDING = {
    f"sliding, {injection}, {projection}, {source}": ModelConfig(
        depth=3,
        width=12,
        heads=2,
        vocab_size=VOCABULARY,
        context=16,
        window=4,
        window_pattern="S",
        value_embeddings="alternate",
        memory=MemoryConfig(injection=injection, projection=projection, source=source, combine="channels"),
    )
    for injection in ("residual", "both")
    for projection in ("shared", "layerwise")
    for source in (None, (2, 3))
}
CONFIGS = {**dict(list(PAIRWISE.items())[::4]), **EACH_DELAY, **SLIDING}


def run(call: Call, tokens: Tensor, schedule: Any) -> Tensor:
    """Hidden (B, T, D): each position by the last pass that computed it."""
    length = tokens.shape[1]
    last: list[Any] = [None] * length
    for p in schedule.passes(length):
        with torch.set_grad_enabled(p.grad and torch.is_grad_enabled()):
            hidden = call(tokens[:, p.slice], p.positions)
        for i, t in enumerate(p.positions):
            last[t] = hidden[:, i]
    return torch.stack(last, 1)


@pytest.mark.parametrize("name", STATES)
@over(CONFIGS)
def test_every_state_computes_what_is_specified(config: ModelConfig, name: str):
    implementation = STATES[name]
    if not implementation.covers(config):
        return
    model, tokens = random_model(config), random_tokens(length=LENGTH)
    for schedule in implementation.schedules:
        hidden = run(implementation.make(model, tokens), tokens, schedule)
        assert_same(hidden, specified(config, schedule), repr(schedule))


@functools.cache
def specified(config: ModelConfig, schedule: Any) -> Tensor:
    """What the specification gives: hidden (B, T, D) of the same tokens."""
    model, tokens = random_model(config), random_tokens(length=LENGTH)
    weights = weights_of(model)
    with torch.no_grad():
        return torch.stack([simulate(weights, config, row, schedule.passes(LENGTH))[0] for row in tokens])


@pytest.mark.parametrize("name", [name for name, state in STATES.items() if state.gradients and name != "slots"])
@over(CONFIGS)
def test_gradients_are_those_of_slots(config: ModelConfig, name: str):
    implementation = STATES[name]
    if not implementation.covers(config):
        return
    model, tokens = random_model(config), random_tokens(length=LENGTH)
    for schedule in implementation.schedules:
        hidden = run(implementation.make(model, tokens), tokens, schedule)
        expected = run(STATES["slots"].make(model, tokens), tokens, schedule)
        assert_same_gradients(gradients(model, hidden), gradients(model, expected), repr(schedule))


@pytest.mark.parametrize("kind", [State, StridedState, RollingState, PagedState])
def test_every_state_has_what_the_protocol_asks(kind: type):
    asked = {name for name in vars(ModelState) if not name.startswith("_")}
    assert {"read_memory", "write", "visible", "write_memory", "where", "mark_written"} <= asked
    offered = set(dir(kind)) | set(kind.__dataclass_fields__)  # type: ignore[attr-defined]
    assert asked <= offered, f"{kind.__name__} lacks {sorted(asked - offered)}"


def test_a_rolling_state_is_covered_by_some_models_here():
    covered = [config for config in CONFIGS.values() if slides(config)]
    assert len(covered) >= len(SLIDING)
    config = covered[-1]
    model, tokens = random_model(config), random_tokens(length=3 * LENGTH)
    state = RollingState.of(model.empty_state(len(tokens), 1), config.windows)
    for t in range(tokens.shape[1]):
        _, state = model(tokens[:, t : t + 1], range(t, t + 1), state)
        assert state.keys[0].shape[2] == min(t + 1, 3)  # constant in size: the window less the own position
    assert_same(refine(model, tokens, SEQUENTIAL).hidden[:1], oracle_rows(model, tokens[:1]))
