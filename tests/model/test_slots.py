"""The State's bookkeeping against plain sets and loops: positions, what is written, what is visible, crops, sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lrt.model.rolling_state import RollingState
from lrt.model.state import State, as_positions, empty_state

BATCH, SLOTS = 2, 12


def empty(slots: int = SLOTS, documents: torch.Tensor | None = None, reusable: bool = False) -> State:
    tokens = torch.arange(BATCH * slots).view(BATCH, slots)
    return empty_state(2, (1, 4), (2, 3), BATCH, slots, documents, tokens, reusable, dtype=torch.float64)


@given(
    st.lists(st.integers(0, 9), max_size=5) | st.builds(range, st.integers(0, 5), st.integers(0, 20), st.integers(1, 4))
)
def test_a_tensor_that_counts_up_evenly_is_a_range(numbers: list[int] | range):
    tensor = torch.tensor(list(numbers), dtype=torch.long)
    positions = as_positions(tensor)
    steps = {b - a for a, b in zip(list(numbers), list(numbers)[1:], strict=False)}
    if len(numbers) and len(steps) <= 1 and min(steps, default=1) >= 1:
        assert isinstance(positions, range)
        assert list(positions) == list(numbers)
    else:
        assert positions is tensor


def test_other_positions_stay_as_they_are():
    for positions in (range(3), torch.tensor([[0, 1], [1, 2]]), torch.arange(3, device="meta")):
        assert as_positions(positions) is positions


ranges = st.builds(
    lambda start, stop, step: range(start, stop, step), st.integers(0, 6), st.integers(7, SLOTS), st.integers(1, 3)
)


@given(st.lists(ranges, max_size=8))
def test_written_until_never_says_too_much_and_knows_prefixes_and_whole_strides(written: list[range]):
    state, positions = empty(), set[int]()
    for positions_of_call in written:
        state = state.mark_written(positions_of_call)
        positions |= set(positions_of_call)
        until = next(p for p in range(SLOTS + 1) if p not in positions)
        assert state.written_until <= until
        if positions_of_call.step == 1 and positions_of_call.start == 0:
            assert state.written_until >= positions_of_call.stop
        held = [p if p in positions else -1 for p in range(SLOTS)]
        assert state.slot_positions.tolist() == [held] * BATCH
        assert (state.length, state.lengths.tolist()) == (max(positions) + 1, [max(positions) + 1] * BATCH)


@pytest.mark.parametrize("stride", [2, 3])
@pytest.mark.parametrize("before", [0, 1, 4])
def test_a_whole_set_of_strides_counts_at_once(stride: int, before: int):
    state = empty()
    if before:
        state = state.mark_written(range(before))
    for number, residue in enumerate(range(stride), start=1):
        state = state.mark_written(range(before + residue, SLOTS, stride))
        assert state.written_until == (SLOTS if number == stride else before)
        assert len(state.pending_strides) == (0 if number == stride else number)


@given(
    st.integers(0, SLOTS - 1),
    st.integers(1, SLOTS),
    st.integers(1, 3),
    st.none() | st.integers(1, SLOTS),
    st.booleans(),
    st.booleans(),
)
def test_what_is_visible_is_the_rule_in_every_form(
    start: int, length: int, step: int, window: int | None, packed: bool, known: bool
):
    documents = torch.tensor([[0] * 5 + [1] * 7, [0] * 2 + [1] * 3 + [2] * 7]) if packed else None
    positions = range(start, min(start + length, SLOTS), step)
    state = replace(empty(documents=documents).mark_written(range(positions[-1] + 1)), written_until=0)
    if known:
        state = replace(state, written_until=positions[-1] + 1)
    for asked in (positions, torch.tensor(list(positions)), torch.tensor([list(positions)] * BATCH)):
        sight = state.visible(asked, window)
        alone = documents is None and window is None
        if known and asked is positions and step == 1 and alone and (start == 0 or len(positions) == 1):
            assert sight.mask is None  # the fast path of a prompt, and of a token
        view = range(SLOTS)[sight.view]
        seen = torch.zeros(BATCH, len(positions), SLOTS, dtype=torch.bool)
        whole = torch.ones(len(positions), len(view), dtype=torch.bool)
        mask = whole.tril() if sight.causal else whole if sight.mask is None else sight.mask
        seen[:, :, list(view)] = mask.view(-1, *mask.shape[-2:]).expand(BATCH, -1, -1)
        expected = [
            [
                [
                    key <= query
                    and (window is None or query - key < window)
                    and (documents is None or bool(documents[row, key] == documents[row, query]))
                    for key in range(SLOTS)
                ]
                for query in positions
            ]
            for row in range(BATCH)
        ]
        assert seen.tolist() == expected


@given(st.integers(0, SLOTS), st.integers(0, SLOTS), st.booleans())
def test_a_cropped_state_is_one_that_never_went_further(first: int, second: int, in_place: bool):
    state = empty().mark_written(range(SLOTS))
    state = state.in_place() if in_place else state
    cropped = state.crop(torch.tensor([first, second]))
    for row, length in enumerate((first, second)):
        assert cropped.slot_positions[row].tolist() == [*range(length), *[-1] * (SLOTS - length)]
        assert cropped.tokens[row].tolist() == [SLOTS * row + t if t < length else -1 for t in range(SLOTS)]
    assert (cropped.written_until, cropped.pending_strides) == (min(first, second), ())
    assert cropped.crop(1).lengths.tolist() == [min(first, 1), min(second, 1)]
    if not in_place:
        assert state.lengths.tolist() == [SLOTS] * BATCH  # it stays as it was


@given(st.integers(0, 30), st.integers(0, 6), st.integers(0, 14))
def test_intact_is_whether_the_past_still_has_its_slots(written: int, back: int, lookback: int):
    slots = 5
    state = empty(slots, reusable=True)
    for position in range(written):
        state = state.mark_written(range(position, position + 1))
    length = max(0, written - back)
    needed = [p for p in range(length - min(lookback, slots), length) if p >= 0]
    kept = set(range(max(0, written - slots), written))
    assert state.intact(torch.tensor([length] * BATCH), lookback).tolist() == [set(needed) <= kept] * BATCH


def test_a_resized_state_has_other_slots_and_the_same_positions():
    state = empty().in_place().mark_written(range(3))
    state.memory[:, :3] = 7.0
    for slots in (3, SLOTS, 20):
        resized = state.resized(slots)
        assert (resized.slots, resized.batch, resized.lengths.tolist()) == (slots, BATCH, [3] * BATCH)
        assert resized.slot_positions.tolist() == [[0, 1, 2, *[-1] * (slots - 3)]] * BATCH
        kept = min(slots, SLOTS)
        assert resized.tokens[:, :kept].equal(state.tokens[:, :kept])
        assert (resized.tokens[:, kept:] == -1).all()
        assert (resized.memory[:, :3] == 7).all()
        assert not resized.memory[:, 3:].any()
        assert [tuple(k.shape) for k in (*resized.keys, *resized.values)] == [(BATCH, 1, slots, 4)] * 4
    for wrong in (state.resized, replace(state, documents=torch.zeros(BATCH, SLOTS)).resized):
        with pytest.raises(ValueError, match="cannot have"):
            wrong(2)


def test_rows_are_put_in_place_of_others():
    state, other = empty().mark_written(range(5)), empty().mark_written(range(3)).select(torch.tensor([1]))
    both = state.put(torch.tensor([0]), other)
    assert both.lengths.tolist() == [3, 5]
    assert (both.written_until, both.tokens[0].equal(other.tokens[0]), both.tokens[1].equal(state.tokens[1])) == (
        3,
        True,
        True,
    )
    packed = empty(documents=torch.zeros(BATCH, SLOTS, dtype=torch.long)).select(torch.tensor([0]))
    for wrong in (empty(), empty(5).select(torch.tensor([0])), packed):
        with pytest.raises(ValueError, match="cannot replace"):
            state.put(torch.tensor([0]), wrong)


def test_an_empty_state_knows_nothing_and_shares_nothing_with_its_caller():
    tokens, documents = torch.zeros(BATCH, SLOTS, dtype=torch.int32), torch.ones(BATCH, SLOTS, dtype=torch.long)
    state = empty_state(2, (1, 4), (2, 3), BATCH, SLOTS, documents, tokens, False, dtype=torch.bfloat16)
    documents[0, 0] = tokens[0, 0] = 9
    assert state.documents is not None
    assert (int(state.documents[0, 0]), int(state.tokens[0, 0]), state.tokens.dtype) == (1, 0, torch.long)
    assert {x.dtype for x in (*state.keys, *state.values, state.memory)} == {torch.bfloat16}
    assert (state.shape, state.length, state.written_until) == ((2, 1, 4, 2, 3), 0, 0)
    unknown = empty_state(1, (1, 4), (0, 3), BATCH, SLOTS, None, None, False)
    assert (unknown.tokens == -1).all()
    assert unknown.documents is None


def test_only_the_memory_is_detached():
    tracked = torch.ones((), dtype=torch.float64, requires_grad=True)
    state = empty()._map(lambda buffer: buffer * tracked if buffer.is_floating_point() else buffer)
    for kind in (state, RollingState.of(state, (3, 3))):
        cut = kind.detach_memory()
        assert not cut.memory.requires_grad
        assert all(x.requires_grad for x in (kind.memory, *cut.keys, *cut.values))
        assert cut.memory.equal(kind.memory)


@pytest.mark.parametrize("positions", [range(5), range(1), range(6, 7)])
def test_a_prompt_from_the_start_and_a_single_token_need_no_mask(positions: range):
    sight = empty().mark_written(range(8)).visible(positions, None)
    assert (sight.view, sight.causal, sight.mask) == (slice(0, positions.stop), positions.start == 0, None)
