"""Schedules as text: `parse` reads what `repr` writes, and executes nothing."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from lrt.schedules.base import SCHEDULES, Mixture, Schedule, Simple, Stages, bind
from lrt.schedules.library import late, mixture, stages
from lrt.utils.registry import UnknownName
from lrt.utils.validation import shorten

_COMPOSED: dict[str, Callable[..., Schedule]] = {"mixture": mixture, "stages": stages, "late": late}
"""Schedules made of schedules, which are no entries of SCHEDULES: they have no passes of their own."""
LONG_NUMBER = re.compile(r"\d{1000}")
EXAMPLES = {
    "plain": "plain()",
    "interleaved": "interleaved(2)",
    "multi_refinement": "multi_refinement(2)",
    "chunked": "chunked(64)",
    "strided": "strided(4, 2)",
    "sequential": "sequential()",
    "settled": "settled(1, 1, 1)",
    "mixture": "mixture([(0.5, interleaved(2)), (0.5, settled(0, 1, 1))])",
    "stages": "stages([(0.7, plain()), (0.3, settled(1, 1, 1))])",
    "late": "late(0.7, settled(1, 1, 1))",
}
"""What a message shows of each kind."""


def names() -> Iterator[str]:
    """Every schedule's name."""
    yield from SCHEDULES
    yield from _COMPOSED


def parse(text: str) -> Schedule:
    """Read a schedule as `repr` writes it, for example `settled(0, 1, 1)`; nothing is executed.

    Raises ValueError with the text and the known names; it is an UnknownName where that is all that is wrong.
    """
    try:
        if LONG_NUMBER.search(text):  # Python's own message is about a setting of Python's
            raise ValueError("it holds a number of 1,000 digits or more")
        built = _build(ast.parse(text.strip(), mode="eval").body)
        if not isinstance(built, Simple | Mixture | Stages):
            raise ValueError("that is no schedule")
        return built
    except UnknownName as error:
        raise UnknownName(f"cannot read the schedule {shorten(text)}: {error}") from error
    # Python's own parser raises the last two for text that nests too deeply.
    except (
        SyntaxError,
        KeyError,
        TypeError,
        AttributeError,
        ValueError,
        OverflowError,
        RecursionError,
        MemoryError,
    ) as error:
        raise ValueError(
            f"cannot read the schedule {shorten(text)}: {error}; write for example {example_of(text)}"
        ) from error


def example_of(text: str) -> str:
    """A right schedule of the kind that `text` begins with; of another kind where that is none of the library's."""
    return EXAMPLES.get(text.partition("(")[0].strip(), EXAMPLES["interleaved"])


@dataclass(frozen=True, repr=False)
class Unknown:
    """A schedule that nobody registered here. It is kept and written as it is; whatever would run it raises."""

    text: str
    reason: str

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise ValueError(self.reason)

    passes = at = draw = scoring_parts = shares = cost = _refuse

    def __repr__(self) -> str:
        return self.text


def parse_saved(text: str, reason: str | None = None) -> Schedule:
    """The schedule that a checkpoint was trained with; `Unknown`, for `reason`, where no plugin registers it here.

    For who needs the weights, and may do without the schedule. ValueError for what is no schedule at all.
    """
    try:
        return parse(text)
    except UnknownName as error:
        return Unknown(text, reason or str(error))


def _build(node: ast.expr) -> Any:
    """A value of the small language of calls, lists, tuples and literals that `repr` writes."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        name = node.func.id
        SCHEDULES.check(name, tuple(_COMPOSED))
        args = [_build(a) for a in node.args]
        keywords = [k.arg or "**" for k in node.keywords]
        if repeated := sorted({k for k in keywords if keywords.count(k) > 1}):
            raise ValueError(f"{name} is given {', '.join(repeated)} more than once; give it once")
        kwargs = dict(zip(keywords, (_build(k.value) for k in node.keywords), strict=True))
        return _COMPOSED[name](*args, **kwargs) if name in _COMPOSED else _simple(name, args, kwargs)
    if isinstance(node, ast.List | ast.Tuple):
        return tuple(_build(e) for e in node.elts)
    if isinstance(node, ast.Name):
        return _build(ast.Call(ast.Name(node.id), [], []))  # `plain` alone means plain()
    try:
        return ast.literal_eval(node)
    except ValueError as error:
        raise ValueError("only names, numbers, lists and calls of schedules are read") from error


def _simple(name: str, args: list[Any], kwargs: dict[str, Any]) -> Simple:
    arguments = bind(SCHEDULES[name], tuple(args), kwargs)
    SCHEDULES[name](1, *arguments)  # a wrong argument is an error here, not when it is run
    return Simple(name, arguments)
