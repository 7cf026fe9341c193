"""Encode groups of texts, in this process or in several, always in the order in which they came.

What is encoded does not depend on the number of workers: groups are formed before they are handed out, and their
results are taken in order.

Several processes of one thread each beat the tokenizers library's own threads, which share one cache and one memory
allocator.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import TypeVar

import numpy as np

from lrt.data import encode_worker
from lrt.data.sources import Piece
from lrt.data.tokenizer import Tokenizer

Encoded = tuple[np.ndarray, list[int]]
"""Ids of several texts, one after another, and how many each has."""
T = TypeVar("T")
MOST_WORKERS = 1024
"""Processes at most: each is one core's work."""


def token_dtype(tokenizer: Tokenizer) -> str:
    """The smallest type that holds every id; little-endian, so that files are the same everywhere."""
    return "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"


class Encoders:
    """`workers` processes that encode, or with 0 a thread of this process. A context manager."""

    def __init__(self, tokenizer: Tokenizer, file: Path, workers: int) -> None:
        """`file` is where `tokenizer` was saved, for the processes to read. ValueError for a wrong `workers`."""
        check_workers(workers)
        self.encoder = encode_worker.Encoder.of(tokenizer.inner)
        self.dtype = token_dtype(tokenizer)
        self.ahead: int = 2 * max(1, workers)
        """Groups in flight: each worker has one, and the next is ready for it."""
        # A thread waits for one process at a time, so there are as many threads as processes.
        self._threads = ThreadPoolExecutor(max(1, workers))
        self._processes = [start_worker(file, self.dtype) for _ in range(workers)]
        self._idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
        for process in self._processes:
            self._idle.put(process)

    def submit(self, pieces: Sequence[Piece]) -> Future[Encoded]:
        """Encode `pieces` as soon as there is a worker. The future raises OSError where its process died."""
        texts, firsts = [piece.text for piece in pieces], [piece.first for piece in pieces]
        if self._processes:
            return self._threads.submit(self._encode_in_process, texts, firsts)
        return self._threads.submit(encode_worker.encode, self.encoder, texts, firsts, self.dtype)

    def map(self, groups: Iterable[tuple[T, Sequence[Piece]]]) -> Iterator[tuple[T, Encoded]]:
        """Encode the pieces of each group; results come in order, reading and encoding overlap."""
        pending: deque[tuple[T, Future[Encoded]]] = deque()
        for key, pieces in groups:
            pending.append((key, self.submit(pieces)))
            if len(pending) > self.ahead:
                key, future = pending.popleft()
                yield key, future.result()
        while pending:
            key, future = pending.popleft()
            yield key, future.result()

    def _encode_in_process(self, texts: Sequence[str], firsts: Sequence[bool]) -> Encoded:
        process = self._idle.get()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            encode_worker.send(process.stdin, [bytes(firsts), *(text.encode() for text in texts)])
            ids, lengths = encode_worker.receive(process.stdout)
        except (EOFError, BrokenPipeError) as error:
            raise OSError(
                f"an encoding process ended with status {process.wait()}; if memory ran out, use fewer --workers"
            ) from error
        self._idle.put(process)
        return np.frombuffer(ids, self.dtype), np.frombuffer(lengths, np.int64).tolist()

    def __enter__(self) -> Encoders:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)
        for process in self._processes:
            process.communicate()  # closes its input, at whose end it ends


def check_workers(workers: int | None) -> None:
    """ValueError for a number of processes that cannot be; None stands for one per core."""
    if workers is not None and not 0 <= workers <= MOST_WORKERS:
        raise ValueError(f"workers is {workers}; give 0 (encode in this process) to {MOST_WORKERS}")


def start_worker(file: Path, dtype: str) -> subprocess.Popen[bytes]:
    """A process that runs encode_worker.py on one core."""
    program = [sys.executable, "-P", encode_worker.__file__, str(file), dtype]  # -P: this folder is not for imports
    one_thread = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.Popen(
        program, env=os.environ | one_thread, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=1 << 20
    )
