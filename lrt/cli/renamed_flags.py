"""Flags that had other names in 0.1: for one release, what says an old one is told the new one."""

from __future__ import annotations

from collections.abc import Sequence

RENAMED = {
    "train": {
        "--keeping.every": "--snapshots.every",
        "--keeping.last": "--snapshots.last",
        "--keeping.best": "--snapshots.best",
        "--keeping.no-best": "--snapshots.no-best",
        "--watching.every": "--eval.every",
        "--watching.targets": "--eval.targets",
        "--watching.log-to": "--log-to",
    },
}
"""Verb -> old flag -> new flag. Goes with 0.3."""


def check_flags(arguments: Sequence[str]) -> None:
    """ValueError, naming the new flag, where a verb's arguments hold one of 0.1's."""
    verb = arguments[0] if arguments else ""
    for argument in arguments:
        flag = argument.partition("=")[0].replace("_", "-")  # --a.log_to is --a.log-to to tyro
        if new := RENAMED.get(verb, {}).get(flag):
            raise ValueError(f"{flag} is now {new}")
