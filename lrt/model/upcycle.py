"""Begin a model with another's weights: an LRT from a trained Transformer or from its control without recurrence.

What the other model lacks starts neutral: γ, gates and projections of zero add nothing. So the new model computes
bit for bit what the other does, until training changes that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable

import torch
from torch import Tensor

from lrt.model.config import ModelConfig
from lrt.model.memory import KeyValue, Projection, Residual
from lrt.model.memory_config import OWN_INJECTIONS
from lrt.model.transformer import Block, LatentRecurrentTransformer


def adopt(config: ModelConfig, other: ModelConfig) -> ModelConfig:
    """`other` with the memory of `config`: the model to train. ValueError where their depths or widths differ, or
    `other` remembers what `config` has no channel for."""
    if (config.depth, config.width) != (other.depth, other.width):
        raise ValueError(
            f"the model to begin with has depth {other.depth} and width {other.width}, this one {config.depth} and "
            f"{config.width}; give a recipe of its size, or --model.depth {other.depth} --model.width {other.width}"
        )
    adopted = dataclasses.replace(other, memory=config.memory)
    for memory in (adopted.memory, other.memory):
        if memory.injection not in OWN_INJECTIONS:
            raise ValueError(
                f"injection {memory.injection!r} is a plugin's own, of which it is not known what is neutral; use one "
                f"of {', '.join(OWN_INJECTIONS)}"
            )
    there, here = (injection_parts(c.memory.injection) for c in (other, adopted))
    if not set(channel_keys(other)) <= set(channel_keys(adopted)) or not there <= here:
        raise ValueError(
            f"the model to begin with has a memory of {describe(other)}; {describe(adopted)} have no place for all of "
            "it"
        )
    if other.channels and other.memory.projection != adopted.memory.projection:
        raise ValueError(
            f"the model to begin with has memory.projection {other.memory.projection!r}; give the same, not "
            f"{adopted.memory.projection!r}"
        )
    for channel, key in enumerate(channel_keys(other)):
        ours = adopted.channel_layers[channel_keys(adopted).index(key)]
        if not set(other.channel_layers[channel]) <= set(ours):
            raise ValueError(
                f"the model to begin with injects source {other.sources[channel]} in blocks "
                f"{other.channel_layers[channel]}; memory.layers gives it {ours}, which has to hold those"
            )
    return adopted


def describe(config: ModelConfig) -> str:
    """What decides which channels a memory has."""
    memory = config.memory
    return (
        f"injection {memory.injection!r}, source {config.sources}, delay {memory.delay} and combine {memory.combine!r}"
    )


def injection_parts(injection: str) -> set[str]:
    """What an injection of the library consists of."""
    return {"residual", "key_value"} if injection == "both" else {injection} - {"none"}


def channel_keys(config: ModelConfig) -> list[tuple[Hashable, int]]:
    """Of each channel what it remembers, from how far back, and how many before it remember the same."""
    reads = list(zip(config.sources, config.delays, strict=True))
    contents: list[Hashable] = [*reads] if config.channels == len(reads) else [tuple(reads)]
    return [(content, contents[:i].count(content)) for i, content in enumerate(contents[: config.channels])]


@torch.no_grad()
def begin_with(model: LatentRecurrentTransformer, other: LatentRecurrentTransformer) -> None:
    """Put the weights of `other` into `model`, whose configuration `adopt` gave; what `other` lacks becomes neutral."""
    theirs = other.state_dict()
    for name, parameter in model.named_parameters():
        if ".injection." not in name and not name.startswith("projection."):
            if name in theirs:
                parameter.copy_(theirs[name])
        else:
            parameter.zero_()
    pairs = [
        (channel, channel_keys(other.config).index(key))
        for channel, key in enumerate(channel_keys(model.config))
        if key in channel_keys(other.config)
    ]
    for layer, (block, old) in enumerate(zip(model.blocks, other.blocks, strict=True), start=1):
        assert isinstance(block, Block)
        assert isinstance(old, Block)
        ours, before = (config.block_channels[layer - 1] for config in (model.config, other.config))
        copy_injection(block, old, [(ours.index(c), before.index(o)) for c, o in pairs if o in before])
    if isinstance(model.projection, Projection) and isinstance(other.projection, Projection):
        for channel, own in pairs:
            copy_projection(model.projection, other.projection, channel, own)


def copy_injection(block: Block, old: Block, places: list[tuple[int, int]]) -> None:
    """γ and gates of a block; `places` are those of a channel among what `block` and `old` read."""
    if isinstance(block.injection, Residual) and isinstance(old.injection, Residual):
        for here, there in places:
            block.injection.gamma[here] = old.injection.gamma[there]
    if isinstance(block.injection, KeyValue) and isinstance(old.injection, KeyValue):
        gates, before = (by_channel(i.gate.weight, i.groups) for i in (block.injection, old.injection))
        for here, there in [(0, 0), *((h + 1, t + 1) for h, t in places)]:  # the local gate comes first
            gates[here] = before[there]


def by_channel(weight: Tensor, groups: int) -> Tensor:
    """A view (1 + C, G, D) of a gate's weight."""
    return weight.view(-1, groups, weight.shape[1])


def copy_projection(new: Projection, old: Projection, channel: int, own: int) -> None:
    """U_k and U_v of one channel; blocks that only `new` has keep theirs."""
    here, there = new.of_channels(channel, channel + 1)[0], old.of_channels(own, own + 1)[0]
    if old.shared:
        here.copy_(there)
        return
    for place, layer in enumerate(old.channel_layers[own]):
        here[new.channel_layers[channel].index(layer)] = there[place]
