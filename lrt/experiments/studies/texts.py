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


def open_text(name: str) -> Prepared:
    """A text by its name, prepared. ValueError that says how where it is not there."""
    if name == STDLIB:
        return prepare_stdlib(TEXTS / name)
    if name == PACKAGES and not is_prepared(name):
        return prepare(TEXTS / name, [write_sources(TEXTS.parent / "sources")], VOCABULARY)
    if not is_prepared(name):
        raise ValueError(missing_text(name))
    manifest = manifest_file(name).stat()
    return open_folder(text_folder(name), manifest.st_ino, manifest.st_mtime_ns)


@functools.cache  # this Python's library stays as it is while it runs
def prepare_stdlib(folder: Path) -> Prepared:
    """The standard library, prepared where it is not yet."""
    return prepare(folder, None, VOCABULARY, selection=Selection(rule=BY_NAME))


@functools.cache  # a study asks before every cell; a folder that is prepared again has another manifest
def open_folder(folder: Path, *manifest: int) -> Prepared:
    """A prepared folder with the manifest that it has now: its file's number, and when it was written."""
    return Prepared.open(folder)


def text_folder(name: str) -> Path:
    """The prepared folder of a text: a name with a slash in it is a path of its own."""
    return Path(name) if "/" in name else TEXTS / name


def missing_text(name: str) -> str:
    """The message that a text is not there, with the command that makes it."""
    return f"the text {name!r} is not there; prepare it with: lrt prepare {text_folder(name)} --text FILE…"


def is_prepared(name: str) -> bool:
    """Whether a text is prepared."""
    return manifest_file(name).is_file()


def manifest_file(name: str) -> Path:
    """The file that a prepared text is known by."""
    return text_folder(name) / "manifest.json"


def study_folder(folder: Path | None) -> Path:
    """Where ratios of times and unfinished trainings are kept: `folder`; None: beside the texts."""
    return TEXTS.parent if folder is None else folder
