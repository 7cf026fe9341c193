"""A corpus: its sources in a fixed order, what they are made of, and their text in groups of a bounded size.

Inputs are known by content: the SHA-256 of every file, the commit of a data set on the hub. Two corpora of one
description give the same groups, so that a prepared folder can be held against its inputs, and gone on with.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lrt.data.hub import Dataset, hub_source
from lrt.data.records import SOURCES, Selection, suffix_of
from lrt.data.sources import NotTextError, Piece, Source, SourcePosition, TextFile, open_source, text_chunks
from lrt.data.splits import assign_by_content, assign_splits, cut_file
from lrt.utils.progress import Advance, warn

SPLIT_BY_FILE = 10
"""Text files at least, for splits by file; of fewer, or where whole files do not come near the shares of the splits,
every file is cut into three contiguous parts."""
SMALLEST_TEXT = 2000
"""Bytes of text below which there is nothing to train on, choose by and report on."""
GROUP_BYTES = 1 << 19
"""UTF-8 bytes encoded at a time: enough to be worth sending to a process, small enough to hold many of."""
STDLIB_SKIPS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
"""Directories of a Python installation that are not its standard library's own source."""


class CorpusPosition(NamedTuple):
    """How far a corpus was read, as plain data for JSON."""

    source: int = 0
    """The number of the source that is being read."""
    position: SourcePosition | None = None
    """How far that one was read; None before its first piece."""
    documents: int = 0
    """Documents taken, in all sources."""


class DocumentGroup(NamedTuple):
    """Consecutive pieces, which are encoded together, and the place behind them.

    Groups are formed before they are handed to workers, so that no byte depends on how many workers there are.
    """

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
        """Bytes of all sources, for a progress bar; 0 where one does not know its own, or a limit stops the reading."""
        sizes = [source.size for source in self.sources]
        return sum(sizes) if all(sizes) and self.limit is None else 0

    def groups(self, after: CorpusPosition) -> Iterator[DocumentGroup]:
        """The pieces behind `after`, in groups of about `GROUP_BYTES`. A limit counts whole documents."""
        pieces, size, place, documents = [], 0, after, after.documents
        for number, source in enumerate(self.sources[after.source :], after.source):
            if documents == self.limit:
                break
            with closing(source.read(after.position if number == after.source else None)) as pieces_read:
                for piece, position in pieces_read:
                    if documents == self.limit:
                        break
                    pieces.append((number, piece))
                    size += piece.size
                    documents += piece.last
                    place = CorpusPosition(number, position, documents)
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
        remaining = limit
        # A stream does not know its size: it comes last, and takes what the others leave.
        ordered = sorted(self.sources, key=lambda source: source.size or float("inf"))
        for rank, source in enumerate(ordered):
            share = remaining // (len(ordered) - rank)
            with closing(source.read()) as pieces_read:
                for piece, _ in pieces_read:
                    if share <= 0:
                        break
                    if piece.split == "train":
                        share -= piece.size
                        remaining -= piece.size
                        yield piece.text


def open_corpus(
    texts: Sequence[Path] | None, dataset: Dataset | None, selection: Selection, advance: Advance
) -> Corpus:
    """The corpus of `texts` and `dataset`; of the standard library where both are None.

    Every file is read once here: for its digest, and text also to be sure that it is text. What is no text in a folder
    of `texts` is left out, with a warning. ValueError as in `text_chunks` and `hub_source`, for a file named twice, and
    for too little text.
    """
    named = None if texts is None else [Path(path) for path in texts if not Path(path).is_dir()]
    in_folders = [path for folder in texts or () if Path(folder).is_dir() for path in files_in(folder)]
    paths = stdlib_paths() if texts is None and dataset is None else paths_by_name(named, in_folders)
    description: list[list[Any]] = []
    left_out: list[str] = []
    for name in sorted(paths):
        try:
            size, digest = size_and_digest(paths[name])
        except NotTextError as error:
            if paths[name] not in in_folders:
                raise
            left_out.append(str(error))
            continue
        description.append([name, size, digest])
        advance(size, name)
    if left_out:
        warn(f"{len(left_out)} file(s) of the folder are left out: {shortened(left_out)}")
    paths = {name: paths[name] for name, *_ in description}
    if dataset is None and not any(map(is_structured, paths.values())):
        check_size(description)
    sources = file_sources(paths, {name: (size, digest) for name, size, digest in description}, selection)
    if dataset is not None:
        streamed = hub_source(dataset, selection)
        sources.append(streamed)
        description.append([repr(streamed.dataset), 0, streamed.identity])
    return Corpus(sources, description, selection.documents)


def check_size(description: list[list[Any]]) -> None:
    """ValueError for too little plain text, before any work. Of records only the encoder learns how much there is."""
    total = sum(size for _, size, _ in description)
    if total < SMALLEST_TEXT:
        raise ValueError(
            f"the text is too short: {total} bytes in {len(description)} file(s), at least {SMALLEST_TEXT} are needed "
            "for training, validation and test; add text"
        )


def file_sources(paths: Mapping[str, Path], files: Mapping[str, tuple[int, str]], selection: Selection) -> list[Source]:
    """The sources of `paths`, by name; splits of text are by file where there are enough of them.

    files: bytes and digest of each file. The fields of `selection` are for files of records alone, which plain text has
    not, and `Corpus.groups` counts its limit of documents over all sources.
    """
    sources: list[Source] = []
    plain = [name for name in sorted(paths) if not is_structured(paths[name])]
    splits: dict[str, str] = {}
    if len(plain) >= SPLIT_BY_FILE and selection.rule.files == "name":
        splits = dict(zip(plain, assign_splits(plain, selection.rule), strict=True))
    elif len(plain) >= SPLIT_BY_FILE:
        splits = assign_by_content({name: files[name] for name in plain}, selection.rule)
    for name, path in sorted(paths.items()):
        if (suffix := suffix_of(path)) is not None:
            sources.append(SOURCES[suffix](path, name, files[name][0], selection))
        elif name in splits:
            sources.append(TextFile(path, name, splits[name], start=0, stop=files[name][0]))
        else:
            parts = cut_file(path, selection.rule)
            sources += [TextFile(path, name, split, start, stop) for split, start, stop in parts]
    return sources


def files_in(folder: Path) -> list[Path]:
    """All files below a folder, absolute; none of hidden files and folders. ValueError where there are none."""
    paths: list[Path] = []
    for parent, folders, names in os.walk(os.path.abspath(folder)):
        folders[:] = [name for name in folders if not name.startswith(".")]  # in place: os.walk then skips them
        paths += [path for name in names if not name.startswith(".") and (path := Path(parent, name)).is_file()]
    if len(paths) == 0:
        raise ValueError(f"the folder {folder} holds no files; give one with text files in it")
    return paths


def shortened(names: Sequence[str]) -> str:
    """The first three of many names, for a message."""
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def paths_by_name(texts: Sequence[Path] | None, in_folders: Sequence[Path]) -> dict[str, Path]:
    """Files by their path below the folder that holds all of them: names do not depend on where that folder is."""
    if texts is None:
        return {}
    if len(texts) + len(in_folders) == 0:
        raise ValueError("texts is empty; name at least one text file, or give None for the standard library")
    paths: dict[str, Path] = {}
    absolute = [*(Path(os.path.abspath(path)) for path in texts), *in_folders]
    root = Path(os.path.commonpath([path.parent for path in absolute]))
    for path in absolute:
        name = path.relative_to(root).as_posix()
        if name in paths:
            raise ValueError(f"{path} is given twice; give each file once")
        paths[name] = path
    return paths


def stdlib_paths() -> dict[str, Path]:
    """`stdlib_files` by their path below the standard library's folder."""
    root = Path(sysconfig.get_path("stdlib"))
    return {path.relative_to(root).as_posix(): path for path in stdlib_files()}


def is_structured(path: Path) -> bool:
    """Whether the name of a file says that it holds records, not text."""
    return suffix_of(path) is not None


def size_and_digest(path: Path) -> tuple[int, str]:
    """(bytes, SHA-256) of a file. ValueError naming one that cannot be read, or that is text and cannot be used."""
    if not is_structured(path):
        for _ in text_chunks(path):
            pass
    with open_source(path) as file:
        return os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()


def stdlib_files() -> list[Path]:
    """Source files of the running Python's standard library, tests left out, sorted by relative path.

    Files that are empty or not UTF-8 text are skipped: nobody chose them one by one, so there is nobody to tell.
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in STDLIB_SKIPS]  # in place: os.walk then skips them
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    return [path for path in sorted(paths, key=lambda p: p.relative_to(root).as_posix()) if is_text(path)]


def is_text(path: Path) -> bool:
    """Whether `text_chunks` accepts a file."""
    try:
        return all(True for _ in text_chunks(path))
    except ValueError:
        return False


def read_text(path: Path) -> str:
    """The text of a whole file, byte for byte; ValueError as in `text_chunks`."""
    return "".join(text_chunks(path))
