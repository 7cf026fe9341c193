"""The texts of the studies of language: prepared folders, by name."""

from __future__ import annotations

import functools
from pathlib import Path

from lrt.data.prepare import prepare
from lrt.data.prepared import Prepared

TEXTS = Path("runs/studies/texts")
"""Prepared folders by their name: `lrt prepare runs/studies/texts/books --text FILE…`."""
STDLIB, VOCABULARY = "stdlib", 2048


@functools.cache
def prepared_text(name: str) -> Prepared:
    """A text by its name, prepared. ValueError that says how where it is not there."""
    if name == STDLIB:
        return prepare(TEXTS / name, None, VOCABULARY)
    if not is_here(name):
        raise ValueError(how_to(name))
    return Prepared.open(TEXTS / name)


def how_to(name: str) -> str:
    """That a text is not there, and what makes it."""
    return f"the text {name!r} is not there; prepare it with: lrt prepare {TEXTS / name} --text FILE…"


def is_here(name: str) -> bool:
    """Whether a text is prepared."""
    return (TEXTS / name / "manifest.json").is_file()
