"""The texts of the studies of language: prepared folders, by name, or by their path.

`stdlib` and `packages` are made of what is installed; others are prepared by hand.
"""

from __future__ import annotations

import functools
from pathlib import Path

from lrt.data.prepare import prepare
from lrt.data.prepared import Prepared
from lrt.data.records import Selection
from lrt.data.splits import BY_NAME
from lrt.experiments.studies.package_sources import write_sources

TEXTS = Path("runs/studies/texts")
"""Prepared folders by their name: `lrt prepare runs/studies/texts/books --text FILE…`."""
STDLIB, PACKAGES, VOCABULARY = "stdlib", "packages", 2048
"""The texts that need no download, the standard library and the installed packages' sources, and the size of the
tokenizers that are trained on them."""
MADE_HERE = (STDLIB, PACKAGES)
"""Prepared where they are missing."""


@functools.cache
def open_text(name: str) -> Prepared:
    """A text by its name, prepared. ValueError that says how where it is not there."""
    if name == STDLIB:
        return prepare(TEXTS / name, None, VOCABULARY, selection=Selection(rule=BY_NAME))
    if name == PACKAGES and not is_prepared(name):
        return prepare(TEXTS / name, [write_sources(TEXTS.parent / "sources")], VOCABULARY)
    if not is_prepared(name):
        raise ValueError(missing_text(name))
    return Prepared.open(text_folder(name))


def text_folder(name: str) -> Path:
    """The prepared folder of a text: a name with a slash in it is a path of its own."""
    return Path(name) if "/" in name else TEXTS / name


def missing_text(name: str) -> str:
    """The message that a text is not there, with the command that makes it."""
    return f"the text {name!r} is not there; prepare it with: lrt prepare {text_folder(name)} --text FILE…"


def is_prepared(name: str) -> bool:
    """Whether a text is prepared."""
    return (text_folder(name) / "manifest.json").is_file()
