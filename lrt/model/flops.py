"""Floating-point operations, counted from the configuration: a multiply-add is two, the backward twice the forward.

Counted are the matrix products of every pass (spec, trap 4: published counts leave the extra passes out), attention
over the keys that are visible on average, and the head where a pass has a loss. Lookups and elementwise work are not.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from lrt.config import ModelConfig
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.schedules import Schedule


class Unfilled(TorchFunctionMode):
    """No random weights are drawn: for meta tensors torch would import its compiler, which takes a second."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if function in (torch.nn.init.normal_, torch.nn.init.uniform_):
            return args[0] if args else given["tensor"]
        return function(*args, **given)


@functools.lru_cache(maxsize=256)
def sizes(config: ModelConfig) -> dict[str, int]:
    """Numbers of every parameter by name, without allocating them."""
    with torch.device("meta"), Unfilled():
        model = LatentRecurrentTransformer(config)
    return {name: p.numel() for name, p in model.named_parameters()}


def is_table(name: str) -> bool:
    """Whether a parameter is token-indexed, or the head."""
    return ("embedding." in name and "gate" not in name) or name == "head.weight"


def count_parameters(config: ModelConfig) -> tuple[int, int]:
    """(all parameters, those outside token-indexed tables and the head)."""
    found = sizes(config)
    return sum(found.values()), sum(n for name, n in found.items() if not is_table(name))


def visible_keys(length: int, window: int | None) -> float:
    """Keys a query sees on average over a sequence of `length` positions."""
    if window is None or window >= length:
        return (length + 1) / 2
    return window - window * (window - 1) / (2 * length)


def forward_flops(config: ModelConfig, length: int) -> tuple[float, float]:
    """FLOPs per token of a call of the model over `length` tokens: (layer stack with memory, head).

    All loops and thoughts are in it; a first pass, which finds no thoughts before a token, is counted like the others.
    As decoding computes the same, it is also the cost of a generated token, on average over a text of `length`.
    """
    dense = {name: n for name, n in sizes(config).items() if not is_table(name)}
    looped = sum(n for name, n in dense.items() if name.startswith("blocks."))
    products = 2 * (config.loops * looped + sum(dense.values()) - looped)
    positions = config.places * length
    attention = sum(4 * config.heads * config.head_dim * visible_keys(positions, w) for w in config.windows())
    return config.places * (products + attention), 2 * config.width * config.vocab_size


def training_flops(config: ModelConfig, schedule: Schedule, length: int) -> float:
    """FLOPs per token of forward and backward under `schedule`, all passes counted; head only where there is a loss.

    Of a mixture or of stages, the mean over training.
    """
    stack, head = forward_flops(config, length)
    total = 0.0
    for weight, part in schedule.shares():
        for p in part.passes(length):
            share = weight * len(p.positions) / length
            total += share * ((3 if p.grad else 1) * stack + (3 * head if p.loss_weight else 0))
    return total


PEAKS = {
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "GH200": 989e12,
    "A100": 312e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12, "A10": 125e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip
"""Dense bfloat16 FLOP/s with float32 accumulation, from the vendor's data sheets, by whole words of a device's name."""


def peak_flops(device: str | torch.device) -> float | None:
    """FLOP/s that a device could do at most; None where no data sheet is known, on CPUs for example."""
    if torch.device(device).type != "cuda":
        return None
    return known_peak(torch.cuda.get_device_name(device))


def known_peak(name: str) -> float | None:
    """The peak of the first entry of PEAKS that stands in a device's name."""
    return next((peak for part, peak in PEAKS.items() if re.search(rf"\b{part}\b", name)), None)
