"""Text and numbers as HTML, through the templates beside this file. Whatever is put into one is escaped, but HTML."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


@cache
def environment() -> Environment:
    """The templates. A name that is not given is an error, not an empty string."""
    loader = PackageLoader("lrt.eval.report", "templates")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def render(template: str, **values: object) -> Markup:
    """A template of the folder `templates`, by its name without the ending. Strings are escaped, `Markup` is not."""
    return Markup(environment().get_template(f"{template}.html").render(values).strip())


def section(title: str, sentences: Sequence[str], parts: Sequence[Markup]) -> list[Markup]:
    """A section of a page, what it says in words first; nothing where there are no parts."""
    return [render("section", title=title, sentences=sentences, parts=parts)] if parts else []


def heading(text: str) -> Markup:
    """A heading below a section's."""
    return render("heading", text=text)


def notes(*lines: str) -> Markup:
    """Small print, a line each."""
    return render("notes", lines=lines)
