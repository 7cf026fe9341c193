"""Hugging Face datasets, by hub name or local folder, streamed: nothing is downloaded but what is read.

A file of ours is read again up to where it was left. A data set goes on from the `datasets` library's own state, as
reading a hub's files again would take long.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrt.data.records import Selection
from lrt.data.sources import PieceStream, SourcePosition, cut_documents
from lrt.utils.files import sha256
from lrt.utils.imports import MissingExtraError, loaded_class, optional_module
from lrt.utils.progress import warn

SNAPSHOT = 1000
"""Records between two states of the library's iterator: what is read again at most after an interruption."""

NETWORK = (
    ("httpx", "TransportError"), ("httpx2", "TransportError"), ("aiohttp", "ClientConnectionError"),
    ("requests", "ConnectionError"), ("huggingface_hub.errors", "LocalEntryNotFoundError"),
)  # fmt: skip
"""Module and class of what HTTP clients raise without a connection: not all are OSError, and the last is one for files
that are not there. A library that was not imported has raised none."""
PASSING = (408, 429)
"""HTTP: too slow, too many requests. With 500 and above the answers that say nothing of the request itself."""


@dataclass(frozen=True)
class Dataset:
    """Which data set to stream."""

    name: str
    """A hub name (owner/name), a local folder of Parquet, JSON lines, … or a preset: fineweb-edu, climbmix."""
    config: str | None = None
    """The configuration (subset) of the data set. None: its default, or the preset's."""
    split: str = "train"
    """Which of the data set's own splits to read; ours are made of it."""
    revision: str | None = None
    """Branch, tag or commit on the hub. None: the newest, which the manifest then names."""


PRESETS = {
    "fineweb-edu": Dataset("HuggingFaceFW/fineweb-edu", "sample-10BT"),
    "climbmix": Dataset("karpathy/climbmix-400b-shuffle"),  # shuffled, as plain Parquet
}
"""Data sets by a short name."""


@dataclass(frozen=True)
class HubSource:
    """A data set, streamed: a `Source`."""

    dataset: Dataset
    selection: Selection
    identity: str
    """The commit on the hub, or the digest of a local folder's files."""
    size: int = 0

    @property
    def name(self) -> str:
        return self.dataset.name

    def read(self, after: SourcePosition | None = None) -> PieceStream:
        state, taken = (None, 0) if after is None else (after.state, after.pieces)
        records, seen = self.records_behind(state)
        # since, number: records and pieces since `state`; candidate: a state that lacks the record behind it.
        since = number = 0
        candidate: dict[str, Any] | None = None
        for stream, record in records:
            if candidate is not None:
                state, candidate = candidate | {"next": self.digest(record)}, None
                taken = max(0, taken - number)
                since = number = 0
            seen, since = seen + 1, since + 1
            document = self.selection.document(record, f"{self.name} record {seen}")
            for piece in cut_documents([] if document is None else [document]):
                number += 1
                if number > taken:
                    yield piece, SourcePosition(number, seen, state)
            if since % SNAPSHOT == 0:
                iterator = stream.state_dict()
                # One that has not moved is none (datasets 5.0.0, once resumed): the older state serves on.
                if state is None or iterator != state["iterator"]:
                    candidate = {"iterator": iterator, "seen": seen}

    def records_behind(self, state: dict[str, Any] | None) -> tuple[Iterator[tuple[Any, dict[str, Any]]], int]:
        """(the library's stream, record) for all behind `state`; and how many records those left out are.

        The library is believed only where the first record is the one that followed when the state was taken. Else, and
        for a state of an earlier version, which does not say, the data set is read again from its beginning.
        """
        revision = None if Path(self.name).is_dir() else self.identity
        stream = open_stream(self.dataset, revision)
        if state is None:
            return self.records(stream, 0), 0
        seen = state["seen"]
        if "next" in state:
            stream.load_state_dict(state["iterator"])
            records = self.records(stream, seen)
            first = next(records, None)
            if first is not None and self.digest(first[1]) == state["next"]:
                return itertools.chain([first], records), seen
            stream = open_stream(self.dataset, revision)
        warn(f"{self.name}: the datasets library cannot go on behind record {seen:,}; it is read from its beginning")
        return itertools.islice(self.records(stream, 0), seen, None), seen

    def digest(self, record: dict[str, Any]) -> str:
        """What a record is known again by: a hash of the fields that are read."""
        fields = repr([record.get(name) for name in self.selection.columns])
        return hashlib.sha256(fields.encode("utf-8", "backslashreplace")).hexdigest()

    def records(self, stream: Any, seen: int) -> Iterator[tuple[Any, dict[str, Any]]]:
        """What the library reads behind the first `seen` records, as dictionaries, each with its stream.

        ValueError where the data are damaged; OSError, after which what was prepared is kept, where they cannot be had.
        """
        arrow = optional_module("pyarrow", "data", f"reading {self.name}")
        try:
            with contextlib.closing(iter(stream)) as records:
                for record in records:
                    seen += 1
                    yield stream, record
        except (
            arrow.ArrowException,
            UnicodeDecodeError,  # text that is not UTF-8
            RecursionError,  # JSON that is nested too deeply
            optional_module("datasets.exceptions", "data", f"reading {self.name}").DatasetsError,
        ) as error:
            raise ValueError(f"{self.name} is damaged behind record {seen} ({error}); get its files again") from error
        except Exception as error:
            if not (isinstance(error, OSError) or is_unreachable(error)):
                raise
            raise OSError(
                f"{self.name} cannot be read behind record {seen} ({error}); call it again to go on from there"
            ) from error


def hub_source(dataset: Dataset, selection: Selection) -> HubSource:
    """The source of a data set, at the revision it has now.

    ValueError where it cannot be found or read; OSError where the hub cannot be reached.
    """
    dataset = resolve_preset(dataset)
    folder = Path(dataset.name)
    if not folder.is_dir() and folder.exists():
        raise ValueError(f"{folder} is a file; give it with --text, not as a data set")
    if folder.is_dir() and dataset.revision is not None:
        raise ValueError(
            f"revision is {dataset.revision!r}, but {folder} is a local folder, which has none; leave it out"
        )
    with name_in_errors(dataset):
        if folder.is_dir():
            identity = folder_digest(folder)
        else:
            api = optional_module("huggingface_hub", "data", f"reading {dataset.name}").HfApi()
            identity = api.dataset_info(dataset.name, revision=dataset.revision).sha
    return HubSource(dataset, selection, identity)


def resolve_preset(dataset: Dataset) -> Dataset:
    """A preset in full, with whatever fields of `dataset` differ from their defaults."""
    if dataset.name not in PRESETS:
        return dataset
    full = PRESETS[dataset.name]
    return dataclasses.replace(dataset, name=full.name, config=dataset.config or full.config)


def open_stream(dataset: Dataset, revision: str | None) -> Any:
    """The library's iterable data set, at a commit of the hub; None for a local folder."""
    with name_in_errors(dataset):
        load = optional_module("datasets", "data", f"reading {dataset.name}").load_dataset
        return load(dataset.name, dataset.config, split=dataset.split, streaming=True, revision=revision)


@contextlib.contextmanager
def name_in_errors(dataset: Dataset) -> Iterator[None]:
    """Name the data set in what the libraries raise: classes of theirs and of their HTTP client's, so any Exception.

    OSError where it cannot be reached, ValueError for all else.
    """
    try:
        yield
    except MissingExtraError:  # says what to do already
        raise
    except Exception as error:
        if is_unreachable(error):
            raise OSError(
                f"data set {dataset.name!r} cannot be reached ({error}); call it again once it can be: what was "
                "prepared of it is kept"
            ) from error
        raise ValueError(
            f"data set {dataset.name!r} (config {dataset.config!r}, split {dataset.split!r}) cannot be opened: "
            f"{error}; check its name, its configuration and split, or give a local folder or one of "
            f"{', '.join(PRESETS)}"
        ) from error


def is_unreachable(error: Exception) -> bool:
    """Whether an error is the network's, the server's or the disk's, and may be gone the next time."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status in PASSING or status >= 500
    if isinstance(error, tuple(kind for names in NETWORK if (kind := loaded_class(*names)) is not None)):
        return True
    return isinstance(error, OSError) and not isinstance(error, FileNotFoundError)


def folder_digest(folder: Path) -> str:
    """Hexadecimal SHA-256 of the names and contents of all files under `folder`."""
    combined = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        combined.update(f"{path.relative_to(folder).as_posix()}\0{sha256(path)}".encode())
    return combined.hexdigest()
