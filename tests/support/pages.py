"""What README and the site's pages show: their blocks, and the commands and Python in them.

The log is a diary: its commands are those of their day, and are left out.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
LEFT_OUT = {"log.md", "changelog.md", "contributing.md"}
BUILT = {"log", "study", "_build"}
"""Folders that the build of the site writes."""
FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:(?<=\n\n)|^)((?: {4}[^\n]+\n)+)", re.MULTILINE)
VARIABLE = re.compile(r'^([A-Z]+)="(.*)"$', re.MULTILINE)
PROGRAMS = ("lrt", "make", "pip", "python", "uv", "torchrun")
NOT_RUN = re.compile(r"^# not run: \w.*", re.MULTILINE)
"""The first line of Python that is read, and not run: it says why."""


class Block(NamedTuple):
    """A piece of code of a page."""

    page: str
    """Its path from the repository's root."""
    language: str
    text: str


def pages() -> list[Path]:
    """README and every page that is written by hand."""
    inside = (p for p in sorted(DOCS.rglob("*.md")) if not BUILT & set(p.relative_to(DOCS).parts))
    return [ROOT / "README.md", *(page for page in inside if page.name not in LEFT_OUT)]


def notebooks() -> list[Path]:
    """The notebooks, which the build of the site runs."""
    return sorted((DOCS / "notebooks").glob("*.ipynb"))


def blocks(page: Path) -> list[Block]:
    """A page's fenced and indented blocks."""
    text, name = page.read_text(encoding="utf-8"), page.relative_to(ROOT).as_posix()
    fenced = [Block(name, language.strip(), body) for language, body in FENCE.findall(text)]
    return fenced + [Block(name, "", body) for body in INDENTED.findall(FENCE.sub("", text))]


def commands(page: Path) -> list[str]:
    """The shell's commands of a page, comments left off, continued lines joined, and its own variables put in."""
    shown = "\n".join(block.text for block in blocks(page) if block.language in ("", "bash")).replace("\\\n", " ")
    for name, content in VARIABLE.findall(shown):
        shown = shown.replace(f"${name}", content)
    lines = shown.splitlines()
    stripped = (re.sub(r"\s+#.*", "", line).strip() for line in lines)
    return [line for line in stripped if re.sub(r"^[A-Z_]+=\S+ ", "", line).split(" ")[0] in PROGRAMS]


def lrt_arguments(page: Path) -> Iterator[list[str]]:
    """What stands behind `lrt` in a page's commands, also where torchrun starts it. `…` is a file's name."""
    for line in commands(page):
        words = [word.replace("…", "") or "rest.txt" for word in shlex.split(line)]
        if words[0] == "lrt":
            yield words[1:]
        elif words[0] == "torchrun" and words[words.index("-m") + 1] == "lrt":
            yield words[words.index("-m") + 2 :]


def code_cells(notebook: Path) -> list[str]:
    """The code of a notebook, cell by cell."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
