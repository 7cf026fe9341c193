"""Pages that lie at the repository's root, shown on the site: links to and from them lead to pages of the site."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx

PAGES = {"contributing": "CONTRIBUTING.md", "changelog": "CHANGELOG.md"}
"""Page of the site -> file at the root."""


def show_root_page(app: Sphinx, name: str, source: list[str]) -> None:
    """Sphinx's event: a page of PAGES has its file's text; other pages link to it."""
    text = source[0]
    if name in PAGES:
        text = (Path(app.srcdir).parent / PAGES[name]).read_text(encoding="utf-8").replace("](docs/", "](")
    for page, file in PAGES.items():
        text = text.replace(f"](../{file}", f"]({page}.md").replace(f"]({file}", f"]({page}.md")
    source[0] = text


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", show_root_page)
    return {"parallel_read_safe": True}
