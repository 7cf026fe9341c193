"""Names of flags: those that other tools have for them, which are taken; those of 0.1, which are answered; those that
decide nothing, which are refused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

OTHERS = {
    "train": {
        "--max-steps": "--horizon steps=",
        "--output-dir": "--out",
        "--save-steps": "--snapshots.every",
        "--eval-steps": "--eval.every",
        "--report-to": "--log-to",
    },
    "sample": {"--max-tokens": "--max-new-tokens"},
    "chat": {"--max-tokens": "--max-new-tokens"},
    "finetune": {"--max-steps": "--steps", "--learning-rate": "--lr"},
    "serve": {"--max-num-seqs": "--rows", "--served-model-name": "--names"},
}
"""Verb -> flag of transformers, TRL or vLLM -> flag here. What stands behind the flag here comes before the value."""

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


EXCLUSIVE = {"train": (("--minutes", "--horizon", "both say how long to train"),)}
"""Verb -> flags of which one alone can be followed, and why. A value does not say whether it is the default."""


def translate(verb: str, arguments: Sequence[str]) -> list[str]:
    """The arguments with this library's names of the flags.

    ValueError, naming the new flag or what to do, where one is not taken, where no value follows, and for two of which
    one alone can be followed.
    """
    translated, rest = list[str](), list(arguments)
    while rest:
        argument = rest.pop(0)
        flag, equals, content = argument.partition("=")
        flag = flag.replace("_", "-") if flag.startswith("--") else flag  # --a.log_to is --a.log-to to tyro
        check(verb, flag, argument)
        ours, _, before = OTHERS.get(verb, {}).get(flag, "").partition(" ")
        if ours == "--log-to" and (content if equals else rest[:1]) in ("none", ["none"]):
            del rest[: 0 if equals else 1]  # transformers' word for no logger, which is what we have without the flag
            continue
        if not ours:
            translated.append(argument)
        elif equals or before:
            if not equals and not rest:
                raise ValueError(f"{flag} has no value; write {flag} N")
            translated += [ours, before + (content if equals else rest.pop(0))]
        else:
            translated.append(ours)
    flags = {argument.partition("=")[0] for argument in translated}
    for one, other, reason in EXCLUSIVE.get(verb, ()):
        if {one, other} <= flags:
            raise ValueError(f"{one} and {other} {reason}; leave one of them away")
    return translated


def check(verb: str, flag: str, argument: str) -> None:
    """ValueError where a flag is not taken."""
    if new := RENAMED.get(verb, {}).get(flag):
        raise ValueError(f"{flag} is now {new}")
    if advice := WITHOUT_EFFECT.get(verb, {}).get(flag):
        raise ValueError(f"{argument} has no effect: {advice}")


def help_lines(verb: str) -> Iterator[str]:
    """What `lrt VERB --help` says of the names that other tools have."""
    if others := OTHERS.get(verb):
        yield "Also taken: " + ", ".join(f"{other} for {ours}" for other, ours in others.items()) + "."
