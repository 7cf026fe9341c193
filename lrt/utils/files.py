"""Files and folders that are whole or untouched, hashes, and JSON that must be an object.

Whatever replaces a file or folder is first written beside it, under a hidden name that ends in `.saving-PID`, and takes
its place by a rename. A process that is killed, a full disk or a loss of power leaves the old one or the new one, never
a half of either.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


def free_megabytes(path: Path) -> float:
    """MB free on the disk of `path`, or of the nearest of its parents that exists."""
    return shutil.disk_usage(next(p for p in [path, *path.absolute().parents] if p.exists())).free / 1e6


def check_writable(path: Path) -> None:
    """ValueError unless `path` can be made or replaced, as far as can be told before: its nearest parent that exists
    is a folder that may be written."""
    folder = next(p for p in path.absolute().parents if p.exists())
    if not folder.is_dir():
        raise ValueError(f"{path} cannot be written: {folder} is a file; choose another place")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{path} cannot be written: {folder} is not yours to write; choose another place")


def replace_atomically(file: Path, content: str | bytes | Callable[[Path], object]) -> None:
    """Write `file`, in the place of an older one. Its folder must exist.

    `content` is text (written as UTF-8), bytes, or a function that writes to the path it is called with. What it
    raises, and OSError where the disk does not take it, passes through; the older file is then untouched.
    """
    fresh = temporary_name(file)
    try:
        if isinstance(content, str):
            fresh.write_text(content, encoding="utf-8")
        elif isinstance(content, bytes):
            fresh.write_bytes(content)
        else:
            content(fresh)
        _flush(fresh)  # else a loss of power may keep the rename and lose the bytes
        fresh.replace(file)
    finally:
        fresh.unlink(missing_ok=True)
    _flush(file.parent)


def replace_folder(fresh: Path, path: Path) -> None:
    """Put the finished folder `fresh` in the place of `path`, on the same disk.

    No system call exchanges two folders everywhere, so there are two renames. Between them the old folder is at
    `.NAME.previous`, and `recover` puts it back. Where this fails, `fresh` is the caller's to remove.
    """
    for entry in [*fresh.rglob("*"), fresh]:
        _flush(entry)
    previous = _previous(path)
    if path.exists():
        shutil.rmtree(previous, ignore_errors=True)
        path.rename(previous)
    fresh.rename(path)
    _flush(path.parent)
    shutil.rmtree(previous, ignore_errors=True)


def recover(path: Path) -> None:
    """Where `replace_folder` was cut off between its two renames, put the old folder back in its place."""
    if not path.exists() and _previous(path).exists():
        _previous(path).rename(path)


def temporary_name(path: Path) -> Path:
    """Where this process writes what is to replace `path`: hidden, and beside it, so that a rename is enough."""
    return path.with_name(f".{path.name}.saving-{os.getpid()}")


def _previous(path: Path) -> Path:
    return path.with_name(f".{path.name}.previous")


def _flush(path: Path) -> None:
    """Wait until the disk has a file's bytes, or a folder's entries."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ValueError naming it where it holds none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds no JSON object")
    return data
