"""What an evaluation found, as files: one schema for all results, and a ledger of what is done while one goes on.

    RUN/evaluation/bpb-stdlib-val.json       one result: what was measured, on what, with which settings
    RUN/evaluation/partial/….rank0.jsonl     a ledger: one line per item done; a stopped evaluation goes on from it

A result of the same kind and subject replaces the older one; those of other kinds are left alone.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrt.config import require
from lrt.distributed import ALONE, Alone

FORMAT = 1


@dataclass(frozen=True)
class Result:
    """One measurement of one checkpoint."""

    kind: str
    """scores, bpb, bfloat16, sweeps, ablations, memory, text or core."""
    subject: str
    """What it was measured on: a corpus and its split, a bundle."""
    checkpoint: str
    """SHA-256 of the weights."""
    settings: dict[str, Any]
    values: dict[str, Any]
    """What was found: plain data, by kind (docs/evaluation.md)."""
    seconds: float = 0.0
    """Of the call that finished it; what an earlier, stopped one did is not in it."""
    hardware: dict[str, Any] = dataclasses.field(default_factory=dict)
    code: str = dataclasses.field(default_factory=lambda: code_version())
    """Version of the library, and the commit where it runs from a repository."""
    format: int = FORMAT

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)

    def write(self, folder: Path) -> Path:
        """Write the result's file, whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{self.kind}-{slug(self.subject)}.json"
        fresh = file.with_name(f".{file.name}")
        fresh.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        return fresh.replace(file)


@functools.cache
def code_version() -> str:
    """The version of the library, and the commit where it runs from a repository."""
    try:
        version = importlib.metadata.version("latent-recurrent-transformer")
    except importlib.metadata.PackageNotFoundError:
        version = "unknown version"
    here = Path(__file__).parent
    if not (here.parent / ".git").exists():
        return version
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return version
    return f"{version}, commit {done.stdout.strip()}"


def slug(text: str) -> str:
    """A subject as part of a file name."""
    return "".join(c if c.isalnum() or c == "_" else "-" for c in text).strip("-")


def read(folder: Path) -> list[Result]:
    """All results of a folder, by file name. ValueError naming a file that is damaged or of another format."""
    found = []
    for file in sorted(folder.glob("*.json")):
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            require(data.get("format") == FORMAT, f"its format is {data.get('format')!r}, not {FORMAT}")
            found.append(Result(**data))
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is no result of this version ({error}); measure it again, or move it") from error
    return found


class Unkept:
    """Items that are done, in memory alone: the neutral object, and the interface of `Ledger`."""

    def __init__(self, ranks: Alone = ALONE) -> None:
        self.ranks = ranks
        self.done: dict[str, Any] = {}
        """Key -> what was found, by any rank before this call, by this one in it."""

    def todo(self, keys: Sequence[str]) -> list[str]:
        """This rank's share of the keys that are not done."""
        return [key for key in keys if key not in self.done][self.ranks.rank :: self.ranks.ranks]

    def add(self, found: Mapping[str, Any]) -> None:
        """Note some items as done."""
        self.done.update(found)

    def everybody(self) -> dict[str, Any]:
        """The items of all ranks. All of them call it, when their own are done."""
        return self.done


Keep = Callable[[str], Unkept]
"""What is measured -> where its items are noted."""


def unkept(name: str) -> Unkept:
    """Notes nothing on the disk."""
    return Unkept()


class Ledger(Unkept):
    """Items of a long evaluation that are done: key -> what was found, one JSON line each.

    Every rank appends to a file of its own and reads those of all, so that any number of ranks goes on from what any
    other number did. What was made with other settings, or by another version of the code, is in other files.
    """

    def __init__(self, folder: Path, name: str, settings: Mapping[str, Any], ranks: Alone = ALONE) -> None:
        super().__init__(ranks)
        # The code too: a result names the version that measured it, all of it.
        self.settings = json.dumps({**settings, "code": code_version()}, sort_keys=True)
        digest = hashlib.sha256(self.settings.encode()).hexdigest()[:12]
        self.folder, self.stem = folder, f"{slug(name)}-{digest}"
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / f"{self.stem}.rank{ranks.rank}.jsonl"
        with ranks.together():
            self._mend()
        self.done = self.everybody()
        with ranks.together():  # nobody adds before all have read: they share what is left to do
            pass

    def add(self, found: Mapping[str, Any]) -> None:
        """Note some items as done. Once this returns, they survive a kill."""
        super().add(found)
        with self.file.open("a", encoding="utf-8") as out:
            out.write("".join(json.dumps([key, value]) + "\n" for key, value in found.items()))

    def everybody(self) -> dict[str, Any]:
        """The items of all ranks. All of them call it, when their own are done."""
        with self.ranks.together():
            pass
        return self._read()

    def _mend(self) -> None:
        """Drop a line that a kill cut in half."""
        if self.file.exists():
            text = self.file.read_bytes()
            if not text.endswith(b"\n"):
                self.file.write_bytes(text[: text.rfind(b"\n") + 1])

    def _read(self) -> dict[str, Any]:
        lines: list[str] = []
        for file in sorted(self.folder.glob(f"{self.stem}.rank*.jsonl")):
            text = file.read_text(encoding="utf-8")
            lines += text[: text.rfind("\n") + 1].splitlines()  # another rank's last line may be half there
        return dict(json.loads(line) for line in lines)
