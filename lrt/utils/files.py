"""Files that are either whole or untouched: hashes, flushes, renames; and JSON that is held to be an object."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any


def free_megabytes(path: Path) -> float:
    """MB free on the disk of `path`, or of the nearest of its parents that exists."""
    return shutil.disk_usage(next(p for p in [path, *path.absolute().parents] if p.exists())).free / 1e6


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def swap(fresh: Path, path: Path) -> None:
    """Put `fresh` in the place of `path`. Between the two renames the old one is at `_previous`, where `load` looks."""
    previous = _previous(path)
    if path.exists():
        shutil.rmtree(previous, ignore_errors=True)
        path.rename(previous)
    fresh.rename(path)
    _flush(path.parent)
    shutil.rmtree(previous, ignore_errors=True)


def _previous(path: Path) -> Path:
    return path.with_name(f".{path.name}.previous")


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def recover(path: Path) -> None:
    """Where a save was cut off between its two renames, the old checkpoint is whole and goes back to its place."""
    if not path.exists() and _previous(path).exists():
        _previous(path).rename(path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ValueError naming it where it holds none."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds no JSON object")
    return data
