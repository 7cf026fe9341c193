"""Mixed precision, applied from outside the model: float32 weights, passes in bfloat16."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def compute(module: nn.Module, precision: str, *arguments: Any) -> Tensor:
    """`module(*arguments)` with its weights cast to `precision`, once for all passes of a schedule.

    The casts are part of the graph: gradients arrive, and add up over micro-batches, in the weights' own float32.
    Scalars (α, β) stay as they are: 1.003 is 1 in bfloat16, and as scalars they do not raise what they multiply.
    """
    dtype = DTYPES[precision]
    if all(p.dtype == dtype for p in module.parameters()):
        return module(*arguments)
    cast = {name: p.to(dtype) if p.dim() else p for name, p in module.named_parameters()}
    return functional_call(module, cast, arguments)
