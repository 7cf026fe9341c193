"""Text to a prepared folder: a tokenizer, and three splits of token ids, memory-mapped when read.

    sources -> pieces -> groups -> token ids -> shards

runs as one stream, so that memory does not grow with the corpus. A prepared folder holds `tokenizer.json`; for each
split shards (`lrt.data.shards`) of documents one after another, without BOS; and `manifest.json`. It is complete or
not there at all, and it is known by its inputs: asked for again with the same ones, it is opened, not made.

While it is made, a hidden folder beside it holds what is done: the growing shards and, every 16 MB of text, a state
(the place in the corpus, the lengths of the files). Whatever stops the process (Ctrl-C, SIGKILL, a lost connection, a
full disk, a damaged document), the next call with the same inputs cuts the files to those lengths and goes on from
there, and the bytes are the same. Other inputs begin anew.

Splits are by text file where whole files come near the shares of the splits, so that no file is both trained on and
reported; else by contiguous parts of each. Documents of JSON lines, Parquet and data sets are split one by one
(`lrt.data.splits`). The manifest names the rule; one without it was made by the names of files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import filelock

from lrt.data.corpus import SMALLEST_TEXT, Corpus, CorpusPosition, DocumentGroup, open_corpus
from lrt.data.encode import Encoders, check_workers, token_dtype
from lrt.data.hub import Dataset
from lrt.data.prepared import FORMAT, SPLITS, Prepared, read_manifest
from lrt.data.records import SOURCES, Selection, suffix_of
from lrt.data.shards import SplitWriter
from lrt.data.sources import Source, SourcePosition
from lrt.data.split_warnings import split_warnings
from lrt.data.splits import BY_CONTENT, BY_NAME, SHARD_TOKENS, SplitRule
from lrt.data.tokenizer import Tokenizer
from lrt.utils import plugins
from lrt.utils.files import replace_atomically, replace_folder
from lrt.utils.progress import bar, warn

SAMPLE_BYTES = 1 << 25
"""UTF-8 bytes that a vocabulary is trained on: the library's memory grows with the distinct words in them."""
SMALL = 1 << 22
"""Bytes of a corpus below which starting processes costs more time than it saves."""
GROUPS_PER_STATE = 32
"""Groups between two states, 16 MB: an interruption loses at most this much work, some seconds."""
OURS = re.compile(rf"manifest\.json|tokenizer\.json|({'|'.join(SPLITS)})\.(\d{{5}}\.)?(tokens|documents)\.npy")
"""All that a prepared folder holds, or held in an earlier format."""


def prepare(
    out: Path | str,
    texts: Sequence[Path] | None = None,
    vocab_size: int = 2048,
    tokenizer: Path | None = None,
    progress: bool = True,
    *,
    dataset: Dataset | None = None,
    selection: Selection | None = None,
    workers: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
) -> Prepared:
    """Tokenise `texts` and `dataset` (both None: the running Python's standard library) into `out`, and open it.

    A text is a folder of files, or a file: .jsonl or .ndjson (.gz, .xz, .zst), .parquet, or UTF-8 text. Trains
    byte-level BPE of at most `vocab_size` tokens on a sample of the training split, or uses the file `tokenizer`, and
    `vocab_size` is then ignored. `workers` processes encode (None: one per core; 0: none but this one), on which no
    byte depends.

    Nothing is done where `out` was made of the same inputs; a folder prepared from others is replaced. ValueError
    naming the file, the line and the field for what cannot be used, for a text that `tokenizer` does not give back, and
    for an `out` that holds anything else.
    """
    out = Path(out)
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens is {shard_tokens}; it must be at least 1")
    check_workers(workers)
    check_replaceable(out)
    check_apart(out, texts or ())
    ready = None if tokenizer is None else Tokenizer.load(tokenizer)
    selection = selection or Selection()
    if texts is None and dataset is None and selection.rule == BY_CONTENT:
        selection = dataclasses.replace(selection, rule=BY_NAME)
    with bar("reading", None, progress) as advance:
        corpus = open_corpus(texts, dataset, selection, advance)
    arguments = {
        "texts": None if texts is None else [name for name, *_ in corpus.description],
        "selection": [selection.field, selection.split_by, selection.split_until, selection.documents],
        "vocab_size": vocab_size if ready is None else None,
        "tokenizer": None if ready is None else ready.sha256,
        "shard_tokens": shard_tokens,
        **plugins_read_by(texts or ()),
    }  # not the number of workers, on which nothing depends
    if selection.rule == BY_CONTENT and inputs_digest(arguments, corpus) in begun_as(out):
        selection = dataclasses.replace(selection, rule=BY_NAME)  # by version 0.1.0: it stays, or goes on, as it was
        with bar("reading again", None, progress) as advance:
            corpus = open_corpus(texts, dataset, selection, advance)
    if selection.rule != BY_NAME:
        arguments["split_rule"] = dataclasses.asdict(selection.rule)
    inputs_sha256 = inputs_digest(arguments, corpus)
    if (same := open_if_same(out, inputs_sha256)) is not None:
        return same
    with partial_folder(out, inputs_sha256) as part:
        if (same := open_if_same(out, inputs_sha256)) is not None:  # another process made it while this one waited
            return same
        if not (part / "new").is_dir():  # else an earlier call was stopped while it moved what was finished
            if ready is None:
                ready = train_tokenizer(part, corpus, vocab_size, progress)
            else:
                ready.save(part / "tokenizer.json")
            splits = write_splits(part, corpus, ready, shard_tokens, worker_count(workers, corpus), progress)
            write_manifest(part, inputs_sha256, arguments, corpus, ready, splits, selection.rule)
        move_into_place(part, out)
    prepared = Prepared.open(out)
    for text in split_warnings(corpus, prepared, selection.rule):
        warn(text)
    return prepared


def inputs_digest(arguments: dict[str, Any], corpus: Corpus) -> str:
    """All that the bytes depend on, as one digest: it is what a later call compares."""
    return hashlib.sha256(json.dumps([FORMAT, arguments, corpus.description]).encode()).hexdigest()


def begun_as(out: Path) -> set[str]:
    """The inputs, as digests, of the folder `out` and of one that was begun for it."""
    digests: set[str] = set()
    with contextlib.suppress(ValueError, KeyError):
        digests.add(str(read_manifest(out)["inputs"]))
    with contextlib.suppress(OSError):
        digests.add((partial_name(out) / "inputs").read_text(errors="replace"))
    return digests


def check_apart(out: Path, texts: Sequence[Path]) -> None:
    """ValueError for a folder of text that `out` lies in: the second call would read what the first one wrote."""
    for path in map(Path, texts):
        if path.is_dir() and out.resolve().is_relative_to(path.resolve()):
            raise ValueError(f"{out} lies in {path}, whose text is to be prepared; write to a folder outside it")


def plugins_read_by(texts: Sequence[Path]) -> dict[str, Any]:
    """The plugins that read some of the texts: another hash of theirs is another corpus. Empty where there are none."""
    suffixes = sorted({suffix for path in texts if (suffix := suffix_of(Path(path))) is not None})
    records = plugins.describe([use for suffix in suffixes for use in SOURCES.uses(suffix)])
    return {"plugins": records} if records else {}


def write_manifest(
    part: Path,
    inputs_sha256: str,
    arguments: dict[str, Any],
    corpus: Corpus,
    tokenizer: Tokenizer,
    splits: dict[str, Any],
    rule: SplitRule,
) -> None:
    """Write manifest.json, the last file of a prepared folder."""
    manifest = {
        "format": FORMAT,
        "inputs": inputs_sha256,
        "arguments": arguments,
        "sources": corpus.description,
        "split_rule": dataclasses.asdict(rule),
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_sha256": tokenizer.sha256,
        "splits": splits,
    }
    replace_atomically(part / "manifest.json", json.dumps(manifest, indent=2) + "\n")


def worker_count(workers: int | None, corpus: Corpus) -> int:
    """How many processes encode: as asked for, or one per core, or none for a small corpus."""
    if workers is not None:
        return workers
    return 0 if 0 < corpus.size < SMALL else os.cpu_count() or 1


def train_tokenizer(part: Path, corpus: Corpus, vocab_size: int, progress: bool) -> Tokenizer:
    """A tokenizer for the corpus, saved in `part`; the one there, where an earlier call got that far."""
    file = part / "tokenizer.json"
    with contextlib.suppress(ValueError):  # there is none, or it is damaged: the same text gives the same one
        return Tokenizer.load(file)
    with bar(f"training a vocabulary of {vocab_size}", None, progress):
        tokenizer = Tokenizer.train(corpus.sample(SAMPLE_BYTES), vocab_size)
    replace_atomically(file, tokenizer.save)
    return Tokenizer.load(file)


def write_splits(
    part: Path, corpus: Corpus, tokenizer: Tokenizer, shard_tokens: int, workers: int, progress: bool
) -> dict[str, Any]:
    """Encode the corpus from where an earlier call stopped, and return the splits' entries in the manifest."""
    place, writers = open_writers(part, token_dtype(tokenizer), shard_tokens)
    try:
        with (
            Encoders(tokenizer, part / "tokenizer.json", workers) as encoders,
            bar("encoding", corpus.size or None, progress) as advance,
        ):
            groups = ((group, [piece for _, piece in group.pieces]) for group in corpus.groups(place))
            shown = 0  # bytes, on the progress bar
            for number, (group, encoded) in enumerate(encoders.map(groups), 1):
                check_group(group, encoded, tokenizer, corpus.sources)
                write_group(group, encoded, writers)
                place = group.after
                reached = sum(source.size for source in corpus.sources[: place.source]) + (
                    place.position.at if place.position and corpus.size else 0
                )
                tokens = sum(writer.total for writer in writers.values())
                advance(reached - shown, f"{place.documents:,} documents {tokens / 1e6:,.1f} M tokens")
                shown = reached
                if number % GROUPS_PER_STATE == 0:
                    write_state(part, place, {name: writer.sync() for name, writer in writers.items()})
        entries = {name: writer.finish() for name, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.abandon()
    check_entries(entries)
    return entries


def check_group(
    group: DocumentGroup, encoded: tuple[Any, list[int]], tokenizer: Tokenizer, sources: Sequence[Source]
) -> None:
    """ValueError for the first text that its ids do not give back, byte for byte: its scores would be of another."""
    ids, lengths = encoded
    start = 0
    for (source, piece), length in zip(group.pieces, lengths, strict=True):
        if (why := tokenizer.loss(piece.text, ids[start : start + length].tolist(), piece.first, piece.last)) != "":
            raise ValueError(
                f"the tokenizer loses text of {sources[source].name}, in the document or part of one that begins "
                f"{piece.text[:40]!r}: {why}; train one (leave out --tokenizer), give another, or change the text"
            )
        start += length


def write_group(group: DocumentGroup, encoded: tuple[Any, list[int]], writers: dict[str, SplitWriter]) -> None:
    """Add the pieces of a group to the splits they belong to."""
    ids, lengths = encoded
    start = 0
    for (source, piece), length in zip(group.pieces, lengths, strict=True):
        writers[piece.split].add(ids[start : start + length], piece.size, piece.last, source)
        start += length


def check_entries(entries: dict[str, dict[str, Any]]) -> None:
    """ValueError where there is nothing to train on, to choose by or to report on."""
    total = {key: sum(entry[key] for entry in entries.values()) for key in ("bytes", "documents")}
    if total["bytes"] < SMALLEST_TEXT:
        raise ValueError(
            f"the text is too short: {total['bytes']} bytes in {total['documents']} document(s), at least "
            f"{SMALLEST_TEXT} are needed for training, validation and test; add text"
        )
    for name, entry in entries.items():
        if entry["documents"] <= 0:
            raise ValueError(
                f"the {name} split is empty: none of the {total['documents']} documents falls to it, or the tokenizer "
                "makes no tokens of them; add text or documents, or split by a field with more values"
            )


def open_writers(part: Path, dtype: str, shard_tokens: int) -> tuple[CorpusPosition, dict[str, SplitWriter]]:
    """Where an earlier call stopped, and writers that go on from there; the beginning, where there is none.

    ValueError for a state that is damaged, or whose files are: it is removed, so that the next call begins anew.
    """
    file = part / "state.json"
    try:
        place, states = read_state(file)
        return place, {name: SplitWriter(part, name, dtype, shard_tokens, states.get(name)) for name in SPLITS}
    except (ValueError, KeyError, TypeError, RecursionError, FileNotFoundError) as error:
        file.unlink(missing_ok=True)
        raise ValueError(f"{file} is damaged ({error}) and is removed; call it again to begin anew") from error


def read_state(file: Path) -> tuple[CorpusPosition, dict[str, Any]]:
    """Where an earlier call stopped, and what its writers need to go on."""
    if not file.is_file():
        return CorpusPosition(), {}
    state = json.loads(file.read_text(encoding="utf-8"))
    source, mark, documents = state["place"]
    splits = {name: state["splits"][name] for name in SPLITS}
    return CorpusPosition(source, SourcePosition(*mark), documents), splits


def write_state(part: Path, place: CorpusPosition, splits: dict[str, Any]) -> None:
    """Note how far everything is, in one step: a reader finds this state or the one before."""
    replace_atomically(part / "state.json", json.dumps({"place": place, "splits": splits}))


def check_replaceable(out: Path) -> None:
    """ValueError unless `out` is new, empty or a prepared folder: nothing else may be lost by writing it."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"{out} is a file; give a new folder to prepare into")
    others = sorted(entry.name for entry in out.iterdir() if not OURS.fullmatch(entry.name))
    if others:
        raise ValueError(f"{out} holds other files ({', '.join(others[:3])}); give a new or empty folder")


def open_if_same(out: Path, inputs_sha256: str) -> Prepared | None:
    """The folder `out`, every byte of it verified, if its manifest names these inputs by their digest; else None."""
    try:
        if read_manifest(out)["inputs"] != inputs_sha256:
            return None
        prepared = Prepared.open(out)
        for name in SPLITS:
            prepared.verify(name)
    except (ValueError, KeyError):  # not there, or damaged: it is made anew
        return None
    return prepared


@contextlib.contextmanager
def partial_folder(out: Path, inputs_sha256: str) -> Iterator[Path]:
    """A hidden folder beside `out` to write into, for one process at a time.

    It is kept where the work was stopped, for a later call with the same inputs to go on from: also by an error in the
    inputs, since a data set may be whole again, and a call that fails at the same place does so without doing the rest
    again. It is removed when it is done, and where an error in the inputs came before the first state.
    """
    part, lock = partial_name(out), out.parent / f".{out.name}.lock"
    out.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(lock):
        marker = part / "inputs"
        if not marker.is_file() or marker.read_text(errors="replace") != inputs_sha256:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            marker.write_text(inputs_sha256)
        try:
            yield part
            shutil.rmtree(part)
        except ValueError:
            if not (part / "state.json").is_file():
                shutil.rmtree(part)
            raise
        finally:
            with contextlib.suppress(OSError):  # whoever waits for it locks a new one
                lock.unlink()


def partial_name(out: Path) -> Path:
    """The hidden folder in which `out` is made."""
    return out.parent / f".{out.name}.part"


def move_into_place(part: Path, out: Path) -> None:
    """Move the finished files to their place; what was there before is gone once they are. May be called again."""
    new = part / "new"
    new.mkdir(exist_ok=True)
    for entry in sorted(part.iterdir()):
        if OURS.fullmatch(entry.name):
            entry.rename(new / entry.name)
    replace_folder(new, out)
