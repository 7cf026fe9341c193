"""The command line: one verb per thing to do (`lrt --help`). Each is a dataclass that runs itself.

tyro makes flags, their types and --help from the dataclasses: a field's docstring is its help.
"""

from __future__ import annotations

import sys
from typing import Annotated

import tyro
from rich.console import Console

from lrt.cli.bench import Bench, Calibrate
from lrt.cli.convert import Export, Import
from lrt.cli.demo import Demo
from lrt.cli.evaluate import Diagnose, Evaluate, Report
from lrt.cli.generate import Chat, Sample
from lrt.cli.prepare import Prepare
from lrt.cli.renamed import check_flags
from lrt.cli.serve import Serve
from lrt.cli.study import RunStudy
from lrt.cli.train import Train

ABOUT = "Prepare text, train latent recurrent transformers, score them live, let them write, and serve them."
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
