"""Cross-entropy of hidden states, in nats, and the loss of an optimiser step over a schedule's passes.

Shapes: N rows (batch and positions, flattened), D width, V vocabulary. Targets of IGNORED count nowhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lrt.config import IGNORED
from lrt.distributed import ALONE, Alone
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.refine import Refined, refine
from lrt.schedules import Pass, Schedule

ROWS = 1024
"""Rows whose logits exist at one time: (1024, V) stays near the cache, and memory does not grow with the batch."""


def token_nats(model: LatentRecurrentTransformer, hidden: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood (…) of targets (…) under hidden states (…, D); 0 where ignored. For scoring."""
    flat, wanted = hidden.flatten(0, -2), targets.flatten()
    nats = [
        F.cross_entropy(model.logits(h).to(at_least_float32(h)), t, ignore_index=IGNORED, reduction="none")
        for h, t in zip(flat.split(ROWS), wanted.split(ROWS), strict=True)
    ]
    return torch.cat(nats).view_as(targets)


def summed_nats(model: LatentRecurrentTransformer, hidden: Tensor, targets: Tensor) -> Tensor:
    """Summed nats of targets (…) under hidden (…, D), with gradients; logits never exist for more than ROWS rows.

    A head that is more than its weight (an adapter was put around it) is called, and its logits exist at once.
    """
    if type(model.head) is not nn.Linear:
        return summed_nats_reference(model, hidden, targets)
    head = model.head.weight
    result: Tensor = LinearCrossEntropy.apply(hidden.flatten(0, -2), head, targets.flatten(), model.config.softcap)  # type: ignore[assignment]
    return result


def summed_nats_reference(model: LatentRecurrentTransformer, hidden: Tensor, targets: Tensor) -> Tensor:
    """The plain form of `summed_nats`, for tests."""
    return F.cross_entropy(
        model.logits(hidden).flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def at_least_float32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class LinearCrossEntropy(torch.autograd.Function):
    """Head, soft-cap and cross-entropy in one, by row blocks; the gradient is made in the forward.

    The head of a small model is half its work. Going through the logits once (three products per block, the softmax
    used for loss and gradient alike) is what autograd would do, without keeping five copies of (N, V).
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, cap: float) -> Tensor:
        wants_grad = any(ctx.needs_input_grad)
        total = hidden.new_zeros((), dtype=at_least_float32(hidden))
        d_hidden = torch.empty_like(hidden) if wants_grad else None
        d_head = torch.zeros_like(head, dtype=total.dtype) if wants_grad else None
        for start in range(0, len(hidden), ROWS):
            rows = slice(start, start + ROWS)
            h, wanted = hidden[rows], targets[rows]
            capped = (h @ head.T).to(total.dtype).div_(cap).tanh_()
            valid = wanted != IGNORED
            index = wanted.clamp(min=0).unsqueeze(1)
            logits = capped * cap
            lse = logits.logsumexp(1, keepdim=True)
            total += ((lse - logits.gather(1, index)).squeeze(1) * valid).sum()
            if d_hidden is None or d_head is None:
                continue
            grad = logits.sub_(lse).exp_()  # softmax
            grad.scatter_add_(1, index, torch.full_like(index, -1, dtype=grad.dtype))
            grad *= capped.square_().neg_().add_(1)  # through the tanh
            grad *= valid.unsqueeze(1)
            grad = grad.to(hidden.dtype)
            torch.mm(grad, head, out=d_hidden[rows])
            if d_head.dtype == h.dtype:
                d_head.addmm_(grad.T, h)
            else:
                d_head += grad.T @ h  # in float32: a sum of many blocks in bfloat16 loses the small ones
        if wants_grad:
            ctx.save_for_backward(d_hidden, d_head)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        d_hidden, d_head = ctx.saved_tensors
        (scale,) = grads  # a scalar: what it multiplies keeps its type
        return d_hidden * scale, d_head * scale, None, None


@dataclass(frozen=True)
class StepLoss:
    """The loss of one optimiser step: L = Σ_p w_p (N_p / n_p) / Σ_p w_p over its micro-batches and ranks.

    N_p are the nats and n_p the valid targets of pass p over the whole step, so that micro-batches of unequal filling
    count as one batch would, on whichever rank they are. Passes without weight or targets drop out of both sums and
    never run the head.
    """

    schedule: Schedule
    passes: tuple[Pass, ...]
    scales: tuple[float, ...]
    """w_p / (n_p Σ w) per pass, 0 for passes that dropped out."""

    @classmethod
    def of(cls, schedule: Schedule, targets: Sequence[Tensor], ranks: Alone = ALONE) -> StepLoss:
        """From one step's schedule and the targets (B, T) of this rank's micro-batches; all ranks' are counted.

        Raises ValueError where there are none.
        """
        length = targets[0].shape[1]
        passes = schedule.passes(length)
        counts = ranks.sum([sum(int((t[:, p.slice] != IGNORED).sum()) for t in targets) for p in passes])
        weights = [p.loss_weight if n else 0.0 for p, n in zip(passes, counts, strict=True)]
        if sum(weights) <= 0:
            raise ValueError(
                "no pass with a loss weight has a valid target; check the batch and the schedule's weights"
            )
        scales = [w / (n * sum(weights)) if w else 0.0 for w, n in zip(weights, counts, strict=True)]
        return cls(schedule, passes, tuple(scales))

    def __call__(
        self, model: LatentRecurrentTransformer, tokens: Tensor, targets: Tensor, documents: Tensor | None
    ) -> Tensor:
        """The share of micro-batch tokens, targets (B, T) in the step's loss; the shares of all ranks sum to it."""
        return self.over(model, refine(model, tokens, self.schedule, documents), targets)

    def over(self, model: LatentRecurrentTransformer, out: Refined, targets: Tensor) -> Tensor:
        """The same, of passes that ran already."""
        losses = [
            scale * summed_nats(model, hidden, targets[:, p.slice])
            for (p, _, hidden), scale in zip(out.passes, self.scales, strict=True)
            if scale
        ]
        return torch.stack(losses).sum()
