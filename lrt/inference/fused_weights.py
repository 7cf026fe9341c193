"""A model's weights, arranged for decoding: what one token needs is a few large matrix products.

Queries, keys, values and all gates of a layer are one matrix; U of all layers is one per channel; β and γ of all layers
are one. Made once per model, for inference: they are copies (a second set of weights in memory), and do not see later
training.

Matrices are (in, out) and contiguous, which one row reads a quarter faster on a CPU, or in oneDNN's layout, because
products of a hundred rows else spend half of their time on arranging the weights (docs/log.md).

Shapes: D width, V vocabulary, L layers, C memory channels, H query heads, G key/value heads, K head size, M the MLP's
hidden width, N columns.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lrt.model.attention import Attention, ValueEmbedding
from lrt.model.config import ModelConfig
from lrt.model.layers import rms
from lrt.model.memory import BUILT_IN, KeyValue, MemoryReader, NoMemory, Projection, Residual
from lrt.model.transformer import Block, LatentRecurrentTransformer
from lrt.utils.torch_private import pack_linear, packs_linear


class FusedLayer(NamedTuple):
    """One block's weights."""

    inputs: Tensor
    """(D, N): W_q, W_k, W_v, then the gates: local, one per channel, the value embedding's (those that exist)."""
    out: Tensor
    """(H·K, D)."""
    up: Tensor
    """(D, M)."""
    down: Tensor
    """(M, D)."""
    alpha: Tensor
    """(1,): the residual stream's scale."""
    table: Tensor | None
    """(V, G·K): the value embedding."""
    projection: tuple[tuple[int, int], ...] | None
    """(channel, which of its pairs) of each U_k m, U_v m that the block adds; None where it adds none."""


class FusedWeights(NamedTuple):
    """A model's weights, or those of some of its blocks. Named tuples, as torch.compile and `tensors_of` see through
    them."""

    config: ModelConfig
    embedding: Tensor
    """(V, D): x_0 of every token, normalised."""
    mix: Tensor
    """(blocks, 1 + C): what every block adds of x_0 (β) and of each memory channel (γ): one product for all blocks."""
    projection: tuple[Tensor | None, ...]
    """Per channel (D, sets·2·G·K): U_k and U_v of these blocks, None where none reads it; doubled, as the gates'
    factor 2 is taken into them."""
    recall: Tensor | None
    """(sources,): the learned weights of a summed source; None where sources are not summed."""
    layers: tuple[FusedLayer, ...]
    """One per application of a block: L·loops, or some of them."""
    head: Tensor
    """(D, V)."""
    first: int
    """How many applications come before these."""


Layers = tuple[tuple[int, ...], ...]
"""For each channel, blocks (1 to L) that read it."""
Layout = Callable[[Tensor], Tensor]
"""Turns a weight (out, in) into the form in which `fused_step.product` takes it."""


def transposed_layout(weight: Tensor) -> Tensor:
    """(…, in, out), contiguous."""
    return weight.transpose(-1, -2).contiguous()


def packed_layout(rows: int) -> Layout:
    """oneDNN's own layout, for steps of about so many rows; only where `packs` says so."""
    return partial(pack_linear, rows=rows)


def packs(model: LatentRecurrentTransformer) -> bool:
    """Whether this model's weights can be packed: float32 on a CPU."""
    weight = model.embedding.weight
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and packs_linear()


def can_fuse(model: LatentRecurrentTransformer) -> bool:
    """Whether all blocks inject as a class of the library's does; of a user's own no products are known."""
    kinds = tuple(BUILT_IN.values())
    return all(type(block.injection) in kinds for block in model.blocks if isinstance(block, Block))


@torch.no_grad()
def fuse_weights(
    model: LatentRecurrentTransformer, layout: Layout = transposed_layout, blocks: range | None = None
) -> FusedWeights:
    """The fused form of a model's present weights; `layout` is that of the blocks' and the head's matrices.

    blocks: of these alone, counted from 0, loop after loop; the head is then left as it is.
    """
    config = model.config
    if not can_fuse(model):
        raise ValueError(
            f"injection {config.memory.injection!r} is a user's own, of which no fused products are known; decode with "
            "mode='eager'"
        )
    applied = [i % config.depth + 1 for i in (range(config.kv_layers) if blocks is None else blocks)]
    held = tuple(tuple(layer for layer in own if layer in applied) for own in config.channel_layers)
    layers, mix = {}, {}
    for layer in sorted(set(applied)):
        block = model.blocks[layer - 1]
        assert isinstance(block, Block)
        # A channel that a block does not add to its stream has γ 0 in the common product.
        gamma = block.beta.new_zeros(config.channels)
        if isinstance(block.injection, Residual):
            gamma[list(config.block_channels[layer - 1])] = block.injection.gamma
        mix[layer] = torch.cat([block.beta, gamma])
        layers[layer] = _layer(block, projection_sets(config, layer, held), layout)
    weights = model.recall.weights if isinstance(model.recall, MemoryReader) else None
    return FusedWeights(
        config=config,
        embedding=rms(table_rows(model.embedding)),  # normalised once, not per token
        mix=torch.stack([mix[layer] for layer in applied]),
        projection=_projection(model.projection, held, layout) if isinstance(model.projection, Projection) else (),
        recall=None if weights is None else weights.clone(),
        layers=tuple(layers[layer] for layer in applied),
        head=layout(matrix(model.head)) if blocks is None else matrix(model.head).T,
        first=0 if blocks is None else blocks.start,
    )


def projection_sets(config: ModelConfig, layer: int, held: Layers) -> tuple[tuple[int, int], ...]:
    """(channel, which of its pairs of U_k and U_v) for each channel that block `layer` reads; `held` are the layers of
    each channel whose pairs there are."""
    own = config.memory.projection == "layerwise"
    return tuple((channel, held[channel].index(layer) if own else 0) for channel in config.block_channels[layer - 1])


def _layer(block: Block, projection: tuple[tuple[int, int], ...], layout: Layout) -> FusedLayer:
    """One block's weights; `projection` says which pairs of U_k and U_v it adds, if it adds any."""
    attention, injection = block.attention, block.injection
    assert isinstance(attention, Attention)
    assert isinstance(injection, NoMemory)
    embedded = attention.value_embedding if isinstance(attention.value_embedding, ValueEmbedding) else None
    gated = isinstance(injection, KeyValue)
    # 2σ(G u) · W u = σ(G u) · 2W u: a factor of the gates less per token, and doubling rounds nothing.
    scale = 2 if gated else 1
    parts = [matrix(attention.query), scale * matrix(attention.key), scale * matrix(attention.value)]
    if isinstance(injection, KeyValue):
        parts.append(matrix(injection.gate))
    if embedded is not None:
        parts.append(matrix(embedded.gate))
    return FusedLayer(
        inputs=layout(torch.cat(parts)),
        out=layout(matrix(attention.out)),
        up=layout(matrix(block.mlp.up)),
        down=layout(matrix(block.mlp.down)),
        alpha=block.alpha.clone(),
        table=None if embedded is None else table_rows(embedded.table),
        projection=projection if gated else None,
    )


def matrix(layer: nn.Linear) -> Tensor:
    """(out, in): what a layer without bias does; of one that is more than its weight (an adapter), to the identity."""
    if type(layer) is nn.Linear:
        return layer.weight
    weight = layer.weight
    return layer(torch.eye(layer.in_features, device=weight.device, dtype=weight.dtype)).T


def table_rows(table: nn.Embedding) -> Tensor:
    """(V, D): the rows of a table, with what an adapter adds to them."""
    if type(table) is nn.Embedding:
        return table.weight
    return table(torch.arange(table.num_embeddings, device=table.weight.device))


def _projection(projection: Projection, held: Layers, layout: Layout) -> tuple[Tensor | None, ...]:
    """U_k and U_v, doubled, as one matrix per channel: of the layers of it that are held, None where it has none."""
    matrices: list[Tensor | None] = []
    for channel, layers in enumerate(held):
        weight = projection.of_channels(channel, channel + 1)[0]
        if layers and not projection.shared:
            weight = weight[projection.sets(channel, list(layers))]
        matrices.append(layout(2 * weight.flatten(0, 2)) if layers else None)
    return tuple(matrices)
