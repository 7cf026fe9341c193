"""Prefill: a prompt into a State, exactly or by parallel sweeps that say how far they have converged.

Shapes: B rows, T prompt positions (rows right-padded to the longest), D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lrt.certificate import Certificate, Report
from lrt.model.state import State
from lrt.model.transformer import LatentRecurrentTransformer

Mode = Literal["exact", "converged", "fast", "one_sweep"]


@dataclass(frozen=True)
class Prefilled:
    """A prompt, computed."""

    hidden: Tensor
    """(B, 1, D): the final hidden state of each row's last position, which the head reads."""
    state: State
    report: Report


def prefill(
    model: LatentRecurrentTransformer,
    tokens: Tensor,
    state: State,
    mode: Mode = "converged",
    lengths: Tensor | None = None,
) -> Prefilled:
    """Compute tokens (B, T) behind what `state` holds; row b has lengths[b] of them (B,), the rest is padding."""
    batch, length = tokens.shape
    if lengths is None:
        lengths = torch.full((batch,), length, device=tokens.device)
    starts = state.lengths
    hidden = []
    with torch.no_grad():
        for t in range(length):
            h, state = model(tokens[:, t : t + 1], starts.unsqueeze(1) + t, state)
            hidden.append(h)
        state = state.crop(starts + lengths)
        last = torch.cat(hidden, 1)[torch.arange(batch, device=tokens.device), lengths - 1].unsqueeze(1)
    row = Certificate("exact", "asked for")
    return Prefilled(last, state, Report(mode, 1, None, (row,) * batch))
