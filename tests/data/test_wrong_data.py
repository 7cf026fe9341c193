"""What cannot be read ends in a ValueError that names it, and nothing waits for ever."""

from __future__ import annotations

import copy
import json
import os
import pickle
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from lrt.data.encode import Encoders
from lrt.data.prepare import prepare
from lrt.data.prepared import SPLITS, Prepared
from lrt.data.records import Selection
from lrt.data.tokenizer import LARGEST_VOCAB, Tokenizer

DEEP = "[" * 100_000 + "]" * 100_000


def lines(last: str = "", count: int = 60, more: int = 20) -> str:
    """Records, and `last` as line 61."""
    texts = [
        json.dumps({"text": f"document number {n}, of some length and with words in it", "id": f"{n}"})
        for n in range(count)
    ]
    return "\n".join([*texts, *([last] if last else []), *texts[:more]]) + "\n"


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A prepared folder."""
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": f"document {n} " * 20}) + "\n" for n in range(90)))
    return prepare(tmp_path / "out", [tmp_path / "in.jsonl"], 300, progress=False).path


# Lines of JSON


def test_a_number_of_any_length_is_taken(tmp_path: Path) -> None:
    digits = "7" * 5000
    path = tmp_path / "bigint.jsonl"
    path.write_text(lines('{"text": "one more", "id": ' + digits + "}"))
    made = prepare(tmp_path / "out", [path], 300, progress=False)
    assert sum(entry["documents"] for entry in made.manifest["splits"].values()) == 81
    prepare(tmp_path / "by", [path], 300, progress=False, selection=Selection(split_by="id"))
    path.write_text(lines('{"text": ' + digits + "}"))
    with pytest.raises(ValueError, match=r"line 61 has Decimal in field 'text'; name a field of text"):
        prepare(tmp_path / "x", [path], 300, progress=False)


@pytest.mark.parametrize(
    ("line", "selection", "message"),
    [
        ('{"text": "x", "other": ' + DEEP + "}", Selection(), "is JSON nested too deeply to be read"),
        (DEEP, Selection(), "is JSON nested too deeply to be read"),
        (
            '{"text": "x", "id": "a\\ud83d"}',
            Selection(split_by="id"),
            r"half a surrogate pair \(character 1 of field 'id'\)",
        ),
        ('{"a\\ud83d": 1}', Selection(), r"has no field 'text'; its fields are a\\ud83d"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(line: str, selection: Selection, message: str, tmp_path: Path) -> None:
    path = tmp_path / "docs.jsonl"
    path.write_text(lines(line))
    with pytest.raises(ValueError, match=rf"docs\.jsonl line 61 .*{message}") as raised:
        prepare(tmp_path / "out", [path], 300, progress=False, selection=selection)
    str(raised.value).encode()  # it can be printed


def test_a_column_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    texts = pyarrow.array([b"a text", b"caf\xe9"], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "docs.parquet")
    with pytest.raises(ValueError, match=r"docs\.parquet is damaged behind row 0 .*utf-8"):
        prepare(tmp_path / "out", [tmp_path / "docs.parquet"], 300, progress=False)


# What is no file


def no_files(folder: Path) -> Iterator[tuple[Path, str]]:
    os.mkfifo(folder / "fifo.txt")
    yield folder / "fifo.txt", r"fifo\.txt is a pipe \(FIFO\), not a file"
    os.mkfifo(folder / "fifo.jsonl")
    yield folder / "fifo.jsonl", r"fifo\.jsonl is a pipe"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "socket"))
    yield folder / "socket", "socket is a socket, not a file"
    yield Path("/dev/zero"), "/dev/zero is a device, not a file"
    yield Path("/dev/null"), "/dev/null is a device, not a file"


def refused(path: Path, errors: list[BaseException]) -> None:
    """Append what preparing `path` raises."""
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - its words are looked at in the main thread
        prepare("out", [path], 300, progress=False)
    errors.append(raised.value)


def test_pipes_sockets_and_devices_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    for path, message in no_files(Path()):
        errors: list[BaseException] = []

        # In a thread: a test that waits for ever says nothing.
        thread = threading.Thread(target=refused, args=(path, errors), daemon=True)
        thread.start()
        thread.join(20)
        assert not thread.is_alive(), path
        assert [str(error) for error in errors] == [errors[0].args[0]]
        with pytest.raises(ValueError, match=message):
            raise errors[0]
    (tmp_path / "in").mkdir()
    os.mkfifo(tmp_path / "in" / "fifo")
    (tmp_path / "in" / "text.txt").write_text("a line of text\n" * 300)
    assert [name for name, *_ in prepare("out", [Path("in")], 300, progress=False).manifest["sources"]] == ["text.txt"]


# A prepared folder


def places(data: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in nested dictionaries and lists."""
    for key, below in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        yield (*place, key)
        yield from places(below, (*place, key))


def test_a_manifest_with_anything_in_any_place(made: Path) -> None:
    whole = json.loads((made / "manifest.json").read_text())
    missing = object()
    for place in places(whole):
        for wrong in (missing, None, "x", [], {}, -1, 1e20, 10**30, True):
            manifest = copy.deepcopy(whole)
            parent: Any = manifest
            for key in place[:-1]:
                parent = parent[key]
            if wrong is missing:
                del parent[place[-1]]
            else:
                parent[place[-1]] = wrong
            (made / "manifest.json").write_text(json.dumps(manifest))
            if place[0] in ("inputs", "arguments", "sources", "split_rule"):  # not needed to read it
                Prepared.open(made)
            elif place[-1] != "files":
                with pytest.raises(ValueError, match="again"):
                    [Prepared.open(made).split(name) for name in SPLITS]


@pytest.mark.parametrize(
    "text", [DEEP, '{"format": ' + DEEP + "}", "[1]", '{"format": 2}', '{"format": 1e20}', "\ud83d"]
)
def test_a_manifest_that_is_none(text: str, made: Path) -> None:
    (made / "manifest.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=r"manifest\.json .*prepare the folder again"):
        Prepared.open(made)


def header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK\x03\x04 an archive",
        b"\x93NUMPY\x01\x00",
        pickle.dumps([1, 2, 3]),
        header("{'descr': '<u2', 'fortran_order': False, 'shape': (100000000000000000000,)}"),
        header("{'descr': '<u2', 'fortran_order': False, 'shape': (-1,)}"),
        header("{'descr': '|O', 'fortran_order': False, 'shape': (3,)}"),
        header("{'descr': '<u2', 'fortran_order': False, 'shape': " + "(" * 3000 + ")" * 3000 + "}"),
        header("(" * 9000),
        header("{'descr': '<u2'}"),
    ],
)
def test_an_array_that_is_none(data: bytes, made: Path) -> None:
    for name in ("train.00000.tokens.npy", "train.00000.documents.npy"):
        (made / name).write_bytes(data)
        with pytest.raises(ValueError, match=r"train\.00000.* prepare the folder again"):
            Prepared.open(made)


def test_an_archive_in_place_of_an_array(made: Path) -> None:
    np.savez(made / "x.npz", np.zeros(3, np.uint16))
    (made / "x.npz").rename(made / "val.00000.tokens.npy")
    with pytest.raises(ValueError, match=r"val\.00000\.tokens\.npy is truncated or damaged"):
        Prepared.open(made)


@pytest.mark.parametrize(
    "text", ["", "{", DEEP, "[]", "{}", '{"place": 3, "splits": {}}', '{"place": [0, [1, 2], 3], "splits": {}}']
)
def test_a_damaged_state_of_an_interrupted_preparation(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(lines(more=60))
    with monkeypatch.context() as patch:
        patch.setattr(Encoders, "map", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path / "out", [path], 300, progress=False)
    (tmp_path / ".out.part" / "state.json").write_text(text)
    with pytest.raises(ValueError, match=r"state\.json is damaged .*call it again to begin anew"):
        prepare(tmp_path / "out", [path], 300, progress=False)
    prepare(tmp_path / "out", [path], 300, progress=False)


def test_a_tokenizer_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    for data in (b"", DEEP.encode(), b'{"version": 1e20}', b"\x80", pickle.dumps([1]), b"null"):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"tokenizer\.json is not a readable tokenizer"):
            Tokenizer.load(path)


# Numbers that cannot be


def test_numbers_that_are_too_large(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(lines(more=60))
    for vocab_size in (LARGEST_VOCAB + 1, 10**20):
        with pytest.raises(ValueError, match=rf"vocab_size is {vocab_size}; at most 4,194,304"):
            prepare(tmp_path / "out", [path], vocab_size, progress=False)
    for workers in (-1, 1025, 10**20):
        with pytest.raises(ValueError, match=rf"workers is {workers}; give 0 .* to 1024"):
            prepare(tmp_path / "out", [path], 300, progress=False, workers=workers)
    limit = Selection(documents=10**20)
    assert prepare(tmp_path / "out", [path], 300, progress=False, selection=limit, shard_tokens=10**20).vocab_size > 256
