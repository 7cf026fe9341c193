"""Plans by the clock: what some minutes come to on a text, measured once and kept beside the results.

A folder keeps a plan for each key, a hash of what the plan was made for. So a call with other settings removes none.
The file says, too, of which plan the report beside it is. The report of another one is set aside, not written over.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrt.data.prepared import Prepared
from lrt.experiments.demo import EPOCHS
from lrt.utils import files

FEWEST_TOKENS = 10_000
"""Of the training split: of fewer a model learns them by heart, and the comparison says little."""
FEWEST_STEPS = 20
"""Steps below which nothing is learned that could be compared."""


class Plans:
    """The plans of one folder, as plain data by key. ValueError, naming the file, where it holds no JSON object."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def find(self, key: str) -> dict[str, Any] | None:
        """The plan of a key; None where there is none."""
        return self._read()["plans"].get(key)

    def keep(self, key: str, plan: dict[str, Any]) -> None:
        """Write the plan of a key beside the others."""
        saved = self._read()
        self._write({**saved, "plans": {**saved["plans"], key: plan}})

    def make_room(self, key: str, *names: str) -> None:
        """Called before these files, the report of the plan `key`, are written: those of another plan are set aside."""
        saved = self._read()
        if saved["report"] != key:
            for name in names:
                files.set_aside(self.file.with_name(name))
            self._write({**saved, "report": key})

    def _read(self) -> dict[str, Any]:
        saved = files.read_json(self.file) if self.file.exists() else {}
        if "key" in saved:  # written when a folder kept one plan
            return {"plans": {saved["key"]: saved["plan"]}, "report": saved["key"]}
        return {"plans": {}, "report": None, **saved}

    def _write(self, content: dict[str, Any]) -> None:
        files.replace_atomically(self.file, json.dumps(content, indent=2) + "\n")


def plan_key(settings: Any) -> str:
    """A hash of what a plan is made for, plain data."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def check_length(data: Prepared, batch_tokens: int) -> None:
    """ValueError for a text of which there is too little to train on with steps of so many tokens."""
    split = data.manifest["splits"]["train"]
    fewest = max(FEWEST_TOKENS, math.ceil(FEWEST_STEPS * batch_tokens / EPOCHS))
    if split["tokens"] < fewest:
        raise ValueError(
            f"the text is too short to compare models on: {split['tokens']:,} tokens to train on ({split['bytes']:,} "
            f"bytes), and at least {fewest:,} are needed; add more text, such as a whole book"
        )


@dataclass(frozen=True)
class Budget:
    """A time, and what is done in it."""

    minutes: float
    """What the user asked for."""
    left: float
    """Seconds of them that training and scoring may take."""
    trained: float
    """Seconds that all runs together take to train on one token each."""
    scored: float
    """Seconds that all runs together take to score one token each."""
    runs: int
    batch_tokens: int

    def divide(self, data: Prepared, most_targets: int, scoring: float, otherwise: str = "") -> tuple[int, int]:
        """(Tokens that each run trains on, tokens that it is scored on at most), for at most `scoring` of the time.

        A short text is read EPOCHS times, not longer. ValueError for less than FEWEST_STEPS steps, with the minutes
        that are enough; `otherwise` is what else helps.
        """
        targets = min(most_targets, max(1, int(scoring * self.left / self.scored)))
        tokens = int((self.left - targets * self.scored) / self.trained)
        fewest = FEWEST_STEPS * self.batch_tokens
        if tokens < fewest:
            needed = self.minutes + (fewest * self.trained / (1 - scoring) - self.left) / 60
            raise ValueError(
                f"in --minutes {self.minutes:g} each of {self.runs} runs sees too little text here; give --minutes "
                f"{needed + 0.1:.1f} or more{otherwise}"
            )
        return min(EPOCHS * data.manifest["splits"]["train"]["tokens"], tokens), targets
