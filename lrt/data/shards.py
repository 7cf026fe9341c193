"""Write the shards of a split: token ids and where documents start, appended, so that writing can go on after a stop.

To go on, files are cut to the lengths that `SplitWriter.sync` gave: what was written since is written again.

A shard is two arrays in numpy's own format, `train.00000.tokens.npy` and `train.00000.documents.npy`. It is closed at
the end of the document with which it reaches its size, so no document lies in two.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy

from lrt.utils.files import sha256

OFFSETS = "<i8"
"""Type of document offsets."""


def shard_files(split: str, index: int) -> tuple[str, str]:
    """Names of the two files of a shard: tokens, documents."""
    return f"{split}.{index:05}.tokens.npy", f"{split}.{index:05}.documents.npy"


class GrowingArray:
    """A one-dimensional .npy file to append to; its header is right once it is closed with `finish`."""

    def __init__(self, path: Path, dtype: str, length: int) -> None:
        """Go on behind the first `length` values of `path`; with 0 begin anew. ValueError where the file is shorter."""
        self.path, self.dtype, self.length = path, np.dtype(dtype), length
        self.file: BinaryIO = path.open("r+b" if length else "w+b")
        self._header()
        end = self.file.tell() + length * self.dtype.itemsize
        self.file.flush()
        size = os.fstat(self.file.fileno()).st_size
        if size < end:
            raise ValueError(f"{path} holds {size} bytes of {end}: the disk lost some; prepare the folder again")
        self.file.truncate(end)
        self.file.seek(end)

    def append(self, values: np.ndarray) -> None:
        """Add integers (n,), which have to fit the array's type."""
        self.file.write(values.astype(self.dtype, copy=False).tobytes())
        self.length += len(values)

    def sync(self) -> None:
        """Make sure that what was appended outlasts this process and a loss of power."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def finish(self) -> None:
        """Complete the header, and close."""
        self.file.seek(0)
        self._header()  # as long as the one written first: numpy leaves room for the number to grow
        self.sync()
        self.file.close()

    def _header(self) -> None:
        header = {"descr": npy.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (self.length,)}
        npy.write_array_header_1_0(self.file, header)


class SplitWriter:
    """Write the documents of one split, piece by piece."""

    def __init__(
        self, folder: Path, split: str, dtype: str, shard_tokens: int, state: dict[str, Any] | None = None
    ) -> None:
        """`state`: what `sync` returned, to go on from there."""
        self.folder, self.split, self.dtype, self.shard_tokens = folder, split, dtype, shard_tokens
        state = state or {"shards": [], "tokens": 0, "documents": 0, "bytes": 0, "end": 0, "sources": []}
        self.shards: list[dict[str, Any]] = state["shards"]
        self.bytes: int = state["bytes"]
        """UTF-8 bytes of the open shard."""
        self.end: int = state["end"]
        """Where in the open shard its last whole document ends."""
        self.sources: list[int] = state["sources"]
        """Which sources documents came from, ascending."""
        self._open(state["tokens"], state["documents"])

    def add(self, ids: np.ndarray, size: int, last: bool, source: int) -> None:
        """One piece: its ids, its UTF-8 bytes, whether its document ends with it, and the number of its source."""
        self.tokens.append(ids)
        self.bytes += size
        if not last or self.tokens.length == self.end:  # a normaliser may leave nothing of a document
            return
        if not self.sources or self.sources[-1] != source:
            self.sources.append(source)
        self.end = self.tokens.length
        self.documents.append(np.array([self.end], OFFSETS))
        if self.end >= self.shard_tokens:  # only at the end of a document, so that none lies in two shards
            self._close()
            self._open(0, 0)

    @property
    def total(self) -> int:
        """Tokens in all shards."""
        return sum(shard["tokens"] for shard in self.shards) + self.tokens.length

    def sync(self) -> dict[str, Any]:
        """Bring what was added to the disk, and return the state from which a new writer goes on: plain data."""
        self.tokens.sync()
        self.documents.sync()
        return {
            "shards": self.shards,
            "tokens": self.tokens.length,
            "documents": self.documents.length,
            "bytes": self.bytes,
            "end": self.end,
            "sources": self.sources,
        }

    def finish(self) -> dict[str, Any]:
        """Close the last shard, and return the split's entry in the manifest."""
        if self.end > 0:
            self._close()
        else:  # begun, but nothing came
            self.abandon()
            for name in shard_files(self.split, len(self.shards)):
                (self.folder / name).unlink()
        sums = {key: sum(shard[key] for shard in self.shards) for key in ("documents", "tokens", "bytes")}
        return {"files": len(self.sources), **sums, "shards": self.shards}

    def abandon(self) -> None:
        """Close the files as they are, headers included: only a state makes them readable again."""
        self.tokens.file.close()
        self.documents.file.close()

    def _open(self, tokens: int, documents: int) -> None:
        # An empty shard is begun anew: `finish` removes its files, and may be killed before the manifest is written.
        documents = documents if tokens else 0
        names = shard_files(self.split, len(self.shards))
        self.tokens = GrowingArray(self.folder / names[0], self.dtype, tokens)
        self.documents = GrowingArray(self.folder / names[1], OFFSETS, documents)
        if documents == 0:  # offsets begin with 0
            self.documents.append(np.zeros(1, OFFSETS))

    def _close(self) -> None:
        self.tokens.finish()
        self.documents.finish()
        self.shards.append(
            {
                "tokens": self.tokens.length,
                "documents": self.documents.length - 1,
                "bytes": self.bytes,
                "tokens_sha256": sha256(self.tokens.path),
                "documents_sha256": sha256(self.documents.path),
            }
        )
        self.bytes = self.end = 0
