"""Prepared documents to tensors: windows for evaluation, packed rows for training.

Shapes: B rows of a batch, T positions, D documents. Both loaders are pure: the same arguments give the same tensors,
and a position (epoch, row) is all the state there is.

A document is cut into pieces that each start with BOS. Every one of its tokens is a target exactly once, and no
target lies in another document than the tokens before it.
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from lrt.config import IGNORED, require
from lrt.data.prepared import Documents


@dataclass(frozen=True)
class Batch:
    """Tokens and what follows them."""

    tokens: torch.Tensor
    """(B, T) int64; padded with BOS."""
    targets: torch.Tensor
    """(B, T) int64: the token after each of `tokens`, or -1 where nothing is to be predicted."""
    documents: torch.Tensor | None = None
    """(B, T) int64: which document of its row a position belongs to, counted from 0, padding being one of its own.
    None where no row holds more than one document; padding, at the end, is then invisible to a causal model."""

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        documents = None if self.documents is None else self.documents.to(device)
        return Batch(self.tokens.to(device), self.targets.to(device), documents)


@dataclass(frozen=True)
class Windows:
    """Evaluation windows: BOS and up to `context` - 1 consecutive tokens of one document, longest first."""

    documents: Documents
    starts: np.ndarray
    """(n,) int64: where in `documents.tokens` each window's text starts."""
    lengths: np.ndarray
    """(n,) int64: tokens of text, BOS not counted, which is also how many targets the window has."""
    complete: bool
    """Whether these are all windows of the documents, not a sample."""

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def targets(self) -> int:
        """Tokens that are predicted, over all windows."""
        return int(self.lengths.sum())

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Batches of at most `batch_size` windows of similar length.

        T is 1 + the longest text of the batch, at most `context`. A window's last token is there as an input (so
        that `tokens` is the window as `score` takes it) with target -1: its successor belongs to the next window.
        """
        require(batch_size >= 1, f"batch_size is {batch_size}; it must be at least 1")
        for first in range(0, len(self), batch_size):
            starts, lengths = self.starts[first : first + batch_size], self.lengths[first : first + batch_size]
            shape = (len(starts), 1 + int(lengths.max()))
            tokens, targets = np.full(shape, self.documents.bos, np.int64), np.full(shape, IGNORED, np.int64)
            for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
                text = self.documents.tokens[start : start + length]
                tokens[row, 1 : 1 + length] = text
                targets[row, :length] = text
            yield Batch(torch.from_numpy(tokens), torch.from_numpy(targets))


def windows(documents: Documents, context: int, at_least: int | None = 50_000, seed: int = 0) -> Windows:
    """Cut `documents` into evaluation windows of `context` tokens and choose enough of them.

    Chosen are windows evenly spread over the split, from an offset drawn with `seed`, until they have `at_least`
    targets; all of them where there are fewer targets than that, or with None. ValueError for a context below 2.
    """
    require(context >= 2, f"context is {context}; a window needs at least 2 tokens: BOS and one to predict")
    starts, lengths = cut(documents.offsets, context - 1)
    chosen = np.arange(len(starts))
    if at_least is not None and int(lengths.sum()) > at_least:
        offset = np.random.default_rng(seed).random()
        count = max(1, math.ceil(at_least / (context - 1)))  # a window cannot hold more targets than that
        chosen = spread(len(starts), count, offset)
        while int(lengths[chosen].sum()) < at_least and len(chosen) < len(starts):
            count += max(1, count // 100)
            chosen = spread(len(starts), count, offset)
    chosen = chosen[np.argsort(-lengths[chosen], kind="stable")]
    return Windows(documents, starts[chosen], lengths[chosen], complete=len(chosen) == len(starts))


def spread(total: int, count: int, offset: float) -> np.ndarray:
    """(min(count, total),) int64: indices below `total`, ascending, evenly spaced; `offset` in [0, 1) shifts all."""
    count = min(count, total)
    return ((np.arange(count) + offset) * total / count).astype(np.int64)


def cut(offsets: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut documents (offsets (D + 1,)) into pieces of at most `size` tokens: their starts and lengths, in order."""
    pieces = -(-np.diff(offsets) // size)
    number = np.arange(int(pieces.sum())) - np.repeat(np.cumsum(pieces) - pieces, pieces)  # within its document
    starts = np.repeat(offsets[:-1], pieces) + number * size
    return starts, np.minimum(size, np.repeat(offsets[1:], pieces) - starts)


@dataclass(frozen=True)
class Position:
    """Where training is in the data: the next row to read. All that a resumed run needs."""

    epoch: int = 0
    row: int = 0


class Rows:
    """Training rows of `context` positions, each a full piece of a document or several short ones.

    A piece of k tokens takes k positions: BOS and its first k - 1 tokens are inputs, its k tokens targets. Pieces of
    `context` tokens fill a row; the shorter tails of documents share rows, each with its own BOS and number.
    """

    def __init__(self, documents: Documents, context: int, seed: int = 0) -> None:
        """Cut and pack `documents`; `seed` orders the rows of each epoch. ValueError for a context below 1."""
        require(context >= 1, f"context is {context}; it must be at least 1")
        self.documents = documents
        self.context = context
        self.seed = seed
        starts, lengths = cut(documents.offsets, context)
        full = np.flatnonzero(lengths == context)
        tails = np.flatnonzero(lengths < context)
        packed = [tails[row] for row in pack(lengths[tails], context)]
        sizes = np.concatenate([np.ones(len(full), np.int64), np.array([len(row) for row in packed], np.int64)])
        order = np.concatenate([full, *packed])
        self._starts, self._lengths = starts[order], lengths[order]
        self._rows = np.concatenate([[0], np.cumsum(sizes)])  # row r holds the pieces _rows[r] to _rows[r + 1]
        self.targets: int = int(lengths.sum())
        """Targets of an epoch: every token of every document, once."""
        self.padded: int = len(self) * context - self.targets
        """Positions of an epoch that hold padding."""
        self.cropped: int = len(documents.tokens) - self.targets
        """Tokens of the documents that no row holds: none."""

    def __len__(self) -> int:
        """Rows in an epoch."""
        return len(self._rows) - 1

    def batch(self, position: Position, batch_size: int) -> tuple[Batch, Position]:
        """The `batch_size` rows from `position` on, and the position after them; epochs follow one another.

        Pure: whoever asks, in whatever order, gets the same rows. Tensors are (batch_size, context).
        """
        require(batch_size >= 1, f"batch_size is {batch_size}; it must be at least 1")
        shape = (batch_size, self.context)
        tokens, targets = np.full(shape, self.documents.bos, np.int64), np.full(shape, IGNORED, np.int64)
        numbers = np.zeros(shape, np.int64)
        shared = False
        for index in range(batch_size):
            epochs, at = divmod(position.row + index, len(self))
            row = epoch_order(len(self), self.seed, position.epoch + epochs)[at]
            pieces = range(self._rows[row], self._rows[row + 1])
            shared = shared or len(pieces) > 1
            end = 0
            for number, piece in enumerate(pieces):
                start, begin = self._starts[piece], end
                end = begin + self._lengths[piece]
                text = self.documents.tokens[start : start + self._lengths[piece]]
                tokens[index, begin + 1 : end] = text[:-1]
                targets[index, begin:end] = text
                numbers[index, begin:end] = number
            numbers[index, end:] = len(pieces)
        epochs, row = divmod(position.row + batch_size, len(self))
        documents = torch.from_numpy(numbers) if shared else None
        batch = Batch(torch.from_numpy(tokens), torch.from_numpy(targets), documents)
        return batch, Position(position.epoch + epochs, row)


@functools.lru_cache(maxsize=4)  # a batch needs the order of its epoch, sometimes of the next
def epoch_order(rows: int, seed: int, epoch: int) -> np.ndarray:
    """(rows,) int64: the order in which an epoch reads its rows. Shared: do not write."""
    order = np.random.default_rng([seed, epoch]).permutation(rows)
    order.setflags(write=False)
    return order


def pack(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Indices of `lengths`, each at most `capacity`, grouped so that each group's sum is at most `capacity`.

    Longest first, each into the fullest group with room (best-fit decreasing): as good a bound as first-fit, at most
    11/9 of the fewest groups, but found by bisection over the distinct rooms, so a million short documents are fine.
    """
    groups: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # room left -> groups with exactly that room
    rooms: list[int] = []  # the keys of by_room, ascending
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        at = bisect_left(rooms, length)
        if at == len(rooms):
            room, group = capacity, len(groups)
            groups.append([])
        else:
            room = rooms[at]
            group = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[at]
        groups[group].append(index)
        room -= length
        if room > 0:
            if room not in by_room:
                by_room[room] = []
                insort(rooms, room)
            by_room[room].append(group)
    return groups
