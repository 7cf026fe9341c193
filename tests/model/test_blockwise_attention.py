"""Attention in pieces equals one softmax over all keys, and passes by classes equal passes by masks; float64, 1e-10.

B batch, T positions, H query heads, G key/value heads, K head size.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.attention import PLANS, G, H, hiding, random, with_gradients
from support.models import PAIRWISE, VISIBLE, assert_same, assert_same_gradients, difference, gradients, random_model
from torch import Tensor

from lrt import MemoryConfig, ModelConfig, refine, schedules
from lrt.model import blockwise_attention, strided_state
from lrt.model.attention_pieces import AttentionPiece
from lrt.model.blockwise_attention import CPU, PLAIN, Kernel, attend, attend_reference
from lrt.model.strided_state import Band, StridedState, triangle
from lrt.schedules import refinement
from lrt.schedules.work import common_stride
from lrt.utils import torch_private

SMALL = {"TILE": 4, "QUERIES": 5, "KEYS": 7}  # so that few positions make many pieces


@pytest.mark.parametrize("kernel", [CPU, PLAIN], ids=["cpu", "plain"])
@pytest.mark.parametrize("groups", [H, G], ids=["heads", "grouped"])
@pytest.mark.parametrize("name", list(PLANS))
def test_pieces_equal_one_softmax(name: str, groups: int, kernel: Kernel, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(blockwise_attention, "choose_kernel", lambda q, masked: kernel)
    n, sizes, pieces = PLANS[name]
    sources = [random(groups, m, seed) for seed, m in enumerate(sizes * 2)]
    inputs = [random(H, n, 7), *sources]
    results = with_gradients(lambda q, k, v: attend(q, k, v, pieces), inputs)
    expected = with_gradients(lambda q, k, v: attend_reference(q, k, v, pieces), inputs)
    for actual, wanted in zip(results, expected, strict=True):
        assert_same(actual, wanted, name)
        assert not actual.isnan().any()
    if name == "a row without any key":
        assert not results[0][:, :, 3].any()
        assert not results[1][:, :, 3].any()  # nor a gradient of its query
        out, lse = kernel.forward(inputs[0], *(x.repeat_interleave(H // groups, 1) for x in sources[::2]), False,
                                  hiding([0, 3], 5, 5)(inputs[0]))[:2]  # fmt: skip
        assert (lse[:, :, [0, 3]] == -math.inf).all()
        assert not out[:, :, [0, 3]].any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", list(PLANS))
def test_pieces_on_a_gpu_equal_one_softmax(name: str, dtype: torch.dtype):
    n, sizes, pieces = PLANS[name]
    inputs = [random(H, n, 7), *(random(G, m, seed) for seed, m in enumerate(sizes * 2))]
    expected = with_gradients(lambda q, k, v: attend_reference(q, k, v, pieces), inputs)
    moved = [x.detach().to("cuda", dtype).requires_grad_() for x in inputs]
    out = attend(moved[0], moved[1 : 1 + len(sizes)], moved[1 + len(sizes) :], pieces)
    assert float((out.double().cpu() - expected[0]).norm() / expected[0].norm()) < (
        1e-5 if dtype.itemsize == 4 else 0.02
    )


def test_the_gradient_check_passes():
    n, sizes, pieces = PLANS["rows without a key in one piece"]
    inputs = [random(1, n, 7), *(random(1, m, seed) for seed, m in enumerate(sizes * 2))]
    assert torch.autograd.gradcheck(lambda q, *kv: attend(q, kv[:2], kv[2:], pieces), inputs)


@pytest.mark.parametrize(("behind", "more"), [(0, 0), (0, 1), (1, 0), (1, -1)])
@pytest.mark.parametrize(("n", "tile"), [(1, 4), (4, 4), (5, 4), (6, 1), (12, 4), (30, 4), (43, 4), (64, 8), (24, 4)])
def test_a_triangle_is_every_pair_once(n: int, tile: int, behind: int, more: int):
    seen, covered, m = [], behind, n + more
    for piece in triangle(n, m, behind, tile):
        rows, keys = piece.rows, piece.keys
        assert rows.start <= covered or behind  # rows are reached in order
        covered = max(covered, piece.repeat.stop(rows))
        assert piece.repeat.stop(rows) <= n
        assert piece.repeat.stop(keys) <= m
        assert keys.stop - keys.start <= tile or not piece.causal
        for block in range(piece.repeat.blocks):
            at = block * piece.repeat.pitch
            pairs = [(i, j) for i in range(rows.start, rows.stop) for j in range(keys.start, keys.stop)]
            seen += [(at + i, at + j) for i, j in pairs if not piece.causal or j - keys.start <= i - rows.start]
    assert sorted(seen) == [(i, j) for i in range(n) for j in range(i + 1 - behind)]


def test_pieces_of_one_size_are_one_call():
    """512 positions in tiles of 64: the diagonal, and squares of 64, 128 and 256."""
    assert [piece.repeat.blocks for piece in triangle(512, 512, 0, 64)] == [8, 4, 2, 1]
    assert [piece.repeat.blocks for piece in triangle(512, 512, 1, 64)] == [8, 4, 2, 1]


@pytest.mark.parametrize("behind", [0, 1])
def test_a_triangle_of_one_tile_is_square(behind: int):
    """CUDA's kernels, which get such ones only, align it at the last query."""
    (piece,) = triangle(64, 64, behind, 64)
    assert piece.rows.stop - piece.rows.start == piece.keys.stop - piece.keys.start == 64 - behind


def test_repeated_runs_are_views_and_copied_nowhere():
    q = torch.randn(4, 256, 3, 8).transpose(1, 2)  # as the model lays them out: positions outside heads
    for piece in triangle(256, 256, 1, 64):
        for taken in (piece.of_rows(q), piece.of_keys(q)):
            assert taken.untyped_storage().data_ptr() == q.untyped_storage().data_ptr()
            assert taken.shape[:2] == (4 * piece.repeat.blocks, 3)


def test_which_schedules_go_by_classes():
    def stride(schedule: Any) -> int | None:
        return common_stride(schedule.passes(48), 48)

    assert stride(schedules.plain()) == stride(schedules.multi_refinement(3)) == stride(schedules.settled(1, 1, 1)) == 1
    assert stride(schedules.interleaved(2)) == stride(schedules.settled(1, 2, 1)) == 2
    assert stride(schedules.strided(5, 2)) == 5
    for other in (schedules.chunked(8), schedules.sequential(), schedules.strided(48, 1)):
        assert stride(other) is None


BY_CLASSES = [
    schedules.plain(),
    schedules.interleaved(2),
    schedules.interleaved(3),
    schedules.multi_refinement(1),
    schedules.strided(4, 2),
    schedules.settled(1, 2, 1),
]


def by_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refinement, "common_stride", lambda *_: None)


@pytest.mark.parametrize("small", [True, False], ids=["small-pieces", "pieces"])
@pytest.mark.parametrize("schedule", BY_CLASSES, ids=repr)
@pytest.mark.parametrize("config", list(PAIRWISE.values())[::12], ids=list(PAIRWISE)[::12])
def test_passes_by_classes_equal_passes_by_masks(
    config: ModelConfig, schedule: Any, small: bool, monkeypatch: pytest.MonkeyPatch
):
    """Long rows, so that there are many pieces: values, gradients, and the State that is left behind."""
    length = 43 if small else 300
    for name, value in SMALL.items() if small else ():
        monkeypatch.setattr(strided_state, name, value)
    config = replace(config, context=512, window=17)
    model = random_model(config)
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(config.vocab_size, (2, length), generator=generator)
    borders = torch.rand(2, length, generator=generator) < 0.05
    for documents in (None, borders.long().cumsum(1)):
        refined = refine(model, tokens, schedule, documents)
        assert isinstance(refined.last, StridedState)
        with monkeypatch.context() as patch:
            by_masks(patch)
            expected = refine(model, tokens, schedule, documents)
        assert_same(refined.hidden, expected.hidden)
        assert_same_gradients(gradients(model, refined.hidden), gradients(model, expected.hidden))
        for a, b in zip(
            (*refined.state.keys, refined.state.memory), (*expected.state.keys, expected.state.memory), strict=True
        ):
            if b.numel():
                assert_same(a, b, "state")
        assert torch.equal(refined.state.slot_positions, expected.state.slot_positions)
        assert (refined.state.written_until, refined.state.pending_strides) == (
            expected.state.written_until,
            expected.state.pending_strides,
        )


@pytest.mark.parametrize("memory", [{"injection": "none"}, {"source": 0}, {"source": None}], ids=["none", "0", "L"])
def test_what_passes_leave_can_be_continued(memory: dict[str, Any]):
    """Also where nothing is remembered: the State's keys count as written all the same."""
    config = replace(next(iter(PAIRWISE.values())), context=32, window_pattern="L", memory=MemoryConfig(**memory))
    model = random_model(config)
    tokens = torch.randint(config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(3))
    exact = refine(model, tokens, schedules.sequential()).hidden
    state = refine(model, tokens[:, :11], schedules.multi_refinement(11)).state
    assert state.length == state.written_until == 11
    hidden, _ = model(tokens[:, 11:], range(11, 12), state.resized(12))
    assert_same(hidden, exact[:, 11:])


def test_masks_stay_small(monkeypatch: pytest.MonkeyPatch):
    """Of packed documents and windows, over more positions than a mask may have."""
    seen: list[tuple[int, ...]] = []
    mask = Band.mask

    def watched(self: Band, like: Tensor) -> Tensor:
        made = mask(self, like)
        seen.append(tuple(made.shape))
        return made

    monkeypatch.setattr(Band, "mask", watched)
    config = replace(PAIRWISE[next(iter(PAIRWISE))], context=2048, window_pattern="SL", window=300)
    model = random_model(config, torch.float32)
    tokens = torch.randint(config.vocab_size, (1, 2048), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        refine(model, tokens, schedules.interleaved(2), torch.arange(2048).unsqueeze(0) // 700)
    assert seen
    assert max(n for *_, n, _ in seen) <= 512
    assert max(m for *_, m in seen) <= 1024


def test_a_pass_replaces_and_copies_nothing():
    """The tensors that a pass leaves are those that its blocks made: no buffer of all positions is copied."""
    config = replace(PAIRWISE[next(iter(PAIRWISE))], context=512)
    model = random_model(config)
    tokens = torch.randint(config.vocab_size, (1, 64), generator=torch.Generator().manual_seed(0))
    state = StridedState.of(model.empty_state(1, 64, tokens=tokens), 2)
    keys = []
    for p in schedules.interleaved(2).passes(64):
        _, state = model(tokens[:, p.slice], p.positions, state)
        keys.append(state.keys[0])
    (whole, again), (first, untouched), (kept, second) = keys
    assert whole is again
    assert untouched is whole  # the other class is still the first pass's tensor
    assert kept is first
    assert first is not None
    assert second is not None
    assert first.tensor.shape[2] == second.tensor.shape[2] == 32


def test_the_comparison_would_notice_a_wrong_shift():
    """Were class 1 to see class 0 shifted as class 0 sees class 1, the result would differ visibly."""
    q, *kv = random(1, 6, 0), *(random(1, 6, seed) for seed in range(1, 5))
    own = AttentionPiece(slice(0, 6), 0, slice(0, 6), causal=True)
    right, wrong = (
        attend(q, kv[:2], kv[2:], [own, other])
        for other in (
            AttentionPiece(slice(0, 6), 1, slice(0, 6), causal=True),
            AttentionPiece(slice(1, 6), 1, slice(0, 5), causal=True),
        )
    )
    assert float((right - wrong).detach().norm() / right.detach().norm()) > VISIBLE


@pytest.mark.parametrize("amx", [True, False])
@pytest.mark.parametrize("name", list(PLANS))
def test_without_matrix_units_bfloat16_attention_is_rounded_once(name: str, amx: bool, monkeypatch: pytest.MonkeyPatch):
    """Relative to the norm; rounding once is an error below 2^-9. With matrix units the softmax is rounded as well."""
    monkeypatch.setattr(torch_private, "has_amx", lambda: amx)
    n, sizes, pieces = PLANS[name]
    inputs = [random(H, n, 7), *(random(G, m, seed) for seed, m in enumerate(sizes * 2))]
    half = [x.detach().bfloat16().requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in half]
    direction = random(H, n, 9).detach().bfloat16()
    runs = []
    for function, (q, *sources) in ((attend, half), (attend_reference, exact)):
        out = function(q, sources[: len(sizes)], sources[len(sizes) :], pieces)
        runs.append([out.detach(), *torch.autograd.grad((out * direction).sum(), [q, *sources])])
    assert {x.dtype for x in runs[0]} == {torch.bfloat16}
    errors = [difference(actual.double(), expected) for actual, expected in zip(*runs, strict=True)]
    assert errors[0] < (2**-7 if amx else 2**-9)
    assert max(errors[1:]) < (2**-7 if amx else 2**-8)  # their formula has the output, which is rounded too
