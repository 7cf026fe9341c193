"""Documents in records: JSON lines, compressed or not, and Parquet; which field holds the text and which the split."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

from lrt.data.sources import PieceStream, Source, SourcePosition, cut_documents, open_source, with_positions
from lrt.data.splits import BY_CONTENT, SplitRule, split_of
from lrt.utils.imports import optional_module
from lrt.utils.registry import Registry

LONGEST_LINE = 1 << 24
"""Bytes of the longest line of JSON that is read (16 MB): one document is held in memory."""
PARQUET_ROWS = 64
"""Rows decoded at a time."""
COMPRESSIONS = ("", ".gz", ".xz", ".zst")
"""Endings behind .jsonl; "" is none."""
JSON_LINES = tuple(kind + suffix for kind in (".jsonl", ".ndjson") for suffix in COMPRESSIONS)


@dataclass(frozen=True)
class Selection:
    """What to take of JSON lines, Parquet and data sets, and how to split it."""

    field: str = "text"
    """The field or column that holds the text."""
    split_by: str | None = None
    """A field or column whose value decides the split, so that documents which share it stay together. None: the
    text decides, and only equal documents stay together."""
    split_until: str | None = None
    """Only the part of that value before this string: with `split_by` id and "/" all of Author/Title#1 … of one author
    stay together."""
    documents: int | None = None
    """Stop after so many documents. None: take all."""
    rule: SplitRule = BY_CONTENT
    """The shares of the splits, and what decides for files of text."""

    def __post_init__(self) -> None:
        if self.split_until is not None and (self.split_by is None or self.split_until == ""):
            raise ValueError(f"split_until is {self.split_until!r}; it needs split_by, and at least one character")
        if self.documents is not None and self.documents < 1:
            raise ValueError(f"documents is {self.documents}; take at least 1, or give None for all")

    @property
    def columns(self) -> list[str]:
        """The fields that are read."""
        return list(dict.fromkeys([self.field, *([self.split_by] if self.split_by else [])]))

    def document(self, record: dict[str, Any], where: str) -> tuple[str, str] | None:
        """(text, split) of a record; None where it holds no text. ValueError saying `where` a field is wrong."""
        for name in self.columns:
            if name not in record:
                fields = ", ".join(map(str, record)).encode("utf-8", "backslashreplace").decode()
                raise ValueError(
                    f"{where} has no field {name!r}; its fields are {fields}: "
                    f"name one with --{'field' if name == self.field else 'split-by'}"
                )
        text = record[self.field]
        if text is None or text == "":
            return None
        if not isinstance(text, str):
            raise ValueError(
                f"{where} has {type(text).__name__} in field {self.field!r}; name a field of text with --field"
            )
        check_unicode(text, self.field, where)
        if self.split_by is None:
            return text, split_of(text, self.rule)
        key = str(record[self.split_by])
        check_unicode(key, self.split_by, where)
        return text, split_of(key if self.split_until is None else key.partition(self.split_until)[0], self.rule)


def check_unicode(text: str, field: str, where: str) -> None:
    """ValueError saying where half a surrogate pair is, which JSON can spell and UTF-8 cannot."""
    if text.isascii():  # most texts are, and need no second look
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} holds half a surrogate pair (character {error.start} of field {field!r}), which is no text; "
            "repair or remove it"
        ) from error


def read_int(digits: str) -> int | Decimal:
    """A whole number of JSON, which has no limit: what Python does not read as an int (5,000 digits) is a Decimal."""
    try:
        return int(digits)
    except ValueError:
        return Decimal(digits)


@dataclass(frozen=True)
class JsonLines:
    """A file with one JSON object per line, compressed or not."""

    path: Path
    name: str
    size: int
    selection: Selection

    def read(self, after: SourcePosition | None = None) -> PieceStream:
        with open_source(self.path) as raw:
            yield from with_positions(cut_documents(self.documents(raw)), after, raw.tell)

    def documents(self, raw: io.BufferedReader) -> Iterator[tuple[str, str]]:
        """(text, split) of each document; ValueError naming the file and the line where something is wrong."""
        number = 0
        try:
            with open_uncompressed(raw, self.path) as stream:
                while line := stream.readline(LONGEST_LINE + 1):
                    number += 1
                    if not line.isspace() and (document := self.document(line, number)) is not None:
                        yield document
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            raise ValueError(
                f"{self.path} is damaged behind line {number} ({error}); copy or download it again"
            ) from error

    def document(self, line: bytes, number: int) -> tuple[str, str] | None:
        """(text, split) of one line, or None where it holds no text."""
        where = f"{self.path} line {number}"
        if len(line) > LONGEST_LINE:
            raise ValueError(
                f"{where} is longer than {LONGEST_LINE:,} bytes; cut the document, or give it as a text file"
            )
        try:
            record = json.loads(line, parse_int=read_int)
        except ValueError as error:
            raise ValueError(f"{where} is not JSON ({error}); repair or remove it") from error
        except RecursionError:
            raise ValueError(f"{where} is JSON nested too deeply to be read; flatten or remove it") from None
        if not isinstance(record, dict):
            raise ValueError(f"{where} is {type(record).__name__}, no JSON object; repair or remove it")
        return self.selection.document(record, where)


def open_uncompressed(raw: io.BufferedReader, path: Path) -> io.BufferedIOBase:
    """`raw` without the compression that the name of `path` says."""
    match path.suffix:
        case ".gz":
            return gzip.open(raw)
        case ".xz":
            return lzma.open(raw)
        case ".zst":  # by pyarrow: it notices a file that ends too early, which zstandard's stream reader does not
            return io.BufferedReader(
                optional_module("pyarrow", "data", f"reading {path}").input_stream(raw, compression="zstd")
            )
        case _:
            return raw


@dataclass(frozen=True)
class Parquet:
    """A Parquet file with a column of text."""

    path: Path
    name: str
    size: int
    selection: Selection

    def read(self, after: SourcePosition | None = None) -> PieceStream:
        done = 0  # bytes, by the share of rows: for the progress bar

        def documents() -> Iterator[tuple[str, str]]:
            nonlocal done
            for row, (share, record) in enumerate(self.records(), 1):
                done = int(share * self.size)
                if (document := self.selection.document(record, f"{self.path} row {row}")) is not None:
                    yield document

        return with_positions(cut_documents(documents()), after, lambda: done)

    def records(self) -> Iterator[tuple[float, dict[str, Any]]]:
        """The columns of `selection` of every row, with the share of rows that were read, 0 to 1."""
        arrow, parquet = (
            optional_module(module, "data", f"reading {self.path}") for module in ("pyarrow", "pyarrow.parquet")
        )
        row, columns = 0, self.selection.columns
        try:
            # Buffered, and nothing read ahead: a megabyte per column in memory, not a row group.
            with parquet.ParquetFile(self.path, buffer_size=1 << 20, pre_buffer=False) as file:
                names, rows = file.schema_arrow.names, file.metadata.num_rows
                for name in columns:
                    option = "field" if name == self.selection.field else "split-by"
                    if name not in names:
                        raise ValueError(
                            f"{self.path} has no column {name!r}; its columns are {', '.join(names)}: "
                            f"name one with --{option}"
                        )
                for batch in file.iter_batches(PARQUET_ROWS, columns=columns, use_threads=False):
                    for record in batch.to_pylist():
                        row += 1
                        yield row / rows, record
        except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:  # the last: a column's text is not UTF-8
            raise ValueError(f"{self.path} is damaged behind row {row} ({error}); copy or download it again") from error


@dataclass(frozen=True)
class Records:
    """A file of a kind that a user registered."""

    path: Path
    name: str
    size: int
    selection: Selection
    records: Callable[[Path], Iterable[dict[str, Any]]]

    def read(self, after: SourcePosition | None = None) -> PieceStream:
        done = 0

        def documents() -> Iterator[tuple[str, str]]:
            nonlocal done
            for number, record in enumerate(self.records(self.path), 1):
                if (document := self.selection.document(record, f"{self.path} record {number}")) is not None:
                    done = min(self.size, done + len(document[0].encode()))
                    yield document

        return with_positions(cut_documents(documents()), after, lambda: done)


SOURCES: Registry[Callable[[Path, str, int, Selection], Source]] = Registry(
    "source", {**dict.fromkeys(JSON_LINES, JsonLines), ".parquet": Parquet}
)
"""How a file's name ends -> what reads it, made from (path, name, bytes, selection)."""


def register_source(suffix: str, records: Callable[[Path], Iterable[dict[str, Any]]]) -> None:
    """Let `lrt prepare` read files whose names end in `suffix`: `records(path)` gives a dictionary per document.

    Which field holds the text, and how documents are split, the options of `lrt prepare` say as for JSON lines. The
    records must follow from the file alone, in one order: that is how preparing goes on after an interruption.
    ValueError where the suffix is taken.

    >>> import csv, lrt
    >>> def rows(path):
    ...     with path.open(newline="") as file:
    ...         yield from csv.DictReader(file)
    >>> lrt.register_source(".csv", rows)
    """
    SOURCES.register(suffix, partial(Records, records=records), stacklevel=2)


def suffix_of(path: Path) -> str | None:
    """The entry of `SOURCES` that reads a file; None for a file of text."""
    return max((suffix for suffix in SOURCES if path.name.endswith(suffix)), key=len, default=None)
