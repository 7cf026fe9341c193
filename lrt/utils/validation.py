"""Checks of a user's values. A message says the value, the limit and the fix."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any


def check_choice(config: object, name: str, options: tuple[str, ...]) -> None:
    """Raise a ValueError unless field `name` is one of `options`."""
    value = getattr(config, name)
    if value not in options:
        raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(options)}")


def check_fields(kind: type, fields: object, where: str) -> None:
    """Raise a ValueError unless `fields`, plain data from a file, are a mapping of fields of the dataclass `kind`.

    Numbers, texts and truth values have to be such; what is nested or else is left to the class itself.
    """
    if not isinstance(fields, Mapping):
        raise ValueError(f"{where} is {fields!r}; it has to be fields of {kind.__name__}")
    hints = typing.get_type_hints(kind)
    known = [field.name for field in dataclasses.fields(kind)]
    for name, content in fields.items():
        if name not in known:
            raise ValueError(f"{where} has no field {name}; it has {', '.join(sorted(known))}")
        plain = plain_types(hints[name])
        if plain and not is_of(content, plain):
            names = " or ".join(sorted(t.__name__ for t in plain))
            raise ValueError(f"{where}.{name} is {content!r}; it has to be {names.replace('NoneType', 'null')}")


def plain_types(hint: Any) -> tuple[type, ...]:
    """The types that an annotation admits; none where any of them is more than a number, text, truth value or None."""
    parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return tuple(parts) if all(part in (int, float, str, bool, types.NoneType) for part in parts) else ()


def is_of(content: object, plain: tuple[type, ...]) -> bool:
    """Whether a number, text or truth value is of one of these types. A whole number is a float too, a bool no int."""
    return type(content) in plain or (type(content) is int and float in plain)
