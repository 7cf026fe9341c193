"""Which device to compute on."""

from __future__ import annotations

import os
import re
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the machine, has no memory left."""
    texts = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory", "out of memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    )


def choose_device(name: str) -> str:
    """`auto` is CUDA, then Apple's MPS, then the CPU; anything else is a name of torch's, tried.

    ValueError for a device that torch does not know or that cannot compute here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=name).item()  # reading a value back fails on the meta device, which computes nothing
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used here: {reason}; try --device auto or cpu") from error
    return name


def use_device(device: torch.device) -> None:
    """Make a CUDA device the one that this thread's kernels run on; of other kinds there is one only."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def describe_device(device: str | torch.device, processes: int = 1) -> str:
    """Where work is done, for the end of a sentence: `on this CPU`, `on these 8 GPUs`."""
    kind = "CPU" if torch.device(device).type == "cpu" else "GPU"
    return f"on this {kind}" if processes == 1 else f"on these {processes} {kind}s"


def has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64. Apple's does not, of others nothing is known; "meta" computes nothing."""
    return device.type in ("cpu", "cuda", "meta")


def double(x: Tensor) -> Tensor:
    """x in float64, for sums and statistics that are to be exact; on the CPU where its own device has no float64."""
    return x.double() if has_float64(x.device) else x.cpu().double()


def without_autocast(device: str | torch.device) -> AbstractContextManager[object]:
    """A block whose types are those of its tensors, also within somebody's torch.autocast.

    Here the weights' type says what is computed in; autocast would round the operands of a float32 run's products, and
    those of the loss. A backward takes the block that it is called in, not its forward's: put it in one, too.
    """
    kind = torch.device(device).type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):  # "meta" has none
        return nullcontext()
    return torch.autocast(kind, enabled=False)


PEAKS = {
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "GH200": 989e12,
    "A100": 312e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12, "A10": 125e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip
"""Dense bfloat16 FLOP/s with float32 accumulation, from the vendor's data sheets, by whole words of a device's name."""


def peak_flops(device: str | torch.device) -> float | None:
    """Dense bfloat16 FLOP/s that a device could do at most; None where no data sheet is known, as for CPUs."""
    if torch.device(device).type != "cuda":
        return None
    return known_peak(torch.cuda.get_device_name(device))


def known_peak(name: str) -> float | None:
    """The peak of the first entry of PEAKS that stands in a device's name: the longer of two like names is first."""
    return next((peak for part, peak in PEAKS.items() if re.search(rf"\b{part}\b", name)), None)


def memory_bytes(device: str | torch.device) -> int | None:
    """Bytes of a device's whole memory; of the machine's for all but CUDA. None where the system does not say."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    names = os.sysconf_names if hasattr(os, "sysconf_names") else {}  # not on Windows
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if "SC_PHYS_PAGES" in names else None
