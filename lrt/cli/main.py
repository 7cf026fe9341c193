"""The command line: one verb per thing to do (`lrt --help`). Each is a dataclass that runs itself.

tyro makes flags, their types and --help from the dataclasses: a field's docstring is its help.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import tyro
from rich.console import Console

from lrt.cli.bench import Bench, Calibrate
from lrt.cli.demo import Demo
from lrt.cli.evaluate import Diagnose, Evaluate, Report
from lrt.cli.export_import import Export, Import
from lrt.cli.generate import Chat, Sample
from lrt.cli.prepare import Prepare
from lrt.cli.renamed_flags import check_flags
from lrt.cli.serve import Serve
from lrt.cli.study import RunStudy
from lrt.cli.train import Train
from lrt.utils import plugins

ABOUT = (
    "Prepare text, train latent recurrent transformers, score them live, let them write, and serve them. "
    "`lrt --plugin FILE.py VERB …` runs a file of your own first, which registers injections, schedules, tasks, … "
    "(docs/extending.md); it may be given several times."
)
Verb = (
    Prepare | Train | Evaluate | Diagnose | Report | Sample | Chat | Serve | Calibrate | Bench | Export | Import | Demo
    | Annotated[RunStudy, tyro.conf.subcommand("study")]
)  # fmt: skip
RESUMABLE = {"prepare", "train", "evaluate", "diagnose", "study", "demo"}
"""Verbs that go on where they were stopped."""


def main(arguments: list[str] | None = None) -> None:
    """Entry point. A user's mistake ends with one line on standard error and status 2, an interruption with 130."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        arguments = load_plugins(arguments)
        check_flags(arguments)
        # Cascading: flags of a verb may stand before or behind its subcommand, as `lrt train d4 --out X`.
        tyro.cli(Verb, prog="lrt", description=ABOUT, args=arguments, config=(tyro.conf.CascadeSubcommandArgs,)).run()
    except (ValueError, OSError, FloatingPointError) as error:
        Console(stderr=True, highlight=False).print(f"lrt: {error}", style="red", soft_wrap=True, markup=False)
        sys.exit(2)
    except KeyboardInterrupt:
        resumable = next(iter(arguments), "") in RESUMABLE
        hint = "; what was done is kept, and the same command goes on from there" if resumable else ""
        print(f"lrt: interrupted{hint}", file=sys.stderr)
        sys.exit(130)


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
