"""The most bytes that a piece of work holds (contract, section 6): counted on a CPU, asked of the allocator on CUDA."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from lrt.utils.timing import Work
from lrt.utils.torch_private import TorchDispatchMode, tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are made and alive within the block, and their peak.

    Storages are counted, not tensors: a view holds its base's memory, and several views hold it once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage()._cdata for t in tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for tensor in tensors(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in before and storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                # Autograd holds what the backward needs, without a name; it too is freed when its storage goes.
                weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def tensors(tree: object) -> list[Tensor]:
    """All tensors in nested tuples, lists and dicts."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def peak_bytes(module: nn.Module, step: Work, counted: Work, device: str | torch.device) -> int:
    """The most bytes alive in a step of `module` that has run before; its weights, and what optimisers keep, left out.

    `counted` is the same step uncompiled: a counter of tensors, which serves on CPUs, does not see into compiled code.
    """
    if torch.device(device).type == "cuda":
        module.zero_grad()  # a step begins so: gradients are its own, not what was there before
        kept = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - kept
    with LiveBytes() as counter:
        counted()
    return counter.peak
