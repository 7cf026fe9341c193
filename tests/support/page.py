"""What a page of HTML holds, and how it looks in a browser."""

from __future__ import annotations

import html.parser
import zlib
from pathlib import Path

TOKENS = 20_000


# report.html
class Page(html.parser.HTMLParser):
    """What a page loads from elsewhere, its tags and its table."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.loaded: list[str] = []
        self.cells: list[str] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")]
        self.inside = tag == "td"

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.cells.append(data)


# In a browser
QUIET = ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]


def pixels(file: Path) -> tuple[int, int, bytes]:
    """Width, height and the filtered rows of a PNG, as zlib leaves them."""
    data, at, body = file.read_bytes(), 8, b""
    width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
    while at < len(data):
        size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        body += data[at + 8 : at + 8 + size] if kind == b"IDAT" else b""
        at += 12 + size
    return width, height, zlib.decompress(body)
