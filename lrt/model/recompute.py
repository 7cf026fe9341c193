"""Functions compiled once for all, and modules computed again in the backward (`lrt.model.execution` asks for both)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from lrt.utils.torch_private import raise_recompile_limit

VARIANTS = 128
"""Compiled forms of one function, at most: one per size of a pass, kind of block, and whether gradients are wanted."""


@functools.cache
def compile_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with static shapes and without graph breaks; each new size or kind of block is compiled once.

    Cached, so that there is one compiled function however many Executions ask for it.
    """
    raise_recompile_limit(VARIANTS)
    return torch.compile(function, fullgraph=True, dynamic=False)


def recompute(module: nn.Module, *arguments: Any) -> Any:
    """`module(*arguments)`, of which only the arguments are kept; the rest is computed again in the backward.

    Without gradients nothing would be kept anyway, and it is a plain call.
    """
    if not torch.is_grad_enabled():
        return module(*arguments)
    # What `Cast` has put in the place of parameters is gone when the backward comes, so it is kept here. Such tensors
    # are no leaves: they were computed from the parameters.
    swapped: dict[str, Tensor] = {name: p for name, p in module.named_parameters() if not p.is_leaf}

    def call(*arguments: Any) -> Any:
        return functional_call(module, swapped, arguments) if swapped else module(*arguments)

    # Nothing in the model is random, so there is no state of a generator to restore.
    return checkpoint(call, *arguments, use_reentrant=False, preserve_rng_state=False)
