"""What objects look like in a notebook or a debugger: one line, with what sets them apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

SHOWN = 32
"""Items of a sequence that are shown, at most."""


def changed_fields(config: Any) -> str:
    """A dataclass as the call that makes it, with the fields only that are not at their defaults.

    A sequence of more than SHOWN items is its beginning and its length.
    """
    changed = [
        f"{field.name}={short(value)}"
        for field in dataclasses.fields(config)
        if field.repr and (value := vars(config)[field.name]) != default_of(field)
    ]
    return f"{type(config).__name__}({', '.join(changed)})"


def default_of(field: dataclasses.Field[Any]) -> Any:
    """A field's default; MISSING, which equals no value, where it has none."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def short(value: object) -> str:
    """A value as `repr` has it; of a long sequence its beginning and its length."""
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) > SHOWN:
        return f"({', '.join(map(repr, value[:SHOWN]))}, … {len(value):,} in all)"
    return repr(value)
