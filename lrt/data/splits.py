"""Which split a file or a document belongs to: train, validation and test, 90 / 5 / 5 unless asked otherwise.

A hash of the text (or of a field) decides for documents of records, so that adding others moves nothing, and equal
documents stay together. Text files are taken by content in the order of their digests, until a split has its share.
"""

from __future__ import annotations

import hashlib
import mmap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

SHARD_TOKENS = 100_000_000
"""Tokens of a shard, the files of a split: 200 MB with a vocabulary below 65,537."""
LARGEST_PARTS = (0.25, 0.5)
"""The most that one file may be of validation or test; the second is tried where the first leaves too little."""
SHORT, LONG = 0.8, 1.1
"""What validation and test may come to, as multiples of their nominal share, where whole files fall to them."""


@dataclass(frozen=True)
class SplitRule:
    """How text is divided: the shares of validation and test, and what decides for whole files of text."""

    val: float = 0.05
    """Validation's share of the bytes (of records: of the documents), between 0 and 1."""
    test: float = 0.05
    """Test's share."""
    files: Literal["content", "name"] = "content"
    """content: equal files fall to one split, and sizes come near the shares. name: a hash of each file's name decides,
    as it did for every folder whose manifest names no rule."""

    def __post_init__(self) -> None:
        for name, share in (("val", self.val), ("test", self.test)):
            if not 0 < share < 1:
                raise ValueError(f"{name} is {share}; give its share of the text, above 0 and below 1, such as 0.05")
        if self.val_start <= 0:
            raise ValueError(f"val is {self.val} and test {self.test}, which leaves nothing to train on; give less")

    @property
    def val_start(self) -> float:
        """Where validation begins, in a file or in the range of the hashes. Rounded: 1 - 0.05 - 0.05 is not 0.9."""
        return round(1 - self.val - self.test, 12)

    @property
    def test_start(self) -> float:
        """Where test begins."""
        return round(1 - self.test, 12)


BY_CONTENT = SplitRule()
"""The rule of folders that are made now."""
BY_NAME = SplitRule(files="name")
"""The rule of version 0.1.0. The standard library keeps it, so that what was published of it stays comparable."""


def hash_fraction(key: str) -> float:
    """A number in [0, 1) that follows from `key` alone: the first 64 bits of its SHA-256."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def split_of(key: str, rule: SplitRule = BY_NAME) -> str:
    """The split of whatever has this key: a file's name, an author, a text."""
    place = hash_fraction(key)
    return "train" if place < rule.val_start else "val" if place < rule.test_start else "test"


def assign_by_content(files: Mapping[str, tuple[int, str]], rule: SplitRule) -> dict[str, str]:
    """The split of each file, whose bytes and digest `files` has by name: equal files fall to the same one.

    Test and then validation take files in the order of their digests, which is as good as random, up to their share
    of the bytes; none that would be a large part of it. Empty where whole files do not come near the shares.
    """
    sizes: Counter[str] = Counter()
    for size, digest in files.values():
        sizes[digest] += size
    for part in LARGEST_PARTS:
        taken: dict[str, str] = {}
        whole = [
            take_share(split, share * sizes.total(), part, sizes, taken)
            for split, share in (("test", rule.test), ("val", rule.val))
        ]
        if all(whole):
            return {name: taken.get(digest, "train") for name, (_, digest) in files.items()}
    return {}


def take_share(split: str, wanted: float, part: float, sizes: Mapping[str, int], taken: dict[str, str]) -> bool:
    """Give `split` about `wanted` bytes of what is not `taken`, at most `part` of it at once; whether it got them."""
    total = 0
    for digest, size in sorted(sizes.items()):
        if digest not in taken and total < wanted and size <= part * wanted and total + size <= LONG * wanted:
            taken[digest], total = split, total + size
    return total >= SHORT * wanted


def assign_splits(names: Sequence[str], rule: SplitRule = BY_NAME) -> list[str]:
    """The split of each file, from a hash of its name: adding files moves none of the others.

    With a few dozen files chance may leave validation or test without any; the training file with the highest hash
    then goes there, the one exception to the rule above.
    """
    splits = [split_of(name, rule) for name in names]
    for missing in ("test", "val"):
        if missing not in splits:
            splits[max((hash_fraction(name), i) for i, name in enumerate(names) if splits[i] == "train")[1]] = missing
    return splits


def cut_places(text: bytes | mmap.mmap, rule: SplitRule = BY_NAME) -> tuple[int, int]:
    """Where validation and test begin in a text of UTF-8: after a newline where one is near, within no character."""
    # Half the smallest part: the two cuts cannot meet.
    reach = min(rule.val_start, rule.test_start - rule.val_start, 1 - rule.test_start) / 2
    places: list[int] = []
    for ideal in (rule.val_start, rule.test_start):
        low, middle, high = (int(len(text) * share) for share in (ideal - reach, ideal, ideal + reach))
        newline = text.find(b"\n", middle, high)
        if newline < 0:
            newline = text.rfind(b"\n", low, middle)
        place = middle if newline < 0 else newline + 1
        while 0 < place < len(text) and text[place] & 0xC0 == 0x80:  # a continuation byte: its character began before
            place -= 1
        places.append(place)
    return places[0], places[1]


def cut_file(path: Path, rule: SplitRule = BY_NAME) -> list[tuple[str, int, int]]:
    """(split, first byte, end) of the contiguous parts of a text file that hold anything."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        val, test = cut_places(text, rule)
        parts = [("train", 0, val), ("val", val, test), ("test", test, len(text))]
    return [part for part in parts if part[1] < part[2]]
