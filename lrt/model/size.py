"""How many parameters a configuration has, counted on the meta device: no memory, no random numbers."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from lrt.model.config import ModelConfig
from lrt.model.transformer import LatentRecurrentTransformer


class Unfilled(TorchFunctionMode):
    """No random weights are drawn: for meta tensors torch would import its compiler, which takes a second."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        arguments = kwargs or {}
        if function in (torch.nn.init.normal_, torch.nn.init.uniform_):
            return args[0] if args else arguments["tensor"]
        return function(*args, **arguments)


@functools.lru_cache(maxsize=256)
def parameter_sizes(config: ModelConfig) -> dict[str, int]:
    """The number of elements of every parameter, by name. Cached and shared: not to be changed."""
    with torch.device("meta"), Unfilled():
        model = LatentRecurrentTransformer(config)
    return {name: p.numel() for name, p in model.named_parameters()}


def is_table(name: str) -> bool:
    """Whether a parameter is token-indexed (embedding, value embeddings but for their gates), or the head.

    These are the ones that "non-embedding parameters" leave out (contract, section 5).
    """
    return ("embedding." in name and "gate" not in name) or name == "head.weight"


def count_parameters(config: ModelConfig) -> tuple[int, int]:
    """(all parameters, those outside token-indexed tables and the head)."""
    sizes = parameter_sizes(config)
    return sum(sizes.values()), sum(n for name, n in sizes.items() if not is_table(name))
