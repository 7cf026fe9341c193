"""What is checked of every verb's flags alike, before any work: numbers, and where results are to be written."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lrt.utils.files import check_writable
from lrt.utils.validation import shorten

OUTPUTS = {"out", "results", "figure"}
"""Fields of verbs that name what is written."""
INTEGERS = 2**63
"""Whole numbers from here on do not fit into the 64 bits that tensors and generators have for them."""


def check_verb(verb: Any) -> None:
    """ValueError that names the flag, the value and the limit, for a number that no flag takes.

    OSError or ValueError where what a flag names cannot be written.
    """
    for flag, content in flag_values(verb):
        for number in content if isinstance(content, tuple) else (content,):
            check_number(flag, number)
        if flag.removeprefix("--") in OUTPUTS and isinstance(content, Path):
            check_writable(content)


def check_number(flag: str, number: object) -> None:
    if isinstance(number, float) and not math.isfinite(number):
        raise ValueError(f"{flag} is {number}; give a finite number")
    if isinstance(number, int) and not 0 <= number < INTEGERS:
        raise ValueError(f"{flag} is {shorten(number)}; give a whole number from 0 to below 2^63")


def flag_values(verb: Any, prefix: str = "--") -> Iterator[tuple[str, Any]]:
    """(flag, value) of every field of a verb, those of its subcommand and of nested settings included."""
    hints = typing.get_type_hints(type(verb), include_extras=True)
    for field in dataclasses.fields(verb):
        content, flag = getattr(verb, field.name), prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(content):
            # tyro's `arg(name="")`: the flags of a subcommand have no prefix.
            is_subcommand = any(getattr(mark, "name", None) == "" for mark in typing.get_args(hints[field.name])[1:])
            yield from flag_values(content, prefix if is_subcommand else f"{flag}.")
        else:
            yield flag, content
