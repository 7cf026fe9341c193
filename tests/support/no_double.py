"""A device without float64, on any machine: the CPU under another name, which refuses what an Apple GPU refuses.

To import this registers it as torch's own backend for Python (PrivateUse1) for the life of the process, and is to come
before lrt. Within `Lending` a tensor of the device is a `Lent`, with a CPU tensor behind it. An operation that makes a
float64 there raises, and so does one that reads a tensor of the CPU together with one of the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "apple"
ABSENT = (torch.float64, torch.complex128)
"""What the device has not."""
ATEN: Any = torch.ops.aten
MOVES = (ATEN._to_copy.default, ATEN.copy_.default)
"""What may read one device and write another."""
INDEXES = (ATEN.index, ATEN.index_put, ATEN.index_put_)
"""What takes an index of the CPU on every device."""


class Lent(Tensor):
    """A tensor on the device. TypeError for a type that it has not."""

    own: Tensor
    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, own: Tensor) -> Lent:
        if own.dtype in ABSENT:
            raise TypeError(f"the device has no {own.dtype}")
        lent: Any = Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls, own.size(), own.stride(), own.storage_offset(), dtype=own.dtype, device=torch.device(NAME, 0)
        )
        lent.own = own
        return lent

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.own.tolist()


class Lending(TorchDispatchMode):
    """Where operations that name the device make tensors there."""

    def __enter__(self) -> Any:
        self.constants = Constants()
        self.constants.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.constants.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


class Constants(TorchFunctionMode):
    """torch.tensor and its like fill memory without an operation: made on the CPU, they are moved."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.new_tensor and isinstance(args[0], Lent):
            return torch.tensor(args[1], dtype=kwargs.get("dtype", args[0].dtype)).to(NAME)
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type == NAME:
            return func(*args, **{**kwargs, "device": "cpu"}).to(kwargs["device"])
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            args = (args[0], indices(args[1]), *args[2:])
        return func(*args, **kwargs)


def indices(index: Any) -> Any:
    """An index whose lists are tensors of the CPU."""
    if isinstance(index, tuple):
        return tuple(map(indices, index))
    return torch.tensor(index, dtype=None if index else torch.long) if isinstance(index, list) else index


def dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation, on the CPU tensors behind those of the device."""
    leaves = tree_leaves((args, kwargs))
    lent = [leaf for leaf in leaves if isinstance(leaf, Lent)]
    check_devices(func, leaves)
    named = next((leaf for leaf in leaves if isinstance(leaf, torch.device)), None)
    there = bool(lent) if named is None else named.type == NAME
    if func is ATEN.copy_.default:
        there = isinstance(args[0], Lent)
    before = {id(leaf.own): leaf for leaf in lent}  # an operation in place returns the tensor it was called with

    def on_cpu(leaf: Any) -> Any:
        if isinstance(leaf, torch.device) and leaf.type == NAME:
            return torch.device("cpu")
        return leaf.own if isinstance(leaf, Lent) else leaf

    def on_device(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not there:
            return leaf
        return before[id(leaf)] if id(leaf) in before else Lent(leaf)

    return tree_map(on_device, func(*tree_map(on_cpu, args), **tree_map(on_cpu, kwargs)))


def check_devices(func: Any, leaves: list[Any]) -> None:
    """RuntimeError where an operation reads tensors of both devices, as every real device has it."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if func in MOVES or func.overloadpacket in INDEXES or not any(isinstance(leaf, Lent) for leaf in tensors):
        return
    for leaf in tensors:
        if not isinstance(leaf, Lent) and leaf.dim() > 0:
            raise RuntimeError(f"{func} reads {tuple(leaf.shape)} of the CPU together with tensors of the device")


def lend() -> torch.device:
    """Register the device, for the life of the process.

    Views of a wrapped tensor cannot be made in inference mode, which becomes no_grad; and what lies behind a parameter
    cannot be exchanged, so that conversions of a module make new ones.
    """
    torch.inference_mode = lambda mode=True: torch.set_grad_enabled(not mode)  # type: ignore[assignment,misc]
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    _setup_privateuseone_for_python_backend(NAME)
    return torch.device(NAME)


DEVICE = lend()
