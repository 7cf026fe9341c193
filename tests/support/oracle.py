"""The oracle: the Latent Recurrent Transformer one token at a time, written from the specification alone.

It shares no code with lrt: no State, no cache, no batch, no mask. One row of tokens, plain Python loops, torch
primitives, and the weights by name, so that gradients reach every one of them. Obvious rather than fast.

    oracle    the recurrence itself: what every exact path of the library must equal
    simulate  the same arithmetic under any list of passes, with the buffers as plain dictionaries

L depth, T positions, D width, H query heads, G key and value heads, K head size, C memory channels. Layers count
from 1 as in the paper; `blocks.0` is block 1; layer 0 is the normalised embedding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lrt.model.config import ModelConfig
from lrt.schedules.base import Pass

Weights = dict[str, Tensor]


@dataclass
class Computed:
    """What one position leaves behind for later ones."""

    keys: list[Tensor]
    """(G, K) per block, rotated and normalised."""
    values: list[Tensor]
    """(G, K) per block."""
    layers: list[Tensor]
    """(D,) normalised outputs of layers 0..L; the last one is the final hidden state."""


def oracle(weights: Weights, config: ModelConfig, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
    """Hidden states (T, D) of one row of tokens (T,) under exact recurrence; `documents` (T,) numbers packed ones."""
    done: dict[int, Computed] = {}
    for t in range(len(tokens)):
        remembered = {s: done[s].layers for s in done}
        memory = read_memory(weights, config, tokens, documents, t, remembered)
        done[t] = compute(weights, config, tokens, documents, t, memory, done)
    return torch.stack([done[t].layers[-1] for t in range(len(tokens))])


def simulate(
    weights: Weights, config: ModelConfig, tokens: Tensor, passes: Iterable[Pass], documents: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """The same row under a list of passes: hidden (T, D) by each position's last pass, and (n, D) of every pass."""
    written: dict[int, Computed] = {}  # keys and values: replaced at once
    remembered: dict[int, list[Tensor]] = {}  # memory: a pass reads what stood there before it began
    hidden: list[Tensor] = []
    for p in passes:
        with torch.set_grad_enabled(p.grad and torch.is_grad_enabled()):
            before = dict(remembered)
            for t in p.positions:
                memory = read_memory(weights, config, tokens, documents, t, before)
                written[t] = compute(weights, config, tokens, documents, t, memory, written)
                remembered[t] = written[t].layers
            hidden.append(torch.stack([written[t].layers[-1] for t in p.positions]))
        if p.detach_memory:
            # All of it: with a delay of 2, a chain of every other position would pass between the cuts of
            # sequential(2), which promises to truncate.
            remembered = {s: [x.detach() for x in layers] for s, layers in remembered.items()}
    return torch.stack([written[t].layers[-1] for t in range(len(tokens))]), hidden


def read_memory(
    weights: Weights,
    config: ModelConfig,
    tokens: Tensor,
    documents: Tensor | None,
    t: int,
    remembered: dict[int, list[Tensor]],
) -> list[Tensor]:
    """The C memory vectors (D,) that position t reads, each so far back as `delay` says; `remembered[s][l]` is layer l
    at s."""
    parts = []
    for i, layer in enumerate(config.sources):
        delay = config.memory.delay
        slot = t - (delay[i] if isinstance(delay, tuple) else delay)
        if same_document(documents, slot, t):
            parts.append(read_part(weights, config, tokens, slot, layer, remembered))
        else:
            parts.append(torch.zeros_like(weights["embedding.weight"][0]))
    if isinstance(config.memory.source, tuple) and config.memory.combine == "sum" and parts:
        total = torch.zeros_like(parts[0])
        for i, part in enumerate(parts):
            total = total + weights["recall.weights"][i] * part
        return [rms(total)]
    return parts


def read_part(
    weights: Weights, config: ModelConfig, tokens: Tensor, slot: int, source: int, remembered: dict[int, list[Tensor]]
) -> Tensor:
    """One source (D,) of one slot: layer 0 needs only the token; the others what a pass wrote, or `initial`."""
    embedded = rms(weights["embedding.weight"][tokens[slot]])
    if source == 0:
        return embedded
    if slot in remembered:
        return remembered[slot][source]
    return embedded if config.memory.initial == "embedding" else torch.zeros_like(embedded)


def compute(
    weights: Weights,
    config: ModelConfig,
    tokens: Tensor,
    documents: Tensor | None,
    t: int,
    memory: list[Tensor],
    written: dict[int, Computed],
) -> Computed:
    """Run all blocks at position t, which attends to itself and to the written positions before it."""
    x0 = rms(weights["embedding.weight"][tokens[t]])
    x, keys, values, layers = x0, [], [], [x0]
    for layer in range(1, config.depth + 1):
        name = f"blocks.{layer - 1}"
        x = enter_block(weights, config, layer, x, x0, memory)

        u = rms(x)
        q, k, v = query_key_value(weights, config, layer, u, tokens[t], memory)
        q, k = rms(rotate(q, t, config.rope_base)), rms(rotate(k, t, config.rope_base))
        keys.append(k)
        values.append(v)
        window = config.windows[layer - 1]
        seen = [
            s
            for s in sorted(written)
            if s < t and same_document(documents, s, t) and (window is None or s > t - window)
        ]
        attended = attend(
            q,
            [written[s].keys[layer - 1] for s in seen] + [k],
            [written[s].values[layer - 1] for s in seen] + [v],
        )
        x = x + weights[f"{name}.attention.out.weight"] @ attended

        up = weights[f"{name}.mlp.up.weight"] @ rms(x)
        x = x + weights[f"{name}.mlp.down.weight"] @ torch.relu(up) ** 2
        layers.append(rms(x))
    return Computed(keys, values, layers)


def enter_block(
    weights: Weights, config: ModelConfig, layer: int, x: Tensor, x0: Tensor, memory: list[Tensor]
) -> Tensor:
    """The residual stream (D,) as block `layer` receives it: α x + β x0 + Σ γ m."""
    name = f"blocks.{layer - 1}"
    x = weights[f"{name}.alpha"] * x + weights[f"{name}.beta"] * x0
    if config.memory.injection in ("residual", "both") and layer in config.injected_layers:
        for i, c in enumerate(channels_of(config, layer)):
            x = x + weights[f"{name}.injection.gamma"][i] * memory[c]
    return x


def query_key_value(
    weights: Weights, config: ModelConfig, layer: int, u: Tensor, token: Tensor, memory: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Query (H, K), key and value (G, K) of one position, before rotation."""
    name, groups, size = f"blocks.{layer - 1}", config.num_kv_heads, config.head_dim
    q = (weights[f"{name}.attention.query.weight"] @ u).view(config.heads, size)
    k = (weights[f"{name}.attention.key.weight"] @ u).view(groups, size)
    v = (weights[f"{name}.attention.value.weight"] @ u).view(groups, size)

    injected = config.injected_layers
    if config.memory.injection in ("key_value", "both") and layer in injected:
        gates = 2 * torch.sigmoid(weights[f"{name}.injection.gate.weight"] @ u)
        channels = channels_of(config, layer)
        gates = gates.view(1 + len(channels), groups, 1)  # row 0 is local, row 1 + i is the block's channel i
        k, v = gates[0] * k, gates[0] * v
        for i, c in enumerate(channels):
            to_key, to_value = projection_of(weights, config, layer, c)  # (G·K, D) each
            k = k + gates[1 + i] * (to_key @ memory[c]).view(groups, size)
            v = v + gates[1 + i] * (to_value @ memory[c]).view(groups, size)

    if config.has_value_embedding(layer):
        gate = 2 * torch.sigmoid(weights[f"{name}.attention.value_embedding.gate.weight"] @ u)
        table = weights[f"{name}.attention.value_embedding.table.weight"]
        v = v + gate.view(groups, 1) * table[token].view(groups, size)
    return q, k, v


def layers_of_channels(config: ModelConfig) -> list[list[int]]:
    """The blocks that read each channel, in order."""
    layers, count = config.memory.layers, config.channels
    if layers is None:
        return [list(range(1, config.depth + 1))] * count
    if isinstance(layers[0], tuple):
        return [sorted(own) for own in layers]
    return [sorted(layers)] * count


def channels_of(config: ModelConfig, layer: int) -> list[int]:
    """The channels that block `layer` reads."""
    return [c for c, own in enumerate(layers_of_channels(config)) if layer in own]


def projection_of(weights: Weights, config: ModelConfig, layer: int, channel: int) -> Tensor:
    """U_k and U_v (2, G·K, D) of one block and channel."""
    by_channel = layers_of_channels(config)
    layerwise, weight = config.memory.projection == "layerwise", weights["projection.weight"]
    place = by_channel[channel].index(layer) if layerwise else 0
    if weight.dim() == 5:  # (layers, C, 2, G·K, D): all channels enter the same blocks
        return weight[place, channel]
    return weight[sum(len(own) if layerwise else 1 for own in by_channel[:channel]) + place]


def attend(q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """Softmax attention of one query (H, K) over n keys and values (G, K) each, heads concatenated (H·K,)."""
    heads, size = q.shape
    shared = heads // keys[0].shape[0]  # query heads per key head
    out = []
    for h in range(heads):
        k = torch.stack([key[h // shared] for key in keys])
        v = torch.stack([value[h // shared] for value in values])
        out.append(torch.softmax(k @ q[h] / math.sqrt(size), dim=0) @ v)
    return torch.cat(out)


def rotate(x: Tensor, position: int, base: float) -> Tensor:
    """Rotary position of heads (…, K), in the half-split convention."""
    half = x.shape[-1] // 2
    x1, x2 = x[..., :half], x[..., half:]
    angle = torch.tensor([position * base ** (-2 * i / (2 * half)) for i in range(half)], dtype=x.dtype)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([x1 * cos + x2 * sin, -x1 * sin + x2 * cos], dim=-1)


def rms(x: Tensor) -> Tensor:
    """Divide by the root mean square over the last dimension."""
    return torch.nn.functional.rms_norm(x, (x.shape[-1],))


def same_document(documents: Tensor | None, s: int, t: int) -> bool:
    """Whether slot s exists and belongs to the document of position t."""
    return s >= 0 and (documents is None or bool(documents[s] == documents[t]))
