"""The program of one encoding process: lists of pieces of documents in, token ids out, until its input ends.

It imports neither lrt nor torch, so that a worker starts in a fraction of a second and takes tens of megabytes, not
hundreds: that is why it is a program and not a `multiprocessing` target. When its parent is killed, its input ends, and
so does it.

A message is a number of arrays of bytes: how many (int64), their sizes (int64 each), and their bytes.
"""

from __future__ import annotations

import json
import signal
import sys
from array import array
from collections.abc import Sequence
from typing import IO, Any, NamedTuple

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


class Encoder(NamedTuple):
    """How a piece of a document is encoded."""

    first: tokenizers.Tokenizer
    """For the piece with which a document begins."""
    further: tokenizers.Tokenizer
    """For all others: without the space that some tokenizers put before a text."""

    @classmethod
    def of(cls, inner: tokenizers.Tokenizer) -> Encoder:
        """The encoder of a tokenizer, which is changed as by `without_processing`."""
        whole = json.loads(without_processing(inner).to_str())
        parts = {key: without_prefix(whole[key]) for key in ("normalizer", "pre_tokenizer")}
        if all(whole[key] == part for key, part in parts.items()):
            return cls(inner, inner)
        return cls(inner, without_processing(tokenizers.Tokenizer.from_str(json.dumps(whole | parts))))


def without_prefix(part: Any) -> Any:
    """A part of a serialised tokenizer, without what puts a space before a text."""
    if isinstance(part, list):
        return [without_prefix(each) for each in part if not (isinstance(each, dict) and each.get("type") == "Prepend")]
    if not isinstance(part, dict):
        return part
    if part.get("type") == "Prepend":
        return None
    never = {"prepend_scheme": "never", "add_prefix_space": False}
    return {key: never.get(key, without_prefix(each)) for key, each in part.items()}


def encode(encoder: Encoder, texts: Sequence[str], firsts: Sequence[bool], dtype: str) -> tuple[np.ndarray, list[int]]:
    """The ids of all `texts`, one after another, as a `dtype` array (n,); and how many each text has.

    firsts: whether each text is the beginning of a document.
    """
    ids, lengths = array("H" if np.dtype(dtype).itemsize == 2 else "I"), []
    start, size = 0, 0
    for stop, text in enumerate(texts, 1):
        size += len(text)
        if size >= AT_ONCE or stop == len(texts) or firsts[stop] != firsts[start]:
            inner = encoder.first if firsts[start] else encoder.further
            for encoding in inner.encode_batch_fast(list(texts[start:stop]), add_special_tokens=False):
                token_ids = encoding.ids
                ids.extend(token_ids)
                lengths.append(len(token_ids))
            start, size = stop, 0
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
    encoder, dtype = Encoder.of(tokenizers.Tokenizer.from_file(sys.argv[1])), sys.argv[2]
    while True:
        try:
            firsts, *texts = receive(sys.stdin.buffer)
        except EOFError:
            return
        ids, lengths = encode(encoder, [text.decode() for text in texts], [bool(first) for first in firsts], dtype)
        send(sys.stdout.buffer, [ids.tobytes(), np.array(lengths, np.int64).tobytes()])


if __name__ == "__main__":
    main()
