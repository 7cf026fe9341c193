"""The page that a browser loads: HTML, style and modules, as they are written. There is no build step."""

from __future__ import annotations

from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

FOLDER = files("lrt.serve") / "page"
MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
"""Of files by their endings."""


def addresses(folder: Traversable) -> dict[str, Traversable]:
    """Address -> file of a page's folder. What is neither HTML, style nor module has none."""
    served = [file for file in folder.iterdir() if file.name != "index.html" and ending(file) in MEDIA_TYPES]
    return {"/": folder / "index.html", **{f"/page/{file.name}": file for file in served}}


def ending(file: Traversable) -> str:
    return Path(file.name).suffix


PAGE_FILES = addresses(FOLDER)
"""None of them holds data of a model or a user."""


def read_page_file(path: str) -> tuple[str, str]:
    """The text of what is at an address of PAGE_FILES, and its media type."""
    file = PAGE_FILES[path]
    return file.read_text(encoding="utf-8"), MEDIA_TYPES[ending(file)]
