"""Prepared documents to batches of packed rows, for training. (Evaluation windows are in `lrt.data.windows`.)

Shapes: B rows of a batch, T positions. `Rows` is pure: the same arguments give the same tensors, and a position (epoch,
row, shard) is all the state there is.

No token is cropped. A document is cut into pieces that each start with BOS, every one of its tokens is a target exactly
once, and no target lies in another document than the tokens before it. Padding is the price, well below 1 % with real
text. Both are counted (`Rows.packing`), kept in the checkpoint, and printed by `lrt train`.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from lrt.data.batch import IGNORED, Batch
from lrt.data.packing import PackedRows, pack_documents, permutation
from lrt.data.prepared import Documents


@dataclass(frozen=True)
class Position:
    """Where training is in the data: the next row to read. All that a resumed run needs, on any number of ranks."""

    epoch: int = 0
    row: int = 0
    """Of the current shard, in this epoch's order."""
    shard: int = 0
    """In this epoch's order of shards."""


@dataclass(frozen=True)
class PackingStats:
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

    Shards are packed and shuffled one at a time, when they are reached, so that neither grows with the corpus. All
    ranks read the same shard, each its own rows of it: how many ranks there are changes neither a global batch nor the
    position after it, and one shard serves any number of them. Only more ranks than rows is an error.
    """

    def __init__(self, documents: Documents, context: int, seed: int = 0, rank: int = 0, ranks: int = 1) -> None:
        """`seed` orders shards and rows in each epoch; rank `rank` of `ranks` gets its share of every batch.

        ValueError for a context below 1, a rank that is not below `ranks`, or more ranks than rows.
        """
        if context < 1:
            raise ValueError(f"context is {context}; it must be at least 1")
        if not 0 <= rank < ranks:
            raise ValueError(f"rank is {rank} of {ranks} ranks; count them from 0 to ranks - 1")
        self.documents = documents
        self.context = context
        self.seed = seed
        self.rank, self.ranks = rank, ranks
        self.packing = PackingStats()
        """Counts over the shards that were read so far."""
        self._counted: set[int] = set()
        self._cache: dict[int, PackedRows] = {}
        fewest = -(-len(documents.tokens) // context)  # rows at least: packing every shard to count them takes long
        if fewest < ranks and len(self) < ranks:
            raise ValueError(
                f"ranks is {ranks}, but {len(documents)} documents of {len(documents.tokens)} tokens make only "
                f"{fewest if fewest >= ranks else len(self)} rows of {context}; "
                "use at most as many ranks as rows, a shorter context, or more text"
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
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        shape = (batch_size, self.context)
        tokens, targets = np.full(shape, self.documents.bos, np.int64), np.full(shape, IGNORED, np.int64)
        numbers = np.zeros(shape, np.int64)  # of the documents in a row; padding counts as one more
        shared = False
        for index in range(batch_size):
            texts = self._row(self._after(position, self.rank * batch_size + index))
            shared = shared or len(texts) > 1
            end = 0
            for number, text in enumerate(texts):
                begin, end = end, end + len(text)
                tokens[index, begin + 1 : end] = text[:-1]  # behind BOS, with which the array is filled
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
        return int(permutation(len(self.documents.shards), self.seed, epoch)[place])

    def _row(self, at: Position) -> list[np.ndarray]:
        """The tokens of each piece of one row, as views, without BOS."""
        shard = self._shard(at.epoch, at.shard)
        packed, tokens = self._packed(shard), self.documents.shards[shard].tokens
        row = permutation(len(packed), self.seed, at.epoch, shard)[at.row]
        pieces = slice(packed.rows[row], packed.rows[row + 1])
        bounds = zip(packed.starts[pieces], packed.lengths[pieces], strict=True)
        return [tokens[start : start + length] for start, length in bounds]

    def _packed(self, shard: int) -> PackedRows:
        """The rows of a shard. Two are kept, as a batch may begin in one and end in the next."""
        if shard not in self._cache:
            documents = self.documents.shards[shard]
            packed = pack_documents(documents, self.context)
            while len(self._cache) > 1:
                del self._cache[next(iter(self._cache))]
            self._cache[shard] = packed
            if shard not in self._counted:
                self._counted.add(shard)
                targets, before = int(packed.lengths.sum()), self.packing
                self.packing = PackingStats(
                    before.rows + len(packed),
                    before.targets + targets,
                    before.padded + len(packed) * self.context - targets,
                    before.cropped + len(documents.tokens) - targets,
                )
        return self._cache[shard]


def prefetch(
    rows: Rows, position: Position, batch_size: int, ahead: int = 2
) -> Generator[tuple[Batch, Position], None, None]:
    """The batches from `position` on, without end, each with the position after it: `rows.batch` called in advance.

    A thread reads `ahead` batches before they are asked for. To be closed; the position that came with the last
    batch used is where another run goes on, whatever was read in advance.
    """
    if ahead < 1:
        raise ValueError(f"ahead is {ahead}; read at least 1 batch in advance")

    def next_batch() -> tuple[Batch, Position]:
        nonlocal position
        batch, position = rows.batch(position, batch_size)
        return batch, position

    with ThreadPoolExecutor(1, "prefetch") as thread:
        pending = deque(thread.submit(next_batch) for _ in range(ahead))
        try:
            while True:
                yield pending[0].result()
                pending.popleft()
                pending.append(thread.submit(next_batch))
        finally:
            thread.shutdown(wait=True, cancel_futures=True)
