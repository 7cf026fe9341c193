"""Checks of a user's values. A message says the value, the limit and the fix."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

LONGEST = 200
"""Characters of a value that a message repeats."""


def shorten(content: object) -> str:
    """A value for a message, as `repr` has it: of a long one the beginning, of a long number that it is one.

    Python refuses to write numbers of more than 4,300 digits.
    """
    if isinstance(content, int) and abs(content) >= 10**30:
        return f"a {'negative ' if content < 0 else ''}number of more than 30 digits"
    try:
        text = repr(content)
    except ValueError:  # such a number within
        return f"a {type(content).__name__} with a number of more than 30 digits"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}… ({len(text):,} characters)"


def near_matches(name: str, names: Iterable[str]) -> str:
    """For the end of a message: the names that are spelt like `name`; empty where none is."""
    near = difflib.get_close_matches(name, [*names], n=3)
    return f"; did you mean {' or '.join(near)}" if near else ""


def check_choice(config: object, name: str, options: tuple[str, ...]) -> None:
    """Raise a ValueError unless field `name` is one of `options`."""
    value = getattr(config, name)
    if value not in options:
        raise ValueError(f"unknown {name} {shorten(value)}; choose one of {', '.join(options)}")


def check_fields(kind: type, fields: object, where: str) -> None:
    """Raise a ValueError unless `fields`, plain data from a file, are a mapping of fields of the dataclass `kind`.

    Numbers, texts and truth values have to be such; what is nested or else is left to the class itself.
    """
    if not isinstance(fields, Mapping):
        raise ValueError(f"{where} is {shorten(fields)}; it has to be fields of {kind.__name__}")
    hints = typing.get_type_hints(kind)
    known = [field.name for field in dataclasses.fields(kind)]
    for name, content in fields.items():
        if name not in known:
            raise ValueError(f"{where} has no field {name}; it has {', '.join(sorted(known))}")
        plain = plain_types(hints[name])
        if plain and not is_of(content, plain):
            names = " or ".join(sorted(t.__name__ for t in plain))
            raise ValueError(f"{where}.{name} is {shorten(content)}; it has to be {names.replace('NoneType', 'null')}")


def plain_types(hint: Any) -> tuple[type, ...]:
    """The types that an annotation admits; none where any of them is more than a number, text, truth value or None."""
    parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return tuple(parts) if all(part in (int, float, str, bool, types.NoneType) for part in parts) else ()


def is_of(content: object, plain: tuple[type, ...]) -> bool:
    """Whether a number, text or truth value is of one of these types. A whole number is a float too, a bool no int."""
    return type(content) in plain or (type(content) is int and float in plain)


@dataclass(frozen=True)
class Limits:
    """What a numeric field may be. Every number is finite, and no bool, whatever the limits."""

    least: float
    most: float
    whole: bool = False
    """Whether it counts something: an int."""
    above: bool = False
    """Whether `least` itself is too little."""
    optional: bool = False
    """Whether None stands for something."""
    several: bool = False
    """Whether it may also be a tuple of such numbers."""

    def allow(self, number: object) -> bool:
        """Whether `number` is such a number."""
        if self.several and isinstance(number, tuple):
            return all(map(dataclasses.replace(self, several=False).allow, number))
        if number is None:
            return self.optional
        if isinstance(number, bool) or not isinstance(number, int if self.whole else int | float):
            return False
        # In this order: a nan compares as False, and an int may be too large for a float.
        return self.least <= number <= self.most and not (self.above and number == self.least)

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a finite number"
        least = f"{'above' if self.above else 'of at least'} {self.least:,}" if self.least > -math.inf else ""
        others = (", or None" if self.optional else "") + (", or a tuple of such" if self.several else "")
        return " ".join([kind, *([least, "and"] if least else []), f"at most {self.most:,}"]) + others


def check_numbers(config: object, limits: Mapping[str, Limits], prefix: str = "") -> None:
    """Raise a ValueError unless each named field of `config` is within its limits; `prefix` says where it is set."""
    for name, limit in limits.items():
        number = getattr(config, name)
        if not limit.allow(number):
            raise ValueError(f"{prefix}{name} is {shorten(number)}; it must be {limit}")
