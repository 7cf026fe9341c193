"""What is wrong with a body, in plain words: pydantic's errors are about types, and its messages in its own terms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

KINDS = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "none_required": "null",
}
"""Pydantic's type of an error about a value of the wrong kind -> the kind that is asked for."""
LIMITS = {
    "missing": "it is missing; give it",
    "extra_forbidden": "unknown; leave it out",
    "less_than_equal": "at most {le:g}, and it is {number}",
    "less_than": "less than {lt:g}, and it is {number}",
    "greater_than_equal": "at least {ge:g}, and it is {number}",
    "greater_than": "more than {gt:g}, and it is {number}",
    "too_long": "at most {max_length} {things}, and there are {size}",
    "too_short": "{min_length} or more {things}, and there are {size}",
    "string_too_long": "at most {max_length} characters, and there are {size}",
    "string_too_short": "{min_length} or more characters, and there are {size}",
    "string_pattern_mismatch": "its names must be the numbers of tokens",
    "literal_error": "choose {expected}",
    "union_tag_invalid": "choose {expected_tags} as its {discriminator}",
    "union_tag_not_found": "its {discriminator} is missing; give it",
}
"""Pydantic's type of any other error -> what is said of it."""
THINGS = {"stop": "texts", "messages": "turns", "metadata": "names", "logit_bias": "tokens"}
"""Parameter -> what a list or an object of it holds; of others entries."""
UNION_TAGS = frozenset({"str", "int", "float", "bool"})
"""What pydantic puts into an error's place to name a member of a union."""
TAGGED = frozenset({"response_format"})
"""Parameters of several forms: behind their names pydantic puts that of the form, which no body has there."""
LARGEST_SHOWN = 10**15
Path = tuple[int | str, ...]


def describe(errors: Iterable[Mapping[str, Any]]) -> str:
    """One sentence for pydantic's errors (`loc`, `type`, `msg`, `ctx`, `input`) about one parameter.

    A union gives errors for each of its members. What is said is of the member whose kind was right, else of the one
    that was read furthest.
    """
    of_limits = [error for error in errors if error["type"] not in KINDS]
    paths = [(path_of(error), error) for error in of_limits or errors]
    furthest = max((path for path, _ in paths), key=depth)
    there = [error for path, error in paths if path == furthest]
    if of_limits:
        reason = limit_words(there[0], furthest)
    else:
        *others, last = dict.fromkeys(KINDS[error["type"]] for error in there)
        reason = f"{', '.join(others)} or {last} is needed" if others else f"{last} is needed"
    return f"{spell(furthest)}: {reason}"


def limit_words(error: Mapping[str, Any], path: Path) -> str:
    """What is said of an error that is not about a kind; pydantic's own words where there are none of ours."""
    value = error.get("input")
    size = len(value) if isinstance(value, str | list | dict) else 0
    named = next((part for part in reversed(path) if isinstance(part, str)), "")
    words = {"number": show_number(value), "size": size, "things": THINGS.get(named, "entries")}
    return LIMITS.get(error["type"], str(error["msg"])[:200]).format(**error.get("ctx", {}), **words)


def path_of(error: Mapping[str, Any]) -> Path:
    """Where an error is, without the names of unions' members."""
    loc = error["loc"]
    parts = [p for i, p in enumerate(loc) if p != "body" and not (i > 0 and loc[i - 1] in TAGGED)]
    return tuple(p for p in parts if isinstance(p, int) or (p.isidentifier() and p.islower() and p not in UNION_TAGS))


def depth(path: Path) -> tuple[int, ...]:
    """How far a path has come, for comparison: later entries of a list are further."""
    return tuple(part if isinstance(part, int) else 0 for part in path)


def spell(path: Path) -> str:
    """A path as one writes it: messages[0].content."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part[:64]}" for part in path).removeprefix(".")


def show_number(value: object) -> str:
    """A number; of one that is too long to be read, to which side it goes."""
    if not isinstance(value, int | float):
        return ""
    return str(value) if abs(value) < LARGEST_SHOWN else "far more" if value > 0 else "far less"
