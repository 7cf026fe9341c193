"""Run a schedule: for each pass, call the model on its positions.

Training, exact scoring, prefill and decoding are the same thing: a list of position sets, and one function.

`refine` runs all passes and keeps them; `walk` gives one at a time. A training step takes `walk` and lets go of what it
does not score.

Shapes: B batch, T positions, n positions of a pass, D width.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lrt.model.buffers import write_copy
from lrt.model.execution import WHOLE, Execution
from lrt.model.state import State
from lrt.model.strided_state import StridedState
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.schedules.base import Pass, Schedule
from lrt.schedules.work import common_stride, parts_of

Ran = tuple[Pass, Tensor, Tensor]
"""(pass, its positions (n,), its hidden states (B, n, D); those of a pass that ended early are (B, 0, D))."""


@dataclass(frozen=True)
class Refined:
    """What a schedule leaves behind."""

    passes: tuple[Ran, ...]
    """In order."""
    length: int
    """T."""
    last: State | StridedState
    """What the last pass left, in the form that it ran on."""

    # Training asks for neither of these, which copy. So they are made when asked for.

    @functools.cached_property
    def hidden(self) -> Tensor:
        """(B, T, D): each position by the last pass that computed it."""
        return last_written(list(self.passes), self.length)

    @functools.cached_property
    def state(self) -> State:
        """The general State, to continue from or to decode behind."""
        return self.last if isinstance(self.last, State) else self.last.whole()


def refine(
    model: LatentRecurrentTransformer,
    tokens: Tensor,
    schedule: Schedule,
    documents: Tensor | None = None,
    state: State | None = None,
    execution: Execution = WHOLE,
) -> Refined:
    """Run `schedule` over tokens (B, T).

    documents (B, T) int says which packed document each token belongs to. With a `state`, the tokens continue behind
    its last position; its own documents serve. A mixture or stages without a step are drawn (`schedule.draw`).
    `execution` says how it is computed, not what. By default all passes run whole; with `blocks="needed"` those that
    only the memory is wanted of end early, and have no hidden states.

    Raises ValueError without tokens, with `documents` beside a `state`, and where the state's rows differ in length or
    its slots do not suffice.
    """
    ran: list[Ran] = []
    last: State | StridedState | None = None
    for p, hidden, current in walk(model, tokens, schedule, documents, state, execution):
        ran.append((p, torch.arange(p.start, p.stop, p.stride), hidden))
        last = current
    assert last is not None
    return Refined(tuple(ran), tokens.shape[1], last)


def walk(
    model: LatentRecurrentTransformer,
    tokens: Tensor,
    schedule: Schedule,
    documents: Tensor | None = None,
    state: State | None = None,
    execution: Execution = WHOLE,
) -> Iterator[tuple[Pass, Tensor, State | StridedState]]:
    """The passes of `refine`, one after another: (pass, its hidden states (B, n, D), the State it left).

    A pass that ends early gives (B, 0, D) for hidden states.

    For callers that do not want all of them at once: of a pass that was let go of, only what later passes read stays.
    ValueErrors as in `refine`, at the first pass.
    """
    batch, length = tokens.shape
    if length == 0:
        raise ValueError("there are no tokens; give at least one position (a BOS token will do)")
    if state is not None and documents is not None:
        raise ValueError("documents come with an empty state; make it with model.empty_state(batch, slots, documents)")
    offset, per_token = 0, model.config.positions_per_token
    if state is not None:
        offset = state.length // per_token  # a State counts positions, a pass tokens
        if bool((state.lengths != state.length).any()):
            raise ValueError(
                f"the state's rows have lengths {state.lengths.tolist()}; refine continues rows of one length"
            )
    passes = schedule.draw().passes(length)
    current: State | StridedState
    if state is None:
        current = initial_state(model.empty_state(batch, length, documents, tokens), passes, execution, per_token)
    else:
        current = dataclasses.replace(state, execution=execution)
    common: Tensor | None = None  # (B, T, D): the residual stream that passes start from which share their first blocks
    for part in parts_of(model.config, passes, execution, strided=isinstance(current, StridedState)):
        p, blocks, hidden = part.p, part.blocks, no_hidden(model, batch)
        if blocks:  # none where source 0 alone is remembered: the memory is known without a pass
            positions = range(p.start + offset, p.stop + offset, p.stride)
            stream = common[:, p.slice] if blocks.start and common is not None else None
            with torch.set_grad_enabled(part.grad and torch.is_grad_enabled()):
                hidden, current = execution.whole_pass(model, tokens[:, p.slice], positions, current, blocks, stream)
        if not part.ends:
            common = hidden
            continue
        if blocks.stop < model.config.kv_layers:
            hidden = no_hidden(model, batch)
        if p.detach_memory:
            current = current.detach_memory()
        yield p, hidden, current
        del hidden  # the next pass runs without it


def no_hidden(model: LatentRecurrentTransformer, batch: int) -> Tensor:
    """(B, 0, D): what a pass that ended early has computed of the final hidden states."""
    return model.embedding.weight.new_zeros(batch, 0, model.config.width)


def initial_state(
    empty: State, passes: Sequence[Pass], execution: Execution, per_token: int = 1
) -> State | StridedState:
    """The State to run `passes` from: by residue classes where all of them are such, else the general one.

    `per_token` positions of the State are one of `passes`' (`ModelConfig.positions_per_token`).
    """
    stride = common_stride(passes, empty.slots // per_token)
    # With latent thoughts a full pass is itself run as classes, of stride `per_token`; a strided one would need two.
    if stride is None or (stride > 1 and per_token > 1):
        return dataclasses.replace(empty, execution=execution)
    return StridedState.of(empty, stride * per_token, execution)


def last_written(ran: list[tuple[Pass, Tensor, Tensor]], length: int) -> Tensor:
    """(B, T, D): each position from the last pass that computed it."""
    needed, missing = [], set(range(length))  # from the last pass backwards, until every position has its writer
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
    for p, part in reversed(needed):  # in their order: later passes overwrite
        whole = write_copy(whole, p.slice, part, 1)
    return whole
