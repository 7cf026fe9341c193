"""Tensor parallelism: each rank holds some heads and some of the MLP, as a narrower model of the same class.

A rank's part of a model is a model: with fewer heads and a narrower MLP, and the same width. Queries, keys, values,
gates, memory projections and the MLP's first matrix are cut by their outputs (column-parallel); attention's and the
MLP's last matrix by their inputs (row-parallel), and what these give is summed over the ranks. So the residual stream,
and with it the memory, is whole on every rank. Embedding and head are whole, too.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrt.model.config import ModelConfig
from lrt.model.transformer import LatentRecurrentTransformer


@dataclass(frozen=True)
class Cut:
    """How a parameter is divided among ranks."""

    dim: int
    """Along which dimension; negative counts from the end."""
    blocked: bool = False
    """Whether that dimension is several blocks of key/value heads one after another, of which each is cut."""


CUTS = {
    r"attention\.(query|key|value)\.weight": Cut(0),
    r"attention\.value_embedding\.gate\.weight": Cut(0),
    r"attention\.value_embedding\.table\.weight": Cut(1),
    r"injection\.gate\.weight": Cut(0, blocked=True),  # the local gate, then one of each channel
    r"projection\.weight": Cut(-2),
    r"mlp\.up\.weight": Cut(0),
    r"(attention\.out|mlp\.down)\.weight": Cut(1),
}
"""What a parameter's name ends with -> how it is cut. All others are whole on every rank."""
SUMMED = re.compile(r"blocks\.\d+\.(attention\.out|mlp\.down)$")
"""The linear layers whose outputs are summed over the ranks."""


def local_config(config: ModelConfig, ranks: int) -> ModelConfig:
    """The configuration of one rank's part. ValueError where a number cannot be divided."""
    for name, count in (
        ("heads", config.heads),
        ("kv_heads", config.num_kv_heads),
        ("the MLP's width", config.mlp_dim),
    ):
        if count % ranks:
            raise ValueError(
                f"{name} is {count}, which tensor_parallel_size {ranks} does not divide; give one that does"
            )
    return dataclasses.replace(
        config,
        heads=config.heads // ranks,
        kv_heads=config.num_kv_heads // ranks,
        head_size=config.head_dim,
        mlp_width=config.mlp_dim // ranks,
    )


def local_part(name: str, weight: Tensor, config: ModelConfig, rank: int, ranks: int) -> Tensor:
    """One rank's part of a parameter of the whole model, whose configuration is `config`."""
    cut = next((cut for pattern, cut in CUTS.items() if re.search(f"(^|\\.){pattern}$", name)), None)
    if cut is None or ranks == 1:
        return weight
    if cut.blocked:
        blocks = weight.unflatten(cut.dim, (-1, config.num_kv_heads))
        return blocks.chunk(ranks, cut.dim + 1)[rank].flatten(cut.dim, cut.dim + 1)
    return weight.chunk(ranks, cut.dim)[rank]


class SummedLinear(nn.Linear):
    """A linear layer without bias, of which each rank has some inputs; the outputs are summed over the ranks."""

    def __init__(self, layer: nn.Linear, all_reduce: Callable[[Tensor], Tensor]) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.all_reduce = layer.weight, all_reduce
        self.register_parameter("bias", None)

    def forward(self, input: Tensor) -> Tensor:
        return self.all_reduce(F.linear(input, self.weight))


def sum_over_ranks(model: LatentRecurrentTransformer, all_reduce: Callable[[Tensor], Tensor]) -> None:
    """Make one rank's part of a model sum over the ranks where the parts come together."""
    for name, layer in list(model.named_modules()):
        if SUMMED.search(name):
            assert isinstance(layer, nn.Linear)
            parent, _, attribute = name.rpartition(".")
            model.get_submodule(parent).add_module(attribute, SummedLinear(layer, all_reduce))


@torch.no_grad()
def load_part(
    model: LatentRecurrentTransformer, weights: Mapping[str, Tensor], config: ModelConfig, rank: int, ranks: int
) -> None:
    """Copy one rank's part of the weights of the whole model, whose configuration is `config`, into its model."""
    parameters = dict(model.named_parameters())
    for name, weight in weights.items():
        parameters[name].copy_(local_part(name, weight, config, rank, ranks))
