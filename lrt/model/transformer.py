"""The Latent Recurrent Transformer: one forward for training passes, prefill and decoding.

Shapes: B batch, T positions of this call, C memory channels, S slots, H query heads, G key/value heads, K head size,
D width, V vocabulary.

Only two lines know about recurrence: the memory that the positions read before the layer stack, and the source
layers that they write after it. Source: LRT, arXiv 2605.26797, section 3; the base model is in nanochat's style.

Loops and latent thoughts, the rivals, are two numbers of the configuration. A loop is the blocks again, with keys and
values of its own. A thought is a position of the State behind its token's; callers count tokens and never see it.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from lrt.model import state as states
from lrt.model.attention import Attention, Cache, ValueEmbedding
from lrt.model.config import ModelConfig
from lrt.model.execution import Execution
from lrt.model.layers import MLP, rms, rotary
from lrt.model.memory import INJECTIONS, READERS, NoMemory, NoProjection, Projected, Projection
from lrt.model.state import State, as_positions
from lrt.model.state_protocol import ModelState, Positions, Visible

AnyState = TypeVar("AnyState", bound=ModelState)


class Inputs(Protocol):
    """What is looked up in tables for the positions of a call: at once by `LookedUp`, when needed by `TokenInputs`."""

    @property
    def x0(self) -> Tensor:
        """(B, T, D): the normalised embeddings, or the latent thoughts that stand in their place."""
        ...

    def value_rows(self, block: Block) -> tuple[Tensor, ...]:
        """The rows (B, T, G, K) of the block's value embedding; none where it has none."""
        ...


@dataclass(frozen=True)
class TokenInputs:
    """Tokens (B, T) and x_0 (B, T, D); a block looks up its rows itself: under FSDP2 its tables are whole only while it
    runs."""

    tokens: Tensor
    x0: Tensor

    def value_rows(self, block: Block) -> tuple[Tensor, ...]:
        return block.attention.value_embedding.look_up(self.tokens)


@dataclass(frozen=True)
class Call:
    """What all blocks share in one call of the model."""

    inputs: Inputs
    angles: tuple[Tensor, Tensor]
    """Cosine and sine of the rotary angles, (T, 1, K/2) or (B, T, 1, K/2) each."""
    slots: Any
    """Where the State keeps the call's positions: `ModelState.where`."""
    write: Any
    """How the State replaces them in a layer's keys and values: `ModelState.write`."""
    execution: Execution


class Block(nn.Module):
    """Injection, attention and MLP of one layer, with all of its parameters."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        injected, own = layer in config.injected_layers, config.of_block(layer)
        # α and β scale the stream and x_0. One element each, as FSDP2 shards no scalars; used as scalars.
        self.alpha = nn.Parameter(torch.empty(1))
        self.beta = nn.Parameter(torch.empty(1))
        self.injection = (INJECTIONS[config.memory.injection] if injected else NoMemory)(own)
        self.attention = Attention(config, layer)
        self.mlp = MLP(config.width, config.mlp_dim)

    def forward(
        self, x: Tensor, x0: Tensor, memory: Tensor, projected: Projected, call: Call, visible: Visible, cache: Cache
    ) -> tuple[Tensor, Cache]:
        """x, x0 (B, T, D), memory (C, B, T, D) of the block's channels -> the residual stream after the block, and its
        cache with this call's keys and values.

        What gradients flow through are arguments of their own: FSDP2 looks at the tensors among a module's arguments
        to know when its backward is over.
        """
        rows = call.inputs.value_rows(self)
        run = call.execution
        x, q, k, v = run.function(before_attention)(self, x, x0, memory, rows, projected, call.angles)
        keys, values = call.write(cache[0], call.slots, k, 2), call.write(cache[1], call.slots, v, 2)
        y = visible.attend(q, keys, values)
        return run.function(after_attention)(self, x, y), (keys, values)


# The two halves of a block, functions so that one compiled form serves all blocks and all passes of a size. Lookups in
# tables stay outside: compiled, their gradients are added up atomically, in another order each time, and a run would
# not resume bit for bit.
def before_attention(
    block: Block,
    x: Tensor,
    x0: Tensor,
    memory: Tensor,
    rows: tuple[Tensor, ...],
    projected: Projected,
    angles: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The residual stream with the memory injected (B, T, D); q (B, H, T, K), k and v (B, G, T, K).

    x <- α·x + β·x_0 + Σ_c γ_c·m_c (paper, section 3); rows are what the value embedding looked up.
    """
    x = block.injection.residual(block.alpha.squeeze() * x + block.beta.squeeze() * x0, memory)
    return x, *block.attention.query_key_value(rms(x), rows, block.injection, projected, angles)


def after_attention(block: Block, x: Tensor, y: Tensor) -> Tensor:
    """x (B, T, D) after attention's output y (B, H, T, K) and the MLP."""
    x = x + block.attention.out(y.transpose(1, 2).flatten(2))
    return x + block.mlp(rms(x))


class LatentRecurrentTransformer(nn.Module):
    """A decoder-only transformer whose tokens read a high-layer state of the token before them.

    Called, it computes some positions from a State: `forward`. With `MemoryConfig(injection="none")` it is a plain
    Transformer.
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

    def __repr__(self) -> str:
        """One line. The tree of modules is `torch.nn.Module.__repr__(model)`."""
        total = sum(weight.numel() for weight in self.parameters())
        return f"LatentRecurrentTransformer({total:,} parameters, {self.config!r})"

    @torch.no_grad()
    def reset(self) -> None:
        """Initial values (nanochat's): unit embeddings, uniform inputs, zero outputs; gates at 1.

        With zero outputs every block starts by passing the stream on, and with a small head all tokens start alike.
        """
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
        # A thought belongs to its token's document, and knows its token.
        documents, tokens = (
            None if x is None else x.repeat_interleave(config.positions_per_token, 1) for x in (documents, tokens)
        )
        return states.empty_state(
            config.kv_layers,
            (config.num_kv_heads, config.head_dim),
            (len(config.stored_sources), config.width),
            batch,
            slots * config.positions_per_token,
            documents,
            tokens,
            config.unlimited_context,
            device=weight.device,
            dtype=weight.dtype,
        )

    def forward(
        self,
        tokens: Tensor,
        positions: Positions,
        state: AnyState,
        blocks: range | None = None,
        stream: Tensor | None = None,
    ) -> tuple[Tensor, AnyState]:
        """Compute these positions from what the state knows, and replace what it knows of them.

        tokens (B, T) int; positions: a range, or ints (T,) or (B, T). Returns the final hidden state (B, T, D) of
        these positions, after the last RMSNorm, and the new State. Raises ValueError where sizes do not match, the
        state has no slot for a position, or it is another model's.

        blocks: run only these applications of blocks, counted from 0, loop after loop: from `stream` (B, T, D), the
        residual stream before the first of them, where that is not the first of all. Where they end early, what comes
        back is the residual stream behind the last of them. Keys and values of other blocks stay what they were, and
        so does the memory unless all remembered layers are among them (`ModelConfig.memory_blocks`).
        """
        positions = as_positions(positions)  # a range where the tensor is one: the State's fast path
        if isinstance(positions, Tensor):
            positions = positions.to(tokens.device)
        self._check(tokens, positions, state)
        blocks = range(self.config.kv_layers) if blocks is None else blocks
        per_token, hidden = self.config.positions_per_token, None
        assert per_token == 1 or blocks == range(self.config.kv_layers), "latent thoughts run whole"
        for number in range(per_token):  # the token itself, then its thoughts, which stand in the embedding's place
            place = state_positions(positions, per_token, number)
            hidden, state = self._at(tokens, place, state, hidden, blocks, stream)
        assert hidden is not None
        return hidden, state

    def _at(
        self,
        tokens: Tensor,
        positions: Positions,
        state: AnyState,
        thought: Tensor | None,
        blocks: range,
        stream: Tensor | None,
    ) -> tuple[Tensor, AnyState]:
        """The blocks at positions of the State, on the tokens' embeddings or, in their place, on thought (B, T, D)."""
        # Before the memory is read: source 0 may be a token of this very call.
        state = state.write_tokens(positions, tokens)
        memory = self.recall(state, positions, self.embedding)
        x0 = rms(self.embedding(tokens)) if thought is None else thought
        angles = rotary(positions, self.config.head_dim, self.config.rope_base, x0)
        return self.run_blocks(TokenInputs(tokens, x0), memory, angles, positions, state, blocks, stream)

    def run_blocks(
        self,
        inputs: Inputs,
        memory: Tensor,
        angles: tuple[Tensor, Tensor],
        positions: Positions,
        state: AnyState,
        blocks: range | None = None,
        stream: Tensor | None = None,
    ) -> tuple[Tensor, AnyState]:
        """Run blocks with the memory (C, B, T, D), write the sources: what `forward` gives of them, and the new State.

        positions are the State's, of which a token with latent thoughts has several.
        """
        # After the memory was read, which is that of earlier passes; before attention, as a position sees itself.
        state = state.mark_written(positions)

        config = self.config
        blocks = range(config.kv_layers) if blocks is None else blocks
        # U m of all layers at once: the memory is known before the stack starts.
        if isinstance(self.projection, Projection):
            projected = self.projection(memory, config.layers_of(blocks))
        else:
            projected = self.projection(memory)
        visible = {window: state.visible(positions, window) for window in dict.fromkeys(config.windows)}
        channels = {own: pick_channels(memory, own) for own in dict.fromkeys(config.block_channels)}
        call = Call(inputs, angles, state.where(positions), state.write, state.execution)
        # Not x_0 itself. Given one tensor twice, the first block would be compiled apart from the others. And FSDP2's
        # hooks part the two: x_0's gradients would be added up in another order than in one process, which shows in
        # bfloat16; and a recomputed block, which has no hooks, would save other tensors than its forward did.
        x = inputs.x0.view_as(inputs.x0) if stream is None else stream
        outputs: dict[int, Tensor] = {}
        keys, values = list(state.keys), list(state.values)
        for i in blocks:
            layer = i % config.depth + 1  # counted from 1, as sources are; i counts loops, too, as caches do
            own = projected[layer - 1 if len(projected) > 1 else 0]
            read = channels[config.block_channels[layer - 1]]
            x, (keys[i], values[i]) = state.execution.block(
                self.blocks[layer - 1], x, inputs.x0, read, own, call, visible[config.windows[i]], (keys[i], values[i])
            )
            if layer in config.stored_sources:
                outputs[layer] = rms(x)  # of all loops the last one's stays

        state = state.write_cache(tuple(keys), tuple(values))
        if config.stored_sources and outputs.keys() >= set(config.stored_sources):
            state = state.write_memory(positions, torch.stack([outputs[s] for s in config.stored_sources], dim=2))
        if blocks[-1] + 1 < config.kv_layers:
            return x, state
        # The memory of the last layer is the final hidden state: the same vector.
        return outputs[config.depth] if config.depth in outputs else rms(x), state

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits (…, V) of hidden states (…, D), soft-capped."""
        cap = self.config.softcap
        return cap * torch.tanh(self.head(hidden) / cap)

    def shard_units(self) -> tuple[nn.Module, ...]:
        """The modules that FSDP2 gathers one at a time.

        Embedding and head are not among them: every pass needs both, at its start and its end, so that they would be
        whole nearly always.
        """
        return (*self.blocks, self.projection)

    def with_memory_reader(self, recall: nn.Module) -> LatentRecurrentTransformer:
        """This model, all parameters shared, reading its memory through `recall` (for ablations at test time)."""
        other = copy.copy(self)
        other._modules = {**self._modules, "recall": recall}  # a dict of its own: the copy shares this model's
        return other

    def _check(self, tokens: Tensor, positions: Positions, state: ModelState) -> None:
        """Wrong sizes are the caller's mistake and named.

        Positions on a GPU are not looked at, which would wait for it at every call: an indexing error is then its own.
        """
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
            len(config.stored_sources),
            config.width,
        )
        if state.shape != expected:
            raise ValueError("this state was made by another model; make one with model.empty_state(batch, slots)")
        if isinstance(positions, range) or positions.device.type == "cpu":
            ends = (positions[0], positions[-1]) if isinstance(positions, range) else positions.aminmax()
            if int(ends[0]) < 0:
                raise ValueError(f"position {int(ends[0])} is negative; positions count from 0")
            self._check_room(int(ends[1]), length, state)

    def _check_room(self, last: int, length: int, state: ModelState) -> None:
        """ValueError where the State has no slot for position `last`, or reuses one that this call still reads."""
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
        needed = length + self.config.lookback
        if needed > state.slots:
            raise ValueError(
                f"{length} positions at once need {needed} slots (window and delay included), the state has "
                f"{state.slots}; pass fewer at once or make a longer state"
            )


def pick_channels(memory: Tensor, channels: tuple[int, ...]) -> Tensor:
    """Of memory (C, B, T, D), which may lack the last channels, those of `channels`."""
    present = [channel for channel in channels if channel < memory.shape[0]]
    if present == list(range(memory.shape[0])):
        return memory
    first, count = (present[0], len(present)) if present else (0, 0)
    if present == list(range(first, first + count)):
        return memory[first : first + count]
    return memory[present]


def state_positions(positions: Positions, per_token: int, number: int) -> Positions:
    """The State's positions of tokens at `positions`, of which each has `per_token`: of them the one of this `number`,
    0 for the token itself, then its thoughts."""
    if per_token == 1:
        return positions
    if isinstance(positions, Tensor):
        return positions * per_token + number
    first, last = (p * per_token + number for p in (positions[0], positions[-1]))
    return range(first, last + 1, positions.step * per_token)
