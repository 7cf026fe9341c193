"""docs/log.md, a page per entry: written into docs/log/ when the build begins, newest first."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from sphinx.application import Sphinx

ENTRY = re.compile(r"^## (\d{4}-\d{2}-\d{2}): (.*)$", re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:|#|/)")
"""Where a link to a neighbour begins: entries lie one folder deeper than the log."""
WORDS = 8
"""Of a title, in a page's name."""


class Entry(NamedTuple):
    """One entry of the log."""

    date: str
    title: str
    body: str

    @property
    def name(self) -> str:
        """Of its page, without the folder."""
        return "-".join([self.date, *re.findall(r"\w+", self.title.lower())[:WORDS]])

    @property
    def page(self) -> str:
        """Its page, in Markdown."""
        return f"# {self.date}: {self.title}\n" + LINK.sub("](../", self.body)


def entries(text: str) -> list[Entry]:
    """All entries of the log, in its order. ValueError where two would have one page."""
    _, *parts = ENTRY.split(text)
    split = [Entry(*parts[i : i + 3]) for i in range(0, len(parts), 3)]
    names = [entry.name for entry in split]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"entries of the log begin alike: {', '.join(sorted(twice))}; change a title")
    return split


def contents(text: str) -> str:
    """The page of the log itself: what stands before its entries, and a list of them."""
    listed = "\n".join(f"log/{entry.name}" for entry in entries(text))
    return ENTRY.split(text)[0] + f"```{{toctree}}\n:maxdepth: 1\n\n{listed}\n```\n"


def write_pages(app: Sphinx, config: object) -> None:
    """Write the pages that differ; remove those of entries that are no longer there."""
    folder = Path(app.srcdir) / "log"
    folder.mkdir(exist_ok=True)
    pages = {f"{e.name}.md": e.page for e in entries((folder.parent / "log.md").read_text(encoding="utf-8"))}
    for file in folder.glob("*.md"):
        if file.name not in pages:
            file.unlink()
    for name, page in pages.items():
        if not (folder / name).is_file() or (folder / name).read_text(encoding="utf-8") != page:
            (folder / name).write_text(page, encoding="utf-8")


def show_contents(app: Sphinx, name: str, source: list[str]) -> None:
    """Sphinx's event: log.md is shown as its contents."""
    if name == "log":
        source[0] = contents(source[0])


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("config-inited", write_pages)
    app.connect("source-read", show_contents)
    return {"parallel_read_safe": True}
