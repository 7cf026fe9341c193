"""Evaluation windows: every token of a split scored once, each window starting empty with BOS (contract, section 4)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from lrt.data.batch import IGNORED, Batch
from lrt.data.packing import cut_pieces
from lrt.data.prepared import Documents


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
    def document_starts(self) -> int:
        """How many of the windows begin a document: as often there may be a space that is no part of it."""
        return int(np.isin(self.starts, self.documents.offsets[:-1]).sum())

    @property
    def positions(self) -> int:
        """Positions computed where all windows are one batch: padding too."""
        return len(self) * int(self.lengths.max(initial=0))

    def select(self, indices: slice | np.ndarray) -> Windows:
        """Some of the windows, by their indices."""
        return dataclasses.replace(self, starts=self.starts[indices], lengths=self.lengths[indices], complete=False)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Batches of at most `batch_size` windows of similar length.

        T is 1 + the longest text of the batch, at most `context`. A window's last token is there as an input (so
        that `tokens` is the window as `score` takes it) with target -1: its successor belongs to the next window.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
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
    """Cut `documents` into evaluation windows of `context` tokens and take enough of them.

    Windows are evenly spread over the split, from a random offset that `seed` decides, until they have `at_least`
    targets; all are taken where there are fewer targets than that, or with None. ValueError for a context below 2.
    """
    if context < 2:
        raise ValueError(f"context is {context}; a window needs at least 2 tokens: BOS and one to predict")
    starts, lengths = cut_pieces(documents.offsets, context - 1)
    indices = np.arange(len(starts))
    if at_least is not None and int(lengths.sum()) > at_least:
        offset = np.random.default_rng(seed).random()
        count = max(1, math.ceil(at_least / (context - 1)))  # a window cannot hold more targets than that
        indices = evenly_spaced(len(starts), count, offset)
        while int(lengths[indices].sum()) < at_least and len(indices) < len(starts):
            count += max(1, count // 100)  # short documents make short windows: more of them, by a hundredth
            indices = evenly_spaced(len(starts), count, offset)
    indices = indices[np.argsort(-lengths[indices], kind="stable")]  # batches of like lengths have little padding
    return Windows(documents, starts[indices], lengths[indices], complete=len(indices) == len(starts))


def evenly_spaced(total: int, count: int, offset: float) -> np.ndarray:
    """(min(count, total),) int64: indices below `total`, ascending, evenly spaced; `offset` in [0, 1) shifts all."""
    count = min(count, total)
    return ((np.arange(count) + offset) * total / count).astype(np.int64)
