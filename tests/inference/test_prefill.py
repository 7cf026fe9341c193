"""One promise: a prefill is exact or says how far from exact it is, row by row, and never pretends.

In float64 against `reference.oracle` and against `refine`, to 1e-10. B rows, T prompt positions.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from support.oracle import oracle
from support.prefill import GROUPS, PARALLEL
from torch import Tensor

from lrt import LatentRecurrentTransformer, MemoryConfig, ModelConfig, refine, schedules
from lrt.inference.calibrate import STRIDES, calibrate, count_sweeps, sample_text
from lrt.inference.certificate import Certificate, merge_certificates
from lrt.inference.cost_model import FILE, BlockShares, Calibration, Plan, fallback, read_calibration, write_calibration
from lrt.inference.generation import generate
from lrt.inference.prefill import TOLERANCES, Prefilled, PrefillMode, prefill
from lrt.model.execution import WHOLE
from lrt.model.state import State

MODES: tuple[PrefillMode, ...] = get_args(PrefillMode)
SWEPT: tuple[PrefillMode, ...] = ("converged", "fast")
LENGTH = 70
MEMORIES = {
    "final": MemoryConfig(),
    "below": MemoryConfig(source=1, initial="embedding", delay=2),
    "channels": MemoryConfig(source=(0, 1, 2), combine="channels"),
    "delays": MemoryConfig(source=(0, 2, 2), combine="channels", delay=(3, 1, 2)),
}


def model_of(memory: MemoryConfig, strength: float = 0.1, **settings: Any) -> LatentRecurrentTransformer:
    """A tiny model in float64, all parameters random; the way in for the memory has this strength."""
    torch.manual_seed(0)
    config = ModelConfig(depth=2, width=16, heads=2, vocab_size=31, **{"context": 128, "memory": memory, **settings})
    model = LatentRecurrentTransformer(config).double().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = 0.5 if p.dim() < 2 else p.shape[-1] ** -0.5
            p.copy_(torch.randn_like(p) * scale * (strength if "gamma" in name or "projection" in name else 1))
    return model


@pytest.fixture(params=MEMORIES)
def model(request: pytest.FixtureRequest) -> LatentRecurrentTransformer:
    return model_of(MEMORIES[request.param])


def prompts(rows: int, length: int = LENGTH, seed: int = 1) -> Tensor:
    return torch.randint(31, (rows, length), generator=torch.Generator().manual_seed(seed))


def run(
    model: LatentRecurrentTransformer, tokens: Tensor, mode: PrefillMode, lengths: Tensor | None = None
) -> Prefilled:
    return prefill(model, tokens, model.empty_state(len(tokens), 100), mode, lengths, PARALLEL)


def distance(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).detach().norm() / expected.detach().norm())


def exact(model: LatentRecurrentTransformer, row: Tensor) -> Tensor:
    """(T, D) by the oracle."""
    with torch.no_grad():
        return oracle(dict(model.named_parameters()), model.config, row)


def decode(model: LatentRecurrentTransformer, state: State, tokens: Tensor) -> Tensor:
    """Hidden states (B, n, D) of tokens (B, n) that follow, each row at its own place."""
    hidden = []
    with torch.no_grad():
        for t in range(tokens.shape[1]):
            h, state = model(tokens[:, t : t + 1], state.lengths.unsqueeze(1), state)
            hidden.append(h)
    return torch.cat(hidden, 1)


# ------------------------------------------------------------------------------------------------------------ exactness
def test_exact_equals_the_oracle_and_decoding_goes_on(model: LatentRecurrentTransformer) -> None:
    tokens, further = prompts(2, 20), prompts(2, 5, seed=2)
    done = run(model, tokens, "exact")
    following = decode(model, done.state, further)
    for row in range(2):
        expected = exact(model, torch.cat([tokens[row], further[row]]))
        torch.testing.assert_close(done.hidden[row, 0], expected[19], rtol=0, atol=1e-10)
        torch.testing.assert_close(done.sequence[row], expected[:20], rtol=0, atol=1e-10)
        torch.testing.assert_close(following[row], expected[20:], rtol=0, atol=1e-10)
    assert done.report.converged
    assert done.report.forwards == 1
    assert done.state.written_until == 20


@pytest.mark.parametrize("mode", MODES)
def test_rows_of_a_ragged_batch_are_what_they_are_alone(model: LatentRecurrentTransformer, mode: PrefillMode) -> None:
    """Also with other rows' padding, whatever it holds, and where each row has its own number of sweeps."""
    lengths = torch.tensor([70, 41, 3, 55])
    tokens = prompts(4).masked_fill(torch.arange(LENGTH) >= lengths.unsqueeze(1), -5)
    together = run(model, tokens, mode, lengths)
    assert together.state.lengths.tolist() == lengths.tolist()
    further = prompts(4, 3, seed=2)
    following = decode(model, together.state, further)
    for row, n in enumerate(lengths.tolist()):
        alone = run(model, tokens[row : row + 1, :n], mode)
        torch.testing.assert_close(together.hidden[row], alone.hidden[0], rtol=0, atol=1e-10)
        torch.testing.assert_close(together.sequence[row, :n], alone.sequence[0], rtol=0, atol=1e-10)
        assert not together.sequence[row, n:].any()
        torch.testing.assert_close(
            following[row], decode(model, alone.state, further[row : row + 1])[0], rtol=0, atol=1e-10
        )
        (single,), batched = alone.report.rows, together.report.rows[row]
        assert (batched.path, batched.sweeps, batched.groups, batched.tokens) == (
            single.path,
            single.sweeps,
            single.groups,
            n,
        )
        assert (batched.residual is None) == (mode == "one_sweep" and n > GROUPS)
        assert batched.residual is None or batched.residual == pytest.approx(single.residual, rel=1e-6)


@pytest.mark.parametrize("mode", SWEPT)
def test_converged_means_what_it_says(model: LatentRecurrentTransformer, mode: PrefillMode) -> None:
    """The residual is that of `refine`'s own sweeps, of all blocks (to the source: test_source_sweeps.py); the
    estimated distance from exact is of the right size."""
    tokens = prompts(1)
    done = prefill(model, tokens, replace(model.empty_state(1, 100), execution=WHOLE), mode, calibration=PARALLEL)
    (row,) = done.report.rows
    assert row.path == "sweeps"
    assert 1 < row.sweeps < LENGTH / GROUPS
    last, before = (refine(model, tokens, schedules.strided(GROUPS, n)) for n in (row.sweeps, row.sweeps - 1))
    compared = [(last.hidden, before.hidden)]
    compared += [(last.state.memory[:, :, i], before.state.memory[:, :, i]) for i in range(last.state.memory.shape[2])]
    assert row.residual == pytest.approx(max(distance(before, after) for after, before in compared), rel=1e-2)
    single = max(float(((a - b).norm(dim=-1) / a.norm(dim=-1)).max().detach()) for a, b in compared)
    assert row.worst == pytest.approx(single, rel=1e-2)
    assert row.residual is not None
    assert row.worst_distance is not None
    assert max(row.residual, row.worst_distance) <= TOLERANCES[mode]
    earlier = refine(model, tokens, schedules.strided(GROUPS, row.sweeps - 2)).hidden
    moves = (before.hidden - earlier).norm(dim=-1) / before.hidden.norm(dim=-1)
    assert moves.max() > TOLERANCES[mode], "a sweep too many"
    torch.testing.assert_close(done.hidden[:, 0], last.hidden[:, -1], rtol=0, atol=1e-10)
    torch.testing.assert_close(done.sequence, last.hidden, rtol=0, atol=1e-10)
    expected = exact(model, tokens[0])
    assert row.distance is not None
    assert distance(last.hidden[0], expected) <= 3 * row.distance
    # What an earlier sweep has made exact is not computed again.
    assert row.forwards == pytest.approx(sum(LENGTH - n * GROUPS for n in range(row.sweeps)) / LENGTH)


def test_one_sweep_is_one_sweep(model: LatentRecurrentTransformer) -> None:
    tokens = prompts(2)
    done = run(model, tokens, "one_sweep")
    swept = refine(model, tokens, schedules.strided(GROUPS, 1))
    torch.testing.assert_close(done.hidden[:, 0], swept.hidden[:, -1], rtol=0, atol=1e-10)
    torch.testing.assert_close(done.state.memory[:, :LENGTH], swept.state.memory, rtol=0, atol=1e-10)
    assert not done.report.converged
    assert all(row.residual is None and row.forwards == 1 for row in done.report.rows)


def test_as_many_sweeps_as_a_class_has_positions_are_exact() -> None:
    model = model_of(MEMORIES["final"], strength=3.0)
    hopeful = dataclasses.replace(PARALLEL, plans={mode: Plan(GROUPS, 1) for mode in SWEPT}, overhead=1e9)
    tokens = prompts(1, 7)
    done = prefill(model, tokens, model.empty_state(1, 7), "converged", calibration=hopeful)
    (row,) = done.report.rows
    assert (row.path, row.residual, row.sweeps) == ("sweeps", 0.0, 2)
    torch.testing.assert_close(done.hidden[0, 0], exact(model, tokens[0])[-1], rtol=0, atol=1e-10)


# ----------------------------------------------------------------------------------------------- what does not contract
@pytest.mark.parametrize("mode", SWEPT)
@pytest.mark.parametrize("source", [None, 1, (2, 1)])
def test_an_adversarial_model_is_detected_and_computed_exactly(mode: PrefillMode, source: Any) -> None:
    """Weights scaled until the sweeps do not contract."""
    model = model_of(MemoryConfig(source=source, combine="channels"), strength=30.0)
    tokens = prompts(2)
    apart = distance(*(refine(model, tokens, schedules.strided(GROUPS, n)).hidden for n in (5, 6)))
    assert apart > 0.05, "this model contracts: the test would show nothing"
    done = run(model, tokens, mode)
    for row, certificate in enumerate(done.report.rows):
        assert certificate.path == "fallback"
        assert certificate.residual == 0
        assert certificate.contraction is not None
        assert certificate.contraction > 0.5
        assert certificate.forwards <= 8, "noticed late"
        assert "more sweeps would cost more than token by token" in certificate.reason
        torch.testing.assert_close(done.sequence[row], exact(model, tokens[row]), rtol=0, atol=1e-10)
    assert done.report.converged
    plainly = run(model, tokens, "exact")
    assert torch.equal(done.hidden, plainly.hidden), "nothing of the sweeps stays"
    assert torch.equal(done.state.memory, plainly.state.memory)


def test_each_row_takes_its_own_path() -> None:
    """A model in which some rows contract and others do not: some are swept, the others computed exactly."""
    model = model_of(MEMORIES["final"], strength=0.15)
    tokens = prompts(6)
    done = run(model, tokens, "converged")
    assert {row.path for row in done.report.rows} == {"sweeps", "fallback"}
    for row, certificate in enumerate(done.report.rows):
        limit = 1e-10 if certificate.path == "fallback" else TOLERANCES["converged"]
        assert distance(done.hidden[row, 0], exact(model, tokens[row])[-1]) < limit


# ------------------------------------------------------------------------------------------------ from a state, sliding
@pytest.mark.parametrize("mode", MODES)
def test_continuing_from_a_state(model: LatentRecurrentTransformer, mode: PrefillMode) -> None:
    """Rows that start at different places; the second part is as good as the mode says."""
    first, second = prompts(3, 20), prompts(3, LENGTH, seed=2)
    starts, lengths = torch.tensor([20, 7, 13]), torch.tensor([50, 70, 61])
    begun = prefill(model, first, model.empty_state(3, 100), "exact", starts)
    done = prefill(model, second, begun.state, mode, lengths, PARALLEL)
    assert done.state.lengths.tolist() == (starts + lengths).tolist()
    assert begun.state.lengths.tolist() == starts.tolist(), "a state that is not in place stays as it was"
    limit = {"exact": 1e-10, "one_sweep": math.inf}.get(mode, TOLERANCES.get(mode, 0.0))
    for row in range(3):
        whole = torch.cat([first[row, : starts[row]], second[row, : lengths[row]]])
        assert distance(done.hidden[row, 0], exact(model, whole)[-1]) <= limit
        if mode in SWEPT:
            assert done.report.rows[row].path == "sweeps"


@pytest.mark.parametrize("mode", SWEPT)
def test_split_prefill_equals_the_whole_within_the_tolerance(
    model: LatentRecurrentTransformer, mode: PrefillMode
) -> None:
    tokens = prompts(2, 100)
    begun = prefill(model, tokens[:, :50], model.empty_state(2, 100), mode, calibration=PARALLEL)
    done = prefill(model, tokens[:, 50:], begun.state, mode, calibration=PARALLEL)
    assert {row.path for row in (*begun.report.rows, *done.report.rows)} == {"sweeps"}
    assert done.state.written_until == 100, "known to be whole, so that decoding needs no mask"
    for row in range(2):
        assert distance(done.hidden[row, 0], exact(model, tokens[row])[-1]) <= TOLERANCES[mode]


def test_a_state_in_place_is_used_and_another_is_not(model: LatentRecurrentTransformer) -> None:
    for state in (model.empty_state(1, 100), model.empty_state(1, 100).in_place()):
        done = prefill(model, prompts(1), state, "fast", calibration=PARALLEL)
        reused = done.state.keys[0].data_ptr() == state.keys[0].data_ptr()
        assert reused == (state.write is done.state.write and state.keys[0].is_contiguous())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("memory", MEMORIES)
def test_a_long_prompt_where_every_layer_slides(mode: PrefillMode, memory: str) -> None:
    """In chunks, on slots that are used again; rows of different lengths."""
    model = model_of(MEMORIES[memory], window_pattern="S", window=6, context=16)
    lengths = torch.tensor([160, 97, 12])
    tokens = prompts(3, 160)
    slots = model.config.lookback + 45
    done = prefill(model, tokens, model.empty_state(3, slots), mode, lengths, PARALLEL)
    assert done.state.lengths.tolist() == lengths.tolist()
    limit = {"exact": 1e-10, "one_sweep": math.inf}.get(mode, TOLERANCES.get(mode, 0.0))
    for row, n in enumerate(lengths.tolist()):
        expected = exact(model, tokens[row, :n])
        assert distance(done.hidden[row, 0], expected[-1]) <= limit
        assert distance(done.sequence[row, :n], expected) <= limit
    assert sum(row.tokens for row in done.report.rows) == int(lengths.sum())
    if mode in SWEPT:
        assert "chunks" in done.report.rows[0].reason
        assert done.report.converged


def test_padding_that_would_not_fit_the_state(model: LatentRecurrentTransformer) -> None:
    """A row that starts late and is short, beside one that starts early and is long."""
    begun = prefill(model, prompts(2, 50), model.empty_state(2, 75), "exact", torch.tensor([5, 50]))
    tokens = prompts(2, 60, seed=2)
    for mode in MODES:
        done = prefill(model, tokens, begun.state, mode, torch.tensor([60, 20]), PARALLEL)
        assert done.state.lengths.tolist() == [65, 70]
        assert done.state.slots == 75


# -------------------------------------------------------------------------------------------------------------- choices
@pytest.mark.parametrize("memory", [MemoryConfig(injection="none"), MemoryConfig(source=0)], ids=["none", "shift"])
@pytest.mark.parametrize("mode", MODES)
def test_without_recurrence_one_forward_is_exact(memory: MemoryConfig, mode: PrefillMode) -> None:
    model = model_of(memory)
    calls: list[int] = []
    model.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape[1]))
    tokens = prompts(2)
    done = prefill(model, tokens, model.empty_state(2, 100), mode, torch.tensor([70, 33]))
    assert calls == [70]
    assert done.report.converged
    for row, n in enumerate((70, 33)):
        torch.testing.assert_close(done.hidden[row, 0], exact(model, tokens[row, :n])[-1], rtol=0, atol=1e-10)


def test_short_prompts_are_computed_exactly() -> None:
    model = model_of(MEMORIES["below"])
    edge = math.floor(PARALLEL.break_even(PARALLEL.plan("converged"), 1, BlockShares(0, 0.5, 0.5)))
    paths = [run(model, prompts(1, n), "converged").report.rows[0] for n in (edge, edge + 1)]
    assert [row.path for row in paths] == ["exact", "sweeps"]
    assert f"token by token is cheaper than sweeps up to {edge} tokens" in paths[0].reason


@pytest.mark.parametrize("overhead", [0.0, 16.0, 1000.0])
@pytest.mark.parametrize("rows", [1, 2, 32])
def test_break_even_is_where_the_costs_meet(overhead: float, rows: int) -> None:
    calibration = dataclasses.replace(PARALLEL, overhead=overhead)
    plan = Plan(16, 7)
    edge = calibration.break_even(plan, rows)
    for length in (20, 50, 100, 1000, 100_000):
        cheaper = calibration.exact_cost(length, rows) <= plan.sweeps * calibration.sweep_cost(
            length, rows, plan.groups
        )
        assert cheaper == (length <= edge)


def test_without_a_calibration_the_choice_is_the_same_everywhere() -> None:
    assert fallback(torch.device("cpu")).plans == fallback(torch.device("cuda")).plans
    assert fallback(torch.device("cpu")).plan("fast").groups == 16


def test_float32_converges_too(model: LatentRecurrentTransformer) -> None:
    single = model.float()
    done = prefill(single, prompts(1), single.empty_state(1, 100), "converged", calibration=PARALLEL)
    assert done.report.rows[0].path == "sweeps"
    assert distance(done.hidden[0, 0].double(), exact(single.double(), prompts(1)[0])[-1]) < 1e-4


@pytest.mark.parametrize("mode", SWEPT)
def test_bfloat16_converges_to_its_rounding(mode: PrefillMode) -> None:
    """Never nearer: the sweeps go on to differ by rounding. What is reported is the tolerance that was used."""
    model, tokens = model_of(MEMORIES["channels"]), prompts(2)
    expected = torch.stack([exact(model, row) for row in tokens])
    half = model.bfloat16()
    done, plainly = (prefill(half, tokens, half.empty_state(2, 100), m, calibration=PARALLEL) for m in (mode, "exact"))
    assert done.report.tolerance == 2**-7
    assert [row.path for row in done.report.rows] == ["sweeps", "sweeps"]
    assert done.report.converged
    rounding = distance(plainly.sequence.double(), expected)
    assert distance(done.sequence.double(), expected) < 1.5 * rounding


def test_a_report_is_plain_data(model: LatentRecurrentTransformer) -> None:
    report = run(model, prompts(2), "converged", torch.tensor([70, 9])).report
    assert json.loads(json.dumps(report.to_dict()))["rows"][1]["path"] == "exact"
    assert report.rows[0].forwards * 70 + 9 == pytest.approx(report.forwards * 79)


def test_chunks_vouch_for_the_least_exact() -> None:
    parts = [
        Certificate("exact", "short", 10),
        Certificate("sweeps", "within 0.001", 30, 4, 5, 5e-4, 1e-3, 17, 0.1, 5.0),
        Certificate("sweeps", "within 0.001", 10, 4, 3, 2e-4, 1e-3, 44, 0.1, 3.0),
    ]
    whole = merge_certificates(parts)
    assert (whole.path, whole.residual, whole.worst_position, whole.tokens) == ("sweeps", 5e-4, 17, 50)
    assert whole.sweeps == 8
    assert whole.forwards == pytest.approx((10 + 150 + 30) / 50)


def test_distance_is_unknown_or_infinite_where_it_is() -> None:
    assert Certificate("single", "", 5, 4, 1, None, None).distance is None
    assert Certificate("sweeps", "", 5, 4, 2, 1e-6, 1e-6).distance is None
    assert Certificate("sweeps", "", 5, 4, 3, 1e-3, 1e-3, 0, 1.5).distance == math.inf
    assert Certificate("sweeps", "", 5, 4, 3, 1e-3, 1e-3, 0, 0.5).distance == pytest.approx(1e-3)


# ------------------------------------------------------------------------------------------------------ a state's rows
def test_rows_are_selected_and_put_back(model: LatentRecurrentTransformer) -> None:
    """Rows leave, go on by themselves, and return; a row named twice is forked."""
    tokens, further = prompts(3, 12), prompts(3, 4, seed=2)
    state = run(model, tokens, "exact").state
    selected = state.select(torch.tensor([2, 0, 2]))
    after = decode(model, selected, further)
    for place, row in enumerate((2, 0, 2)):
        expected = exact(model, torch.cat([tokens[row], further[place]]))[12:]
        torch.testing.assert_close(after[place], expected, rtol=0, atol=1e-10)
    other = run(model, prompts(1, 7, seed=3), "exact").state
    mixed = state.put(torch.tensor([1]), other)
    assert mixed.lengths.tolist() == [12, 7, 12]
    assert mixed.written_until == 7
    assert state.lengths.tolist() == [12, 12, 12], "a state that is not in place stays as it was"
    after = decode(model, mixed, further)
    expected = exact(model, torch.cat([prompts(1, 7, seed=3)[0], further[1]]))[7:]
    torch.testing.assert_close(after[1], expected, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="of as many slots"):
        state.put(torch.tensor([1]), other.resized(30))


def test_cropped_tokens_are_unknown(model: LatentRecurrentTransformer) -> None:
    """Also to sweeps, which would else read them ahead of their own."""
    state = run(model, prompts(1, 90, seed=3), "exact").state.crop(20)
    fresh = run(model, prompts(1, 90, seed=3)[:, :20], "exact").state
    tokens = prompts(1, 60, seed=4)
    cropped, whole = (refine(model, tokens, schedules.strided(GROUPS, 1), state=s) for s in (state, fresh))
    torch.testing.assert_close(cropped.hidden, whole.hidden, rtol=0, atol=1e-10)


def test_resized_holds_what_was_there(model: LatentRecurrentTransformer) -> None:
    tokens, further = prompts(2, 12), prompts(2, 3, seed=2)
    state = run(model, tokens, "exact").state
    for slots in (15, 100, 120):
        after = decode(model, state.resized(slots), further)
        torch.testing.assert_close(after, decode(model, state, further), rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="holds 12 positions cannot have 11"):
        state.resized(11)


# --------------------------------------------------------------------------------------------------------------- errors
def test_mistakes_are_named() -> None:
    model = model_of(MEMORIES["final"])
    state = model.empty_state(2, 20)
    for tokens, lengths, mode, message in (
        (prompts(2, 0), None, "exact", "at least one token"),
        (prompts(3, 5), None, "exact", "2 rows of the state"),
        (prompts(2, 21), None, "fast", "exceeds the 20 slots"),
        (prompts(2, 5), torch.tensor([0, 5]), "fast", "1 to 5 tokens"),
        (prompts(2, 5), torch.tensor([6, 5]), "fast", "1 to 5 tokens"),
        (prompts(2, 5), torch.tensor([5]), "fast", "1 to 5 tokens"),
        (prompts(2, 5), None, "slow", "choose one of exact, converged, fast, one_sweep"),
    ):
        with pytest.raises(ValueError, match=message):
            prefill(model, tokens, state, mode, lengths)  # type: ignore[arg-type]
    packed = model.empty_state(2, 20, torch.zeros(2, 20, dtype=torch.long))
    with pytest.raises(ValueError, match="packed documents"):
        prefill(model, prompts(2, 5), packed)
    other = model_of(MEMORIES["channels"])
    with pytest.raises(ValueError, match="made by another model"):
        prefill(other, prompts(2, 5), state)
    short = model_of(MEMORIES["final"], window_pattern="S", window=6)
    with pytest.raises(ValueError, match="too short to be reused"):
        prefill(short, prompts(1, 50), short.empty_state(1, 5))


# ---------------------------------------------------------------------------------------------------------- calibration
@pytest.mark.parametrize("groups", [4, 8])
def test_a_calibration_foretells_the_prefill(model: LatentRecurrentTransformer, groups: int) -> None:
    text = sample_text(model, 3, 128)
    counted = count_sweeps(model, text, groups)
    assert min(cost for _, cost in counted.values()) > 0
    plans = {mode: Plan(groups, sweeps) for mode, (sweeps, _) in counted.items()}
    for mode in SWEPT:
        (row,) = prefill(model, text, model.empty_state(1, 128), mode, calibration=Calibration(1e4, plans)).report.rows
        assert (row.path, row.groups, row.sweeps) == ("sweeps", groups, plans[mode].sweeps)


def test_a_calibration_is_kept(tmp_path: Path) -> None:
    model = model_of(MEMORIES["final"])
    text = sample_text(model, 3, 64)
    assert text.shape == (1, 64)
    assert text[0, 0] == 3
    measured = calibrate(model, text, progress=False)
    assert {plan.groups for plan in measured.plans.values()} <= set(STRIDES)
    write_calibration(tmp_path, measured)
    assert read_calibration(tmp_path, model) == measured
    assert read_calibration(tmp_path, model_of(MEMORIES["channels"])) == fallback(torch.device("cpu"))
    write_calibration(tmp_path, dataclasses.replace(measured, device="elsewhere"))
    assert read_calibration(tmp_path, model) == measured, "one entry per device"


def test_a_model_that_does_not_contract_is_calibrated_to_token_by_token() -> None:
    model = model_of(MEMORIES["final"], strength=30.0)
    measured = calibrate(model, sample_text(model, 3, 128), progress=False)
    assert all(plan.groups * plan.sweeps == 128 for plan in measured.plans.values())


def test_damaged_or_useless_calibrations(tmp_path: Path) -> None:
    model = model_of(MEMORIES["final"])
    assert read_calibration(tmp_path, model) == fallback(torch.device("cpu"))
    good = Calibration(3.0, {"converged": Plan(4, 2), "fast": Plan(4, 1)}, "x").to_dict()
    useless = [
        {**good, "plans": {**good["plans"], "fast": {"groups": 0, "sweeps": 1}}},
        {**good, "plans": {"fast": good["plans"]["fast"]}},
        {**good, "overhead": -1.0},
    ]
    texts = [json.dumps({"format": 1, "entries": [entry]}) for entry in useless]
    for text in ("{", "[]", '{"format": 9, "entries": []}', '{"format": 1, "entries": [{"device": "x"}]}', *texts):
        (tmp_path / FILE).write_text(text)
        with pytest.raises(ValueError, match=FILE):
            read_calibration(tmp_path, model)
    (tmp_path / FILE).unlink()
    (tmp_path / FILE).mkdir()
    with pytest.raises(OSError, match=FILE):  # it cannot be read: that does not make it damaged
        read_calibration(tmp_path, model)
    with pytest.raises(ValueError, match="at least 8 tokens"):
        calibrate(model, prompts(1, 7), progress=False)
    with pytest.raises(ValueError, match="nothing recurs"):
        calibrate(model_of(MemoryConfig(source=0)), prompts(1, 20), progress=False)


@pytest.mark.parametrize("mode", SWEPT)
def test_padding_does_not_overwrite_what_is_still_read(mode: PrefillMode) -> None:
    """Where slots are reused: one row nearly fills them, beside a short one that goes on far behind."""
    model = model_of(MemoryConfig(), strength=30.0, window_pattern="S", window=6)
    eager = Calibration(1e6, {"converged": Plan(2, 1), "fast": Plan(2, 1)})  # sweeps, whatever they give
    slots, behind, more = model.config.lookback + 57, 35, 20
    known, tokens = prompts(2, behind), prompts(2, slots - 1, seed=5)
    state = prefill(model, known, model.empty_state(2, slots), "exact").state.crop(torch.tensor([1, behind]))
    done = prefill(model, tokens, state, mode, torch.tensor([slots - 1, more]), eager)
    assert done.report.rows[1].path == "fallback"
    expected = exact(model, torch.cat([known[1], tokens[1, :more]]))[-1]
    torch.testing.assert_close(done.hidden[1, 0], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("wrong", [-1, 31])
def test_a_token_that_is_none(model: LatentRecurrentTransformer, wrong: int) -> None:
    assert model.config.vocab_size == 31
    tokens = torch.tensor([[1, wrong, 2]])
    with pytest.raises(ValueError, match=f"token {wrong} is not in the vocabulary of 31"):
        prefill(model, tokens, model.empty_state(1, 8))
    with pytest.raises(ValueError, match=f"token {wrong} is not in the vocabulary of 31"):
        generate(model, tokens, 2)
