"""A prepared folder, read: documents of token ids, memory-mapped and held against the manifest.

`lrt.data.prepare` says what the folder holds and makes it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lrt.config import require
from lrt.data.tokenizer import Tokenizer

FORMAT = 1
"""Version of the folder's layout; another one is prepared anew."""
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Documents:
    """Token ids of the documents of one split. `documents[i]` is document i, `for` runs over all."""

    tokens: np.ndarray
    """(n,) uint16, uint32 or any integers: all documents, one after another, without BOS."""
    offsets: np.ndarray
    """(D + 1,) int64: document i is tokens[offsets[i]:offsets[i + 1]]; no document is empty."""
    bos: int
    """Id of the token that opens a document."""
    bytes: int = 0
    """UTF-8 size of all documents together; 0 where it is not known."""

    def __post_init__(self) -> None:
        ends = self.offsets
        require(
            len(ends) >= 2 and ends[0] == 0 and ends[-1] == len(self.tokens) and bool((np.diff(ends) > 0).all()),
            f"the document offsets do not divide the {len(self.tokens)} tokens into non-empty documents; "
            "give each document's start, ascending from 0, and last the number of tokens",
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        """Tokens of document `index`, 0 to len - 1, as a view."""
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


@dataclass(frozen=True)
class Prepared:
    """A prepared folder, checked against its manifest."""

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
            require(
                manifest["tokenizer_sha256"] == tokenizer.sha256 and manifest["vocab_size"] == tokenizer.vocab_size,
                f"{path / 'tokenizer.json'} is not the tokenizer of {path / 'manifest.json'}; prepare the folder again",
            )
            splits = {name: open_split(path, name, manifest["splits"][name], tokenizer) for name in SPLITS}
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{path / 'manifest.json'} is damaged (missing or malformed: {error}); prepare the folder again"
            ) from error
        return cls(path, manifest, tokenizer, splits)

    @property
    def fingerprint(self) -> str:
        """A hash of the tokens of all splits and of the tokenizer: equal data, equal fingerprint."""
        hashes = [self.manifest["tokenizer_sha256"], *(self.manifest["splits"][name]["sha256"] for name in SPLITS)]
        return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()

    @property
    def vocab_size(self) -> int:
        """V of the tokenizer, which the model's must equal: a small text may give fewer tokens than asked for."""
        return self.tokenizer.vocab_size

    def split(self, name: str) -> Documents:
        """The documents of `train`, `val` or `test`."""
        require(name in self.splits, f"there is no split {name!r}; choose one of {', '.join(SPLITS)}")
        return self.splits[name]


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a prepared folder; ValueError naming what is missing, damaged or of another format."""
    file = path / "manifest.json"
    require(file.is_file(), f"{path} is not a prepared folder: there is no {file}; prepare it first")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}); prepare the folder again") from error
    require(
        isinstance(manifest, dict) and manifest.get("format") == FORMAT,
        f"{file} is not a manifest of format {FORMAT}; prepare the folder again",
    )
    return manifest


def open_split(path: Path, name: str, entry: dict[str, Any], tokenizer: Tokenizer) -> Documents:
    """One split, memory-mapped, of the sizes its manifest entry says."""
    tokens = open_array(path / f"{name}.tokens.npy", entry["tokens"])
    offsets = np.asarray(open_array(path / f"{name}.documents.npy", entry["documents"] + 1))
    try:
        return Documents(tokens, offsets, tokenizer.bos, entry["bytes"])
    except ValueError as error:
        raise ValueError(f"{path / f'{name}.documents.npy'} is damaged ({error}); prepare the folder again") from error


def open_array(file: Path, length: int) -> np.ndarray:
    """(length,) integers, memory-mapped read-only; ValueError naming a file that is missing or of another size."""
    require(file.is_file(), f"{file} is missing; prepare the folder again")
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{file} is truncated or damaged ({error}); prepare the folder again") from error
    require(
        array.shape == (length,) and array.dtype.kind in "iu",
        f"{file} holds {array.shape} {array.dtype}, its manifest says {length} whole numbers; prepare the folder again",
    )
    return array
