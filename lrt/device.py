"""Which device to compute on."""

from __future__ import annotations

import torch


def chosen_device(name: str) -> str:
    """`auto` is CUDA, then Apple's MPS, then the CPU; anything else is torch's own spelling, checked."""
    if name == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=name).item()  # a value, which the meta device cannot give
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used here: {reason}; try --device auto or cpu") from error
    return name
