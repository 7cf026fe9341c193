"""A step's passes and their loss as one module, which is what DDP and FSDP2 hook into; and its cast to bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lrt.utils.device import without_autocast


class Objective(nn.Module):
    """A function of the model and a batch, as a module: `objective(loss, …)` is `loss(model, …)`.

    DDP and FSDP2 hook into a module's forward, and expect one per backward. A schedule calls the model several times
    before its one backward, and the fused loss reads the head's weight; here all of that is one forward, and neither
    model nor loss knows of it.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, loss: Callable[..., Tensor], *batch: Any) -> Tensor:
        with without_autocast(next(self.model.parameters()).device):
            return loss(self.model, *batch)


class Cast(nn.Module):
    """An objective whose weights are cast, once for all passes; gradients arrive in the weights' own type.

    Mixed precision is so a cast in front of the model, not code in it: the State takes the weights' type. α, β, γ and
    source weights, the vectors, stay as they are: 1.003 is 1 in bfloat16, and used as scalars they do not raise the
    type of what they multiply.
    """

    def __init__(self, objective: Objective, dtype: torch.dtype) -> None:
        super().__init__()
        self.objective, self.dtype = objective, dtype

    def forward(self, *arguments: Any) -> Tensor:
        parameters = self.objective.named_parameters()
        cast = {name: p.to(self.dtype) if p.dim() > 1 else p for name, p in parameters}
        return functional_call(self.objective, cast, arguments)


def make_objective(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The objective of a model that computes in `dtype`."""
    return Objective(model) if dtype == torch.float32 else Cast(Objective(model), dtype)
