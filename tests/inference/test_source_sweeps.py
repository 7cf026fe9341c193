"""Sweeps that end at the source: the memory of whole sweeps, the state of token by token, and a certificate of what is
returned. float64, to 1e-10 where numbers must be equal. B rows, T positions, D width, s the highest remembered layer.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from support.models import random_model
from support.prefill import GROUPS, PARALLEL
from torch import Tensor

from lrt import LatentRecurrentTransformer, MemoryConfig, ModelConfig
from lrt.inference import sweeps
from lrt.inference.cost_model import BlockShares, Calibration, Plan, block_shares, swept_blocks
from lrt.inference.prefill import TOLERANCES, Prefilled, PrefillMode, prefill
from lrt.inference.prompt import Prompt
from lrt.inference.sweeps import BlockRange, SweepState
from lrt.model.execution import EAGER, WHOLE, Execution
from lrt.model.state import State

SWEPT: tuple[PrefillMode, ...] = ("converged", "fast")
LENGTH = 70
EAGERLY = Calibration(1e6, PARALLEL.plans)
"""Sweeps pay as long as they get anywhere."""
MIDDLE = MemoryConfig(source=(0, 2), combine="channels", projection="layerwise", initial="embedding")


def config_of(memory: MemoryConfig = MIDDLE, **settings: Any) -> ModelConfig:
    sizes = {"depth": 4, "width": 16, "heads": 2, "vocab_size": 31, "context": 128, "memory": memory}
    return ModelConfig(**{**sizes, **settings})


CONFIGS = {
    "middle": config_of(),
    "sum": config_of(MemoryConfig(source=(2, 1, 0), projection="shared"), depth=3),
    "two stored, delay 2": config_of(MemoryConfig(source=(1, 3), combine="channels", delay=2)),
    "two delays": config_of(MemoryConfig(source=(2, 0, 2), combine="channels", delay=(1, 2, 3))),
    "first": config_of(MemoryConfig(source=1, injection="key_value", projection="layerwise")),
    "residual": config_of(MemoryConfig(source=2, injection="residual")),
    "read above only": config_of(dataclasses.replace(MIDDLE, layers=(3, 4))),
    "read below only": config_of(dataclasses.replace(MIDDLE, layers=(1,)), kv_heads=1),
    "state above": config_of(
        dataclasses.replace(MIDDLE, source=(0, 3), layers=((1, 2, 3, 4), (3, 4)), initial="zeros")
    ),
    "loops": config_of(dataclasses.replace(MIDDLE, source=(0, 1)), depth=2, loops=2),
    "windows": config_of(window_pattern="SL", window=6, value_embeddings="alternate"),
}


def tame_model(config: ModelConfig, strength: float = 0.03) -> LatentRecurrentTransformer:
    """All parameters random; what comes in with the memory is weak, so that sweeps contract."""
    model = copy.deepcopy(random_model(config))  # which other tests share
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "gamma" in name or "projection" in name:
                p.mul_(strength)
    return model


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> LatentRecurrentTransformer:
    return tame_model(CONFIGS[request.param])


def prompts(rows: int, length: int = LENGTH, seed: int = 1) -> Tensor:
    return torch.randint(31, (rows, length), generator=torch.Generator().manual_seed(seed))


def empty(model: LatentRecurrentTransformer, rows: int, execution: Execution = EAGER) -> State:
    return dataclasses.replace(model.empty_state(rows, 100), execution=execution)


def run(
    model: LatentRecurrentTransformer, tokens: Tensor, mode: PrefillMode, execution: Execution = EAGER
) -> Prefilled:
    return prefill(model, tokens, empty(model, len(tokens), execution), mode, calibration=EAGERLY)


def swept(model: LatentRecurrentTransformer, tokens: Tensor, execution: Execution = EAGER) -> SweepState:
    """The rows of a prompt, of which nothing is computed yet."""
    rows, length = tokens.shape
    state = empty(model, rows, execution).in_place().write_tokens(range(length), tokens)
    return SweepState.of(model, Prompt(tokens, [length] * rows, [0] * rows), state)


def furthest(actual: Tensor, expected: Tensor) -> float:
    """The largest relative distance of a position."""
    apart = (actual - expected).detach().norm(dim=-1) / expected.detach().norm(dim=-1).clamp(min=1e-300)
    return float(apart.max())


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("model", [name for name in CONFIGS if name != "state above"], indirect=True)
def test_equal_numbers_of_sweeps_leave_the_same_memory(model: LatentRecurrentTransformer):
    """And the same keys and values of the blocks that a sweep runs: those above take no part in it.

    But for the model whose blocks below run first: they see all of the prompt from the first class on, so that as many
    sweeps leave it nearer.
    """
    tokens = prompts(2)
    ours, whole = swept(model, tokens), swept(model, tokens, WHOLE)
    blocks = model.config.memory_blocks
    assert (ours.lower.blocks.stop, len(whole.lower.blocks)) == (blocks, model.config.kv_layers)
    assert ours.below is None
    for sweep in range(4):
        for rows in (ours, whole):
            rows.sweep(model, GROUPS, sweep * GROUPS)
        assert_close(ours.state.memory[:, :LENGTH], whole.state.memory[:, :LENGTH])
        for name in ("keys", "values"):
            for own, its in zip(getattr(ours.state, name)[:blocks], getattr(whole.state, name), strict=False):
                assert_close(own[:, :, :LENGTH], its[:, :, :LENGTH])


@torch.no_grad()
def test_the_blocks_above_give_what_the_model_gives_at_the_fixed_point(model: LatentRecurrentTransformer):
    """After as many sweeps as a class has positions, everything is what token by token gives."""
    tokens = prompts(2, 30)
    rows, exact = swept(model, tokens), run(model, tokens, "exact")
    while rows.exact < 30:
        rows.sweep(model, GROUPS, rows.exact)
    rows.finish(model, [0, 1])
    assert_close(rows.hidden(), exact.sequence)
    for name in ("keys", "values"):
        for own, its in zip(getattr(rows.state, name), getattr(exact.state, name), strict=True):
            assert_close(own[:, :, :30], its[:, :, :30])


@pytest.mark.parametrize("mode", SWEPT)
def test_both_kinds_of_sweeps_converge_to_the_same_state(model: LatentRecurrentTransformer, mode: PrefillMode):
    tokens, further = prompts(2), prompts(2, 5, seed=2)
    ours, whole, exact = run(model, tokens, mode), run(model, tokens, mode, WHOLE), run(model, tokens, "exact")
    assert {row.path for row in (*ours.report.rows, *whole.report.rows)} == {"sweeps"}
    assert (ours.state.execution, whole.state.execution) == (EAGER, WHOLE)
    limit = 3 * TOLERANCES[mode]
    after: list[Tensor] = []
    for done in (ours, whole, exact):
        assert furthest(done.sequence, exact.sequence) <= limit
        assert furthest(done.hidden, exact.hidden) <= limit
        assert furthest(done.state.memory[:, :LENGTH], exact.state.memory[:, :LENGTH]) <= limit
        after.append(model(further, range(LENGTH, LENGTH + 5), done.state)[0])
    for hidden in after[:2]:  # keys and values of every layer are read
        assert furthest(hidden, after[2]) <= limit


@pytest.mark.parametrize("mode", SWEPT)
@torch.no_grad()
def test_the_certificate_is_of_what_is_returned(model: LatentRecurrentTransformer, mode: PrefillMode):
    """Its moves are those of the final hidden state and of every source, after the last sweep and the one before."""
    tokens = prompts(1)
    done = run(model, tokens, mode)
    (row,) = done.report.rows
    rows, values = swept(model, tokens), []
    for sweep in range(row.sweeps):
        rows.sweep(model, GROUPS, sweep * GROUPS)
        rows.finish(model, [0])
        values.append(torch.cat([rows.hidden().unsqueeze(2), rows.moves.values], 2)[0])
    assert_close(values[-1][:, 0], done.sequence[0])
    moves = values[-1] - values[-2]
    residual = (moves.norm(dim=(0, 2)) / values[-1].norm(dim=(0, 2))).max()
    each = (moves.norm(dim=-1) / values[-1].norm(dim=-1)).amax(1)
    assert row.residual == pytest.approx(float(residual), rel=1e-6, abs=1e-14)
    assert row.worst == pytest.approx(float(each.max()), rel=1e-6, abs=1e-14)
    assert each.max() < 1e-14 or row.worst_position == int(each.argmax())
    (everything,) = rows.certificates(GROUPS, "")  # with the final hidden state compared after every sweep
    assert row.contraction is not None
    assert everything.contraction is not None
    assert row.contraction <= everything.contraction
    assert row.within(TOLERANCES[mode])


@pytest.mark.parametrize("mode", SWEPT)
@pytest.mark.parametrize("execution", [EAGER, WHOLE], ids=["source", "whole"])
def test_what_is_counted_is_what_is_computed(
    model: LatentRecurrentTransformer, mode: PrefillMode, execution: Execution, monkeypatch: pytest.MonkeyPatch
):
    work, compute = [], BlockRange.__call__

    def counted(self: BlockRange, model: LatentRecurrentTransformer, tokens: Tensor, *others: Any) -> Any:
        work.append((self.blocks, tokens.shape[1]))
        return compute(self, model, tokens, *others)

    monkeypatch.setattr(BlockRange, "__call__", counted)
    (row,) = run(model, prompts(1), mode, execution).report.rows
    config = model.config
    done = sum(len(blocks) * positions for blocks, positions in work)
    assert row.forwards == pytest.approx(done / (config.kv_layers * LENGTH))
    lower = swept_blocks(config, execution)
    swept = sum(positions for blocks, positions in work if blocks == lower)
    assert swept == sum(LENGTH - n * GROUPS for n in range(row.sweeps))
    assert [positions for blocks, positions in work if blocks.stop == lower.start] == [LENGTH] * (lower.start > 0)
    finished = [positions for blocks, positions in work if blocks.start == lower.stop]
    assert finished[:1] == ([LENGTH] if execution == EAGER else [])
    assert all(positions < LENGTH for positions in finished[1:]), "what was exact before is left out"


def test_a_prompt_costs_its_sweeps_and_two_passes_of_the_blocks_above():
    (row,) = run(tame_model(CONFIGS["middle"]), prompts(1), "converged").report.rows
    swept = sum(LENGTH - n * GROUPS for n in range(row.sweeps)) / 2
    assert row.forwards == pytest.approx((swept + LENGTH / 2 + (LENGTH - (row.sweeps - 1) * GROUPS) / 2) / LENGTH)


@pytest.mark.parametrize("mode", SWEPT)
def test_a_final_state_that_does_not_settle_is_noticed(
    model: LatentRecurrentTransformer, mode: PrefillMode, monkeypatch: pytest.MonkeyPatch
):
    """The sources settle as ever, but what the blocks above give differs by a hundredth each time."""
    tokens, compute = prompts(1), BlockRange.__call__

    def restless(self: BlockRange, *arguments: Any) -> tuple[Tensor, State]:
        output, state = compute(self, *arguments)
        return output + (0.01 * torch.randn_like(output) if self.blocks.stop == model.config.kv_layers else 0), state

    monkeypatch.setattr(BlockRange, "__call__", restless)
    rows = swept(model, tokens)
    with torch.no_grad():
        for _ in range(8):
            rows.sweep(model, GROUPS, rows.exact)
            rows.finish(model, [0])
    (certificate,), ((worst, _),) = rows.certificates(GROUPS, ""), rows.moves.worst([LENGTH])
    assert rows.moves.bound(0, worst) <= TOLERANCES[mode], "the sources alone would pass"
    assert certificate.bound > 0.01
    done, exact = run(model, tokens, mode), run(model, tokens, "exact")
    assert done.report.rows[0].path == "fallback"
    assert torch.equal(done.sequence, exact.sequence)


@torch.no_grad()
def test_the_blocks_above_run_over_some_rows_alone(model: LatentRecurrentTransformer):
    """Of three rows the second is finished: it is what it is alone, and the others know no final hidden state."""
    tokens = prompts(3)
    together, alone = swept(model, tokens), swept(model, tokens[1:2])
    for sweep in range(3):
        for rows in (together, alone):
            rows.sweep(model, GROUPS, sweep * GROUPS)
        together.finish(model, [1] if sweep > 0 else [])
        alone.finish(model, [0] if sweep > 0 else [])
    (expected,), (first, row, last) = alone.certificates(GROUPS, ""), together.certificates(GROUPS, "")
    assert row.residual == pytest.approx(expected.residual, rel=1e-9)
    assert (row.worst_position, row.forwards) == (expected.worst_position, expected.forwards)
    assert_close(together.hidden()[1], alone.hidden()[0])
    for other in (first, last):
        assert (other.residual, other.worst, other.bound) == (None, None, math.inf)
        assert other.forwards < row.forwards
    together.finish(model, [0, 1])  # after the same sweep again: the second row is compared, the last one knows nothing
    assert together.certificates(GROUPS, "")[2].residual is None


@torch.no_grad()
def test_a_pause_forgets_what_is_too_old_to_be_compared(model: LatentRecurrentTransformer):
    tokens = prompts(1)
    rows = swept(model, tokens)
    for sweep, finished in enumerate([True, True, False, True]):
        rows.sweep(model, GROUPS, sweep * GROUPS)
        rows.finish(model, [0] if finished else [])
        known = rows.certificates(GROUPS, "")[0].residual is not None
        assert known == (sweep == 1)


@pytest.mark.parametrize("mode", [*SWEPT, "one_sweep"])
def test_without_fused_products_the_model_computes_the_same(
    model: LatentRecurrentTransformer, mode: PrefillMode, monkeypatch: pytest.MonkeyPatch
):
    tokens, lengths = prompts(2), torch.tensor([LENGTH, 51])
    fused = prefill(model, tokens, empty(model, 2), mode, lengths, EAGERLY)
    monkeypatch.setattr(sweeps, "can_fuse", lambda model: False)
    plain = prefill(model, tokens, empty(model, 2), mode, lengths, EAGERLY)
    assert_close(plain.sequence, fused.sequence)
    for row, n in enumerate(lengths.tolist()):
        assert_close(plain.state.memory[row, :n], fused.state.memory[row, :n])
        for name in ("keys", "values"):
            for own, its in zip(getattr(plain.state, name), getattr(fused.state, name), strict=True):
                assert_close(own[row, :, :n], its[row, :, :n])
    for own, its in zip(plain.report.rows, fused.report.rows, strict=True):
        assert (own.path, own.sweeps, own.forwards) == (its.path, its.sweeps, its.forwards)


@pytest.mark.parametrize("mode", SWEPT)
def test_prefixes_and_chunks(mode: PrefillMode):
    """A long prompt on slots that are used again, of rows that start and end at different places, behind a prefix."""
    model = tame_model(config_of(window_pattern="S", window=6, context=16))
    lengths = torch.tensor([150, 96, 41])
    known, tokens = prompts(3, 9), prompts(3, 150, seed=2)
    begun = prefill(model, known, model.empty_state(3, model.config.lookback + 45), mode, torch.tensor([9, 4, 1]))
    done = prefill(model, tokens, begun.state, mode, lengths, EAGERLY)
    assert done.report.converged
    for row, (start, n) in enumerate(zip((9, 4, 1), lengths.tolist(), strict=True)):
        text = torch.cat([known[row, :start], tokens[row, :n]]).unsqueeze(0)
        expected = prefill(model, text, model.empty_state(1, 200), "exact").sequence[0, start:]
        assert furthest(done.sequence[row, :n], expected) <= 3 * TOLERANCES[mode]
        assert done.report.rows[row].path == "sweeps", done.report.rows[row]


@pytest.mark.parametrize("overhead", [0.0, 16.0, 1000.0])
@pytest.mark.parametrize("rows", [1, 2, 32])
@pytest.mark.parametrize("shares", [(0, 0.25, 0.75), (0, 0.5, 0.5), (0.5, 0.25, 0.25), (0, 1, 0)])
def test_break_even_is_where_the_costs_meet(overhead: float, rows: int, shares: tuple[float, float, float]):
    calibration, plan = Calibration(overhead, {}), Plan(16, 7)
    edge = calibration.break_even(plan, rows, BlockShares(*shares))
    for length in (20, 50, 100, 1000, 100_000):
        once, swept, twice = shares
        cost = plan.sweeps * calibration.sweep_cost(length, rows, plan.groups, swept)
        cost += calibration.pass_cost(length, rows, once) + 2 * calibration.pass_cost(length, rows, twice)
        assert (calibration.exact_cost(length, rows) <= cost) == (length <= edge)


def test_costs_of_some_blocks_by_hand():
    calibration = Calibration(10.0, {})
    assert calibration.sweep_cost(100, 3, 8, 0.25) == (8 * 10 + 300) / 4
    assert calibration.pass_cost(100, 3, 0.75) == 0.75 * (10 + 300)
    assert calibration.break_even(Plan(8, 4), 1, BlockShares(0, 0.5, 0.5)) == 10 * (2 * 8 + 1) / (10 + 1 - 3)
    assert calibration.break_even(Plan(8, 4), 1, BlockShares(0.5, 0.25, 0.25)) == 10 * (8 + 1) / (10 + 1 - 2)
    config = config_of(dataclasses.replace(MIDDLE, source=(0, 1)), depth=2, loops=3)
    assert block_shares(config) == (0, 5 / 6, 1 - 5 / 6)
    assert block_shares(config, WHOLE) == (0, 1, 0)
    assert block_shares(CONFIGS["state above"]) == (0.5, 0.25, 0.25)
