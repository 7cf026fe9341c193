"""Which split a file or a document belongs to: train, validation and test, 90 / 5 / 5.

A hash of the name (or of the text) decides, so that adding others moves nothing, and equal documents stay together.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Sequence
from pathlib import Path

TRAIN, VAL = 0.9, 0.95
"""Where validation and test begin, in a file or in the range of the hashes."""


def hash_fraction(key: str) -> float:
    """A number in [0, 1) that follows from `key` alone: the first 64 bits of its SHA-256."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def split_of(key: str) -> str:
    """The split of whatever has this key: a file's name, an author, a text."""
    place = hash_fraction(key)
    return "train" if place < TRAIN else "val" if place < VAL else "test"


def assign_splits(names: Sequence[str]) -> list[str]:
    """The split of each file, from a hash of its name: adding files moves none of the others.

    With a few dozen files chance may leave validation or test without any; the training file with the highest hash
    then goes there, the one exception to the rule above.
    """
    splits = [split_of(name) for name in names]
    for missing in ("test", "val"):
        if missing not in splits:
            splits[max((hash_fraction(name), i) for i, name in enumerate(names) if splits[i] == "train")[1]] = missing
    return splits


def cut_places(text: bytes | mmap.mmap) -> tuple[int, int]:
    """Where validation and test begin in a text of UTF-8: after a newline where one is near, within no character."""
    reach = (VAL - TRAIN) / 2  # half a part: the two cuts cannot meet
    places: list[int] = []
    for ideal in (TRAIN, VAL):
        low, middle, high = (int(len(text) * share) for share in (ideal - reach, ideal, ideal + reach))
        newline = text.find(b"\n", middle, high)
        if newline < 0:
            newline = text.rfind(b"\n", low, middle)
        place = middle if newline < 0 else newline + 1
        while 0 < place < len(text) and text[place] & 0xC0 == 0x80:  # a continuation byte: its character began before
            place -= 1
        places.append(place)
    return places[0], places[1]


def cut_file(path: Path) -> list[tuple[str, int, int]]:
    """(split, first byte, end) of the contiguous parts of a text file that hold anything."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        val, test = cut_places(text)
        parts = [("train", 0, val), ("val", val, test), ("test", test, len(text))]
    return [part for part in parts if part[1] < part[2]]
