"""Text files to a prepared folder: a tokenizer, and three splits of token ids, memory-mapped when read.

A prepared folder holds `tokenizer.json`, for each split `<split>.tokens.npy` (documents one after another, without
BOS) and `<split>.documents.npy` (where each starts), and `manifest.json`. It is complete or not there at all, and it
is known by its inputs: asked for again with the same ones, it is opened, not made.

Splits are by file where there are enough (`SPLIT_BY_FILE`), so that no file is both trained on and reported; a
file's split follows from its name alone and stays when others are added.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lrt.config import require
from lrt.data.prepared import FORMAT, SPLITS, Prepared, read_manifest
from lrt.data.tokenizer import Tokenizer
from lrt.progress import Advance, bar

TRAIN, VAL = 0.9, 0.95
"""Where validation and test begin, in a file or in the range of the names' hashes."""
SPLIT_BY_FILE = 10
"""With fewer files than this each file is cut into three contiguous parts."""
SMALLEST_TEXT = 2000
"""Bytes of text below which there is nothing to train on, choose by and report on."""
ENCODED_AT_ONCE = 1 << 20
"""Characters handed to the tokenizer at a time: enough for all cores, small enough for the progress bar."""
STDLIB_SKIPS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
"""Directories of a Python installation that are not its standard library's own source."""
FILES = frozenset({"manifest.json", "tokenizer.json"}) | {
    f"{split}.{part}.npy" for split in SPLITS for part in ("tokens", "documents")
}
"""All that a prepared folder holds."""


class Source(NamedTuple):
    """One file of text."""

    name: str
    """Relative to the folder common to all sources, with forward slashes."""
    text: str


def prepare(
    out: Path | str,
    texts: Sequence[Path] | None = None,
    vocab_size: int = 2048,
    tokenizer: Path | None = None,
    progress: bool = True,
) -> Prepared:
    """Tokenise `texts` (None: the running Python's standard library) into the folder `out`, and open it.

    Trains byte-level BPE of at most `vocab_size` tokens on the training split, or uses the file `tokenizer`, and
    `vocab_size` is then ignored. Nothing is done where `out` was made of the same inputs; a folder prepared from
    others is replaced. ValueError for a text that cannot be used (`read_text`), files that share a path, less than
    2,000 bytes in all, or an `out` that holds anything else.
    """
    out = Path(out)
    check_replaceable(out)
    ready = None if tokenizer is None else Tokenizer.load(tokenizer)
    sources = read_sources(texts)
    arguments = {
        "texts": "stdlib" if texts is None else [source.name for source in sources],
        "vocab_size": vocab_size if ready is None else None,
        "tokenizer": None if ready is None else ready.sha256,
    }
    hashes = [[source.name, hashlib.sha256(source.text.encode()).hexdigest()] for source in sources]
    inputs = hashlib.sha256(json.dumps([FORMAT, arguments, hashes]).encode()).hexdigest()
    if (same := reusable(out, inputs)) is not None:
        return same
    splits = divide(sources)
    if ready is None:
        with bar(f"training a vocabulary of {vocab_size}", None, progress):
            ready = Tokenizer.train((source.text for source in splits["train"]), vocab_size)
    with building(out) as part, bar("encoding", sum(len(s.text) for s in sources), progress) as advance:
        manifest = {
            "format": FORMAT,
            "inputs": inputs,
            "arguments": arguments,
            "sources": {"files": len(sources), "bytes": size_of(sources)},
            "vocab_size": ready.vocab_size,
            "tokenizer_sha256": ready.sha256,
            "splits": {name: write_split(part, name, splits[name], ready, advance) for name in SPLITS},
        }
        ready.save(part / "tokenizer.json")
        (part / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        install(part, out, inputs)
    return Prepared.open(out)


# Reading


def stdlib_files() -> list[Path]:
    """Source files of the running Python's standard library, tests left out, sorted by relative path.

    Files that are empty or not UTF-8 text are skipped: nobody chose them one by one, so there is nobody to tell.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in STDLIB_SKIPS]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return [path for path in sorted(found, key=lambda p: p.relative_to(root).as_posix()) if readable(path)]


def readable(path: Path) -> bool:
    """Whether `read_text` accepts a file."""
    try:
        read_text(path)
    except ValueError:
        return False
    return True


def read_text(path: Path) -> str:
    """The file's text, byte for byte: newlines, tabs and a byte-order mark stay as they are.

    ValueError naming the file if it is missing, a directory, unreadable, binary (a NUL byte, or not UTF-8) or
    blank.
    """
    require(not path.is_dir(), f"{path} is a directory; give the text files in it, for example {path}/*.txt")
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"there is no file {path}; check the path") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error}); check its permissions") from error
    at = data.find(b"\0")
    require(at < 0, f"{path} is binary (a NUL byte at offset {at}); give a text file in UTF-8")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text (byte 0x{data[error.start]:02x} at offset {error.start}); "
            "convert it, for example with iconv -t UTF-8, or leave it out"
        ) from error
    require(not (text == "" or text.isspace()), f"{path} holds no text ({len(data)} bytes); leave it out")
    return text


def read_sources(texts: Sequence[Path] | None) -> list[Source]:
    """The texts, sorted by name; names are relative to the folder common to all."""
    if texts is None:
        paths, root = stdlib_files(), Path(sysconfig.get_path("stdlib"))
    else:
        require(len(texts) > 0, "texts is empty; name at least one text file, or give None for the standard library")
        paths = [Path(os.path.abspath(path)) for path in texts]
        root = Path(os.path.commonpath([path.parent for path in paths]))
    sources = sorted(Source(path.relative_to(root).as_posix(), read_text(path)) for path in paths)
    for one, other in itertools.pairwise(sources):
        require(one.name != other.name, f"{root / one.name} is given twice; give each file once")
    total = size_of(sources)
    require(
        total >= SMALLEST_TEXT,
        f"the text is too short: {total} bytes in {len(sources)} file(s), at least {SMALLEST_TEXT} are needed for "
        "training, validation and test; add text",
    )
    return sources


def size_of(sources: Sequence[Source]) -> int:
    """UTF-8 bytes of all sources."""
    return sum(len(source.text.encode()) for source in sources)


# Splitting


def divide(sources: Sequence[Source]) -> dict[str, list[Source]]:
    """The documents of each split, 90 / 5 / 5: by file, or by contiguous parts of every file where there are few."""
    splits: dict[str, list[Source]] = {name: [] for name in SPLITS}
    if len(sources) < SPLIT_BY_FILE:
        for source in sources:
            for name, part in zip(SPLITS, cut_text(source.text), strict=True):
                if part:
                    splits[name].append(Source(source.name, part))
    else:
        for source, name in zip(sources, assign([source.name for source in sources]), strict=True):
            splits[name].append(source)
    for name, documents in splits.items():
        require(len(documents) > 0, f"the text is too short for a {name} split; add text or files")
    return splits


def assign(names: Sequence[str]) -> list[str]:
    """The split of each file, from a hash of its name: adding files moves none of the others.

    With a few dozen files chance may leave validation or test without any; the training file with the highest hash
    then goes there, the one exception to the rule above.
    """
    hashes = [int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64 for name in names]
    splits = ["train" if h < TRAIN else "val" if h < VAL else "test" for h in hashes]
    for missing in ("test", "val"):
        if missing not in splits:
            splits[max((h, i) for i, h in enumerate(hashes) if splits[i] == "train")[1]] = missing
    return splits


def cut_text(text: str) -> tuple[str, str, str]:
    """Contiguous parts of 90, 5 and 5 per cent of the characters, cut after a newline where one is near."""
    reach = (VAL - TRAIN) / 2  # half a part: the two cuts cannot meet
    cuts: list[int] = []
    for ideal in (TRAIN, VAL):
        low, middle, high = (int(len(text) * share) for share in (ideal - reach, ideal, ideal + reach))
        newline = text.find("\n", middle, high)
        if newline < 0:
            newline = text.rfind("\n", low, middle)
        cuts.append(middle if newline < 0 else newline + 1)
    return text[: cuts[0]], text[cuts[0] : cuts[1]], text[cuts[1] :]


# Writing


def write_split(
    part: Path, name: str, documents: list[Source], tokenizer: Tokenizer, advance: Advance
) -> dict[str, Any]:
    """Encode and write one split; its entry in the manifest."""
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    encoded: list[np.ndarray] = []
    for group in grouped([document.text for document in documents]):
        encoded += [np.array(ids, dtype) for ids in tokenizer.encode_batch(group)]
        advance(sum(len(text) for text in group), name)
    encoded = [ids for ids in encoded if len(ids) > 0]  # a normaliser may leave nothing of a part
    require(len(encoded) > 0, f"the tokenizer makes no tokens of the {name} split; add text")
    tokens = np.concatenate(encoded)
    np.save(part / f"{name}.tokens.npy", tokens)
    np.save(part / f"{name}.documents.npy", np.cumsum([0, *(len(ids) for ids in encoded)], dtype=np.int64))
    return {
        "files": len({document.name for document in documents}),
        "documents": len(encoded),
        "tokens": len(tokens),
        "bytes": size_of(documents),
        "sha256": hashlib.sha256((part / f"{name}.tokens.npy").read_bytes()).hexdigest(),
    }


def grouped(texts: Sequence[str]) -> Iterator[list[str]]:
    """Consecutive texts in groups of about `ENCODED_AT_ONCE` characters."""
    group: list[str] = []
    for text in texts:
        group.append(text)
        if sum(len(member) for member in group) >= ENCODED_AT_ONCE:
            yield group
            group = []
    if group:
        yield group


# The folder


def check_replaceable(out: Path) -> None:
    """Require that `out` is new, empty or a prepared folder: nothing else may be lost by writing it."""
    if not out.exists():
        return
    require(out.is_dir(), f"{out} is a file; give a new folder to prepare into")
    others = sorted({entry.name for entry in out.iterdir()} - FILES)
    require(not others, f"{out} holds other files ({', '.join(others[:3])}); give a new or empty folder")


def reusable(out: Path, inputs: str) -> Prepared | None:
    """The folder `out` if it is whole and was made of these inputs."""
    try:
        return Prepared.open(out) if read_manifest(out)["inputs"] == inputs else None
    except (ValueError, KeyError):  # not there, or damaged: it is made anew
        return None


@contextlib.contextmanager
def building(out: Path) -> Iterator[Path]:
    """A new folder beside `out` to write into; whatever is left of it at the end is removed."""
    part = out.parent / f".{out.name}.{os.getpid()}.part"
    part.mkdir(parents=True)
    try:
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)


def install(part: Path, out: Path, inputs: str) -> None:
    """Move the finished folder to its place, unless another process was there first with the same."""
    if reusable(out, inputs) is not None:
        return
    if out.exists():
        old = part / "replaced"  # removed with what is left of `part`
        new = part / "new"
        new.mkdir()
        for entry in sorted(FILES):
            (part / entry).rename(new / entry)
        out.rename(old)
        new.rename(out)
    else:
        try:
            part.rename(out)
        except OSError:  # another process made `out` since the line above
            if reusable(out, inputs) is None:
                raise
