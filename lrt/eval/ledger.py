"""The ledger that a stopped evaluation goes on from: what was measured, item by item, as JSON lines.

A ledger per rank is all there is to resuming: items have names, and every rank reads all ledgers. An item is a whole
batch where a score may depend on what is scored together (shuffled memory), else a window or a question.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lrt.distributed.single_process import SINGLE_PROCESS, SingleProcess
from lrt.eval.results import slug
from lrt.utils.files import replace_atomically
from lrt.utils.provenance import code_version


class InMemory:
    """Items that are done, kept in memory alone: the neutral object, and the interface of `Ledger`."""

    def __init__(self, ranks: SingleProcess = SINGLE_PROCESS) -> None:
        self.ranks = ranks
        self.done: dict[str, Any] = {}
        """Key -> what was measured: by any rank before this run, and by this rank in it."""

    def todo(self, keys: Sequence[str]) -> list[str]:
        """This rank's share of the keys that are not done."""
        return [key for key in keys if key not in self.done][self.ranks.rank :: self.ranks.ranks]

    def add(self, items: Mapping[str, Any]) -> None:
        """Note items as done: plain data, by key."""
        self.done.update(items)

    def gather(self) -> dict[str, Any]:
        """The items of all ranks. All of them call it, when their own are done."""
        return self.done


LedgerFactory = Callable[[str], InMemory]
"""The name of a score -> the ledger of its items."""


def in_memory(name: str) -> InMemory:
    """A `LedgerFactory` that keeps nothing: a stopped evaluation begins anew."""
    return InMemory()


class Ledger(InMemory):
    """Items of a long evaluation that are done, a JSON line [key, value] each.

    Every rank appends to a file of its own and reads those of all, so that any number of ranks goes on from what any
    other number did. What was made with other settings, or by another version of the code, is in other files.
    """

    def __init__(
        self, folder: Path, name: str, settings: Mapping[str, Any], ranks: SingleProcess = SINGLE_PROCESS
    ) -> None:
        super().__init__(ranks)
        # With the code's version: a result names the version that measured it, and means all of it.
        self.settings = json.dumps({**settings, "code": code_version()}, sort_keys=True)
        digest = hashlib.sha256(self.settings.encode()).hexdigest()[:12]
        self.folder, self.stem = folder, f"{slug(name)}-{digest}"
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / f"{self.stem}.rank{ranks.rank}.jsonl"
        with ranks.collective():
            self._drop_half_line()
        self.done = self.gather()
        with ranks.collective():  # nobody adds before all have read: they share what is left to do
            pass

    def add(self, items: Mapping[str, Any]) -> None:
        """Note items as done. Once this returns, they survive a kill."""
        super().add(items)
        with self.file.open("a", encoding="utf-8") as out:
            out.write("".join(json.dumps([key, value]) + "\n" for key, value in items.items()))

    def gather(self) -> dict[str, Any]:
        """The items of all ranks. All of them call it, when their own are done."""
        with self.ranks.collective():  # all have written
            pass
        return self._read()

    def _drop_half_line(self) -> None:
        """Drop the last line where a kill cut it in half: what is appended would make one line of both."""
        if self.file.exists():
            text = self.file.read_bytes()
            if not text.endswith(b"\n"):
                replace_atomically(self.file, text[: text.rfind(b"\n") + 1])

    def _read(self) -> dict[str, Any]:
        lines: list[str] = []
        for file in sorted(self.folder.glob(f"{self.stem}.rank*.jsonl")):
            text = file.read_text(encoding="utf-8")
            lines += text[: text.rfind("\n") + 1].splitlines()  # another rank's last line may be half there
        return dict(json.loads(line) for line in lines)
