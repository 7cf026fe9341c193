"""Checks of a user's values. A message says the value, the limit and the fix."""

from __future__ import annotations


def check_choice(config: object, name: str, options: tuple[str, ...]) -> None:
    """Raise a ValueError unless field `name` is one of `options`."""
    value = getattr(config, name)
    if value not in options:
        raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(options)}")
