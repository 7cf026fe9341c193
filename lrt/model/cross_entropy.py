"""Cross-entropy of hidden states: nats per token, and their sum fused with the head, so that logits never pile up.

Shapes: N rows (batch and positions, flattened), n of them in a block, D width, V vocabulary.

The fused form makes the gradient in the forward, block of rows by block of rows; `summed_nats_reference` is the plain
form beside it. It is our own because of the soft-cap: `torch.nn.functional.linear_cross_entropy` (2.13) has none, and
Liger's kernel, which does the same as this one, runs on CUDA only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lrt.data.batch import IGNORED
from lrt.model.execution import EAGER, Execution
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.utils.device import without_autocast

ROWS = 1024
"""Rows whose logits exist at one time, so that memory does not grow with the batch. (1024, V) stays near the cache, and
products of half as many rows run at a lower rate."""


def token_nats(model: LatentRecurrentTransformer, hidden: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood in nats (…) of targets (…) under hidden states (…, D); 0 where ignored. For scoring."""
    flat, wanted = hidden.flatten(0, -2), targets.flatten()
    nats = [
        F.cross_entropy(model.logits(h).to(at_least_float32(h)), t, ignore_index=IGNORED, reduction="none")
        for h, t in zip(flat.split(ROWS), wanted.split(ROWS), strict=True)
    ]
    return torch.cat(nats).view_as(targets)


def summed_nats(
    model: LatentRecurrentTransformer,
    hidden: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    execution: Execution = EAGER,
) -> Tensor:
    """Σ weight · nats of targets (…) under hidden (…, D), with gradients; weights (…) count each target once if None.

    Logits never exist for more than ROWS rows. A head that is more than its weight (an adapter was put around it) is
    called, so that the adapter computes and gets its gradients; its logits then exist all at once.

    In the hidden states' type, and float32 at least from the logits on, also within somebody's torch.autocast.
    """
    counted = (targets != IGNORED).to(at_least_float32(hidden))
    if weights is not None:
        counted = counted * weights
    if type(model.head) is not nn.Linear:
        logits = model.logits(hidden).flatten(0, -2).to(counted.dtype)
        nats = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="none")
        return (nats * counted.flatten()).sum()
    arguments = (hidden.flatten(0, -2), model.head.weight.to(hidden.dtype), targets.flatten(), counted.flatten())
    with without_autocast(hidden.device):
        total: Tensor = LinearCrossEntropy.apply(*arguments, model.config.softcap, execution)  # type: ignore[assignment]
    return total


def summed_nats_reference(model: LatentRecurrentTransformer, hidden: Tensor, targets: Tensor) -> Tensor:
    """The plain form of `summed_nats` without weights, for tests: all logits exist, autograd makes the gradient."""
    return F.cross_entropy(
        model.logits(hidden).flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def at_least_float32(x: Tensor) -> torch.dtype:
    """The type in which losses and their sums are computed: float64 for float64, else float32."""
    return torch.promote_types(x.dtype, torch.float32)


def grade(logits: Tensor, index: Tensor, weights: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """Nats (n,) of targets `index` (n, 1) under logits (n, V) before the cap, and their weighted gradient (n, V).

    With t = tanh(z / cap) and p = softmax(cap · t): d nats / dz = (p - onehot) · (1 - t²), times the row's weight.
    A few sweeps over z, each in place: the head of a small model is half its work, and most of that is these sweeps.
    In float32 or better whatever the logits' type, which is the gradient's. The casts are in here so that compiling
    joins them to the sweeps; logits that need none are used up.
    """
    z = logits.to(at_least_float32(logits))
    z.div_(cap).tanh_()
    # Capped logits are at most `cap`, which therefore serves as their maximum while exp(-2 cap) is no underflow:
    # exp(-80) = 2e-35 is a normal number in float32. That saves the sweep that looks for the maximum.
    peak = z.new_full((), cap) if cap <= 40 else cap * z.amax(1, keepdim=True)
    exps = torch.add(-peak, z, alpha=cap).exp_()
    total = exps.sum(1, keepdim=True)
    nats = peak + total.log() - cap * z.gather(1, index)
    z.mul_(z).sub_(1)  # t² - 1: minus the slope of the cap
    at_target = z.gather(1, index) * weights.unsqueeze(1)
    z.mul_(exps).mul_(-weights.unsqueeze(1) / total)
    z.scatter_add_(1, index, at_target)
    return nats.squeeze(1), z.to(logits.dtype)


class LinearCrossEntropy(torch.autograd.Function):
    """Head, soft-cap and cross-entropy in one, by row blocks; the gradient is made in the forward.

    Going through the logits once (three products per block, the softmax used for loss and gradient alike) is what
    autograd would do, without keeping five copies of (N, V). It can be done ahead because the result is a scalar: the
    backward has only to scale.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, cap: float, execution: Execution
    ) -> Tensor:
        graded = execution.function(grade)
        total = hidden.new_zeros((), dtype=at_least_float32(hidden))
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_head = torch.zeros_like(head, dtype=total.dtype) if ctx.needs_input_grad[1] else None
        for start in range(0, len(hidden), ROWS):
            rows = slice(start, start + ROWS)
            h, index = hidden[rows], targets[rows].clamp(min=0).unsqueeze(1)  # ignored ones weigh 0: any index will do
            nats, grad = graded(h @ head.T, index, weights[rows], cap)
            total += (nats * weights[rows]).sum()
            if d_hidden is not None:
                torch.mm(grad, head, out=d_hidden[rows])
            if d_head is not None and d_head.dtype == h.dtype:
                d_head.addmm_(grad.T, h)
            elif d_head is not None:
                d_head += grad.T @ h  # in float32: a sum of many blocks in bfloat16 loses the small ones
        ctx.save_for_backward(d_hidden, d_head)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (scale,) = grads  # a scalar: what it multiplies keeps its type
        d_hidden, d_head = (None if d is None else d * scale for d in ctx.saved_tensors)
        return d_hidden, d_head, None, None, None, None
