"""The command line's entry point, and its only boundary: arguments come in, lines and an exit status go out.

`lrt.cli.verbs` reads the line. It is imported only after the environment is set, which torch reads when it is loaded,
and where an interruption or a closed pipe is answered.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence

from lrt.cli.mistakes import explain
from lrt.utils import plugins
from lrt.utils.openmp import spin_briefly

RESUMABLE = {"prepare", "train", "finetune", "evaluate", "diagnose", "compare", "study", "demo", "try", "fair"}
"""Verbs that go on where they were stopped."""
MISTAKE, INTERRUPTED, NO_READER = 2, 130, 141
"""Exit statuses. The last two are those of a shell for a process that SIGINT or SIGPIPE has ended."""


def main(arguments: list[str] | None = None) -> None:
    """Entry point. A user's mistake ends with one line on standard error and status 2, an interruption with 130.

    A reader that has left (`lrt … | head -1`) ends it without a word and with 141, as SIGPIPE ends other programs.
    """
    spin_briefly(os.environ)
    replace_unencodable()
    try:
        try:
            run_verb(sys.argv[1:] if arguments is None else arguments)
        finally:
            sys.stdout.flush()  # here, where a closed pipe can be answered; at exit Python would complain
    except BrokenPipeError:
        discard_output()
        sys.exit(NO_READER)


def run_verb(arguments: list[str]) -> None:
    """Read the command line and run its verb. SystemExit, after one line, where it cannot be done."""
    try:
        from lrt.cli import verbs

        arguments = load_plugins(arguments)
        verbs.parse(arguments).run()
    except BrokenPipeError:
        raise
    except Exception as error:
        if (line := explain(error)) is None:
            raise
        from rich.console import Console

        Console(stderr=True, highlight=False).print(f"lrt: {line}", style="red", soft_wrap=True, markup=False)
        sys.exit(MISTAKE)
    except KeyboardInterrupt:
        resumable = next(iter(arguments), "") in RESUMABLE
        hint = "; what was done is kept, and the same command goes on from there" if resumable else ""
        print(f"lrt: interrupted{hint}", file=sys.stderr)
        sys.exit(INTERRUPTED)


def replace_unencodable() -> None:
    """Have standard output and error replace what their encoding lacks, where they would end in a UnicodeEncodeError.

    A terminal of ASCII lacks most characters. One of UTF-8 lacks what stands for bytes of a file name that is no text.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")


def discard_output() -> None:
    """Nobody reads any more: what is still in the buffers goes nowhere, so that leaving does not fail on it."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(nowhere, stream.fileno())


def load_plugins(arguments: Sequence[str]) -> list[str]:
    """The command line without the `--plugin FILE` before its verb, each of which was loaded.

    They come before the command line is read, as what is registered may stand in it.
    """
    left = list(arguments)
    plugins.load_entry_points()
    while left and (left[0] == "--plugin" or left[0].startswith("--plugin=")):
        option, equals, file = left.pop(0).partition("=")
        if not equals:
            if not left:
                raise ValueError(f"{option} names no file; write lrt --plugin FILE.py VERB …")
            file = left.pop(0)
        plugins.load_file(file)
    return left
