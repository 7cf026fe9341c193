"""Checks of a user's values. A message says the value, the limit and the fix."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


def check_choice(config: object, name: str, options: tuple[str, ...]) -> None:
    """Raise a ValueError unless field `name` is one of `options`."""
    value = getattr(config, name)
    if value not in options:
        raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(options)}")


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

    def allow(self, number: object) -> bool:
        """Whether `number` is such a number."""
        if number is None:
            return self.optional
        if isinstance(number, bool) or not isinstance(number, int if self.whole else int | float):
            return False
        # In this order: a nan compares as False, and an int may be too large for a float.
        return self.least <= number <= self.most and not (self.above and number == self.least)

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a finite number"
        least = f"{'above' if self.above else 'of at least'} {self.least:,}" if self.least > -math.inf else ""
        return " ".join([kind, *([least, "and"] if least else []), f"at most {self.most:,}"]) + (
            ", or None" if self.optional else ""
        )


def check_numbers(config: object, limits: Mapping[str, Limits], prefix: str = "") -> None:
    """Raise a ValueError unless each named field of `config` is within its limits; `prefix` says where it is set."""
    for name, limit in limits.items():
        number = getattr(config, name)
        if not limit.allow(number):
            raise ValueError(f"{prefix}{name} is {number!r}; it must be {limit}")
