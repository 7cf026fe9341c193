"""The loss of an optimiser step over a schedule's passes (contract, section 3).

Shapes: B batch, T positions, n positions of a pass, D width. Targets of IGNORED count nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lrt.data.batch import IGNORED
from lrt.model.cross_entropy import at_least_float32, summed_nats
from lrt.model.execution import EAGER, Execution
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.schedules.base import Pass, Schedule
from lrt.schedules.refinement import walk


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
    """w_p / (n_p Σ w) per pass, 0 for passes that dropped out: what one target's nats count in the loss."""
    execution: Execution = EAGER

    @classmethod
    def of(
        cls,
        schedule: Schedule,
        targets: Sequence[Tensor],
        sum_over_ranks: Callable[[Sequence[float]], list[float]] = list,
        execution: Execution = EAGER,
    ) -> StepLoss:
        """From one step's schedule and the targets (B, T) of this rank's micro-batches.

        All ranks' targets are counted: `sum_over_ranks` adds up each number over them, which for one process changes
        nothing. Raises ValueError where there are none.
        """
        length = targets[0].shape[1]
        passes = schedule.passes(length)
        # The targets of the whole step are counted before any of it is computed: a micro-batch's share needs them.
        counts = sum_over_ranks([sum(int((t[:, p.slice] != IGNORED).sum()) for t in targets) for p in passes])
        weights = [p.loss_weight if n else 0.0 for p, n in zip(passes, counts, strict=True)]
        if sum(weights) <= 0:
            raise ValueError(
                "no pass with a loss weight has a valid target; check the batch and the schedule's weights"
            )
        scales = [w / (n * sum(weights)) if w else 0.0 for w, n in zip(weights, counts, strict=True)]
        return cls(schedule, passes, tuple(scales), execution)

    def __call__(
        self, model: LatentRecurrentTransformer, tokens: Tensor, targets: Tensor, documents: Tensor | None
    ) -> Tensor:
        """The share of micro-batch tokens, targets (B, T) in the step's loss; the shares of all ranks sum to it.

        Hidden states that no loss reads are let go of pass by pass, so that a gradient-free pass keeps nothing but
        what the next one reads.
        """
        ran = walk(model, tokens, self.schedule, documents, execution=self.execution)
        kept: list[Tensor | None] = []
        for scale in self.scales:
            _, hidden, state = next(ran)
            kept.append(hidden if scale else None)
            del hidden, state  # the next pass runs without them
        return self.over(model, kept, targets)

    def over(self, model: LatentRecurrentTransformer, hidden: Sequence[Tensor | None], targets: Tensor) -> Tensor:
        """The same, from the hidden states (B, n, D) of every pass; None will do where the loss has no weight."""
        scored = [
            (h.flatten(0, 1), targets[:, p.slice].flatten(), scale)
            for p, h, scale in zip(self.passes, hidden, self.scales, strict=True)
            if scale and h is not None
        ]
        # One head for all passes: their hidden states are rows of one product, weighted by their pass. So the head's
        # gradient exists once, and short passes share a block of rows.
        rows, wanted = torch.cat([h for h, _, _ in scored]), torch.cat([t for _, t, _ in scored])
        weights = [torch.full((len(h),), scale, device=h.device, dtype=at_least_float32(h)) for h, _, scale in scored]
        return summed_nats(model, rows, wanted, torch.cat(weights), self.execution)
