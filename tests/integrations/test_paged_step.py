"""Steps of vLLM without vLLM: chunks of prompts over pages, each as exact as its certificate says.

The pages are `support.paged`'s, with the plainest attention. What vLLM itself does with them: tests/vllm.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support.models import NONE, PAIRWISE, assert_differs, assert_same, difference, over, random_model
from support.paged import PAGE, PagedEngine
from torch import Tensor

from lrt import MemoryConfig, ModelConfig, refine, schedules
from lrt.inference.certificate import Certificate
from lrt.integrations.vllm.sharing import readers, waves
from lrt.integrations.vllm.spans import Chunk, Spans
from lrt.integrations.vllm.step import Step

GROUPS = 4
LENGTHS = (13, 9, 1, 6)
CONFIGS = dict(list(PAIRWISE.items())[::6])
LONG = 64
CALM = ModelConfig(depth=4, width=12, heads=2, vocab_size=31, context=LONG, window=8, window_pattern="SL")


def calm_model(config: ModelConfig) -> Any:
    """A model whose memory weighs little, so that sweeps contract; of another configuration, its own parameters."""
    model = copy.deepcopy(random_model(config, seed=3))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("gamma") or name == "projection.weight":
                weight.mul_(0.02)
    return model


@torch.no_grad()
def recurrent(model: Any, row: Tensor) -> Tensor:
    """True recurrence over one row (n,), by lrt's own slots: hidden (n, D)."""
    return refine(model, row[None], schedules.sequential()).hidden[0]


def prompts(lengths: Sequence[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(31, (n,), generator=generator) for n in lengths]


def serve(
    model: Any, rows: list[Tensor], chunk: int, tolerance: float | None, groups: int = GROUPS
) -> tuple[list[Tensor], list[list[Certificate]], PagedEngine]:
    """Each row in chunks of so many tokens, all rows in one step: hidden (n, D) and certificates of each, by row."""
    engine = PagedEngine(model, len(rows), max(map(len, rows)))
    hidden, certificates = [torch.empty(0)] * len(rows), [[] for _ in rows]
    for begin in range(0, max(map(len, rows)), chunk):
        parts = [row[begin : begin + chunk] for row in rows]
        chunks = engine.step(parts, [begin] * len(rows))
        out = torch.zeros(sum(map(len, parts)), model.config.width, dtype=torch.float64)
        step = Step(model.config, engine, chunks, {c.request: tolerance for c in chunks}, groups, out)
        step.compute()
        for c in chunks:
            hidden[c.request] = torch.cat((hidden[c.request], out[c.start : c.start + c.tokens]))
            certificates[c.request] += [step.certificates[c.request]] if c.request in step.certificates else []
    return hidden, certificates, engine


@pytest.mark.parametrize("chunk", [16, 5])
@over(CONFIGS, more={"none": NONE})
def test_token_by_token_is_true_recurrence(config: ModelConfig, chunk: int):
    model, rows = random_model(config), prompts([min(n, config.context) for n in LENGTHS])
    hidden, _, _ = serve(model, rows, chunk, None)
    for row, new in zip(rows, hidden, strict=True):
        assert_same(new, recurrent(model, row))


@pytest.mark.parametrize("groups", [1, GROUPS])
@over(CONFIGS)
def test_sweeps_of_a_model_that_does_not_contract_end_exact(config: ModelConfig, groups: int):
    """By falling back, or because so many sweeps are exact."""
    model, rows = random_model(config), prompts([min(n, config.context) for n in LENGTHS])
    hidden, certificates, _ = serve(model, rows, 16, 1e-13, groups)
    for row, new, (*own,) in zip(rows, hidden, certificates, strict=True):
        assert_same(new, recurrent(model, row))
        assert all(certificate.bound <= 1e-13 for certificate in own)


@pytest.mark.parametrize("source", [None, 2, (1, 4)])
@pytest.mark.parametrize("groups", [1, GROUPS])
def test_a_converged_chunk_is_within_what_its_certificate_says(source: Any, groups: int):
    memory = MemoryConfig(source=source, combine="channels")
    model = calm_model(dataclasses.replace(CALM, memory=memory))
    rows = prompts([LONG, 50, 9, 1])
    hidden, certificates, engine = serve(model, rows, LONG, 1e-5, groups)
    for row, new, (*own,) in zip(rows, hidden, certificates, strict=True):
        expected = recurrent(model, row)
        assert difference(new, expected) < 1e-5
        assert len(own) == (len(row) > 1)
    (first,) = certificates[0]
    assert (first.path, first.tokens) == ("sweeps", LONG)
    assert 0 < first.bound <= 1e-5
    assert engine.runs < LONG  # sweeps took fewer runs than tokens
    chunks = engine.step(rows, [0] * len(rows))
    one_pass, _ = engine(Spans.whole(chunks), swept=False)
    assert_differs(one_pass[:LONG], hidden[0])


def test_the_memory_that_later_chunks_read_is_that_of_the_last_sweep():
    model, (row,) = calm_model(CALM), prompts([LONG])
    hidden, certificates, _ = serve(model, [row], 20, 1e-9)
    assert [certificate.tokens for certificate in certificates[0]] == [20, 20, 20, 4]
    assert difference(hidden[0], recurrent(model, row)) < 1e-7


def test_requests_may_ask_for_different_exactness_in_one_step():
    model, rows = calm_model(CALM), prompts([40, 40])
    engine = PagedEngine(model, 2, 40)
    out = torch.zeros(80, 12, dtype=torch.float64)
    step = Step(model.config, engine, engine.step(rows, [0, 0]), {0: None, 1: 1e-3}, GROUPS, out)
    step.compute()
    assert step.certificates[0].path == "exact"
    assert 0 < step.certificates[1].bound <= 1e-3
    assert_same(out[:40], recurrent(model, rows[0]))


@pytest.mark.parametrize("tolerance", [None, 1e-9])
def test_a_request_waits_for_the_one_that_computes_its_beginning(tolerance: float | None):
    """In one step: pages count as cached as soon as they are scheduled."""
    model, (row, other) = calm_model(CALM), prompts([30, 13])
    rows = [row, torch.cat((row[: 2 * PAGE], other))]
    engine = PagedEngine(model, 2, 40)
    engine.blocks[1, :2] = engine.blocks[0, :2]
    chunks = engine.step([rows[0], other], [0, 2 * PAGE])
    within = engine.everywhere
    slots = engine.blocks[engine.requests, within // PAGE] * PAGE + within % PAGE
    waiting = readers(chunks, engine.blocks, slots, PAGE)
    assert waiting == {1: {0}}
    out = torch.zeros(43, 12, dtype=torch.float64)
    Step(model.config, engine, chunks, {0: tolerance, 1: tolerance}, GROUPS, out, waiting=waiting).compute()
    assert difference(out[30:], recurrent(model, rows[1])[2 * PAGE :]) < 1e-8


def test_waves_follow_a_chain():
    chain = [Chunk(request, request, 1, 10 * request) for request in (2, 0, 1)]
    order = [[chunk.request for chunk in wave] for wave in waves(chain, {1: {0}, 2: {0, 1}})]
    assert order == [[0], [1], [2]]
