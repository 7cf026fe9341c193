"""The texts of the studies of language: prepared folders, by name."""

from __future__ import annotations

import functools
from pathlib import Path

from lrt.data.prepare import prepare
from lrt.data.prepared import Prepared
from lrt.data.records import Selection
from lrt.data.splits import BY_NAME

TEXTS = Path("runs/studies/texts")
"""Prepared folders by their name: `lrt prepare runs/studies/texts/books --text FILE…`."""
STDLIB, VOCABULARY = "stdlib", 2048
"""The text that needs no download, and the size of the tokenizer that is trained on it."""


@functools.cache
def open_text(name: str) -> Prepared:
    """A text by its name, prepared. ValueError that says how where it is not there."""
    if name == STDLIB:
        return prepare(TEXTS / name, None, VOCABULARY, selection=Selection(rule=BY_NAME))
    if not is_prepared(name):
        raise ValueError(missing_text(name))
    return Prepared.open(TEXTS / name)


def missing_text(name: str) -> str:
    """The message that a text is not there, with the command that makes it."""
    return f"the text {name!r} is not there; prepare it with: lrt prepare {TEXTS / name} --text FILE…"


def is_prepared(name: str) -> bool:
    """Whether a text is prepared."""
    return (TEXTS / name / "manifest.json").is_file()
