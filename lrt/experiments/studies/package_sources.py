"""Python sources of the installed packages as a text: tens of millions of tokens of code that need no download.

Every file counts once, however many packages have it. Files are taken in the order of a hash of their content, up to a
number of bytes: a sample that neither names nor the order of installation decide. A manifest beside the text names the
packages' versions and every file's hash: another set of packages is another text.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lrt.utils.files import replace_atomically
from lrt.utils.imports import DISTRIBUTION

LARGEST = 200_000
"""Bytes: longer files are tables and generated code, mostly."""
BYTES = 60_000_000
"""Of the text: with a vocabulary of 2,048 about 20 million tokens."""


@dataclass(frozen=True)
class SourceFile:
    """One file of an installed package."""

    package: str
    name: str
    """As the package's own record spells it, such as `torch/nn/functional.py`."""
    path: Path


def installed_files() -> Iterator[SourceFile]:
    """The Python sources that packages' records name, package by package in the order of their names; not our own."""
    packages = {one.metadata["Name"]: one for one in importlib.metadata.distributions()}
    for name in sorted(set(packages) - {DISTRIBUTION}):
        for file in sorted(packages[name].files or []):
            path = Path(str(file.locate()))
            if file.suffix == ".py" and path.is_file() and path.stat().st_size <= LARGEST:
                yield SourceFile(name, str(file), path)


def read_sources(files: Iterator[SourceFile]) -> dict[str, tuple[SourceFile, str]]:
    """SHA-256 -> the first file that has it, and its text. What is empty or no UTF-8 is left out."""
    sources: dict[str, tuple[SourceFile, str]] = {}
    for file in files:
        content = file.path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        if digest in sources:
            continue
        try:
            text = content.decode()
        except UnicodeDecodeError:
            continue
        if text.strip():
            sources[digest] = (file, text)
    return sources


def place_of(digest: str) -> str:
    """Where a file stands among all. Not its own hash, which decides the splits: those with the smallest would all fall
    to one of them."""
    return hashlib.sha256(digest.encode()).hexdigest()


def write_sources(folder: Path, size: int = BYTES) -> Path:
    """Write `packages.jsonl`, a file a line, and `packages.json`, the manifest; gives the first.

    ValueError where there is not so much as one source.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sources = read_sources(installed_files())
    if not sources:
        raise ValueError("no installed package has a record of Python sources; name another text")
    lines, entries, versions, written = [], [], {}, 0
    for digest in sorted(sources, key=place_of):
        file, text = sources[digest]
        written += len(text.encode())
        if written > size:
            break
        lines.append(json.dumps({"text": text, "id": f"{file.package}/{file.name}"}) + "\n")
        entries.append([f"{file.package}/{file.name}", digest])
        versions[file.package] = importlib.metadata.version(file.package)
    manifest = {"python": platform.python_version(), "packages": dict(sorted(versions.items())), "files": entries}
    replace_atomically(folder / "packages.json", json.dumps(manifest, indent=1) + "\n")
    replace_atomically(folder / "packages.jsonl", "".join(lines))
    return folder / "packages.jsonl"
