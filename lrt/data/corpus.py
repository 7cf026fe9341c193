"""A corpus: its sources in a fixed order, what they are made of, and their text in groups of a bounded size."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lrt.data.hub import Dataset, hub_source
from lrt.data.records import SOURCES, Selection, suffix_of
from lrt.data.sources import Mark, Piece, Source, TextFile, readable, text_chunks
from lrt.data.splits import assign, cut_file
from lrt.utils.progress import Advance

SPLIT_BY_FILE = 10
"""With fewer text files than this each is cut into three contiguous parts."""
SMALLEST_TEXT = 2000
"""Bytes of text below which there is nothing to train on, choose by and report on."""
GROUP_BYTES = 1 << 19
"""UTF-8 bytes encoded at a time: enough to be worth sending to a process, small enough to hold many of."""
STDLIB_SKIPS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
"""Directories of a Python installation that are not its standard library's own source."""


class CorpusPosition(NamedTuple):
    """How far a corpus was read, as plain data for JSON."""

    source: int = 0
    mark: Mark | None = None
    documents: int = 0
    """Documents taken, in all sources."""


class DocumentGroup(NamedTuple):
    """Consecutive pieces, and the place behind them."""

    pieces: list[tuple[int, Piece]]
    """Each with the number of its source."""
    after: CorpusPosition


@dataclass(frozen=True)
class Corpus:
    """All the text of one call of `prepare`."""

    sources: Sequence[Source]
    description: list[list[Any]]
    """[name, bytes, SHA-256 or revision] of every file or data set: two corpora with the same are the same."""
    limit: int | None
    """Documents to take."""

    @property
    def size(self) -> int:
        """What reading all of it amounts to, for a progress bar; 0 where that is not known."""
        sizes = [source.size for source in self.sources]
        return sum(sizes) if all(sizes) and self.limit is None else 0

    def groups(self, after: CorpusPosition) -> Iterator[DocumentGroup]:
        """The pieces behind `after`, in groups of about `GROUP_BYTES`."""
        pieces, size, place, documents = [], 0, after, after.documents
        for number, source in enumerate(self.sources[after.source :], after.source):
            if documents == self.limit:
                break
            with closing(source.read(after.mark if number == after.source else None)) as found:
                for piece, mark in found:
                    if documents == self.limit:
                        break
                    pieces.append((number, piece))
                    size += piece.size
                    documents += piece.last
                    place = CorpusPosition(number, mark, documents)
                    if size >= GROUP_BYTES:
                        yield DocumentGroup(pieces, place)
                        pieces, size = [], 0
        if pieces:
            yield DocumentGroup(pieces, place)

    def sample(self, limit: int) -> Iterator[str]:
        """At most about `limit` bytes of the training split: every source's beginning, in equal shares.

        Smallest sources first, so that what they do not use of their share is left to the larger ones; a corpus
        below the limit is taken whole.
        """
        left = limit
        ordered = sorted(self.sources, key=lambda source: source.size or float("inf"))
        for rank, source in enumerate(ordered):
            share = left // (len(ordered) - rank)
            with closing(source.read()) as found:
                for piece, _ in found:
                    if share <= 0:
                        break
                    if piece.split == "train":
                        share -= piece.size
                        left -= piece.size
                        yield piece.text


def open_corpus(
    texts: Sequence[Path] | None, dataset: Dataset | None, selection: Selection, advance: Advance
) -> Corpus:
    """The corpus of `texts` and `dataset`; of the standard library where both are None. Every file is read once."""
    paths: dict[str, Path] = {}
    if texts is None and dataset is None:
        root = Path(sysconfig.get_path("stdlib"))
        paths = {path.relative_to(root).as_posix(): path for path in stdlib_files()}
    elif texts is not None:
        if len(texts) == 0:
            raise ValueError("texts is empty; name at least one text file, or give None for the standard library")
        absolute = [Path(os.path.abspath(path)) for path in texts]
        root = Path(os.path.commonpath([path.parent for path in absolute]))
        for path in absolute:
            name = path.relative_to(root).as_posix()
            if name in paths:
                raise ValueError(f"{path} is given twice; give each file once")
            paths[name] = path
    described, names = [], sorted(paths)
    for name in names:
        described.append([name, *inspect(paths[name])])
        advance(described[-1][1], name)
    sources: list[Source] = []
    plain = [name for name in names if not is_structured(paths[name])]
    if len(plain) == len(names) and dataset is None:
        total = sum(size for _, size, _ in described)
        if total < SMALLEST_TEXT:
            raise ValueError(
                f"the text is too short: {total} bytes in {len(plain)} file(s), at least {SMALLEST_TEXT} are needed "
                "for training, validation and test; add text"
            )
    splits = dict(zip(plain, assign(plain), strict=True)) if len(plain) >= SPLIT_BY_FILE else {}
    for name, size, _ in described:
        path = paths[name]
        if (suffix := suffix_of(path)) is not None:
            sources.append(SOURCES[suffix](path, name, size, selection))
        elif name in splits:
            sources.append(TextFile(path, name, splits[name], 0, size))
        else:
            sources += [TextFile(path, name, *part) for part in cut_file(path)]
    if dataset is not None:
        streamed = hub_source(dataset, selection)
        sources.append(streamed)
        described.append([repr(streamed.dataset), 0, streamed.identity])
    return Corpus(sources, described, selection.documents)


def is_structured(path: Path) -> bool:
    """Whether the name of a file says that it holds records, not text."""
    return suffix_of(path) is not None


def inspect(path: Path) -> tuple[int, str]:
    """(bytes, SHA-256) of a file; ValueError naming one that cannot be read or, as text, not be used."""
    if not is_structured(path):
        for _ in text_chunks(path):
            pass
    with readable(path) as file:
        return os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()


def stdlib_files() -> list[Path]:
    """Source files of the running Python's standard library, tests left out, sorted by relative path.

    Files that are empty or not UTF-8 text are skipped: nobody chose them one by one, so there is nobody to tell.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in STDLIB_SKIPS]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return [path for path in sorted(found, key=lambda p: p.relative_to(root).as_posix()) if usable(path)]


def usable(path: Path) -> bool:
    """Whether `text_chunks` accepts a file."""
    try:
        return all(True for _ in text_chunks(path))
    except ValueError:
        return False


def read_text(path: Path) -> str:
    """The text of a whole file, byte for byte; ValueError as in `text_chunks`."""
    return "".join(text_chunks(path))
