"""torch's private names, all that the library uses, and what is used where a version of torch lacks one.

Private names may change with any release. So each is looked up here, may be missing, and whoever uses it has a way
without it, which is slower and gives the same numbers: the plain kernel of `model/blockwise_attention.py`,
transposed weights in `inference/fused_weights.py`, uncompiled passes. `tests/utils/test_torch_private.py` names the
versions that this was tried on.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Operator = Callable[..., Any]
__all__ = ["TorchDispatchMode", "tree_leaves"]  # private by their modules, and used as they are


@dataclass(frozen=True)
class Missing:
    """Stands for an operator that this torch lacks: asked for before it is called, so that a call is our mistake."""

    name: str

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        raise NotImplementedError(f"torch {torch.__version__} has no {self.name}")


def operator(library: str, name: str) -> Operator:
    """torch.ops.LIBRARY.NAME; `Missing` where this torch has no such operator."""
    try:
        return getattr(getattr(torch.ops, library), name)
    except AttributeError:
        return Missing(f"torch.ops.{library}.{name}")


def available(*operators: Operator) -> bool:
    """Whether this torch has all of them."""
    return not any(isinstance(operator, Missing) for operator in operators)


# Attention with its log-sum-exp, forward and backward: the public function gives the output alone, and pieces cannot
# be merged without it.
CPU_FLASH = operator("aten", "_scaled_dot_product_flash_attention_for_cpu")
CPU_FLASH_BACKWARD = operator("aten", "_scaled_dot_product_flash_attention_for_cpu_backward")
CUDA_FLASH = operator("aten", "_scaled_dot_product_flash_attention")
CUDA_FLASH_BACKWARD = operator("aten", "_scaled_dot_product_flash_attention_backward")
CUDA_EFFICIENT = operator("aten", "_scaled_dot_product_efficient_attention")
CUDA_EFFICIENT_BACKWARD = operator("aten", "_scaled_dot_product_efficient_attention_backward")

# A weight in oneDNN's own layout, and the product with it.
PACK_LINEAR = operator("mkldnn", "_reorder_linear_weight")
PACKED_LINEAR = operator("mkldnn", "_linear_pointwise")


def packs_linear() -> bool:
    """Whether this build of torch has oneDNN, and both operators."""
    return torch.backends.mkldnn.is_available() and available(PACK_LINEAR, PACKED_LINEAR)


def pack_linear(weight: Tensor, rows: int) -> Tensor:
    """A weight (out, in) in oneDNN's layout, for products with about so many rows. Ask `packs_linear` first."""
    return PACK_LINEAR(weight.contiguous(), rows)


def packed_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (n, in) times a weight of `pack_linear`: (n, out)."""
    return PACKED_LINEAR(x.contiguous(), weight, None, "none", [], "")


def has_amx() -> bool:
    """Whether this CPU has matrix units that torch uses; no where this torch does not say."""
    try:
        return bool(torch.cpu._is_amx_tile_supported())
    except AttributeError:
        return False


def warn_missing(what: str, instead: str) -> None:
    """Say, once per place, that this torch lacks something and what is used instead."""
    warnings.warn(f"torch {torch.__version__} lacks {what}; {instead}", RuntimeWarning, stacklevel=3)


# --- the compiler -----------------------------------------------------------------------------------------------------


def raise_recompile_limit(least: int) -> None:
    """Let torch.compile keep at least so many forms of one function; it gives up compiling beyond its limit."""
    config = torch._dynamo.config
    with suppress(AttributeError):  # without it, what is compiled beyond torch's own limit runs as it is written
        config.recompile_limit = max(least, config.recompile_limit)


@contextmanager
def recompile_limit(limit: int) -> Iterator[None]:
    """Within the block torch.compile keeps up to `limit` forms of one function."""
    config = torch._dynamo.config
    with config.patch(recompile_limit=limit) if hasattr(config, "recompile_limit") else nullcontext():
        yield


def mark_static_address(tensor: Tensor) -> None:
    """Promise that a tensor stays where it is, so that CUDA graphs read and write it there without a copy."""
    with suppress(AttributeError):  # without the promise a graph copies
        torch._dynamo.mark_static_address(tensor)


def mark_maybe_dynamic(tensor: Tensor, dim: int) -> None:
    """Advise torch.compile that this size will change, so that it does not compile one form for each."""
    with suppress(AttributeError):  # without the advice each size is compiled
        torch._dynamo.maybe_mark_dynamic(tensor, dim)


def cudagraph_skips() -> int | None:
    """How often torch.compile made no CUDA graph of what was to be one, in this process; None where it does not say."""
    try:
        from torch._dynamo.utils import counters
    except ImportError:
        return None
    return int(counters["inductor"]["cudagraph_skips"])


def missing_compiler(device: str | torch.device) -> str | None:
    """Why nothing can be compiled for this device; None where it can."""
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        return f"compiling for {kind} is not tried"
    try:
        return _missing_triton() if kind == "cuda" else _missing_cpp_compiler()
    except (ImportError, AttributeError):
        return f"torch {torch.__version__} does not say whether it can compile here"


def _missing_triton() -> str | None:
    from torch.utils._triton import has_triton

    return None if has_triton() else "Triton is not installed"


def _missing_cpp_compiler() -> str | None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "there is no C++ compiler"
    return None
