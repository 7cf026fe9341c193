"""Where text comes from: a source is a stream of pieces of documents. Text files are read here.

A piece is a document, or a part of one that is too long to be held or encoded at once: nothing grows with the corpus.
Which pieces there are follows from the content alone, so that "n pieces taken" is a place to go on from. To go on, a
file is read again up to there; reading is a small part of encoding.
"""

from __future__ import annotations

import codecs
import io
import stat
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

PIECE = 1 << 18
"""Characters of the longest piece, and bytes of a file that are read at a time."""


KINDS = {stat.S_IFIFO: "pipe (FIFO)", stat.S_IFSOCK: "socket"}
"""What a path may be that is neither a file nor a folder; else it is a device."""


class NotTextError(ValueError):
    """A file that can be read, but is no text: binary, not UTF-8, or blank."""


class Piece(NamedTuple):
    """A document, or a part of a long one."""

    text: str
    size: int
    """UTF-8 bytes."""
    split: str
    last: bool
    """Whether its document ends with it."""
    first: bool = True
    """Whether its document begins with it."""


class SourcePosition(NamedTuple):
    """A place in a source, as plain data for JSON: where a later run goes on."""

    pieces: int
    """Pieces taken, in all or since `state`."""
    at: int
    """Of the source's `size`, in bytes: for the progress bar."""
    state: dict[str, Any] | None = None
    """What the `datasets` library needs to be here without reading what came before."""


PieceStream = Generator[tuple[Piece, SourcePosition], None, None]
"""Pieces, each with the place behind it. Who stops early closes it, which closes its file."""


class Source(Protocol):
    """A file or data set of text."""

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int:
        """What `Mark.at` reaches at the end; 0 where that is not known."""
        ...

    def read(self, after: SourcePosition | None = None) -> PieceStream:
        """The pieces behind `after` (None: all), each with the place behind itself."""
        ...


# Pieces
def cut_text(chunks: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """A text that comes in chunks as pieces of at most `PIECE` characters, each with whether it is the last.

    Cut after a line, or before a word, in the later half of a piece, where nearly every tokenizer cuts too: a token
    may differ there from those of the whole text, and all bytes are kept.
    """
    rest = ""
    for chunk in chunks:
        rest += chunk
        while len(rest) > PIECE:
            # rfind + 1 is behind the newline, and 0 where there is none.
            cut = rest.rfind("\n", PIECE // 2, PIECE) + 1 or max(rest.rfind(" ", PIECE // 2, PIECE), 0) or PIECE
            yield rest[:cut], False
            rest = rest[cut:]
    yield rest, True


def cut_documents(documents: Iterable[tuple[str, str]]) -> Iterator[Piece]:
    """The pieces of documents, which are (text, split)."""
    for text, split in documents:
        first = True
        for part, last in cut_text([text]):
            yield Piece(part, len(part.encode()), split, last, first)
            first = False


def with_positions(pieces: Iterable[Piece], after: SourcePosition | None, at: Callable[[], int]) -> PieceStream:
    """The pieces behind `after`, each with its position; `at` tells how much of the source was read by then."""
    taken = 0 if after is None else after.pieces
    for number, piece in enumerate(pieces, 1):
        if number > taken:
            yield piece, SourcePosition(number, at())


# Text files
@dataclass(frozen=True)
class TextFile:
    """A text file, or a range of its bytes: one document."""

    path: Path
    name: str
    split: str
    """The split that all of it falls to."""
    start: int
    """Its first byte in the file."""
    stop: int
    """Behind its last byte."""

    @property
    def size(self) -> int:
        return self.stop - self.start

    def read(self, after: SourcePosition | None = None) -> PieceStream:
        done = 0

        def read_pieces() -> Iterator[Piece]:
            nonlocal done
            for text, last in cut_text(text_chunks(self.path, self.start, self.stop)):
                size = len(text.encode())
                done += size
                yield Piece(text, size, self.split, last, first=done == size)

        return with_positions(read_pieces(), after, lambda: done)


def text_chunks(path: Path, start: int = 0, stop: int | None = None) -> Iterator[str]:
    """The text of a file or of a range of its bytes, byte for byte: newlines and a byte-order mark stay.

    ValueError naming the file if it is missing, a directory, unreadable, binary (a NUL byte, or not UTF-8) or blank.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a directory; give a file")
    decoder = codecs.getincrementaldecoder("utf-8")()
    place, blank = start, True
    with open_source(path) as file:
        file.seek(start)
        while data := file.read(PIECE if stop is None else min(PIECE, stop - place)):
            nul = data.find(b"\0")
            if nul >= 0:
                raise NotTextError(f"{path} is binary (a NUL byte at offset {place + nul}); give a text file in UTF-8")
            held = len(decoder.getstate()[0])  # bytes of a character that began in the chunk before
            try:
                text = decoder.decode(data)
            except UnicodeDecodeError as error:
                raise not_utf8_error(path, error, place - held) from error
            place += len(data)
            blank = blank and (text == "" or text.isspace())
            yield text
    try:
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise not_utf8_error(path, error, place - len(error.object)) from error
    if blank and start <= 0 and (stop is None):
        raise NotTextError(f"{path} holds no text ({place} bytes); leave it out")


def not_utf8_error(path: Path, error: UnicodeDecodeError, offset: int) -> NotTextError:
    """The error that says where `path` stops being UTF-8: `error` counts from `offset`."""
    return NotTextError(
        f"{path} is not UTF-8 text (byte 0x{error.object[error.start]:02x} at offset {offset + error.start}); "
        "convert it, for example with iconv -t UTF-8, or leave it out"
    )


def open_source(path: Path) -> io.BufferedReader:
    """The file, open for reading bytes; ValueError naming it where it cannot be opened, or is no file.

    A pipe would be waited for, a device may never end, and neither can be read twice.
    """
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # of a folder, opening says so
            raise ValueError(f"{path} is a {KINDS.get(stat.S_IFMT(mode), 'device')}, not a file; save its text to one")
        return path.open("rb")
    except FileNotFoundError as error:
        raise ValueError(f"there is no file {path}; check the path") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error}); check its permissions") from error
