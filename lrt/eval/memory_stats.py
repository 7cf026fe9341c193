"""What the memory does inside: gates and scales by layer, how far back it reaches, and what it gains token by token.

Shapes: B windows, T positions, C memory channels, G key/value heads, K head size, D width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lrt.data.tokenizer import Tokenizer
from lrt.data.windows import Windows
from lrt.model.layers import rms
from lrt.model.memory import KeyValue, Projection, Residual
from lrt.model.state import State
from lrt.model.transformer import Block, LatentRecurrentTransformer
from lrt.schedules.library import sequential
from lrt.schedules.refinement import refine
from lrt.utils.device import double

BACK = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Tokens ago that a memory is perturbed."""
NOISE = 0.1
"""The perturbation's norm over the memory's."""


@contextmanager
def record_block_inputs(
    inputs_by_block: dict[int, tuple[Tensor, Tensor]], model: LatentRecurrentTransformer
) -> Iterator[None]:
    """While it lasts, put into `inputs_by_block` what each block (from 1) reads, both (B, T, D).

    The residual stream before the memory is added, and what its projections and gates read. Not what those give: their
    products may be joined, so that the modules are not called one by one. The hooks are torch's, removed afterwards.
    """

    def note(number: int) -> Callable[..., None]:
        def before(block: Block, inputs: tuple[Any, ...]) -> None:
            x, x0, memory = inputs[:3]
            stream = block.alpha.squeeze() * x + block.beta.squeeze() * x0
            inputs_by_block[number] = stream.detach(), rms(block.injection.residual(stream, memory)).detach()

        return before

    handles = [block.register_forward_pre_hook(note(n)) for n, block in enumerate(native_blocks(model), 1)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def native_blocks(model: LatentRecurrentTransformer) -> list[Block]:
    """The model's blocks, as their own type."""
    return [block for block in model.blocks if isinstance(block, Block)]


def live_state(model: LatentRecurrentTransformer, inputs: Tensor) -> tuple[Tensor, State]:
    """Hidden states (B, T, D) and the State after live decoding of inputs (B, T)."""
    state = model.empty_state(len(inputs), inputs.shape[1], tokens=inputs).in_place()
    out = refine(model, inputs, sequential(), state=state)
    return out.hidden, out.state


@dataclass(frozen=True)
class BlockMemory:
    """What one block adds of the memory, at every position."""

    layer: int
    injected: bool
    stream: Tensor
    """(B, T, D): the residual stream that the memory is added to."""
    gamma: list[float] | None
    """By channel."""
    gates: Tensor | None
    """(B, T, 1 + C, G): local, then one per channel. None where keys and values get no memory."""
    local: dict[str, Tensor]
    """`key` and `value`: g_loc · W u (B, T, G, K)."""
    added: dict[str, Tensor]
    """`key` and `value`: g_mem · U m (C, B, T, G, K)."""


@torch.no_grad()
def live_memory(model: LatentRecurrentTransformer, inputs: Tensor) -> tuple[Tensor, list[BlockMemory]]:
    """The memory (C, B, T, D) that each position of inputs (B, T) reads when decoding live, and what blocks add."""
    _, state = live_state(model, inputs)
    inputs_by_block: dict[int, tuple[Tensor, Tensor]] = {}
    length = inputs.shape[1]
    # All positions in one forward, from the State that live decoding has written.
    memory = model.recall(state, range(length), model.embedding)
    projected = model.projection(memory)
    with record_block_inputs(inputs_by_block, model):
        model(inputs, range(length), dataclasses.replace(state.clone(), write=state.write))
    blocks = []
    for number, block in enumerate(native_blocks(model), 1):
        stream, u = inputs_by_block[number]
        read = list(model.config.block_channels[number - 1])
        gamma = gates = None
        if isinstance(block.injection, Residual):
            gamma = by_channel(block.injection.gamma, read, memory, 0).tolist()
        local, added = {}, {}
        if isinstance(block.injection, KeyValue) and isinstance(model.projection, Projection):
            groups = block.injection.groups
            opened = 2 * torch.sigmoid(block.injection.gate(u)).unflatten(-1, (-1, groups))
            gates = torch.cat([opened[:, :, :1], by_channel(opened[:, :, 1:], read, memory, 2)], 2)
            products = {"key": block.attention.key, "value": block.attention.value}
            for (name, product), part in zip(products.items(), projected[number - 1], strict=True):
                local[name] = gates[:, :, 0].unsqueeze(-1) * product(u).unflatten(-1, (groups, -1))
                sizes = opened[:, :, 1:].permute(2, 0, 1, 3).unsqueeze(-1) * torch.stack(tuple(part))
                added[name] = by_channel(sizes, read, memory, 0)
        blocks.append(BlockMemory(number, len(read) > 0, stream, gamma, gates, local, added))
    return memory, blocks


def by_channel(own: Tensor, read: list[int], memory: Tensor, dim: int) -> Tensor:
    """What a block has for the channels that it reads, put in their places among all of `memory` (C, B, T, D): zeros
    for the others."""
    shape = list(own.shape)
    shape[dim] = memory.shape[0]
    return own.new_zeros(shape).index_copy_(dim, torch.tensor(read, device=own.device), own)


def layer_stats(model: LatentRecurrentTransformer, inputs: Tensor) -> list[dict[str, Any]]:
    """Per block, over inputs (B, T) with their exact memory: γ, mean gates, and how large the injections are.

    Ratios are of root mean squares, gates included: γ m over the residual stream it is added to, U_k m over W_k u, and
    U_v m over W_v u, per channel.
    """
    memory, blocks = live_memory(model, inputs)
    rows = []
    for block in blocks:
        row: dict[str, Any] = {"layer": block.layer, "injected": block.injected}
        if block.gamma is not None:
            row["gamma"] = block.gamma
            row["residual_ratio"] = [
                abs(gamma) * rms_of(m) / rms_of(block.stream) for gamma, m in zip(block.gamma, memory, strict=True)
            ]
        if block.gates is not None:
            row["gates"] = block.gates.mean((0, 1)).tolist()
            row["gate_spread"] = block.gates.std((0, 1)).tolist()
            for name, local in block.local.items():
                row[f"{name}_ratio"] = [rms_of(channel) / rms_of(local) for channel in block.added[name]]
        rows.append(row)
    return rows


def memory_by_token(model: LatentRecurrentTransformer, inputs: Tensor) -> dict[str, Any]:
    """`layer_stats` at every position of inputs (1, T): plain data, a list over T for each quantity.

    norm: ‖m‖ / √D of the memory read, by channel (RMS-normalised, a single source has 1; 0 where nothing is read);
    change: ‖m − m before‖ / √D; blocks: mean gates over heads, and the ratios of `layer_stats`.
    """
    memory, blocks = live_memory(model, inputs)
    memory = memory[:, 0].float()  # (C, T, D)
    root = memory.shape[-1] ** 0.5
    moved = torch.diff(memory, dim=1, prepend=torch.zeros_like(memory[:, :1]))
    stats: dict[str, Any] = {
        "norm": (memory.norm(dim=-1) / root).tolist(),
        "change": (moved.norm(dim=-1) / root).tolist(),
        "blocks": [],
    }
    for block in blocks:
        if block.gates is None:
            continue
        gates = block.gates[0].mean(-1)  # (T, 1 + C)
        row: dict[str, Any] = {"layer": block.layer, "local": gates[:, 0].tolist(), "memory": gates[:, 1:].T.tolist()}
        for name, local in block.local.items():
            sizes = block.added[name][:, 0].flatten(2).norm(dim=-1)  # (C, T)
            row[f"{name}_ratio"] = (sizes / local[0].flatten(1).norm(dim=-1)).tolist()
        stats["blocks"].append(row)
    return stats


def rms_of(x: Tensor) -> float:
    """The root of the mean square of all entries, in float64."""
    return float(double(x).square().mean().sqrt())


@torch.no_grad()
def memory_scales(model: LatentRecurrentTransformer) -> dict[str, Any]:
    """What can be read off the weights alone, for comparing snapshots: γ by layer, the size of U_k and U_v."""
    stats: dict[str, Any] = {
        "gamma": [
            b.injection.gamma.tolist() if isinstance(b.injection, Residual) else None for b in native_blocks(model)
        ],
        "gate": [
            rms_of(b.injection.gate.weight) if isinstance(b.injection, KeyValue) else None for b in native_blocks(model)
        ],
    }
    if isinstance(model.projection, Projection):
        stats["projection"] = [[rms_of(u) for u in layer.flatten(0, -3)] for layer in model.projection.weight]
    return stats


@torch.no_grad()
def memory_reach(
    model: LatentRecurrentTransformer, inputs: Tensor, back: Sequence[int] = BACK, seed: int = 0
) -> list[dict[str, float]]:
    """How far back the memory reaches: inputs (B, T), decoded live with one memory perturbed k tokens before a place.

    The place is two thirds of the way. The memory written k tokens before it gets noise of a tenth of its norm, and
    what follows is decoded anew; k = 1 is the memory that the place itself reads. Reported per k: the mean divergence
    KL(p ‖ p_perturbed) of the next-token distribution there, in nats, and the relative change of the hidden state.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden, state = live_state(model, inputs)
    if state.memory.shape[2] == 0:
        return []
    place = 2 * inputs.shape[1] // 3
    expected = double(model.logits(hidden[:, place])).log_softmax(-1)
    points = []
    for k in back:
        start = place - k  # whose memory is changed; start + 1 is the first to read it
        if start < 0:
            break
        before = state.clone().crop(start + 1)  # as it was just after the token was decoded
        noise = torch.randn(before.memory[:, start].shape, generator=generator).to(before.memory)
        noise = noise * (NOISE * before.memory[:, start].norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True))
        memory = before.memory.clone()
        memory[:, start] += noise
        current, h = dataclasses.replace(before, memory=memory), hidden[:, :1]  # h is set below: k is at least 1
        for t in range(start + 1, place + 1):
            h, current = model(inputs[:, t : t + 1], range(t, t + 1), current)
        changed = double(model.logits(h[:, 0])).log_softmax(-1)
        kl = F.kl_div(changed, expected, reduction="none", log_target=True).sum(-1).mean()
        moved = (h[:, 0] - hidden[:, place]).norm(dim=-1) / hidden[:, place].norm(dim=-1)
        points.append({"back": k, "kl": float(kl), "moved": float(moved.mean())})
    return points


def longest_inputs(windows: Windows, count: int, device: torch.device) -> Tensor:
    """The `count` longest windows as inputs (B, T), cut to the shortest of them: nothing is padding."""
    batch = next(iter(windows.batches(count)))
    shortest = int((batch.targets >= 0).sum(1).min())
    return batch.tokens[:, : max(1, shortest)].to(device)


def token_pieces(
    tokenizer: Tokenizer, tokens: Sequence[int], live: Sequence[float], off: Sequence[float]
) -> dict[str, Any]:
    """A text in pieces, each with its surprisal in bits, live and with nothing recurrent read."""
    decoder = tokenizer.decoder()
    pieces = [decoder.push(int(token)) for token in tokens]
    bits = 1 / math.log(2)
    return {
        "pieces": pieces,
        "live": [round(v * bits, 4) for v in live],
        "off": [round(v * bits, 4) for v in off],
    }
