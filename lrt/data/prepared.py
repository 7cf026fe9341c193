"""A prepared folder, read: documents of token ids, memory-mapped and held against the manifest.

`lrt.data.prepare` says what the folder holds and makes it. Sizes are checked when it is opened. The bytes of a split
are hashed when it is first asked for: an evaluation need not read the training split.
"""

from __future__ import annotations

import functools
import hashlib
import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
from numpy.lib import format as npy

from lrt.data.shards import shard_files
from lrt.data.tokenizer import Tokenizer
from lrt.utils.files import sha256

FORMAT = 2
"""Version of the folder's layout; another one is prepared anew."""
SPLITS = ("train", "val", "test")
UNREADABLE = (ValueError, EOFError, OSError, OverflowError, MemoryError, RecursionError, SyntaxError, TokenError)
"""What numpy raises of a file that is no array: it parses the header as Python."""


class ConcatenatedArray:
    """One-dimensional arrays one after another, read like one. A slice within one of them is a view."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self.parts = tuple(parts)
        self.ends = np.cumsum([len(part) for part in parts]).tolist()

    @property
    def dtype(self) -> np.dtype:
        return self.parts[0].dtype

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, at: slice) -> np.ndarray:
        """Values from `at.start` to `at.stop`, both within the length; no negative ones, and no step."""
        views, start, stop = [], int(at.start or 0), len(self) if at.stop is None else int(at.stop)
        index = bisect_right(self.ends, start)
        while start < stop:
            offset = self.ends[index] - len(self.parts[index])
            views.append(self.parts[index][start - offset : min(stop, self.ends[index]) - offset])
            start, index = self.ends[index], index + 1
        # An empty array of the same type: a slice without any values has no views.
        return views[0] if len(views) == 1 else np.concatenate([*views, self.parts[0][:0]])


@dataclass(frozen=True)
class Documents:
    """Token ids of the documents of one split. `documents[i]` is document i, `for` runs over all."""

    tokens: np.ndarray | ConcatenatedArray
    """(n,) uint16, uint32 or any integers: all documents, one after another, without BOS."""
    offsets: np.ndarray
    """(D + 1,) int64: document i is tokens[offsets[i]:offsets[i + 1]]; no document is empty."""
    bos: int
    """Id of the token that opens a document."""
    bytes: int = 0
    """UTF-8 size of all documents together; 0 where it is not known."""
    parts: tuple[Documents, ...] = field(default=(), repr=False)
    """The shards, where there are several."""

    def __post_init__(self) -> None:
        ends = self.offsets
        if len(ends) < 2 or ends[0] != 0 or ends[-1] != len(self.tokens) or (not bool((ends[1:] > ends[:-1]).all())):
            raise ValueError(
                f"the document offsets do not divide the {len(self.tokens)} tokens into non-empty documents; "
                "give each document's start, ascending from 0, and last the number of tokens"
            )

    @classmethod
    def join(cls, shards: Sequence[Documents]) -> Documents:
        """The documents of all `shards`, in order."""
        if len(shards) == 1:
            return shards[0]
        starts = np.cumsum([0, *(len(shard.tokens) for shard in shards)])
        offsets = [shard.offsets[:-1] + start for shard, start in zip(shards, starts[:-1], strict=True)]
        tokens = ConcatenatedArray([shard.tokens[0 : len(shard.tokens)] for shard in shards])
        size = sum(shard.bytes for shard in shards)
        return cls(tokens, np.concatenate([*offsets, starts[-1:]]), shards[0].bos, size, tuple(shards))

    @property
    def shards(self) -> tuple[Documents, ...]:
        """The parts that are packed and shuffled on their own, so that no more than one has to be."""
        return self.parts or (self,)

    def __repr__(self) -> str:
        return f"Documents({len(self):,} documents, {len(self.tokens):,} tokens)"

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        """Tokens of document `index`, 0 to len - 1, as a view."""
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


@dataclass(frozen=True)
class Prepared:
    """A prepared folder, checked against its manifest: sizes when opened, the bytes of a split when it is used."""

    path: Path
    manifest: dict[str, Any]
    tokenizer: Tokenizer
    splits: dict[str, Documents]

    @classmethod
    def open(cls, path: Path | str) -> Prepared:
        """Open a prepared folder; tokens are memory-mapped.

        ValueError naming the file that is missing, of another size than the manifest says, or unreadable.
        """
        path = Path(path)
        manifest = read_manifest(path)
        tokenizer = Tokenizer.load(path / "tokenizer.json")
        try:
            if manifest["tokenizer_sha256"] != tokenizer.sha256 or manifest["vocab_size"] != tokenizer.vocab_size:
                raise ValueError(
                    f"{path / 'tokenizer.json'} is not the tokenizer of {path / 'manifest.json'}; prepare the folder "
                    "again"
                )
            splits = {name: open_split(path, name, manifest["splits"][name], tokenizer) for name in SPLITS}
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(
                f"{path / 'manifest.json'} is damaged (missing or malformed: {error}); prepare the folder again"
            ) from error
        return cls(path, manifest, tokenizer, splits)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name} {len(documents.tokens):,}" for name, documents in self.splits.items())
        return f"Prepared('{self.path}', tokens: {sizes}, vocabulary {self.vocab_size:,})"

    @property
    def fingerprint(self) -> str:
        """A hash of the tokens of all splits and of the tokenizer: equal data, equal fingerprint."""
        hashes = [self.manifest["tokenizer_sha256"], *(self.manifest["splits"][name]["shards"] for name in SPLITS)]
        return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()

    @property
    def vocab_size(self) -> int:
        """V of the tokenizer, which the model's must equal: a small text may give fewer tokens than asked for."""
        return self.tokenizer.vocab_size

    def split(self, name: str) -> Documents:
        """The documents of `train`, `val` or `test`; ValueError naming a file that is not the manifest's."""
        if name not in self.splits:
            raise ValueError(f"there is no split {name!r}; choose one of {', '.join(SPLITS)}")
        self.verify(name)
        return self.splits[name]

    def verify(self, name: str) -> None:
        """Hold the bytes of a split against the hashes of the manifest, once: a second or two per billion tokens."""
        if name in self._verified:
            return
        for index, entry in enumerate(self.manifest["splits"][name]["shards"]):
            for file, part in zip(shard_files(name, index), ("tokens", "documents"), strict=True):
                actual, expected = sha256(self.path / file), entry.get(f"{part}_sha256")
                if actual != expected:
                    raise ValueError(
                        f"{self.path / file} does not match {self.path / 'manifest.json'}: its SHA-256 is {actual}, "
                        f"the manifest says {expected}; copy the file again, or prepare the folder again"
                    )
        self._verified.add(name)

    @functools.cached_property
    def _verified(self) -> set[str]:
        return set()


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a prepared folder; ValueError naming what is missing, damaged or of another format."""
    file = path / "manifest.json"
    if not file.is_file():
        raise ValueError(f"{path} is not a prepared folder: there is no {file}; prepare it first")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({error}); prepare the folder again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{file} is not a manifest of format {FORMAT}; prepare the folder again")
    return manifest


def open_split(path: Path, split: str, entry: dict[str, Any], tokenizer: Tokenizer) -> Documents:
    """One split, memory-mapped, of the sizes its manifest entry says."""
    for numbers in (entry, *entry["shards"]):
        for key in ("tokens", "documents", "bytes"):
            if type(numbers[key]) is not int or numbers[key] < 0:
                raise TypeError(f"{key} of {split} is {numbers[key]!r}")
    shards = [open_shard(path, split, index, shard, tokenizer) for index, shard in enumerate(entry["shards"])]
    if len(shards) == 0:
        raise ValueError(f"{path / 'manifest.json'} is damaged (no shards of {split}); prepare the folder again")
    for key in ("tokens", "documents", "bytes"):
        total = sum(shard[key] for shard in entry["shards"])
        if total != entry[key]:
            raise ValueError(
                f"{path / 'manifest.json'} is damaged ({split} has {entry[key]} {key}, its shards {total}); "
                "prepare the folder again"
            )
    return Documents.join(shards)


def open_shard(path: Path, split: str, index: int, entry: dict[str, Any], tokenizer: Tokenizer) -> Documents:
    """Shard number `index` of a split, memory-mapped.

    ValueError naming its file where offsets do not ascend or sizes differ.
    """
    tokens_file, documents_file = (path / file for file in shard_files(split, index))
    tokens = open_array(tokens_file, entry["tokens"])
    # Offsets are computed with: without this view of the map, results would be np.memmap too. Tokens are only cut.
    offsets = np.asarray(open_array(documents_file, entry["documents"] + 1))
    try:
        return Documents(tokens, offsets, tokenizer.bos, entry["bytes"])
    except ValueError as error:
        raise ValueError(f"{documents_file} is damaged ({error}); prepare the folder again") from error


def open_array(file: Path, length: int) -> np.ndarray:
    """(length,) integers, memory-mapped read-only; ValueError naming a file that is missing or of another size."""
    if not file.is_file():
        raise ValueError(f"{file} is missing; prepare the folder again")
    try:
        array = npy.open_memmap(file, mode="r")  # np.load would also open archives, and try to unpickle
    except UNREADABLE as error:
        raise ValueError(f"{file} is truncated or damaged ({error}); prepare the folder again") from error
    if array.shape != (length,) or array.dtype.kind not in "iu":
        raise ValueError(
            f"{file} holds {array.shape} {array.dtype}, its manifest says {length} whole numbers; prepare the folder "
            "again"
        )
    return array
