"""Docstrings of lrt are plain text with `names` in backticks: here they become reStructuredText for autodoc."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphinx.application import Sphinx

MARKUP = re.compile(r"([\\*|]|_(?!\w)|(?<!\w)_)")
"""What plain text may hold and reStructuredText would read as markup."""
BULLET = re.compile(r"\s*[-*] ")


def literal(name: str, after: str) -> str:
    """A name in backticks; what follows it at once (`T`s) is kept apart as markup demands."""
    return f"``{name}``" + ("\\ " if after[:1].isalnum() else "")


def inline(text: str) -> str:
    """A piece of prose with its `names`."""
    parts = text.split("`")
    if len(parts) % 2 == 0:  # a lone backtick is no markup
        return MARKUP.sub(r"\\\1", text.replace("`", "'"))
    return "".join(literal(part, parts[i + 1]) if i % 2 else MARKUP.sub(r"\\\1", part) for i, part in enumerate(parts))


def paragraphs(lines: list[str]) -> Iterator[list[str]]:
    """Runs of lines without an empty one."""
    current: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            current.append(line)
        elif current:
            yield current
            current = []


def to_rst(lines: list[str]) -> list[str]:
    """A docstring's lines as reStructuredText. Doctests stay; what is indented, or a table, is shown as it stands."""
    out: list[str] = []
    for part in paragraphs(lines):
        if part[0].lstrip().startswith(">>>"):
            out += part
        elif all(line.startswith("  ") for line in part) or part[0].startswith("|"):
            out += ["::", "", *(f"  {line}" for line in part)]
        else:
            out += spaced(inline("\n".join(part)).split("\n"))
        out.append("")
    return out


def spaced(lines: list[str]) -> Iterator[str]:
    """A paragraph with an empty line before a list that begins in it."""
    before = ""
    for line in lines:
        if BULLET.match(line) and before and not BULLET.match(before) and not before.startswith("  "):
            yield ""
        yield line
        before = line


def on_docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """autodoc's event: replace the lines in place."""
    lines[:] = to_rst(lines)


def on_signature(app: Sphinx, what: str, name: str, obj: Any, *rest: Any) -> tuple[str, None] | None:
    """autodoc's event: a dataclass's fields are listed below it with types and defaults, and not twice."""
    return ("", None) if what == "class" and dataclasses.is_dataclass(obj) else None


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", on_docstring)
    app.connect("autodoc-process-signature", on_signature)
    return {"parallel_read_safe": True}
