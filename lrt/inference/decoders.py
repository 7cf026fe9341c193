"""Decoders: one token for each of several rows, at positions of their own. All give the numbers of `eager`.

    eager      the model itself: the reference
    fused      `lrt.inference.fused_step` over `lrt.inference.fused_weights`: fewer, larger matrix products, in place;
               eager for an injection that a user registered, whose products it does not know
    packed     the same over weights in oneDNN's layout: on a CPU, in float32
    compiled   fused, through torch.compile; on a GPU with static shapes, as CUDA graphs

A decoder owns a State of B rows. A call computes its first n rows; which rows those are is the caller's business. Its
buffers are a State's, so prefill, sessions and every decoder read what another wrote. Weights are copied when a decoder
is made: it does not see later training.

`fused` is the default, as it starts at once; `best` measures. `packed` is a mode of its own because one row is faster
in the layout of `fused`, and many rows are in oneDNN's (docs/log.md).

Shapes: B rows of the State, n of them in a call, D width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Sequence
from types import FunctionType

import torch
from torch import Tensor

from lrt.inference.fused_step import Buffers, buffers, logits, occupy, read_memory, step
from lrt.inference.fused_weights import (
    FusedWeights,
    Layout,
    can_fuse,
    fuse_weights,
    packed_layout,
    packs,
    transposed_layout,
)
from lrt.model.memory import MemoryReader
from lrt.model.state import State
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.utils import torch_private

BUCKET = 128
"""Where shapes are static (CUDA graphs), the slots in view are a power of two times this: few widths, so few graphs."""


class EagerDecoder:
    """The model itself, position by position."""

    name = "eager"

    def __init__(self, model: LatentRecurrentTransformer, state: State) -> None:
        """`state` holds B rows; its buffers are copied, and overwritten by calls."""
        self.model = model
        with torch.no_grad():  # buffers are ordinary tensors, whoever reads them later
            self.state = state.in_place()

    @classmethod
    def covers(cls, model: LatentRecurrentTransformer) -> bool:
        """Whether this decoder takes such a model; one that does not raises ValueError when it is made."""
        return True

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, positions: Sequence[int]) -> Tensor:
        """The final hidden state (n, D) of tokens (n,) int, row b at positions[b], behind all that the row holds."""
        count, first = len(positions), positions[0]
        state = rows_of(self.state, count)
        if all(p == first for p in positions):  # a range: the State's fast path
            hidden, after = self.model(tokens.unsqueeze(1), range(first, first + 1), state)
            if count == self.state.batch:  # the same buffers, and what Python now knows of all rows (`written_until`)
                self.state = after
            return hidden.squeeze(1)
        at = torch.tensor(positions, device=tokens.device).unsqueeze(1)
        hidden, _ = self.model(tokens.unsqueeze(1), at, state)
        return hidden.squeeze(1)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits (n, V) of hidden states (n, D)."""
        return self.model.logits(hidden)


class FusedDecoder(EagerDecoder):
    """The flat step over fused weights: a decoded token is a few large products, written into the State in place."""

    name = "fused"

    def __init__(self, model: LatentRecurrentTransformer, state: State) -> None:
        super().__init__(model, state)
        self.weights = fuse_weights(model, self.layout(self.state.batch))
        self.buffers = buffers(self.state)
        # A reader of another kind (an ablation) is called.
        self.read = self.read_buffers if type(model.recall) is MemoryReader else self.ask_reader
        self.slides = any(w is not None for w in model.config.windows)

    @classmethod
    def covers(cls, model: LatentRecurrentTransformer) -> bool:
        return can_fuse(model)

    def layout(self, rows: int) -> Layout:
        """The layout of the weights for steps of so many rows."""
        return transposed_layout

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, positions: Sequence[int]) -> Tensor:
        first, last = min(positions), max(positions)
        slots, per_token = self.state.slots, self.model.config.positions_per_token
        if last >= slots // per_token and not self.state.reusable:
            raise ValueError(f"position {last} exceeds the {slots // per_token} slots of this state; make a longer one")
        at = torch.tensor(positions, device=tokens.device)
        # All rows at one position, nothing slides: every slot up to it is visible, and no mask is needed.
        everything = first == last < slots and not self.slides and self.state.documents is None
        hidden = self.run(tokens, at * per_token, min(last * per_token + 1, slots), everything, None)
        for thought in range(1, per_token):
            hidden = self.run(tokens, at * per_token + thought, last * per_token + thought + 1, everything, hidden)
        return hidden

    def run(self, tokens: Tensor, positions: Tensor, width: int, everything: bool, thought: Tensor | None) -> Tensor:
        """One position of the State for each row, on the tokens' embeddings or, in their place, on thought (n, D).

        width: the slots in view are 0 … width - 1; everything: all of them are visible to every row.
        """
        view = torch.arange(width, device=tokens.device)
        memory = self.read(tokens, positions)
        place = occupy(self.weights, self.buffers, positions, view, everything)
        return step(self.weights, self.buffers, memory, tokens, place, thought)

    def read_buffers(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """The memory (C, n, D) that `positions` (n,) read."""
        return read_memory(self.weights, self.buffers, positions)

    def ask_reader(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """The same from a reader of another kind (an ablation), which wants a State."""
        state, values = rows_of(self.state, len(tokens)), set(positions.tolist())
        at = range(min(values), max(values) + 1) if len(values) == 1 else positions.unsqueeze(1)
        return self.model.recall(state, at, self.model.embedding).squeeze(2)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        return logits(self.weights, hidden)


class PackedDecoder(FusedDecoder):
    """The flat step over weights in oneDNN's layout, faster for many rows. ValueError but for float32 on a CPU."""

    name = "packed"

    def __init__(self, model: LatentRecurrentTransformer, state: State) -> None:
        if not packs(model):
            raise ValueError(f"mode='packed' needs float32 on a CPU; this is {model.embedding.weight.dtype}")
        super().__init__(model, state)

    def layout(self, rows: int) -> Layout:
        return packed_layout(rows)

    @classmethod
    def covers(cls, model: LatentRecurrentTransformer) -> bool:
        return packs(model) and can_fuse(model)


class CompiledDecoder(FusedDecoder):
    """The flat step as one compiled graph, tokens in, hidden states out. The first calls compile: a minute on a CPU.

    On a CPU the number of slots in view is a dynamic size. On a GPU widths are few static ones, recorded as CUDA
    graphs. Batches are not padded: each number of rows has graphs of its own. ValueError for a model whose memory
    reader is replaced.
    """

    name = "compiled"

    def __init__(self, model: LatentRecurrentTransformer, state: State) -> None:
        super().__init__(model, state)
        if not self.covers(model):
            raise ValueError(
                "a model whose recall is replaced (an ablation, or a combination that a user registered) is not "
                "compiled; decode it with mode='fused'"
            )
        self.static = model.embedding.weight.device.type == "cuda"
        self.graph = torch.compile(
            with_own_code(full_step), fullgraph=True, mode="reduce-overhead" if self.static else None
        )
        self.compiled: set[tuple[int, bool, bool, bool, int, bool]] = set()
        """Kinds of steps that were run: what makes torch compile anew (rows, mask, sizes that it specialises on, …)."""
        if self.static:  # CUDA graphs read and write these where they are, without copies
            for tensor in tensors_of(self.weights, self.buffers):
                torch_private.mark_static_address(tensor)

    @classmethod
    def covers(cls, model: LatentRecurrentTransformer) -> bool:
        return type(model.recall) is MemoryReader and can_fuse(model)

    def run(self, tokens: Tensor, positions: Tensor, width: int, everything: bool, thought: Tensor | None) -> Tensor:
        if self.static:  # few shapes: a graph for each
            width = min(bucket(width), self.state.slots)
            everything = False  # the rounded width has slots that nothing is written in
            torch.compiler.cudagraph_mark_step_begin()
        view = torch.arange(width, device=tokens.device)
        if not self.static:
            torch_private.mark_maybe_dynamic(view, 0)
        arguments = (self.weights, self.buffers, tokens, positions, view, everything, thought)
        # A dynamic size has one graph, but torch makes others where it is 1 and where the view is all slots.
        whole_view, static_width = width == self.state.slots, width if self.static else 0
        kind = (len(tokens), everything, width == 1, whole_view, static_width, thought is None)
        if kind in self.compiled:
            hidden = self.graph(*arguments)
        else:  # may compile: each kind of step has a graph of its own, which torch's limit (8) is not to stop
            with torch_private.recompile_limit(len(self.compiled) + 8):
                hidden = self.graph(*arguments)
            self.compiled.add(kind)
        return hidden.clone() if self.static else hidden  # the next run overwrites the graph's own memory


def full_step(
    p: FusedWeights,
    b: Buffers,
    tokens: Tensor,
    positions: Tensor,
    view: Tensor,
    everything: bool,
    thought: Tensor | None,
) -> Tensor:
    """A step from tokens to hidden states: what is compiled."""
    memory = read_memory(p, b, positions)
    place = occupy(p, b, positions, view, everything)
    return step(p, b, memory, tokens, place, thought)


def with_own_code(function: FunctionType) -> FunctionType:
    """A copy with a code object of its own: torch counts recompilations per code object, over all models."""
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(COUNTER)}")
    return FunctionType(code, function.__globals__)


COUNTER = itertools.count()
MODES: dict[str, type[EagerDecoder]] = {
    kind.name: kind for kind in (EagerDecoder, FusedDecoder, PackedDecoder, CompiledDecoder)
}
"""By name. To add one, subclass `EagerDecoder` and give it a place here; the tests hold it against the oracle."""


def decoder(
    model: LatentRecurrentTransformer, state: State, mode: str = "fused", candidates: Sequence[str] = ()
) -> EagerDecoder:
    """A decoder for a State, whose buffers it copies.

    mode: a name in MODES; or `best`, which times `candidates` (all by default) here, on copies, and takes the fastest.
    Raises ValueError where there is no such mode, or where it does not take this model.
    """
    if mode not in MODES and mode != "best":
        raise ValueError(f"unknown mode {mode!r}; choose one of {', '.join(MODES)} or best")
    if mode == "best":
        mode = fastest(model, state, candidates or tuple(MODES))
    if mode == "fused" and not FusedDecoder.covers(model):
        mode = "eager"
    return MODES[mode](model, state)


def fastest(model: LatentRecurrentTransformer, state: State, candidates: Sequence[str], steps: int = 8) -> str:
    """The name of the mode that decodes all rows of such a State fastest, each by its best of `steps` steps."""
    seconds: dict[str, float] = {}
    for name in candidates:
        if not MODES[name].covers(model):
            continue
        trial = MODES[name](model, model.empty_state(state.batch, state.slots))
        tokens = torch.zeros(state.batch, dtype=torch.long, device=state.tokens.device)
        spent = []
        for position in range(min(state.slots, steps + 4)):  # the first ones may compile; the best is taken
            begin = time.perf_counter()
            trial.logits(trial(tokens, [position] * state.batch)).sum().item()  # a number, so that a GPU is waited for
            spent.append(time.perf_counter() - begin)
        seconds[name] = min(spent)
    return min(seconds, key=lambda name: seconds[name])


def rows_of(state: State, count: int) -> State:
    """The first rows of a State, sharing its buffers."""
    if count == state.batch:
        return state
    return dataclasses.replace(
        state,
        keys=tuple(k[:count] for k in state.keys),
        values=tuple(v[:count] for v in state.values),
        memory=state.memory[:count],
        tokens=state.tokens[:count],
        slot_positions=state.slot_positions[:count],
        documents=None if state.documents is None else state.documents[:count],
    )


def bucket(width: int) -> int:
    """The next power of two times BUCKET."""
    return BUCKET * 2 ** max(0, (width - 1) // BUCKET).bit_length()


def tensors_of(*parts: object) -> list[Tensor]:
    """All tensors in nested tuples (named ones, too): what CUDA graphs may read where it is."""
    tensors: list[Tensor] = []
    for part in parts:
        if isinstance(part, Tensor):
            tensors.append(part)
        elif isinstance(part, tuple):
            tensors.extend(tensors_of(*part))
    return tensors
