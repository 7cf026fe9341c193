"""Flags that are not taken: those that had other names in 0.1, for one release, and those that decide nothing."""

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

WITHOUT_EFFECT = {
    "train": {
        "--model.vocab-size": "the tokenizer of the prepared text decides the size of the vocabulary; leave the flag "
        "out, and give --vocab-size to `lrt prepare`",
    },
}
"""Verb -> flag of a shared configuration that the verb cannot follow -> what to do."""


def check_flags(arguments: Sequence[str]) -> None:
    """ValueError, naming the new flag or what to do, where a verb's arguments hold one that is not taken."""
    verb = arguments[0] if arguments else ""
    for argument in arguments:
        flag = argument.partition("=")[0].replace("_", "-")  # --a.log_to is --a.log-to to tyro
        if new := RENAMED.get(verb, {}).get(flag):
            raise ValueError(f"{flag} is now {new}")
        if advice := WITHOUT_EFFECT.get(verb, {}).get(flag):
            raise ValueError(f"{argument} has no effect: {advice}")
