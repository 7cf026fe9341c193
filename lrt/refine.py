"""Run a schedule: for each pass, call the model on its positions.

Training, exact scoring, prefill and decoding are the same thing: a list of position sets, and one function.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lrt.model.state import State, write_copy
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.schedules import Pass, Schedule


@dataclass(frozen=True)
class Refined:
    """What a schedule leaves behind."""

    hidden: Tensor
    """(B, T, D): each position by the last pass that computed it."""
    state: State
    passes: tuple[tuple[Pass, Tensor, Tensor], ...]
    """(pass, its positions (n,), its hidden states (B, n, D)), in order."""


def refine(
    model: LatentRecurrentTransformer,
    tokens: Tensor,
    schedule: Schedule,
    documents: Tensor | None = None,
    state: State | None = None,
) -> Refined:
    """Run `schedule` over tokens (B, T).

    documents (B, T) int says which packed document each token belongs to. With a `state`, the tokens continue behind
    what it holds; its own documents serve. A mixture or stages without a step are drawn (`schedule.drawn`).
    """
    batch, length = tokens.shape
    if length == 0:
        raise ValueError("there are no tokens; give at least one position (a BOS token will do)")
    if state is not None and documents is not None:
        raise ValueError("documents come with an empty state; make it with model.empty_state(batch, slots, documents)")
    offset = 0
    if state is not None:
        offset = state.length
        if bool((state.lengths != offset).any()):
            raise ValueError(
                f"the state's rows have lengths {state.lengths.tolist()}; refine continues rows of one length"
            )
    current = model.empty_state(batch, length, documents, tokens) if state is None else state
    ran: list[tuple[Pass, Tensor, Tensor]] = []
    for p in schedule.drawn().passes(length):
        positions = range(p.start + offset, p.stop + offset, p.stride)
        with torch.set_grad_enabled(p.grad and torch.is_grad_enabled()):
            hidden, current = model(tokens[:, p.slice], positions, current)
        if p.detach_memory:
            current = current.detach_memory()
        ran.append((p, torch.arange(p.start, p.stop, p.stride), hidden))
    return Refined(last_written(ran, length), current, tuple(ran))


def last_written(ran: list[tuple[Pass, Tensor, Tensor]], length: int) -> Tensor:
    """(B, T, D): each position from the last pass that computed it."""
    needed, missing = [], set(range(length))
    for p, _, hidden in reversed(ran):
        if missing.isdisjoint(p.positions):
            continue
        missing.difference_update(p.positions)
        needed.append((p, hidden))
        if not missing:
            break
    assert not missing, "a schedule left positions uncomputed"
    (first, hidden), *_ = needed
    if len(needed) == 1 and first.positions == range(length):
        return hidden
    if all(len(p.positions) == 1 for p, _ in needed):  # sequential: one concatenation, not T copies
        return torch.cat([h for _, h in sorted(needed, key=lambda entry: entry[0].start)], dim=1)
    whole = hidden.new_zeros(hidden.shape[0], length, hidden.shape[2])
    for p, part in reversed(needed):
        whole = write_copy(whole, p.slice, part, 1)
    return whole
