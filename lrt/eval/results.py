"""What was measured, as files: one schema for results of all kinds, beside the ledgers of what is still going on.

    RUN/evaluation/bpb-stdlib-val.json       one result: what was measured, on what, with which settings
    RUN/evaluation/partial/….rank0.jsonl     a ledger: one line per item done; a stopped evaluation goes on from it

A result of the same kind and subject replaces the older one; those of other kinds are left alone.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrt.utils.files import replace_atomically
from lrt.utils.provenance import code_version

FORMAT = 1
"""Version of the schema; files of another are refused."""


@dataclass(frozen=True)
class Result:
    """One measurement of one checkpoint."""

    kind: str
    """scores, bpb, bfloat16, sweeps, hops, ablations, memory, text, probe or core."""
    subject: str
    """What it was measured on: a corpus and its split, a bundle."""
    checkpoint: str
    """SHA-256 of the weights."""
    settings: dict[str, Any]
    values: dict[str, Any]
    """What was measured: plain data, by kind (docs/evaluation.md)."""
    seconds: float = 0.0
    """Of the call that finished it; what an earlier, stopped one did is not in it."""
    hardware: dict[str, Any] = dataclasses.field(default_factory=dict)
    code: str = dataclasses.field(default_factory=lambda: code_version())
    """Version of the library, and the commit where it runs from a repository."""
    format: int = FORMAT

    def __repr__(self) -> str:
        return f"Result({self.kind!r} of {self.subject!r}: {', '.join(self.values)})"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)

    def write(self, folder: Path) -> Path:
        """Write the result's file into `folder`, which is made where it is missing. Returns its path."""
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{self.kind}-{slug(self.subject)}.json"
        replace_atomically(file, json.dumps(self.to_dict(), indent=1) + "\n")
        return file


def slug(text: str) -> str:
    """A subject as part of a file name: anything but letters, digits and _ becomes a dash."""
    return "".join(c if c.isalnum() or c == "_" else "-" for c in text).strip("-")


def read_results(folder: Path) -> list[Result]:
    """All results of a folder, by file name. ValueError naming a file that is damaged or of another format."""
    results = []
    for file in sorted(folder.glob("*.json")):
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            if data.get("format") != FORMAT:
                raise ValueError(f"its format is {data.get('format')!r}, not {FORMAT}")
            results.append(Result(**data))
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is no result of this version ({error}); measure it again, or move it") from error
    return results
