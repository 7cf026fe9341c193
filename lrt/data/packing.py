"""How documents become rows: cut into pieces of a row at most, and the shorter tails packed together, best fit."""

from __future__ import annotations

import functools
from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np

from lrt.data.prepared import Documents


@dataclass(frozen=True)
class PackedRows:
    """The rows of one shard."""

    starts: np.ndarray
    """(n,) int64: where in the shard's tokens each piece starts, those of one row one after another."""
    lengths: np.ndarray
    """(n,) int64: their tokens."""
    rows: np.ndarray
    """(rows + 1,) int64: row r holds the pieces rows[r] to rows[r + 1]."""

    def __len__(self) -> int:
        return len(self.rows) - 1


def pack_documents(documents: Documents, context: int) -> PackedRows:
    """Rows of `context` positions: pieces that fill one, and the shorter tails of documents, best fit."""
    starts, lengths = cut_pieces(documents.offsets, context)
    full = np.flatnonzero(lengths == context)
    tails = np.flatnonzero(lengths < context)
    shared_rows = [tails[group] for group in pack(lengths[tails], context)]
    sizes = np.concatenate([np.ones(len(full), np.int64), np.array([len(row) for row in shared_rows], np.int64)])
    order = np.concatenate([full, *shared_rows])
    return PackedRows(starts[order], lengths[order], np.concatenate([[0], np.cumsum(sizes)]))


@functools.lru_cache(maxsize=4)  # a batch needs its shard's, the shards', and sometimes those that follow
def permutation(length: int, *key: int) -> np.ndarray:
    """(length,) int64: a permutation that follows from `key` alone. Read-only, as callers share it."""
    indices = np.random.default_rng(key).permutation(length)
    indices.setflags(write=False)
    return indices


def cut_pieces(offsets: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut documents (offsets (D + 1,)) into pieces of at most `size` tokens: their starts and lengths, in order."""
    pieces = -(-np.diff(offsets) // size)
    # Each piece's number within its document: its number in all, less the pieces of the documents before.
    number = np.arange(int(pieces.sum())) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = np.repeat(offsets[:-1], pieces) + number * size
    return starts, np.minimum(size, np.repeat(offsets[1:], pieces) - starts)


def pack(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Indices of `lengths`, each at most `capacity`, grouped so that each group's sum is at most `capacity`.

    Longest first, each into the fullest group with room (best-fit decreasing): as good a bound as first-fit, at most
    11/9 of the fewest groups, but found by bisection over the distinct rooms, so a million short documents are fine.
    """
    # As classical bin packing: a group is a bin, its room what still fits in. All rooms stay below `capacity`.
    groups: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # room left -> groups with exactly that room
    rooms: list[int] = []  # the keys of by_room, ascending
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        at = bisect_left(rooms, length)  # the least room that is enough
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
