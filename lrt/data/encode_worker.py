"""The program of one encoding process: lists of texts in, token ids out, until its input ends.

It imports neither lrt nor torch, so that a worker starts in a fraction of a second and takes tens of megabytes, not
hundreds: that is why it is a program and not a `multiprocessing` target. When its parent is killed, its input ends, and
so does it.

A message is a number of arrays of bytes: how many (int64), their sizes (int64 each), and their bytes.
"""

from __future__ import annotations

import signal
import sys
from array import array
from collections.abc import Sequence
from typing import IO

import numpy as np
import tokenizers

AT_ONCE = 1 << 19
"""Characters that the library encodes at a time: until its results are converted it holds a hundred bytes per token."""


def without_processing(inner: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """`inner`, changed to encode text as it is: no truncation, no padding, special tokens in a text stay text."""
    inner.no_truncation()
    inner.no_padding()
    inner.encode_special_tokens = True  # "<|bos|>" in a user's file is seven characters, not a new document
    return inner


def encode(inner: tokenizers.Tokenizer, texts: Sequence[str], dtype: str) -> tuple[np.ndarray, list[int]]:
    """The ids of all `texts`, one after another, as a `dtype` array (n,); and how many each text has."""
    ids, lengths = array("H" if np.dtype(dtype).itemsize == 2 else "I"), []
    first, size = 0, 0
    for last, text in enumerate(texts, 1):
        size += len(text)
        if size >= AT_ONCE or last == len(texts):
            for encoding in inner.encode_batch_fast(list(texts[first:last]), add_special_tokens=False):
                token_ids = encoding.ids
                ids.extend(token_ids)
                lengths.append(len(token_ids))
            first, size = last, 0
    return np.frombuffer(ids, dtype=ids.typecode).astype(dtype, copy=False), lengths


def send(stream: IO[bytes], parts: Sequence[bytes]) -> None:
    """Write a message, all of it."""
    stream.write(np.array([len(parts), *map(len, parts)], np.int64).tobytes())
    stream.write(b"".join(parts))
    stream.flush()


def receive(stream: IO[bytes]) -> list[bytes]:
    """Read a message; EOFError where the other side has ended."""
    (count,) = np.frombuffer(read_exactly(stream, 8), np.int64)
    return [
        read_exactly(stream, size) for size in np.frombuffer(read_exactly(stream, 8 * int(count)), np.int64).tolist()
    ]


def read_exactly(stream: IO[bytes], size: int) -> bytes:
    """`size` bytes of `stream`; EOFError where it ends before."""
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return data


def main() -> None:
    """Serve the process that started this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent closes our input
    inner, dtype = without_processing(tokenizers.Tokenizer.from_file(sys.argv[1])), sys.argv[2]
    while True:
        try:
            texts = [data.decode() for data in receive(sys.stdin.buffer)]
        except EOFError:
            return
        ids, lengths = encode(inner, texts, dtype)
        send(sys.stdout.buffer, [ids.tobytes(), np.array(lengths, np.int64).tobytes()])


if __name__ == "__main__":
    main()
