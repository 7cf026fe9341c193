"""From any source to the same bytes: JSON lines, Parquet, data sets, however many workers, however often killed."""

from __future__ import annotations

import gzip
import itertools
import json
import lzma
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow
import pytest
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import LocalEntryNotFoundError
from pyarrow import parquet

from lrt.data import corpus, encode_worker, hub, records, sources
from lrt.data import prepare as preparing
from lrt.data.corpus import read_text
from lrt.data.encode import Encoders
from lrt.data.hub import Dataset
from lrt.data.loader import Position, Rows
from lrt.data.prepare import prepare
from lrt.data.prepared import Prepared
from lrt.data.records import JsonLines, Parquet, Selection
from lrt.data.sources import Piece, SourcePosition, TextFile, cut_text
from lrt.data.splits import split_of
from lrt.data.tokenizer import Tokenizer
from lrt.data.windows import windows
from lrt.utils.imports import MissingExtraError

ROOT = Path(__file__).resolve().parents[2]


def records_of(count: int, length: int = 12) -> list[dict[str, object]]:
    """Documents of different lengths, by 100 authors."""
    return [
        {
            "id": f"Author {n % 100}/Title {n % 200}#{n}",
            "text": f"Document {n}: größer 🙂\n" + "".join(f"line {n * k} of it\n" for k in range(n % length)),
        }
        for n in range(count)
    ]


def write_json_lines(path: Path, found: list[dict[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(record) + "\n" for record in found).encode()
    match path.suffix:
        case ".gz":
            data = gzip.compress(data)
        case ".xz":
            data = lzma.compress(data, preset=1)
        case ".zst":
            half = len(data) // 2  # two frames, as parallel compressors write them
            data = b"".join(pyarrow.compress(part, codec="zstd", asbytes=True) for part in (data[:half], data[half:]))
    path.write_bytes(data)
    return path


def write_parquet(path: Path, found: list[dict[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(found), path, row_group_size=100)
    return path


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.json."""
    path = tmp_path_factory.mktemp("given") / "tokenizer.json"
    Tokenizer.train([str(record["text"]) for record in records_of(100)], 400).save(path)
    return path


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that happens at the size of gigabytes happens at that of kilobytes."""
    monkeypatch.setattr(corpus, "GROUP_BYTES", 4000)
    monkeypatch.setattr(preparing, "GROUPS_PER_STATE", 2)
    monkeypatch.setattr(sources, "PIECE", 100)
    monkeypatch.setattr(hub, "SNAPSHOT", 50)


def texts_of(made: Prepared) -> dict[str, list[str]]:
    return {
        name: [made.tokenizer.decode(document.tolist()) for document in made.split(name)]
        for name in ("train", "val", "test")
    }


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a prepared folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# The same documents, whatever holds them


def test_every_format_gives_the_same_documents(tmp_path: Path, given: Path) -> None:
    found = records_of(300)
    paths = [write_json_lines(tmp_path / f"docs.jsonl{end}", found) for end in ("", ".gz", ".xz", ".zst")]
    paths.append(write_parquet(tmp_path / "docs.parquet", found))
    made = [prepare(tmp_path / f"out{i}", [path], tokenizer=given, progress=False) for i, path in enumerate(paths)]
    folder = write_parquet(tmp_path / "folder" / "part.parquet", found).parent
    made.append(prepare(tmp_path / "set", tokenizer=given, progress=False, dataset=Dataset(str(folder))))
    folder = write_json_lines(tmp_path / "lines" / "part.jsonl", found).parent
    made.append(prepare(tmp_path / "set2", tokenizer=given, progress=False, dataset=Dataset(str(folder))))
    expected: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for record in found:
        expected[split_of(str(record["text"]))].append(str(record["text"]))
    assert min(map(len, expected.values())) > 3
    for each in made:
        assert texts_of(each) == expected
        assert each.manifest["splits"] == made[0].manifest["splits"]
        assert each.manifest["splits"]["val"]["bytes"] == sum(len(text.encode()) for text in expected["val"])


def test_text_json_lines_parquet_and_a_data_set_together(tmp_path: Path, given: Path) -> None:
    found = records_of(200)
    text = tmp_path / "in" / "notes.txt"
    write_json_lines(tmp_path / "in" / "a.jsonl", found[:50])
    text.write_text("".join(f"line {n}\n" for n in range(300)))
    paths = [tmp_path / "in" / "a.jsonl", text, write_parquet(tmp_path / "in" / "b.parquet", found[50:100])]
    folder = write_parquet(tmp_path / "folder" / "part.parquet", found[100:]).parent
    made = prepare(tmp_path / "out", paths, tokenizer=given, progress=False, dataset=Dataset(str(folder)))
    parts = texts_of(made)
    assert "".join(parts[name][i] for name, i in (("train", -1), ("val", -1), ("test", -1))) != ""
    everything = [document for part in parts.values() for document in part]
    assert {record["text"] for record in found} <= set(everything)
    pieces_of_text = [document for document in everything if document.startswith("line ")]
    assert "".join(sorted(pieces_of_text, key=read_text(text).index)) == read_text(text)
    assert [name for name, *_ in made.manifest["sources"]][:3] == ["a.jsonl", "b.parquet", "notes.txt"]


def test_documents_that_share_a_value_stay_together(tmp_path: Path, given: Path) -> None:
    path = write_json_lines(tmp_path / "docs.jsonl", records_of(400))
    selection = Selection(split_by="id", split_until="/")
    made = prepare(tmp_path / "out", [path], tokenizer=given, progress=False, selection=selection)
    authors = {
        name: {int(text.split(":")[0].removeprefix("Document ")) % 100 for text in part}
        for name, part in texts_of(made).items()
    }
    assert sum(map(len, authors.values())) == 100 == len(set.union(*authors.values()))
    assert all(split_of(f"Author {n}") == name for name, part in authors.items() for n in part)


def test_a_number_of_documents(tmp_path: Path, given: Path) -> None:
    path = write_json_lines(tmp_path / "docs.jsonl", records_of(400))
    made = prepare(tmp_path / "out", [path], tokenizer=given, progress=False, selection=Selection(documents=150))
    short = write_json_lines(tmp_path / "short" / "docs.jsonl", records_of(400)[:150])
    same = prepare(tmp_path / "same", [short], tokenizer=given, progress=False)
    assert made.manifest["splits"] == same.manifest["splits"]
    assert sum(entry["documents"] for entry in made.manifest["splits"].values()) == 150


def test_presets_take_other_configurations() -> None:
    assert hub.resolve_preset(Dataset("fineweb-edu")) == Dataset("HuggingFaceFW/fineweb-edu", "sample-10BT")
    assert hub.resolve_preset(Dataset("fineweb-edu", "sample-100BT", revision="v1")) == Dataset(
        "HuggingFaceFW/fineweb-edu", "sample-100BT", revision="v1"
    )
    assert hub.resolve_preset(Dataset("climbmix")).name == "karpathy/climbmix-400b-shuffle"
    assert hub.resolve_preset(Dataset("someone/else")) == Dataset("someone/else")


def test_a_hub_name_is_streamed_at_a_fixed_revision(
    tmp_path: Path, given: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the code that reads the hub, with the two calls that need it answered here."""
    import datasets
    import huggingface_hub

    folder = write_parquet(tmp_path / "folder" / "part.parquet", records_of(200)).parent
    load, asked = datasets.load_dataset, []

    class Info:
        sha = "c0ffee"

    def answer(name: str, config: str | None, **options: object) -> object:
        asked.append((name, config, options))
        return load(str(folder), None, **(options | {"revision": None}))

    monkeypatch.setattr(datasets, "load_dataset", answer)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: Info())
    made = prepare(tmp_path / "out", tokenizer=given, progress=False, dataset=Dataset("fineweb-edu"))
    name, config, options = asked[0]
    assert (name, config) == ("HuggingFaceFW/fineweb-edu", "sample-10BT")
    assert options == {"split": "train", "streaming": True, "revision": "c0ffee"}
    assert made.manifest["sources"][-1][-1] == "c0ffee"
    same = prepare(tmp_path / "same", tokenizer=given, progress=False, dataset=Dataset(str(folder)))
    assert made.manifest["splits"] == same.manifest["splits"]


# Pieces and places


@pytest.mark.parametrize("text", ["ab c\n" * 200, "é🙂" * 300, " " * 500, "a" * 99 + "\n" * 102, "", "short"])
def test_pieces_hold_the_text(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PIECE", 100)
    found = list(cut_text([text]))
    assert "".join(part for part, _ in found) == text
    assert [last for _, last in found] == [False] * (len(found) - 1) + [True]
    assert all(len(part) <= 100 for part, _ in found)
    assert min((len(part) for part, last in found if not last), default=50) >= 50
    for size in (1, 7, 100, 333):
        assert list(cut_text(text[i : i + size] for i in range(0, len(text), size))) == found


def test_cutting_after_lines_leaves_tokens_as_they_are(given: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PIECE", 100)
    tokenizer = Tokenizer.load(given)
    text = "".join(f"a line, number {n}, and some words\n" for n in range(200))
    parts = [part for part, _ in cut_text([text])]
    assert len(parts) > 50
    assert [i for part in parts for i in tokenizer.encode(part)] == tokenizer.encode(text)


@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize("kind", ["text", "json", "parquet", "data set"])
def test_reading_goes_on_from_every_mark(kind: str, tmp_path: Path) -> None:
    found = records_of(230)
    source: sources.Source
    match kind:
        case "text":
            (tmp_path / "a.txt").write_text("größer 🙂 und so weiter\n" * 800)
            source = TextFile(tmp_path / "a.txt", "a.txt", "train", 26, (tmp_path / "a.txt").stat().st_size)
        case "json":
            path = write_json_lines(tmp_path / "a.jsonl.gz", found)
            source = JsonLines(path, "a", path.stat().st_size, Selection())
        case "parquet":
            path = write_parquet(tmp_path / "a.parquet", found)
            source = Parquet(path, "a", path.stat().st_size, Selection())
        case _:
            write_parquet(tmp_path / "in" / "a.parquet", found[:120])
            write_parquet(tmp_path / "in" / "b.parquet", found[120:])
            source = hub.hub_source(Dataset(str(tmp_path / "in")), Selection())
    whole = list(source.read())
    assert len(whole) > 100
    for taken in (1, 2, 49, 51, 60, 99, len(whole) - 1, len(whole)):
        mark = SourcePosition(*json.loads(json.dumps(whole[taken - 1][1])))
        assert [piece for piece, _ in source.read(mark)] == [piece for piece, _ in whole[taken:]]
    if kind == "data set":  # and what came before the last state is not read again
        late = whole[-1][1]
        assert late.state is not None
        assert late.state["seen"] == 200
        assert late.pieces < len(whole) / 2
    if source.size:
        assert 0.5 * source.size < whole[-1][1].at <= source.size


class Frozen:
    """A stream that reports the state it was given, noting that, however far it has read since: datasets 5.0.0."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.loaded: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.stream)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = {**state, "resumed": True}
        self.stream.load_state_dict({key: state[key] for key in state if key != "resumed"})

    def state_dict(self) -> dict[str, Any]:
        return self.stream.state_dict() if self.loaded is None else self.loaded


class Forgetful(Frozen):
    """A stream that moves, but begins anew whatever state it is given."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = None


@pytest.mark.parametrize("stream", [None, Frozen, Forgetful])
@pytest.mark.parametrize("stops", [(5,), (15, 25), (25, 31, 11), (12, 13, 14, 15, 16)])
def test_a_data_set_goes_on_however_often_it_is_stopped(
    stream: type[Frozen] | None, stops: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "SNAPSHOT", 10)
    write_json_lines(tmp_path / "in" / "a.jsonl", records_of(60))
    write_json_lines(tmp_path / "in" / "b.jsonl", records_of(95)[60:])
    source = hub.hub_source(Dataset(str(tmp_path / "in")), Selection())
    whole = [piece for piece, _ in source.read()]
    if stream is not None:
        opened = hub.open_stream
        monkeypatch.setattr(hub, "open_stream", lambda *arguments: stream(opened(*arguments)))
    taken, mark = [], None
    for count in stops:
        with closing(source.read(mark)) as pieces:
            read = list(itertools.islice(pieces, count))
        taken += [piece for piece, _ in read]
        mark = SourcePosition(*json.loads(json.dumps(read[-1][1])))
    assert taken + [piece for piece, _ in source.read(mark)] == whole


def test_a_state_of_the_last_version_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not name the record that follows, so that nothing can vouch for it."""
    monkeypatch.setattr(hub, "SNAPSHOT", 10)
    write_json_lines(tmp_path / "in" / "a.jsonl", records_of(60))
    source = hub.hub_source(Dataset(str(tmp_path / "in")), Selection())
    whole = list(source.read())
    mark = whole[24][1]
    assert mark.state is not None
    old = mark._replace(state={key: mark.state[key] for key in ("iterator", "seen")})
    assert [piece for piece, _ in source.read(old)] == [piece for piece, _ in whole[25:]]


# Workers, shards and interruptions


@pytest.mark.usefixtures("small_groups")
def test_any_number_of_workers_gives_the_same_bytes(tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "docs.jsonl", records_of(500))
    made = []
    for workers in (0, 1, 2, 3):
        out = tmp_path / f"out{workers}"
        prepare(out, [path], 400, progress=False, workers=workers, shard_tokens=5000)
        made.append(content(out))
    assert made[0] == made[1] == made[2] == made[3]
    assert len([name for name in made[0] if name.startswith("train.")]) > 6


@pytest.mark.usefixtures("small_groups")
def test_shards_hold_whole_documents_and_read_as_one(tmp_path: Path, given: Path) -> None:
    path = write_json_lines(tmp_path / "docs.jsonl", records_of(500))
    whole = prepare(tmp_path / "whole", [path], tokenizer=given, progress=False)
    cut = prepare(tmp_path / "cut", [path], tokenizer=given, progress=False, shard_tokens=1500)
    assert len(whole.manifest["splits"]["train"]["shards"]) == 1
    entries = cut.manifest["splits"]["train"]["shards"]
    assert len(entries) > 10
    longest = int(np.diff(whole.split("train").offsets).max())
    assert all(1500 <= entry["tokens"] < 1500 + longest for entry in entries[:-1])
    for name in ("train", "val", "test"):
        one, many = whole.split(name), cut.split(name)
        assert len(many.shards) == len(cut.manifest["splits"][name]["shards"])
        assert [d.tolist() for d in one] == [d.tolist() for d in many]
        assert np.array_equal(one.offsets, many.offsets)
        assert one.bytes == many.bytes == sum(shard.bytes for shard in many.shards)
        for start, stop in ((0, 0), (0, 10), (1400, 4000), (len(one.tokens) - 3, len(one.tokens))):
            assert many.tokens[start:stop].tolist() == one.tokens[start:stop].tolist()
        for ours, theirs in zip(windows(one, 16).batches(8), windows(many, 16).batches(8), strict=True):
            assert ours.tokens.equal(theirs.tokens)


@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize("kind", ["json", "data set"])
def test_an_interrupted_preparation_goes_on(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_json_lines(tmp_path / "in" / "docs.jsonl", records_of(500))
    options = {"texts": [path]} if kind == "json" else {"dataset": Dataset(str(path.parent))}

    def run(out: str) -> Prepared:
        return prepare(tmp_path / out, vocab_size=400, progress=False, shard_tokens=5000, **options)  # type: ignore[arg-type]

    run("whole")
    calls, write = 0, preparing.write_group

    def interrupted(*arguments) -> None:
        nonlocal calls
        calls += 1
        if calls % 7 == 0:
            raise KeyboardInterrupt
        write(*arguments)

    monkeypatch.setattr(preparing, "write_group", interrupted)
    for _ in range(30):
        assert not (tmp_path / "out").exists()
        try:
            run("out")
            break
        except KeyboardInterrupt:
            assert sorted(p.name for p in tmp_path.iterdir()) == [".out.part", "in", "whole"]
    assert 14 < calls < 60  # each call went on where the one before had stopped
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out", "whole"]


@pytest.mark.parametrize("at", [0, 3, 9])  # of ten renames: eight files into a folder, the old one away, the new one in
def test_a_preparation_interrupted_while_it_moves_its_files_goes_on(
    at: int, tmp_path: Path, given: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, renames, rename = write_json_lines(tmp_path / "docs.jsonl", records_of(300)), [], Path.rename
    prepare(tmp_path / "whole", [path], tokenizer=given, progress=False)
    prepare(
        tmp_path / "out", [write_json_lines(tmp_path / "a.jsonl", records_of(200))], tokenizer=given, progress=False
    )

    def interrupted(self: Path, target: Path) -> Path:
        renames.append(target)
        if len(renames) == at + 1:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path / "out", [path], tokenizer=given, progress=False)
    prepare(tmp_path / "out", [path], tokenizer=given, progress=False)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "docs.jsonl", "out", "whole"]


@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize("error", [ValueError("a document is wrong"), OSError("no connection")])
def test_an_error_late_in_the_text_keeps_what_is_done(
    error: Exception, tmp_path: Path, given: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_json_lines(tmp_path / "docs.jsonl", records_of(500))
    made = prepare(tmp_path / "whole", [path], tokenizer=given, progress=False)
    groups, begun = corpus.Corpus.groups, []

    def failing(self: corpus.Corpus, after: corpus.CorpusPosition) -> Iterator[corpus.DocumentGroup]:
        begun.append(after)
        for group in groups(self, after):
            if group.after.documents > 400:
                raise error
            yield group

    with monkeypatch.context() as patch:
        patch.setattr(corpus.Corpus, "groups", failing)
        for _ in range(2):
            with pytest.raises(type(error), match=str(error)):
                prepare(tmp_path / "out", [path], tokenizer=given, progress=False)
    assert begun[0].documents == 0
    assert begun[1].documents > 250  # it fails there again, and does nothing twice
    assert prepare(tmp_path / "out", [path], tokenizer=given, progress=False).manifest == made.manifest
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert not (tmp_path / ".out.part").exists()


@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize("name", ["tokenizer.json", "state.json", "train.00000.tokens.npy"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_what_is_damaged_of_the_work_that_was_done_stops_nobody_for_ever(
    name: str, damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, write = write_json_lines(tmp_path / "docs.jsonl", records_of(500)), preparing.write_group
    prepare(tmp_path / "whole", [path], 400, progress=False)
    calls = itertools.count()

    def interrupted(*arguments: Any) -> None:
        if next(calls) > 6:
            raise KeyboardInterrupt
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(preparing, "write_group", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path / "out", [path], 400, progress=False)
    file = tmp_path / ".out.part" / name
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:10])
    try:
        prepare(tmp_path / "out", [path], 400, progress=False)
    except ValueError as error:
        assert "call it again to begin anew" in str(error)  # noqa: PT017
        prepare(tmp_path / "out", [path], 400, progress=False)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


class Answer:
    """Of a server."""

    def __init__(self, status_code: int) -> None:
        self.status_code = status_code


def answered(status: int) -> Exception:
    """What HTTP clients raise for a status."""
    error = Exception(f"{status} of the server")
    error.response = Answer(status)  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ConnectionError("Couldn't reach the hub"), OSError),
        (TimeoutError("too slow"), OSError),
        (httpx.ConnectError("no route"), OSError),
        (httpx.ReadTimeout("too slow"), OSError),
        (PermissionError("not yours"), OSError),
        (LocalEntryNotFoundError("no connection, and not in the cache"), OSError),
        (answered(503), OSError),
        (answered(429), OSError),
        (answered(404), ValueError),
        (answered(401), ValueError),
        (DatasetNotFoundError("no such data set"), ValueError),
        (RuntimeError("a script"), ValueError),
    ],
    ids=lambda part: repr(part)[:40],
)
def test_a_lost_connection_is_no_mistake_of_the_user(
    error: Exception, kind: type[Exception], tmp_path: Path, given: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    folder = write_json_lines(tmp_path / "in" / "a.jsonl", records_of(300)).parent

    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(kind, match=r"in' .*cannot be (reached|opened)") as raised:
        hub.open_stream(Dataset(str(folder)), None)
    assert isinstance(raised.value, ValueError) == (kind is ValueError)


def test_a_connection_that_is_lost_while_reading_is_an_error_of_the_system(tmp_path: Path) -> None:
    def stream() -> Iterator[dict[str, Any]]:
        yield {"text": "one"}
        raise httpx.ReadError("connection reset")

    source = hub.HubSource(Dataset("owner/name"), Selection(), "commit")
    with pytest.raises(OSError, match=r"owner/name cannot be read behind record 1 \(connection reset\)"):
        list(source.records(stream(), 0))


def test_other_inputs_do_not_go_on_from_an_interruption(
    tmp_path: Path, given: Path, monkeypatch: pytest.MonkeyPatch, small_groups: None
) -> None:
    path = write_json_lines(tmp_path / "docs.jsonl", records_of(300))
    with monkeypatch.context() as patch:
        patch.setattr(Encoders, "map", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path / "out", [path], tokenizer=given, progress=False)
    assert (tmp_path / ".out.part" / "train.00000.tokens.npy").is_file()
    write_json_lines(path, records_of(200))
    prepare(tmp_path / "out", [path], tokenizer=given, progress=False)
    prepare(tmp_path / "fresh", [path], tokenizer=given, progress=False)
    assert content(tmp_path / "out") == content(tmp_path / "fresh")


KILLED = """
import sys
from pathlib import Path
from lrt.data import corpus, prepare
corpus.GROUP_BYTES, prepare.GROUPS_PER_STATE = 20_000, 2
prepare.prepare(sys.argv[1], [Path(sys.argv[2])], tokenizer=Path(sys.argv[3]), workers=2, shard_tokens=100_000)
"""


def test_killed_and_called_again_it_gives_the_same_bytes(
    tmp_path: Path, given: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "GROUP_BYTES", 20_000)
    path = write_json_lines(tmp_path / "docs.jsonl", records_of(8_000, length=50))
    options = {"tokenizer": given, "progress": False, "shard_tokens": 100_000}
    prepare(tmp_path / "whole", [path], workers=0, **options)  # type: ignore[arg-type]
    state = tmp_path / ".out.part" / "state.json"
    arguments = [sys.executable, "-c", KILLED, tmp_path / "out", path, given]
    process = subprocess.Popen(arguments, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    patience = time.monotonic() + 60
    while not (state.is_file() and json.loads(state.read_text())["place"][2] > 2000):
        assert process.poll() is None, "it was done before it could be killed"
        assert time.monotonic() < patience
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    taken = json.loads(state.read_text())["place"][2]
    assert 2000 < taken < 8000
    begun = []
    groups = corpus.Corpus.groups
    monkeypatch.setattr(corpus.Corpus, "groups", lambda self, after: begun.append(after) or groups(self, after))
    prepare(tmp_path / "out", [path], workers=1, **options)  # type: ignore[arg-type]
    assert begun[0].documents == taken
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_two_processes_make_a_folder_once(tmp_path: Path, given: Path) -> None:
    path = write_json_lines(tmp_path / "in" / "docs.jsonl", records_of(3000))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", KILLED, tmp_path / "out", path, given],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        for _ in range(2)
    ]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]
    Prepared.open(tmp_path / "out").split("train")


def test_a_worker_that_dies_is_named(tmp_path: Path, given: Path) -> None:
    with Encoders(Tokenizer.load(given), given, 1) as encoders:
        piece = Piece("some text", 9, "train", last=True)
        assert encoders.submit([piece]).result()[1] == [len(Tokenizer.load(given).encode("some text"))]
        encoders._processes[0].kill()
        with pytest.raises(OSError, match=r"an encoding process ended with status -9.*--workers"):
            encoders.submit([piece]).result()
    with pytest.raises(ValueError, match="workers is -1"):
        Encoders(Tokenizer.load(given), given, -1)


def test_a_worker_encodes_as_the_tokenizer_does(given: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode_worker, "AT_ONCE", 30)
    tokenizer = Tokenizer.load(given)
    texts = ["", "one", "<|bos|> is text", "größer 🙂\n" * 9, "", "end"]
    encoder, firsts = encode_worker.Encoder.of(tokenizer.inner), [True, False, True, False, True, True]
    ids, lengths = encode_worker.encode(encoder, texts, firsts, "<u2")
    assert ids.dtype == np.uint16
    assert [len(tokenizer.encode(text)) for text in texts] == lengths
    assert ids.tolist() == [i for text in texts for i in tokenizer.encode(text)]
    assert encode_worker.encode(encoder, texts, firsts, "<u4")[0].dtype == np.uint32
    assert encode_worker.encode(encoder, [], [], "<u2")[0].shape == (0,)


def test_the_vocabulary_is_trained_on_a_bounded_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = []
    for i in range(12):
        files.append(tmp_path / "in" / f"text{i}.txt")
        files[-1].parent.mkdir(exist_ok=True)
        files[-1].write_text(f"file {i} " * (20 if i < 11 else 5000))
    monkeypatch.setattr(sources, "PIECE", 100)
    found = corpus.open_corpus(files, None, Selection(), lambda *_: None)
    train = sum(source.size for source in found.sources if source.split == "train")  # type: ignore[attr-defined]
    whole = "".join(found.sample(10**6))
    assert len(whole) == train
    part = list(found.sample(20_000))
    assert 18_000 < sum(map(len, part)) < 20_200
    assert {f"file {i} " in "".join(part) for i in range(12) if f"file {i} " in whole} == {True}
    assert part == list(found.sample(20_000))


# Wrong input


def damaged(path: Path) -> Path:
    """The file without its second half."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return path


@pytest.mark.parametrize("end", [".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst", ".parquet"])
def test_a_file_that_ends_halfway_is_named(end: str, tmp_path: Path, given: Path) -> None:
    write = write_parquet if end == ".parquet" else write_json_lines
    path = damaged(write(tmp_path / f"docs{end}", records_of(3000)))
    message = {".jsonl": r"docs\.jsonl line \d+ is not JSON .*repair", ".parquet": r"is damaged behind row 0 .*again"}
    with pytest.raises(ValueError, match=message.get(end, rf"docs\{end} is damaged behind line \d+ .*again")):
        prepare(tmp_path / "out", [path], tokenizer=given, progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name]


@pytest.mark.parametrize("end", [".jsonl.gz", ".jsonl.xz", ".parquet"])  # .zst need not hold a checksum
def test_a_file_with_wrong_bytes_in_the_middle_is_named(end: str, tmp_path: Path, given: Path) -> None:
    write = write_parquet if end == ".parquet" else write_json_lines
    path = write(tmp_path / f"docs{end}", records_of(3000, length=60))
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 600] = bytes(range(200)) * 3
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"docs\{end} "):
        prepare(tmp_path / "out", [path], tokenizer=given, progress=False)


def test_records_that_cannot_be_used(tmp_path: Path, given: Path) -> None:
    good = json.dumps({"id": "a", "text": "a text"})
    cases = {
        '{"text": "a"': r"line 3 is not JSON",
        '["a"]': r"line 3 is list, no JSON object",
        '{"id": 3}': r"line 3 has no field 'text'; its fields are id: name one with --field",
        '{"text": 3}': r"line 3 has int in field 'text'; name a field of text with --field",
        '{"text": "half \\ud83d of it"}': r"line 3 holds half a surrogate pair \(character 5 of field 'text'\)",
        '{"text": "' + "x" * records.LONGEST_LINE + '"}': "line 3 is longer than 16,777,216 bytes",
        b'{"text": "caf\xe9"}': r"line 3 is not JSON",
    }
    for line, message in cases.items():
        path = tmp_path / "bad.jsonl"
        path.write_bytes(f"{good}\n\n".encode() + (line if isinstance(line, bytes) else line.encode()) + b"\n")
        with pytest.raises(ValueError, match=rf"bad\.jsonl {message}"):
            prepare(tmp_path / "out", [path], tokenizer=given, progress=False)
    path = write_parquet(tmp_path / "docs.parquet", [{"content": "a text", "number": 3}])
    with pytest.raises(
        ValueError, match=r"docs\.parquet has no column 'text'; its columns are content, number: .*--fi"
    ):
        prepare(tmp_path / "out", [path], tokenizer=given, progress=False)
    for selection, message in {
        Selection("number"): r"docs\.parquet row 1 has int in field 'number'",
        Selection("content", split_by="url"): r"no column 'url'.*--split-by",
        Selection("content"): "too short: 6 bytes in 1 document",
    }.items():
        with pytest.raises(ValueError, match=message):
            prepare(tmp_path / "out", [path], tokenizer=given, progress=False, selection=selection)
    path = write_json_lines(tmp_path / "one.jsonl", [{"text": "the same words again and again " * 100}] * 9)
    with pytest.raises(ValueError, match=r"the \w+ split is empty: none of the 9 documents"):
        prepare(tmp_path / "out", [path], tokenizer=given, progress=False)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.part").exists()


def test_documents_without_text_are_left_out(tmp_path: Path, given: Path) -> None:
    found = records_of(300)
    gaps = [each for record in found for each in (record, {"id": "x", "text": ""}, {"id": "y", "text": None})]
    one = prepare(tmp_path / "a", [write_json_lines(tmp_path / "a.jsonl", found)], tokenizer=given, progress=False)
    other = prepare(tmp_path / "b", [write_parquet(tmp_path / "b.parquet", gaps)], tokenizer=given, progress=False)
    assert one.manifest["splits"] == other.manifest["splits"]


def test_data_sets_that_cannot_be_used(tmp_path: Path, given: Path) -> None:
    folder = write_parquet(tmp_path / "in" / "a.parquet", [{"content": "a text"}]).parent

    def refuses(message: str, dataset: Dataset, selection: Selection | None = None) -> None:
        with pytest.raises(ValueError, match=message):
            prepare(tmp_path / "out", tokenizer=given, progress=False, dataset=dataset, selection=selection)

    refuses(r"in record 1 has no field 'text'; its fields are content", Dataset(str(folder)))
    refuses(r"split 'valid'\) cannot be opened.*Available splits: \['train'\]", Dataset(str(folder), split="valid"))
    refuses(r"revision is 'v1', but .* is a local folder", Dataset(str(folder), revision="v1"))
    refuses(r"a\.parquet is a file; give it with --text", Dataset(str(folder / "a.parquet")))
    (tmp_path / "empty").mkdir()
    refuses(r"empty' .* cannot be opened", Dataset(str(tmp_path / "empty")))
    damaged(write_json_lines(folder.parent / "bad" / "a.jsonl", records_of(100)))
    refuses(r"bad is damaged behind record", Dataset(str(tmp_path / "bad")))


def test_a_missing_extra_is_named(tmp_path: Path, given: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = records_of(20)
    paths = [write_parquet(tmp_path / "a.parquet", found), write_json_lines(tmp_path / "a.jsonl.zst", found)]
    for name in ("pyarrow", "pyarrow.parquet", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    for path in paths:
        with pytest.raises(
            MissingExtraError, match=rf"{path.name} needs the package pyarrow.*pip install '.*\[data\]'"
        ):
            prepare(tmp_path / "out", [path], tokenizer=given, progress=False)
    (tmp_path / "in").mkdir()
    with pytest.raises(MissingExtraError, match=r"needs the package datasets.*pip install '.*\[data\]'"):
        prepare(tmp_path / "out", tokenizer=given, progress=False, dataset=Dataset(str(tmp_path / "in")))


def test_arguments_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="split_until is '/'; it needs split_by"):
        Selection(split_until="/")
    with pytest.raises(ValueError, match="documents is 0"):
        Selection(documents=0)
    with pytest.raises(ValueError, match="shard_tokens is 0"):
        prepare(tmp_path / "out", shard_tokens=0)


def test_a_shard_that_is_not_the_manifests_is_named(tmp_path: Path, given: Path) -> None:
    path = write_json_lines(tmp_path / "docs.jsonl", records_of(300))
    out = tmp_path / "out"
    made = prepare(out, [path], tokenizer=given, progress=False, shard_tokens=2000)
    before = content(out)
    for name in ("train.00001.tokens.npy", "test.00000.documents.npy"):
        data = bytearray(before[name])
        data[-2 if "tokens" in name else -16] ^= 1  # the size stays, and the offsets ascend
        (out / name).write_bytes(data)
        split = name.partition(".")[0]
        with pytest.raises(ValueError, match=rf"{name} does not match .*manifest\.json: its SHA-256 is .* again"):
            Prepared.open(out).split(split)
        assert Prepared.open(out).split("val") is not None  # another split is as it was
        prepare(out, [path], tokenizer=given, progress=False, shard_tokens=2000)
        assert content(out) == before
    (out / "train.00001.tokens.npy").write_bytes(before["train.00000.tokens.npy"])
    with pytest.raises(ValueError, match=r"train\.00001\.tokens\.npy holds .* its manifest says"):
        Prepared.open(out)
    assert made.manifest["tokenizer_sha256"] == Tokenizer.load(given).sha256


# Rows of shards, for ranks


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory, given: Path) -> Prepared:
    folder = tmp_path_factory.mktemp("sharded")
    path = write_json_lines(folder / "docs.jsonl", records_of(400, length=30))
    return prepare(folder / "out", [path], tokenizer=given, progress=False, shard_tokens=4000)


def row_set(rows: Rows, start: Position, count: int, batch_size: int) -> list[tuple[int, ...]]:
    """The targets of so many batches, a tuple per row."""
    found, position = [], start
    for _ in range(count):
        batch, position = rows.batch(position, batch_size)
        found += [tuple(row) for row in batch.targets.tolist()]
    return found


def test_ranks_share_the_rows_of_every_shard(sharded: Prepared) -> None:
    data = sharded.split("train")
    assert len(data.shards) > 4
    alone = Rows(data, 32, seed=1)
    batches = len(alone) // 8
    together = row_set(alone, Position(), batches, 8)
    for ranks in (2, 4, 8):
        parts = [row_set(Rows(data, 32, 1, rank, ranks), Position(), batches, 8 // ranks) for rank in range(ranks)]
        step = 8 // ranks
        joined = [row for i in range(batches) for part in parts for row in part[i * step : (i + 1) * step]]
        assert joined == together
        after = {Rows(data, 32, 1, rank, ranks).batch(Position(1, 3, 2), step)[1] for rank in range(ranks)}
        assert after == {alone.batch(Position(1, 3, 2), 8)[1]}
    with pytest.raises(ValueError, match="rank is 2 of 2 ranks"):
        Rows(data, 32, 0, 2, 2)
    with pytest.raises(ValueError, match=r"ranks is 5000, but \d+ documents of \d+ tokens make only \d+ rows of 32"):
        Rows(data, 32, 0, 0, 5000)


def test_an_epoch_reads_every_shard_once(sharded: Prepared) -> None:
    data = sharded.split("train")
    rows = Rows(data, 32, seed=1)
    position, targets, shards = Position(), [], []
    while position.epoch == 0:
        batch, position = rows.batch(position, 1)
        targets += batch.targets[batch.targets >= 0].tolist()
        shards.append(position.shard)
    assert position == Position(1, 0, 0)
    assert sorted(targets) == sorted(data.tokens[0 : len(data.tokens)].tolist())
    assert shards == [*sorted(shards[:-1]), 0]  # one after another
    packing = rows.packing
    assert (packing.rows, packing.targets, packing.cropped) == (len(rows), len(data.tokens), 0)
    assert packing.padded == rows.padded == len(rows) * 32 - len(data.tokens)
    assert rows.padded < 0.02 * packing.targets
    first, second = (row_set(rows, Position(epoch), 5, 8) for epoch in (0, 1))
    assert set(first).isdisjoint(second)  # shards come in another order


def test_reading_ahead_changes_nothing(sharded: Prepared) -> None:
    from lrt.data.loader import prefetch

    rows = Rows(sharded.split("train"), 32, seed=2)
    stream = prefetch(rows, Position(), 7, ahead=3)
    position = Position()
    for _ in range(2 * len(rows) // 7):
        batch, expected = rows.batch(position, 7)
        read, position = next(stream)
        assert position == expected
        assert read.targets.equal(batch.targets)
        assert read.tokens.equal(batch.tokens)
    stream.close()
    resumed = prefetch(rows, position, 7)
    assert next(resumed)[0].targets.equal(rows.batch(position, 7)[0].targets)
    resumed.close()
    with pytest.raises(ValueError, match="ahead is 0"):
        next(prefetch(rows, Position(), 7, ahead=0))
    with pytest.raises(ValueError, match="batch_size is 0"):  # an error of the thread reaches the caller
        next(prefetch(rows, Position(), 0))


# At scale


@pytest.mark.slow
def test_the_benchmark_of_preparing_runs_in_little_memory(tmp_path: Path, given: Path) -> None:
    found = [{"text": read_text(path)} for path in corpus.stdlib_files()]
    path = write_json_lines(tmp_path / "docs.jsonl.xz", found)
    program = [sys.executable, "benchmarks/prepare.py", path, given, "--workers", "2"]
    done = subprocess.run(
        program, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, check=True
    )
    measured = json.loads(done.stdout)
    assert measured["megabytes"] > 5
    assert measured["ratio"] > 0, measured  # its size is the benchmark's to report: a clock is no test
    assert measured["cpu_ratio"] > 0, measured
    assert measured["peak_bytes"] < 1e9, measured


MEASURED = """
import sys
from pathlib import Path
sys.path.insert(0, "benchmarks")
from prepare import Peak
from lrt.data.prepare import prepare
with Peak() as peak:
    prepare(sys.argv[1], [Path(sys.argv[2])], tokenizer=Path(sys.argv[3]), progress=False, workers=2)
print(peak.bytes)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, given: Path) -> None:
    """One document without a line or a space, every byte of it a token: the worst there is."""
    peaks = []
    for megabytes in (8, 32):
        path = tmp_path / f"{megabytes}.txt"
        path.write_text("\U0001f9e0" * (megabytes << 18))
        program = [sys.executable, "-c", MEASURED, tmp_path / f"out{megabytes}", path, given]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, check=True)
        peaks.append(int(done.stdout))
    assert max(peaks) < 1e9, peaks
    assert peaks[1] < 1.25 * peaks[0], peaks
