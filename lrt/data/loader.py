"""Prepared documents to tensors: windows for evaluation, packed rows for training.

Shapes: B rows of a batch, T positions, D documents. Both loaders are pure: the same arguments give the same tensors,
and a position (epoch, row, shard) is all the state there is.

A document is cut into pieces that each start with BOS. Every one of its tokens is a target exactly once, and no
target lies in another document than the tokens before it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from lrt.config import IGNORED, require
from lrt.data.packing import Packed, cut, order, pack_documents
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

    @property
    def openings(self) -> int:
        """How many of the windows begin a document."""
        return int(np.isin(self.starts, self.documents.offsets[:-1]).sum())

    @property
    def positions(self) -> int:
        """Positions computed where all windows are one batch: padding too."""
        return len(self) * int(self.lengths.max(initial=0))

    def part(self, chosen: slice | np.ndarray) -> Windows:
        """Some of the windows."""
        return dataclasses.replace(self, starts=self.starts[chosen], lengths=self.lengths[chosen], complete=False)

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


@dataclass(frozen=True)
class Position:
    """Where training is in the data: the next row to read. All that a resumed run needs, on any number of ranks."""

    epoch: int = 0
    row: int = 0
    """Of the current shard, in this epoch's order."""
    shard: int = 0
    """In this epoch's order of shards."""


@dataclass(frozen=True)
class Packing:
    """What packing made of the shards that were read so far."""

    rows: int = 0
    targets: int = 0
    """Tokens that are predicted."""
    padded: int = 0
    """Positions that hold padding."""
    cropped: int = 0
    """Tokens of the documents that no row holds."""


class Rows:
    """Training rows of `context` positions, each a full piece of a document or several short ones.

    A piece of k tokens takes k positions: BOS and its first k - 1 tokens are inputs, its k tokens targets. Pieces of
    `context` tokens fill a row; the shorter tails of documents share rows, each with its own BOS and number.

    Shards are packed and shuffled one at a time, when they are reached. All ranks read the same shard, each its own
    rows of it: how many ranks there are changes neither a global batch nor the position after it, and one shard
    serves any number of them.
    """

    def __init__(self, documents: Documents, context: int, seed: int = 0, rank: int = 0, ranks: int = 1) -> None:
        """`seed` orders shards and rows in each epoch; rank `rank` of `ranks` gets its share of every batch.

        ValueError for a context below 1, a rank that is not below `ranks`, or more ranks than rows.
        """
        require(context >= 1, f"context is {context}; it must be at least 1")
        require(0 <= rank < ranks, f"rank is {rank} of {ranks} ranks; count them from 0 to ranks - 1")
        self.documents = documents
        self.context = context
        self.seed = seed
        self.rank, self.ranks = rank, ranks
        self.packing = Packing()
        """Counts over the shards that were read so far."""
        self._counted: set[int] = set()
        self._cache: dict[int, Packed] = {}
        fewest = -(-len(documents.tokens) // context)  # packing every shard to count them would take long
        require(
            fewest >= ranks or len(self) >= ranks,
            f"ranks is {ranks}, but {len(documents)} documents of {len(documents.tokens)} tokens make only "
            f"{fewest if fewest >= ranks else len(self)} rows of {context}; "
            "use at most as many ranks as rows, a shorter context, or more text",
        )

    @functools.cached_property
    def _lengths(self) -> list[int]:
        """Rows of every shard: packs them all."""
        return [len(self._packed(shard)) for shard in range(len(self.documents.shards))]

    def __len__(self) -> int:
        """Rows in an epoch, of all ranks. Packs every shard, once."""
        return sum(self._lengths)

    @property
    def targets(self) -> int:
        """Targets of an epoch: every token of every document, once."""
        return len(self.documents.tokens)

    @property
    def padded(self) -> int:
        """Positions of an epoch that hold padding. Packs every shard, once."""
        return len(self) * self.context - self.targets

    @property
    def cropped(self) -> int:
        """Tokens of the documents that no row holds: none, in the shards read so far."""
        return self.packing.cropped

    def batch(self, position: Position, batch_size: int) -> tuple[Batch, Position]:
        """This rank's `batch_size` rows of the `ranks * batch_size` from `position` on, and the position after those.

        Pure: whoever asks, in whatever order, gets the same rows. Epochs follow one another. Tensors are
        (batch_size, context).
        """
        require(batch_size >= 1, f"batch_size is {batch_size}; it must be at least 1")
        shape = (batch_size, self.context)
        tokens, targets = np.full(shape, self.documents.bos, np.int64), np.full(shape, IGNORED, np.int64)
        numbers = np.zeros(shape, np.int64)
        shared = False
        for index in range(batch_size):
            texts = self._row(self._after(position, self.rank * batch_size + index))
            shared = shared or len(texts) > 1
            end = 0
            for number, text in enumerate(texts):
                begin, end = end, end + len(text)
                tokens[index, begin + 1 : end] = text[:-1]
                targets[index, begin:end] = text
                numbers[index, begin:end] = number
            numbers[index, end:] = len(texts)
        documents = torch.from_numpy(numbers) if shared else None
        batch = Batch(torch.from_numpy(tokens), torch.from_numpy(targets), documents)
        return batch, self._after(position, self.ranks * batch_size)

    def _after(self, position: Position, count: int) -> Position:
        """The position `count` rows behind `position`."""
        epoch, row, place = position.epoch, position.row + count, position.shard
        while row >= (length := len(self._packed(self._shard(epoch, place)))):
            row, place = row - length, place + 1
            if place == len(self.documents.shards):
                epoch, place = epoch + 1, 0
        return Position(epoch, row, place)

    def _shard(self, epoch: int, place: int) -> int:
        """The shard that an epoch reads at `place`."""
        return int(order(len(self.documents.shards), self.seed, epoch)[place])

    def _row(self, at: Position) -> list[np.ndarray]:
        """The pieces of one row."""
        shard = self._shard(at.epoch, at.shard)
        packed, tokens = self._packed(shard), self.documents.shards[shard].tokens
        row = order(len(packed), self.seed, at.epoch, shard)[at.row]
        pieces = slice(packed.rows[row], packed.rows[row + 1])
        found = zip(packed.starts[pieces], packed.lengths[pieces], strict=True)
        return [tokens[start : start + length] for start, length in found]

    def _packed(self, shard: int) -> Packed:
        """The rows of a shard; the two used last are kept."""
        if shard not in self._cache:
            documents = self.documents.shards[shard]
            packed = pack_documents(documents, self.context)
            while len(self._cache) > 1:
                del self._cache[next(iter(self._cache))]
            self._cache[shard] = packed
            if shard not in self._counted:
                self._counted.add(shard)
                held, seen = int(packed.lengths.sum()), self.packing
                self.packing = Packing(
                    seen.rows + len(packed),
                    seen.targets + held,
                    seen.padded + len(packed) * self.context - held,
                    seen.cropped + len(documents.tokens) - held,
                )
        return self._cache[shard]


def prefetch(
    rows: Rows, position: Position, batch_size: int, ahead: int = 2
) -> Generator[tuple[Batch, Position], None, None]:
    """The batches from `position` on, without end, each with the position after it: `rows.batch` called in advance.

    A thread reads `ahead` batches before they are asked for. To be closed; the position that came with the last
    batch used is where another run goes on, whatever was read in advance.
    """
    require(ahead >= 1, f"ahead is {ahead}; read at least 1 batch in advance")

    def following() -> tuple[Batch, Position]:
        nonlocal position
        batch, position = rows.batch(position, batch_size)
        return batch, position

    with ThreadPoolExecutor(1, "prefetch") as thread:
        pending = deque(thread.submit(following) for _ in range(ahead))
        try:
            while True:
                yield pending[0].result()
                pending.popleft()
                pending.append(thread.submit(following))
        finally:
            thread.shutdown(wait=True, cancel_futures=True)
