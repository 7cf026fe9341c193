"""The Latent Recurrent Transformer: one forward for training passes, prefill and decoding.

Shapes: B batch, T positions of this call, S slots, D width, V vocabulary.

Only two lines know about recurrence: the memory that the positions read before the layer stack, and the source
layers that they write after it. Source: LRT, arXiv 2605.26797, section 3; the base model is in nanochat's style.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lrt.model import state as states
from lrt.model.attention import Attention, Cache, ValueEmbedding, Visible
from lrt.model.buffers import Writer
from lrt.model.config import ModelConfig
from lrt.model.execution import Execution
from lrt.model.layers import MLP, rms, rotary
from lrt.model.memory import INJECTIONS, READERS, NoMemory, NoProjection, Projected
from lrt.model.state import Positions, State, as_positions
from lrt.model.strided_state import StridedState

AnyState = TypeVar("AnyState", State, StridedState)


class Block(nn.Module):
    """Injection, attention and MLP of one layer, with all of its parameters."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        injected = layer in config.memory.injected_layers(config.depth)
        self.alpha = nn.Parameter(torch.empty(1))  # one element, as FSDP2 shards no scalars; used as scalars
        self.beta = nn.Parameter(torch.empty(1))
        self.injection = (INJECTIONS[config.memory.injection] if injected else NoMemory)(config)
        self.attention = Attention(config, layer)
        self.mlp = MLP(config.width, config.mlp_dim)

    def forward(
        self,
        x: Tensor,
        x0: Tensor,
        tokens: Tensor,
        memory: Tensor,
        projected: Projected,
        angles: tuple[Tensor, Tensor],
        visible: Visible,
        cache: Cache,
        slots: Any,
        write: Writer,
        execution: Execution,
    ) -> tuple[Tensor, Cache]:
        """x, x0 (B, T, D), memory (C, B, T, D) -> the residual stream after the block, and its cache."""
        found = self.attention.value_embedding.look_up(tokens)
        x, q, k, v = execution.function(before_attention)(self, x, x0, memory, found, projected, angles)
        keys, values = write(cache[0], slots, k, 2), write(cache[1], slots, v, 2)
        y = visible.attend(q, keys, values)
        return execution.function(after_attention)(self, x, y), (keys, values)


# The two halves of a block, functions so that one compiled form serves all blocks. Lookups in tables stay outside:
# compiled, their gradients are added up in an order that changes from run to run.
def before_attention(
    block: Block,
    x: Tensor,
    x0: Tensor,
    memory: Tensor,
    found: tuple[Tensor, ...],
    projected: Projected,
    angles: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The residual stream with the memory injected (B, T, D); q (B, H, T, K), k and v (B, G, T, K)."""
    x = block.injection.residual(block.alpha.squeeze() * x + block.beta.squeeze() * x0, memory)
    return x, *block.attention.query_key_value(rms(x), found, block.injection, projected, angles)


def after_attention(block: Block, x: Tensor, y: Tensor) -> Tensor:
    """x (B, T, D) after attention's output y (B, H, T, K) and the MLP."""
    x = x + block.attention.out(y.transpose(1, 2).flatten(2))
    return x + block.mlp(rms(x))


class LatentRecurrentTransformer(nn.Module):
    """A decoder-only transformer whose tokens read a high-layer state of the token before them.

    With `MemoryConfig(injection="none")` it is a plain Transformer.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.recall: nn.Module = READERS[config.memory.combine](config)
        self.projection: NoProjection = INJECTIONS[config.memory.injection].projection(config)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(1, config.depth + 1))
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Initial values (nanochat's): unit embeddings, uniform inputs, zero outputs; gates at 1."""
        bound = math.sqrt(3 / self.config.width)  # uniform with standard deviation 1/sqrt(D)
        nn.init.normal_(self.embedding.weight)
        nn.init.normal_(self.head.weight, std=0.001)
        for block in self.blocks:
            assert isinstance(block, Block)
            nn.init.constant_(block.alpha, 1.0)
            nn.init.constant_(block.beta, self.config.skip_init)
            block.injection.reset()
            attention = block.attention
            for linear in (attention.query, attention.key, attention.value, block.mlp.up):
                nn.init.uniform_(linear.weight, -bound, bound)
            for linear in (attention.out, block.mlp.down):
                nn.init.zeros_(linear.weight)
            if isinstance(attention.value_embedding, ValueEmbedding):
                nn.init.uniform_(attention.value_embedding.table.weight, -bound, bound)
                nn.init.zeros_(attention.value_embedding.gate.weight)
        self.projection.reset()

    def empty_state(
        self, batch: int, slots: int, documents: Tensor | None = None, tokens: Tensor | None = None
    ) -> State:
        """A State of `slots` slots in which nothing is written.

        documents (batch, slots) int: the packed document of each slot. tokens (batch, slots) int: those known ahead,
        so that source 0 is exact whatever order the positions are computed in; calls write their own.
        Raises ValueError where `slots` exceeds the context (no limit where every layer slides).
        """
        config = self.config
        if slots > config.context and not config.unlimited_context:
            raise ValueError(
                f"{slots} positions exceed the context of {config.context}; shorten the input, or use a model in "
                "which every layer has a sliding window (window_pattern='S')"
            )
        for name, value in (("documents", documents), ("tokens", tokens)):
            if value is not None and value.shape != (batch, slots):
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)}; it must be (batch, slots) = ({batch}, {slots})"
                )
        weight = self.embedding.weight
        documents, tokens = (
            None if x is None else x.repeat_interleave(config.positions_per_token, 1) for x in (documents, tokens)
        )
        return states.empty_state(
            config.kv_layers,
            (config.num_kv_heads, config.head_dim),
            (len(config.memory.stored_sources(config.depth)), config.width),
            batch,
            slots * config.positions_per_token,
            documents,
            tokens,
            config.unlimited_context,
            device=weight.device,
            dtype=weight.dtype,
        )

    def forward(self, tokens: Tensor, positions: Positions, state: AnyState) -> tuple[Tensor, AnyState]:
        """Compute these positions from what the state holds, and replace what it holds of them.

        tokens (B, T) int; positions: a range, or ints (T,) or (B, T). Returns the final hidden state (B, T, D) of
        these positions, after the last RMSNorm, and the new State.
        """
        positions = as_positions(positions)
        if isinstance(positions, Tensor):
            positions = positions.to(tokens.device)
        self._check(tokens, positions, state)
        hidden, state = self._at(tokens, state_positions(positions, self.config.positions_per_token, 0), state, None)
        for place in range(1, self.config.positions_per_token):  # latent thoughts
            hidden, state = self._at(
                tokens, state_positions(positions, self.config.positions_per_token, place), state, hidden
            )
        return hidden, state

    def _at(
        self, tokens: Tensor, positions: Positions, state: AnyState, thought: Tensor | None
    ) -> tuple[Tensor, AnyState]:
        """The blocks at positions of the State, on the tokens' embeddings or, in their place, on thought (B, T, D)."""
        state = state.write_tokens(positions, tokens)
        memory = self.recall(state, positions, self.embedding)
        state = state.mark_written(positions)

        config, remembered = self.config, self.config.memory.stored_sources(self.config.depth)
        projected = self.projection(memory)
        x0 = x = rms(self.embedding(tokens)) if thought is None else thought
        angles = rotary(positions, config.head_dim, config.rope_base, x)
        windows = config.windows()
        visible = {window: state.visible(positions, window) for window in set(windows)}
        slots, run = state.where(positions), state.execution
        injected = config.memory.injected_layers(config.depth)
        outputs: dict[int, Tensor] = {}
        caches: list[Cache] = []
        for i, block in enumerate(tuple(self.blocks) * config.loops):
            layer = i % config.depth + 1
            index = injected.index(layer) if layer in injected and len(projected) > 1 else 0
            cache = state.keys[i], state.values[i]
            seen = visible[windows[i]]
            given = (x, x0, tokens, memory, projected[index], angles, seen, cache, slots, state.write, run)
            x, cache = run.block(block, *given)
            caches.append(cache)
            if layer in remembered or layer == config.depth:
                outputs[layer] = rms(x)  # the last loop's stays

        state = state.write_cache(tuple(k for k, _ in caches), tuple(v for _, v in caches))
        if remembered:
            state = state.write_memory(positions, torch.stack([outputs[s] for s in remembered], dim=2))
        return outputs[config.depth], state

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits (…, V) of hidden states (…, D), soft-capped."""
        cap = self.config.softcap
        return cap * torch.tanh(self.head(hidden) / cap)

    def shard_units(self) -> tuple[nn.Module, ...]:
        """The modules that FSDP2 gathers one at a time; embeddings and head, which every pass needs, are the rest."""
        return (*self.blocks, self.projection)

    def with_recall(self, recall: nn.Module) -> LatentRecurrentTransformer:
        """This model, all parameters shared, reading its memory through `recall` (for ablations at test time)."""
        other = copy.copy(self)
        other._modules = {**self._modules, "recall": recall}
        return other

    def _check(self, tokens: Tensor, positions: Positions, state: State | StridedState) -> None:
        """Wrong sizes are the caller's mistake and named; what only the device knows is left to it."""
        batch, length = tokens.shape
        count = len(positions) if isinstance(positions, range) else positions.shape[-1]
        if count != length or batch != state.batch or count == 0:
            raise ValueError(
                f"tokens are {tuple(tokens.shape)}, positions {count}, the state has {state.batch} rows; "
                "give one token per position (at least one) and row"
            )
        config = self.config
        expected = (
            config.kv_layers,
            config.num_kv_heads,
            config.head_dim,
            len(config.memory.stored_sources(config.depth)),
            config.width,
        )
        if state.shape != expected:
            raise ValueError("this state was made by another model; make one with model.empty_state(batch, slots)")
        if isinstance(positions, range) or positions.device.type == "cpu":
            ends = (positions[0], positions[-1]) if isinstance(positions, range) else positions.aminmax()
            if int(ends[0]) < 0:
                raise ValueError(f"position {int(ends[0])} is negative; positions count from 0")
            self._check_room(int(ends[1]), length, state)

    def _check_room(self, last: int, length: int, state: State | StridedState) -> None:
        slots = state.slots // self.config.positions_per_token
        if last < slots:
            return
        if not state.reusable:
            raise ValueError(
                f"position {last} exceeds the {slots} slots of this state (context {self.config.context}); "
                "make a longer state, shorten the input, or use a model in which every layer slides"
            )
        if state.documents is not None:
            raise ValueError(
                f"position {last} reuses a slot of this state of {state.slots}, whose documents are fixed; "
                "make a state with a slot for every position, or without documents"
            )
        reach = self.config.lookback
        if length + reach > state.slots:
            raise ValueError(
                f"{length} positions at once need {length + reach} slots (window and delay included), the state has "
                f"{state.slots}; pass fewer at once or make a longer state"
            )


def state_positions(positions: Positions, places: int, place: int) -> Positions:
    """Where the State holds place `place` (0: the token, then its thoughts) of tokens at `positions`."""
    if places == 1:
        return positions
    if isinstance(positions, Tensor):
        return positions * places + place
    first, last = (p * places + place for p in (positions[0], positions[-1]))
    return range(first, last + 1, positions.step * places)


def fingerprint(model: LatentRecurrentTransformer) -> str:
    """SHA-256 of a model's configuration and weights, types included: what a state or a calibration belongs to."""
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(memoryview(weight.detach().contiguous().cpu().flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()
