"""The plain kernel in the types that models are trained in, and that what needs no copy is not copied."""

from __future__ import annotations

import math

import pytest
import torch
from support.models import difference

from lrt.model.attention_pieces import Merged, Repeat, Total
from lrt.model.blockwise_attention import CPU, PLAIN, align_mask

SIZES = (2, 3, 7, 8)  # B, H, n, K


def inputs(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(SIZES, generator=generator, dtype=torch.float64).to(dtype) for _ in range(4)]


@pytest.mark.parametrize("kernel", [PLAIN, CPU], ids=["plain", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_a_kernel_keeps_its_type_and_is_softmax_attention(kernel: object, dtype: torch.dtype, causal: bool):
    q, k, v, g = inputs(dtype)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    scores = exact[0] @ exact[1].mT / math.sqrt(SIZES[-1])
    if causal:
        scores = scores.masked_fill(torch.ones(7, 7, dtype=torch.bool).triu(1), -math.inf)
    expected = scores.softmax(-1) @ exact[2]
    gradients = torch.autograd.grad(expected, exact, g.double())
    wanted = [x.detach() for x in (expected, scores.logsumexp(-1), *gradients)]

    out, lse, *_ = kernel.forward(q, k, v, causal, None)  # type: ignore[attr-defined]
    gradients = kernel.backward(g, q, k, v, out, lse, causal, None)  # type: ignore[attr-defined]
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype]
    assert {x.dtype for x in (out, *gradients)} == {dtype}
    assert lse.dtype == torch.promote_types(dtype, torch.float32)
    for actual, right in zip((out, lse, *gradients), wanted, strict=True):
        assert difference(actual.double().detach(), right) <= tolerance


def test_one_piece_is_taken_as_it_is():
    out, like = torch.ones(SIZES), torch.ones(SIZES)
    merged, total = Merged(out), Total(like)
    merged.add(slice(0, 7), out, torch.zeros(SIZES[:3]))
    total.add(slice(0, 7), out)
    assert merged.result()[0] is out
    assert total.result() is out


def test_a_gradient_adds_up_whatever_the_order_of_its_pieces():
    generator = torch.Generator().manual_seed(0)
    wheres = [slice(0, 2), slice(4, 6), slice(0, 4), slice(1, 6, 2), slice(2, 3)]
    for order in (wheres, wheres[::-1], [wheres[2], wheres[0], *wheres[3:]], [wheres[3]]):
        total = Total(torch.full(SIZES, 9.0, dtype=torch.bfloat16))
        expected = torch.zeros(SIZES)
        for where in order:
            part = torch.randn(expected[:, :, where].shape, generator=generator)
            total.add(where, part.clone())
            expected[:, :, where] += part
        assert total.result().dtype == torch.bfloat16
        torch.testing.assert_close(total.result(), expected.bfloat16(), rtol=0.01, atol=0.02)
    assert not Total(torch.ones(SIZES)).result().any()


def test_many_small_parts_are_not_lost_behind_a_first_one_of_all_rows():
    """In bfloat16 1 + 1/512 is 1: what is merged or added is so in float32."""
    first = torch.ones(2, 1, 8, 4, dtype=torch.bfloat16)
    merged, total, halves = Merged(first), Total(first), first[:, :, :4].repeat_interleave(2, 0)
    merged.add(slice(0, 8), first, torch.zeros(2, 1, 8))
    total.add(slice(0, 8), first)
    for _ in range(64):
        total.add(slice(0, 4), halves / 512, Repeat(2, 4))
        # A weight of about 1/512, so that a merge moves the output by 1/2048; bfloat16's step above 1 is 1/128.
        merged.add(slice(0, 4), halves * 1.25, torch.full((4, 1, 4), -6.24), Repeat(2, 4))
    weight = 64 * math.exp(-6.24)
    assert total.result().dtype == merged.result()[0].dtype == torch.bfloat16
    torch.testing.assert_close(total.result(), first * 1.125, rtol=0, atol=0)
    wanted = torch.full(first.shape, (1 + 1.25 * weight) / (1 + weight))
    torch.testing.assert_close(merged.result()[0].float(), wanted, rtol=0.005, atol=0)


@pytest.mark.parametrize("m", [1, 15, 16, 17, 40])
def test_an_aligned_mask_is_the_mask_with_rows_at_multiples_of_16(m: int):
    q, mask = torch.ones(2, 3, 5, 8), torch.randn(1, 1, 5, m)
    aligned = align_mask(mask, q)
    assert aligned is not None
    assert aligned.shape == (2, 3, 5, m)
    assert aligned.stride(-2) % 16 == 0
    assert aligned.equal(mask.expand(2, 3, 5, m))
    assert align_mask(None, q) is None
