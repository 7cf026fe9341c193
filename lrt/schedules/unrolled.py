"""Exact sequential passes in constant time per position: the recurrence unrolled, some positions to a compiled graph.

Shapes: B batch, T positions, C positions of a chunk, D width, G key/value heads, K head size.

`refine(model, tokens, sequential())` is the reference: it calls the model once per position, through a State that
grows with the sequence. A small model then spends its time in launching operations. Here C positions are one function
of (chunk, State), compiled once, which runs the model's own blocks over a `RollingState`. That has one size from the
second chunk on, so that two graphs serve any length, and a stream takes constant memory. A test in float64 holds values
and gradients against `refine`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from lrt.model.execution import EAGER, Execution
from lrt.model.layers import rms, rotary
from lrt.model.memory import MemoryReader
from lrt.model.rolling_state import RollingState
from lrt.model.transformer import Block, LatentRecurrentTransformer

CHUNK = 8
"""Positions of a compiled graph: more compile longer, and gain little."""
Angles = tuple[Tensor, Tensor]
Rows = tuple[tuple[Tensor, ...], ...]
"""Of each block, the rows that its value embedding looked up."""
NEXT = range(1)
"""The positions of a call over a RollingState: one, and the state does not ask which (`rotary` has its angles)."""


@dataclass(frozen=True)
class LookedUp:
    """Inputs whose tables were read before: compiled, the lookups' gradients are added up in an order that changes."""

    x0: Tensor
    rows: tuple[tuple[Block, tuple[Tensor, ...]], ...]
    """Each block with its rows."""

    def value_rows(self, block: Block) -> tuple[Tensor, ...]:
        return next(rows for other, rows in self.rows if other is block)


def reason_uncovered(model: LatentRecurrentTransformer) -> str | None:
    """Why this module does not compute such a model; None where it does."""
    config = model.config
    if type(model.recall) is not MemoryReader:
        return "a model whose memory reader is replaced (an ablation)"
    if config.forwards > 1:
        return f"{config.loops} loops and {config.thoughts} thoughts: it needs one forward per token"
    if not config.sources or 0 in config.sources or set(config.delays) != {1}:
        return f"memory sources {config.sources} at delay {config.memory.delay}: it needs sources >= 1 at delay 1"
    # Windows are full after one chunk: from the second on a State has its final size, and the graph its shapes.
    if not config.unlimited_context or max(w or 0 for w in config.windows) - 1 > CHUNK:
        return f"windows {config.windows}: every layer must slide over at most {CHUNK + 1} positions"
    return None


def empty_carry(model: LatentRecurrentTransformer, batch: int) -> RollingState:
    """The State before the first position of `batch` rows. ValueError where the model is not covered."""
    reason = reason_uncovered(model)
    if reason is not None:
        raise ValueError(f"exact passes in chunks do not cover {reason}; use refine with sequential()")
    return RollingState.of(model.empty_state(batch, 1), model.config.windows)


def over(
    model: LatentRecurrentTransformer, tokens: Tensor, backprop: int | None = None, execution: Execution = EAGER
) -> Tensor:
    """The hidden states (B, T, D) that `refine(model, tokens, sequential(backprop))` gives, with their gradients.

    ValueError where the model is not covered (`reason_uncovered`).
    """
    state, hidden = empty_carry(model, tokens.shape[0]), []
    for part in tokens.split(tokens.shape[1] if backprop is None else backprop, dim=1):
        out, state = run_chunks(model, part, state, execution)
        state = state if backprop is None else state.detach_memory()
        hidden.append(out)
    return torch.cat(hidden, dim=1)


def run_chunks(
    model: LatentRecurrentTransformer, tokens: Tensor, state: RollingState, execution: Execution = EAGER
) -> tuple[Tensor, RollingState]:
    """The final hidden states (B, T, D) of tokens (B, T) behind `state`, and what is carried on."""
    hidden = []
    for part in tokens.split(CHUNK, dim=1):
        positions = range(state.position, state.position + part.shape[1])
        x0 = rms(model.embedding(part))
        rows = tuple(block.attention.value_embedding.look_up(part) for block in model.blocks)  # type: ignore[union-attr]
        angles = rotary(positions, model.config.head_dim, model.config.rope_base, x0)
        arguments = (model, x0, rows, angles, state.memory, state.keys, state.values, state.tokens)
        out, memory, keys, values = execution.function(chunk)(*arguments)
        hidden.append(out)
        state = dataclasses.replace(state, memory=memory, keys=keys, values=values, position=positions.stop)
    return torch.cat(hidden, dim=1), state


def chunk(
    model: LatentRecurrentTransformer,
    x0: Tensor,
    rows: Rows,
    angles: Angles,
    memory: Tensor,
    keys: tuple[Tensor, ...],
    values: tuple[Tensor, ...],
    tokens: Tensor,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """C positions in order, from embeddings x0 (B, C, D), rows of value embeddings, angles, and a State's tensors.

    A State goes in and comes out as its tensors: its position is a number that changes, and would be another graph.
    """
    hidden = []
    windows = tuple(w or 0 for w in model.config.windows)
    # All fields are named: the compiler does not find the defaults of a dataclass.
    state = RollingState(keys, values, memory, tokens, windows, 0, EAGER, None, True)
    for i in range(x0.shape[1]):
        here = slice(i, i + 1)
        looked_up = tuple(
            (block, tuple(table[:, here] for table in layer)) for block, layer in zip(model.blocks, rows, strict=True)
        )
        inputs = LookedUp(x0[:, here], looked_up)  # type: ignore[arg-type]
        read = model.recall(state, NEXT, model.embedding)
        out, state = model.run_blocks(inputs, read, (angles[0][here], angles[1][here]), NEXT, state)
        hidden.append(out)
    return torch.cat(hidden, dim=1), state.memory, state.keys, state.values
