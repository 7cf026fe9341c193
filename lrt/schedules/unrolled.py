"""Exact sequential passes in constant time per position: the recurrence unrolled, some positions to a compiled graph.

Shapes: B batch, T positions, C positions of a chunk, W keys a window holds beside the own, P remembered sources,
D width, G key/value heads, K head size.

`refine(model, tokens, sequential())` is the reference: it calls the model once per position, through a State that
grows with the sequence. A small model then spends its time in launching operations. Here C positions are one function
of (chunk, carry), compiled once; the carry (last memory, last W keys and values of each layer) has one size from the
second chunk on, so that two graphs serve any length. A test in float64 holds values and gradients against `refine`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lrt.model.execution import EAGER, Execution
from lrt.model.layers import rms, rotary
from lrt.model.memory import MemoryReader
from lrt.model.transformer import LatentRecurrentTransformer, after_attention, before_attention

CHUNK = 8
"""Positions of a graph: more compile longer, and gain little."""
Angles = tuple[Tensor, Tensor]
Found = tuple[tuple[Tensor, ...], ...]


@dataclass(frozen=True)
class Carry:
    """What a position knows of the past: constant in size."""

    memory: Tensor
    """(B, 1, P, D): the sources' states at the last position; zeros before the first."""
    keys: tuple[Tensor, ...]
    """One (B, G, W, K) per layer, the last ones; fewer at the beginning."""
    values: tuple[Tensor, ...]
    position: int = 0
    """The next position."""

    def detach(self) -> Carry:
        """The same, with every gradient cut."""
        keys, values = (tuple(x.detach() for x in cache) for cache in (self.keys, self.values))
        return Carry(self.memory.detach(), keys, values, self.position)


def reason_uncovered(model: LatentRecurrentTransformer) -> str | None:
    """Why this module does not compute such a model; None where it does."""
    config = model.config
    if type(model.recall) is not MemoryReader:
        return "a model whose recall is replaced (an ablation)"
    sources = config.memory.sources(config.depth)
    if config.forwards > 1:
        return f"{config.loops} loops and {config.thoughts} thoughts: it needs one forward per token"
    if not sources or 0 in sources or config.memory.delay != 1:
        return f"memory sources {sources} at delay {config.memory.delay}: it needs sources >= 1 at delay 1"
    if not config.unlimited_context or max(w or 0 for w in config.windows()) - 1 > CHUNK:
        return f"windows {config.windows()}: every layer must slide over at most {CHUNK + 1} positions"
    return None


def empty_carry(model: LatentRecurrentTransformer, batch: int) -> Carry:
    """Before the first position of `batch` rows."""
    config = model.config
    reason = reason_uncovered(model)
    if reason is not None:
        raise ValueError(f"exact passes in chunks do not cover {reason}; use refine with sequential()")
    place = model.embedding.weight
    remembered = len(config.memory.stored_sources(config.depth))
    empty = place.new_zeros(batch, config.num_kv_heads, 0, config.head_dim)
    return Carry(place.new_zeros(batch, 1, remembered, config.width), (empty,) * config.depth, (empty,) * config.depth)


def over(
    model: LatentRecurrentTransformer, tokens: Tensor, backprop: int | None = None, execution: Execution = EAGER
) -> Tensor:
    """The hidden states (B, T, D) that `refine(model, tokens, sequential(backprop))` gives."""
    carry, hidden = empty_carry(model, tokens.shape[0]), []
    for part in tokens.split(tokens.shape[1] if backprop is None else backprop, dim=1):
        out, carry = run_chunks(model, part, carry, execution)
        carry = carry if backprop is None else dataclasses.replace(carry, memory=carry.memory.detach())
        hidden.append(out)
    return torch.cat(hidden, dim=1)


def run_chunks(
    model: LatentRecurrentTransformer, tokens: Tensor, carry: Carry, execution: Execution = EAGER
) -> tuple[Tensor, Carry]:
    """The final hidden states (B, T, D) of tokens (B, T) behind `carry`, and what is carried on."""
    hidden = []
    for part in tokens.split(CHUNK, dim=1):
        positions = range(carry.position, carry.position + part.shape[1])
        # Lookups stay outside what is compiled: compiled, their gradients are added up in an order that changes.
        x0 = rms(model.embedding(part))
        found = tuple(block.attention.value_embedding.look_up(part) for block in model.blocks)  # type: ignore[union-attr]
        angles = rotary(positions, model.config.head_dim, model.config.rope_base, x0)
        given = (model, x0, found, angles, carry.memory, carry.keys, carry.values)
        out, memory, keys, values = execution.function(chunk)(*given)
        hidden.append(out)
        carry = Carry(memory, keys, values, positions.stop)
    return torch.cat(hidden, dim=1), carry


def chunk(
    model: LatentRecurrentTransformer,
    x0: Tensor,
    found: Found,
    angles: Angles,
    memory: Tensor,
    keys: tuple[Tensor, ...],
    values: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """C positions in order, from embeddings x0 (B, C, D), value embeddings and angles; `Carry` has the rest."""
    hidden = []
    for i in range(x0.shape[1]):
        here = slice(i, i + 1)
        rows = tuple(tuple(table[:, here] for table in layer) for layer in found)
        out, memory, keys, values = position(
            model, x0[:, here], rows, (angles[0][here], angles[1][here]), memory, keys, values
        )
        hidden.append(out)
    return torch.cat(hidden, dim=1), memory, keys, values


def position(
    model: LatentRecurrentTransformer,
    x0: Tensor,
    found: Found,
    angles: Angles,
    memory: Tensor,
    keys: tuple[Tensor, ...],
    values: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """One position: what `model` computes, with the last keys and values in place of a State."""
    config = model.config
    remembered, injected = config.memory.stored_sources(config.depth), config.memory.injected_layers(config.depth)
    read = model.recall.combine([memory[:, :, remembered.index(s)] for s in model.recall.sources], memory)  # type: ignore[operator]
    projected = model.projection(read)
    x, outputs = x0, {}
    new_keys, new_values = [], []
    for layer, block in enumerate(model.blocks, start=1):
        index = injected.index(layer) if layer in injected and len(projected) > 1 else 0
        x, q, k, v = before_attention(block, x, x0, read, found[layer - 1], projected[index], angles)  # type: ignore[arg-type]
        k, v = torch.cat((keys[layer - 1], k), 2), torch.cat((values[layer - 1], v), 2)
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=config.num_kv_heads != config.heads)
        x = after_attention(block, x, y)  # type: ignore[arg-type]
        kept = (config.windows()[layer - 1] or 1) - 1
        new_keys.append(k[:, :, max(0, k.shape[2] - kept) :])
        new_values.append(v[:, :, max(0, v.shape[2] - kept) :])
        if layer in remembered or layer == config.depth:
            outputs[layer] = rms(x)
    memory = torch.stack([outputs[s] for s in remembered], dim=2)
    return outputs[config.depth], memory, tuple(new_keys), tuple(new_values)
