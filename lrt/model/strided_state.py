"""StridedState: a State for training, where every pass is the full range or a residue class r::S.

Shapes: B batch, T positions of a row, n queries and m keys of a class, S classes, H query heads, G key/value heads,
K head size, P remembered sources, D width.

A State copies a buffer to replace some of its slots, and attends through a mask. Here keys, values and memory are kept
as S classes of positions, each in the tensor of the pass that wrote it last: a pass *replaces* one class (or all), and
nothing is copied. Query i of class a is position a + iS, key j of class b is b + jS; so it sees keys j <= i where
b <= a and keys j <= i - 1 where b > a: each pair of classes is plain causal attention, shifted by one or not.

`refine` takes it where a schedule's passes allow (`common_stride`); chunked, sequential and too many classes keep the
general State. The model does not know: it asks both for the same things, and what `visible` gives attends by itself.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lrt.model.attention_pieces import AttentionPiece, Repeat
from lrt.model.blockwise_attention import attend
from lrt.model.buffers import write_copy
from lrt.model.execution import EAGER, Execution
from lrt.model.state import State, extend
from lrt.model.state_protocol import MemoryRead, Positions
from lrt.model.visibility import additive, visible_keys

TILE = 128
"""Queries and keys of the smallest triangle, on CPUs. Their kernel computes 512 keys at a time, also those that a
causal mask then hides; with 64 there is less of that, in products that run at a lower rate (docs/log.md)."""
QUERIES, KEYS = 256, 1024
"""Largest mask: windows and documents are attended in blocks of so many queries and keys, whose masks are made when
needed."""


@dataclass(frozen=True)
class Held:
    """One class's keys, values or memory, in a tensor of its own or in that of a pass over all positions."""

    tensor: Tensor
    """Keys or values (B, G, m, K), memory (B, m, P, D); T for m where it is `whole`."""
    whole: bool
    """Whether the tensor has all positions, of which this class is residue::S."""

    def of(self, residue: int, stride: int, dim: int) -> Tensor:
        """This class alone, as a view; `dim` is the dimension of positions."""
        if not self.whole:
            return self.tensor
        return self.tensor[(slice(None),) * dim + (slice(residue, None, stride),)]


Classes = tuple[Held | None, ...]
"""One per residue; None where nothing is written."""


@dataclass(frozen=True)
class Pieces:
    """What one layer's queries attend to."""

    pieces: tuple[AttentionPiece, ...]
    """In an order in which the first ones reach every query, as `attend` wants."""
    sources: tuple[int, ...]
    """The class whose tensor is source 0, 1, … of the pieces."""

    def attend(self, q: Tensor, keys: Classes, values: Classes) -> Tensor:
        """Softmax attention (B, H, n, K) of q (B, H, n, K)."""
        pairs = [(k, v) for i in self.sources if (k := keys[i]) is not None and (v := values[i]) is not None]
        return attend(q, [k.tensor for k, _ in pairs], [v.tensor for _, v in pairs], self.pieces)


@dataclass(frozen=True)
class ClassVisibility:
    """What one pass's queries see, in layers that may hold their classes differently: blocks that passes share keep a
    full pass's keys, others those of each class."""

    state: StridedState
    positions: range
    window: int | None
    known: dict[tuple[bool | None, ...], Pieces]
    """By how a layer holds its classes."""

    def attend(self, q: Tensor, keys: Classes, values: Classes) -> Tensor:
        """Softmax attention (B, H, n, K) of q (B, H, n, K)."""
        holding = tuple(None if held is None else held.whole for held in keys)
        if holding not in self.known:
            self.known[holding] = self.state.pieces(self.positions, self.window, keys)
        return self.known[holding].attend(q, keys, values)


@dataclass(frozen=True)
class StridedState:
    """What passes over full ranges and residue classes r::S leave behind, for B rows of T positions."""

    tokens: Tensor
    """(B, T) int."""
    documents: Tensor | None
    """(B, T) int, or None where a row is one document."""
    stride: int
    """S."""
    shape: tuple[int, ...]
    """(layers, G, K, P, D), as State's."""
    nothing: Tensor
    """(B, 0, P, D): memory of no position, for its type and device."""
    keys: tuple[Classes, ...]
    """Per layer; tensors (B, G, n, K)."""
    values: tuple[Classes, ...]
    """Likewise."""
    memory: Classes
    """Tensors (B, n, P, D)."""
    execution: Execution = EAGER
    reusable: bool = False
    """A slot is its position."""

    @classmethod
    def of(cls, state: State, stride: int, execution: Execution = EAGER) -> StridedState:
        """From an empty State, whose slots are the positions."""
        empty: Classes = (None,) * stride
        layers = (empty,) * len(state.keys)
        nothing = state.memory[:, :0]
        return cls(state.tokens, state.documents, stride, state.shape, nothing, layers, layers, empty, execution)

    @property
    def batch(self) -> int:
        return self.tokens.shape[0]

    @property
    def slots(self) -> int:
        return self.tokens.shape[1]

    def where(self, positions: Positions) -> range:
        """A class is its own place: `write` replaces it as a whole."""
        assert isinstance(positions, range)
        return positions

    # --- reading and writing -----------------------------------------------------------------------------------

    def write_tokens(self, positions: Positions, tokens: Tensor) -> StridedState:
        """Nothing: all tokens are known from the start."""
        return self

    def mark_written(self, positions: Positions) -> StridedState:
        """Nothing: what is written is what is there."""
        return self

    def write(self, classes: Classes, slots: range, new: Tensor, dim: int) -> Classes:
        """These classes with those of `slots`, the full range or one class, replaced by `new`: nothing is copied."""
        if slots.step == 1:
            return (Held(new, whole=True),) * self.stride
        replacement = Held(new, whole=False)
        return tuple(replacement if residue == slots.start else old for residue, old in enumerate(classes))

    def write_cache(self, keys: tuple[Classes, ...], values: tuple[Classes, ...]) -> StridedState:
        """The same with the layers' classes that a call has written."""
        return dataclasses.replace(self, keys=keys, values=values)

    def write_memory(self, positions: Positions, memory: Tensor) -> StridedState:
        """Replace the memory (B, n, P, D) of these positions."""
        return dataclasses.replace(self, memory=self.write(self.memory, self.where(positions), memory, 1))

    def detach_memory(self) -> StridedState:
        """The same, with the gradient through the memory cut."""
        cut = tuple(
            None if held is None else dataclasses.replace(held, tensor=held.tensor.detach()) for held in self.memory
        )
        return dataclasses.replace(self, memory=cut)

    def read_memory(self, positions: Positions, delay: int) -> MemoryRead:
        """What stands `delay` positions before each of `positions`."""
        assert isinstance(positions, range)
        n, step = len(positions), positions.step
        # Position start + i·step reads start - delay + i·step, which is entry i - shift of the class `residue`. With
        # stride 2 and delay 1, class 1 reads class 0 unshifted, and class 0 reads class 1 shifted by one.
        residue = (positions.start - delay) % step
        shift = (residue + delay - positions.start) // step
        inside = torch.arange(n, device=self.tokens.device) >= shift
        inside = inside.expand(self.batch, n)
        tokens = shift_back(self.tokens[:, residue::step], n, shift)
        if self.documents is not None:
            before = shift_back(self.documents[:, residue::step], n, shift)
            inside = inside & (self.documents[:, positions.start :: step] == before)
        memory, written = self._memory_of(residue, step)
        return MemoryRead(
            tokens,
            shift_back(memory, n, shift),
            inside & shift_back(written.unsqueeze(0), n, shift),
            inside,
            nowhere_written=self.execution.blocks == "needed" and all(held is None for held in self.memory),
        )

    def _memory_of(self, residue: int, step: int) -> tuple[Tensor, Tensor]:
        """Memory (B, m, P, D) of a class, or of all positions, and which of it (m,) is written."""
        classes = self.memory if step == 1 else (self.memory[residue],)
        written = torch.tensor([held is not None for held in classes], device=self.tokens.device)
        m = len(range(residue, self.slots, step))
        written = written.repeat(-(-m // len(classes)))[:m]  # class by class, as positions go
        if step == 1:
            return self._buffer(self.memory, 1, self.shape[-2:]), written
        held = self.memory[residue]
        if held is None:
            return self._buffer((None,), 1, self.shape[-2:])[:, :m], written
        return held.of(residue, step, 1), written

    # --- attention ---------------------------------------------------------------------------------------------

    def visible(self, positions: Positions, window: int | None) -> ClassVisibility:
        """Position p sees written positions <= p of its own document, within the window."""
        assert isinstance(positions, range)
        return ClassVisibility(self, positions, window, {})

    def pieces(self, positions: range, window: int | None, classes: Classes) -> Pieces:
        """What queries at `positions` attend to in a layer whose keys are held as `classes`, their own class aside."""
        own, step = positions.start, positions.step
        if step == 1:
            return Pieces(tuple(self._pieces(positions, 0, 1, 0, False, window)), (0,))
        # The own class first: its pieces reach every query.
        sources, pieces = [own], list(self._pieces(positions, own, step, 0, False, window))
        whole: int | None = None  # the source that is a full pass's tensor: one for all classes that it still holds
        for residue, held in enumerate(classes):
            if held is None or residue == own or residue >= self.slots:
                continue
            if not held.whole or whole is None:
                sources.append(residue)
            source = len(sources) - 1
            if held.whole:
                whole = source = source if whole is None else whole
            pieces += self._pieces(positions, residue, step, source, held.whole, window)
        return Pieces(tuple(pieces), tuple(sources))

    def _pieces(
        self, positions: range, residue: int, step: int, source: int, whole: bool, window: int | None
    ) -> Iterator[AttentionPiece]:
        """The pieces of one class's keys, as entries of the class's own tensor or of the whole one.

        Without windows and documents triangles and rectangles, which need no mask; else blocks with one.
        """
        behind = 1 if residue > positions.start else 0  # query i sees keys up to i - behind
        n, m = len(positions), len(range(residue, self.slots, step))
        where = functools.partial(entries, residue, step) if whole else slice
        if self.documents is None and (window is None or window > positions[-1]):
            tile = TILE if self.tokens.device.type == "cpu" else n  # CUDA's kernels skip what is masked
            for piece in triangle(n, m, behind, tile):
                keys = where(piece.keys.start, piece.keys.stop)
                yield dataclasses.replace(piece, source=source, keys=keys)
            return
        for first in range(0, n, QUERIES):
            rows = slice(first, min(first + QUERIES, n))
            stop = min(m, rows.stop - behind)
            begin = 0
            if window is not None:  # the first key that query `first` sees
                begin = max(0, (positions[first] - window - residue) // step + 1)
            for start in range(begin, stop, KEYS):
                keys = slice(start, min(start + KEYS, stop))
                band = Band(self.documents, positions[rows], range(residue, self.slots, step)[keys], window)
                yield AttentionPiece(rows, source, where(keys.start, keys.stop), mask=band.mask)

    # --- the end -----------------------------------------------------------------------------------------------

    def whole(self) -> State:
        """The State that other passes would have left: contiguous buffers, to be continued."""
        classes = self.keys[0]  # not the memory's: a model may remember nothing
        written = torch.tensor([held is not None for held in classes], device=self.tokens.device)
        index = torch.arange(self.slots, device=self.tokens.device)
        written_until, pending = 0, ()
        for residue, held in enumerate(classes):
            if held is not None and residue < self.slots:
                written_until, pending = extend(written_until, pending, range(residue, self.slots, self.stride))
        return State(
            keys=tuple(self._buffer(classes, 2, self.shape[1:3]) for classes in self.keys),
            values=tuple(self._buffer(classes, 2, self.shape[1:3]) for classes in self.values),
            memory=self._buffer(self.memory, 1, self.shape[-2:]),
            tokens=self.tokens,
            documents=self.documents,
            slot_positions=torch.where(written[index % self.stride], index, -1).expand(self.batch, -1),
            written_until=written_until,
            pending_strides=pending,
            execution=self.execution,
        )

    def _buffer(self, classes: Classes, dim: int, sizes: Sequence[int]) -> Tensor:
        """All positions' keys or values (B, G, T, K) or memory (B, T, P, D), zeros where nothing is written."""
        first = classes[0]  # of a full pass, if all share its tensor: nothing to put together
        if first is not None and all(held is not None and held.tensor is first.tensor for held in classes):
            return first.tensor
        shape = (self.batch, sizes[0], self.slots, sizes[1]) if dim == 2 else (self.batch, self.slots, *sizes)
        buffer = self.nothing.new_zeros(()).expand(shape)
        for residue, held in enumerate(classes):
            if held is not None and residue < self.slots:
                slots = slice(residue, self.slots, self.stride)
                buffer = write_copy(buffer, slots, held.of(residue, self.stride, dim), dim)
        return buffer


@dataclass(frozen=True)
class Band:
    """Which keys of one run the queries of another see: not later ones, within the window, of their own document."""

    documents: Tensor | None
    queries: range
    """Positions, as are the keys."""
    keys: range
    window: int | None

    def mask(self, like: Tensor) -> Tensor:
        """(1 or B, 1, n, m) to add to scores, 0 or -inf, of the type and on the device of `like`."""
        queries, keys = index_tensor(self.queries, like.device).unsqueeze(1), index_tensor(self.keys, like.device)
        own = other = None
        if self.documents is not None:
            own, other = (self.documents[:, r.start : r.stop : r.step] for r in (self.queries, self.keys))
            own, other = own.unsqueeze(2), other.unsqueeze(1)
        mask = visible_keys(queries, keys, self.window, own, other)
        return additive(mask if mask.dim() == 3 else mask.unsqueeze(0), like).unsqueeze(1)


def index_tensor(positions: range, device: torch.device) -> Tensor:
    """(n,) int: a range as a tensor."""
    return torch.arange(positions.start, positions.stop, positions.step, device=device)


def triangle(n: int, m: int, behind: int, tile: int) -> Iterator[AttentionPiece]:
    """The pieces in which query i of n sees keys 0 … i - behind of source 0, which has m; behind is 0 or 1.

    Triangles of `tile` entries on the diagonal, then squares of 1, 2, 4, … tiles below it, each the lower left quarter
    of the square that it completes. All of one size are one piece, but for a last one that is cut off at n. So outputs
    and gradients are merged log2(n / tile) times.
    """
    for start, blocks in alike(n, tile, tile):
        stop = min(start + tile, n)
        # Where queries begin one later, the last key of a tile is seen by none. Repeated tiles have it all the same:
        # the CPU's kernel takes half as long again for 63 keys as for 64.
        even = blocks > 1 and start + blocks * tile <= m
        rows, keys = slice(start + behind, stop), slice(start, stop if even else stop - behind)
        if rows.start < rows.stop:
            yield AttentionPiece(rows, 0, keys, causal=True, repeat=Repeat(blocks, tile))
    side = tile
    while side < n:
        for start, blocks in alike(n - side, side, 2 * side):
            rows = slice(start + side, min(start + 2 * side, n))
            yield AttentionPiece(rows, 0, slice(start, start + side), repeat=Repeat(blocks, 2 * side))
        side *= 2


def alike(n: int, size: int, pitch: int) -> Iterator[tuple[int, int]]:
    """(start, how many) of runs of `size` entries of n, begun at multiples of `pitch`: whole ones, then a cut one."""
    whole = (n - size) // pitch + 1 if n >= size else 0
    if whole:
        yield 0, whole
    if whole * pitch < n:
        yield whole * pitch, 1


def entries(residue: int, stride: int, first: int, last: int) -> slice:
    """Entries first … last of a class, in a tensor of all positions."""
    return slice(residue + first * stride, residue + (last - 1) * stride + 1, stride)


def shift_back(x: Tensor, n: int, shift: int) -> Tensor:
    """(B, n, …): x (B, m, …) moved back by `shift`, zeros before it."""
    if shift == 0:
        return x[:, :n]
    zeros = x.new_zeros(x.shape[0], min(shift, n), *x.shape[2:])
    return torch.cat([zeros, x[:, : max(0, n - shift)]], dim=1)
