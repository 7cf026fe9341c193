"""Files and folders that are whole or untouched, hashes, and JSON that must be an object.

Whatever replaces a file or folder is first written beside it, under a hidden name that ends in `.saving-PID`, and takes
its place by a rename. A process that is killed, a full disk or a loss of power leaves the old one or the new one, never
a half of either.

Files get the mode that the user's umask gives a new file. Libraries that write through a temporary file (safetensors)
leave one that only its owner can read.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import stat
import threading
from collections.abc import Callable, Collection
from fnmatch import fnmatch
from pathlib import Path
from typing import Any


def free_megabytes(path: Path) -> float:
    """MB free on the disk of `path`, or of the nearest of its parents that exists."""
    return shutil.disk_usage(next(p for p in [path, *path.absolute().parents] if p.exists())).free / 1e6


def place_and_size(path: Path) -> str:
    """Where a file or folder is and what it weighs: `runs/mine/checkpoint, 6.3 MB`. With this, what writes ends."""
    return f"{path}, {format_bytes(size_of(path))}"


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    files = [path] if path.is_file() else (file for file in path.rglob("*") if file.is_file())
    return sum(file.stat().st_size for file in files)


def format_bytes(count: int) -> str:
    """For people, to two digits at least: `812 bytes`, `12 kB`, `6.3 MB`, `1.5 GB`."""
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= size:
            return f"{count / size:.1f} {unit}" if count < 10 * size else f"{count / size:,.0f} {unit}"
    return f"{count} bytes"


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
            fresh.chmod(usual_mode(file.parent))
        _flush(fresh)  # else a loss of power may keep the rename and lose the bytes
        fresh.replace(file)
    finally:
        fresh.unlink(missing_ok=True)
    _flush(file.parent)


def replace_folder(fresh: Path, path: Path, own: Collection[str] = ("*",)) -> None:
    """Put the finished folder `fresh` in the place of `path`, on the same disk.

    No system call exchanges two folders everywhere, so there are two renames. Between them the old folder is at
    `.NAME.previous`, and `recover` puts it back. Where this fails, `fresh` is the caller's to remove. What others keep
    in `path`, all but the `own` names (patterns), is in the new folder too.
    """
    mode = usual_mode(fresh)
    for entry in [*fresh.rglob("*"), fresh]:
        if entry.is_file():
            entry.chmod(mode)
        _flush(entry)
    carry_over(path, fresh, own)
    _flush(fresh)
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


def set_aside(path: Path) -> None:
    """Rename a file or folder, where it exists, to `NAME.old`, or the first of `NAME.old-2`, … that is free."""
    if path.exists():
        path.rename(free_name(path.with_name(f"{path.name}.old")))


def free_name(path: Path) -> Path:
    """`path`, or the first of `NAME-2`, `NAME-3`, … where nothing is."""
    numbered = (path.with_name(f"{path.name}-{n}") for n in itertools.count(2))
    return next(name for name in itertools.chain([path], numbered) if not name.exists())


def carry_over(path: Path, fresh: Path, own: Collection[str]) -> None:
    """Put into `fresh`, which is to replace the folder `path`, what others keep in that: all but `own` names.

    `own` are patterns, such as *.json. Files are linked, not copied, where the disk can.
    """
    for entry in path.iterdir() if path.is_dir() else ():
        if (fresh / entry.name).exists() or any(fnmatch(entry.name, pattern) for pattern in own):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, fresh / entry.name, symlinks=True, copy_function=_link)
        else:
            _link(entry, fresh / entry.name)


def _link(source: Path | str, target: Path | str) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def append_durably(file: Path, text: str) -> None:
    """Append to a file, which is made where it is missing, and wait until the disk has it."""
    with file.open("a", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    _flush(file.parent)


def usual_mode(folder: Path) -> int:
    """The mode of a new file in `folder`: 0666 & ~umask. A process can only ask for its umask by changing it, for all
    of its threads; a file that is made and removed shows it."""
    probe = folder / f".mode-{os.getpid()}-{threading.get_ident()}"
    with probe.open("wb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    probe.unlink()
    return mode


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
