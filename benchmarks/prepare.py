"""How fast `lrt prepare` is beside the tokenizers library alone, and the memory it takes: one JSON line.

    python benchmarks/prepare.py CORPUS TOKENIZER [--pairs 3] [--workers 2] [--documents N]

CORPUS is a JSON-lines file (.gz, .xz, .zst), TOKENIZER a tokenizer.json. The library encodes the same texts, held in
memory, in groups of the same size, with as many threads; it neither reads nor writes. Both run in turn, so that what
else the machine does falls on both. On a busy machine trust `cpu_ratio`: a preparation has one process more to be
given time than the library has threads.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import threading
import time
from pathlib import Path

import tokenizers

from lrt.data.corpus import CorpusPosition, open_corpus
from lrt.data.prepare import prepare
from lrt.data.records import Selection


def processor_seconds() -> float:
    """Of this process and of its children that have ended."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def time_call(work) -> tuple[float, float]:
    """(seconds, processor seconds) of a call."""
    begun, used = time.perf_counter(), processor_seconds()
    work()
    return time.perf_counter() - begun, processor_seconds() - used


def memory() -> int:
    """Bytes of this process and its children, what they share counted once (Linux)."""
    pids = [os.getpid()]
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "stat").read_text().rsplit(")", 1)[1].split()[1] == str(os.getpid()):
                pids.append(int(entry.name))
        except OSError:  # it has ended
            continue
    total = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


class Peak:
    """The most memory while a block runs, looked at every tenth of a second."""

    def __enter__(self) -> Peak:
        self.bytes, self.done = memory(), threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        while not self.done.wait(0.1):
            self.bytes = max(self.bytes, memory())

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("corpus", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--documents", type=int, default=None)
    options = parser.parse_args()
    os.environ["RAYON_NUM_THREADS"] = str(options.workers)  # of the library, here; read at its first call
    selection, out = Selection(documents=options.documents), Path(tempfile.mkdtemp()) / "out"

    def ours() -> None:
        prepare(
            out,
            [options.corpus],
            tokenizer=options.tokenizer,
            progress=False,
            workers=options.workers,
            selection=selection,
        )

    with Peak() as peak:  # before the texts are held in memory for the library
        ours()
    corpus = open_corpus([options.corpus], None, selection, lambda *_: None)
    groups = [[piece.text for _, piece in group.pieces] for group in corpus.groups(CorpusPosition())]
    size = sum(len(text.encode()) for group in groups for text in group)

    def library() -> None:
        inner = tokenizers.Tokenizer.from_file(str(options.tokenizer))  # a fresh one: it remembers words
        for group in groups:
            inner.encode_batch_fast(group, add_special_tokens=False)

    pairs = []
    for _ in range(options.pairs):
        alone = time_call(library)
        shutil.rmtree(out.parent)
        pairs.append((*alone, *time_call(ours)))
    shutil.rmtree(out.parent)
    mean = [statistics.median(column) for column in zip(*pairs, strict=True)]
    print(
        json.dumps(
            {
                "megabytes": size / 1e6,
                "workers": options.workers,
                "library_mb_per_s": size / 1e6 / mean[0],
                "prepare_mb_per_s": size / 1e6 / mean[2],
                "ratio": statistics.median(pair[0] / pair[2] for pair in pairs),
                "cpu_ratio": statistics.median(pair[1] / pair[3] for pair in pairs),
                "peak_bytes": peak.bytes,
                "pairs": pairs,
            }
        )
    )


if __name__ == "__main__":
    main()
