"""The command line: one verb per thing to do (`lrt --help`). Each is a dataclass that runs itself."""

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
from lrt.cli.serve import Serve
from lrt.cli.study import RunStudy
from lrt.cli.train import Train

ABOUT = "Prepare text, train latent recurrent transformers, score them live, let them write, and serve them."
Verb = (
    Prepare | Train | Evaluate | Diagnose | Report | Sample | Chat | Serve | Calibrate | Bench | Export | Import | Demo
    | Annotated[RunStudy, tyro.conf.subcommand("study")]
)  # fmt: skip
RESUMED = {"prepare", "train", "evaluate", "diagnose", "study", "demo"}
"""Verbs whose work is kept when they are stopped."""


def main(arguments: list[str] | None = None) -> None:
    """Entry point. A user's mistake ends with one line on standard error and status 2."""
    try:
        tyro.cli(Verb, prog="lrt", description=ABOUT, args=arguments, config=(tyro.conf.CascadeSubcommandArgs,)).run()
    except (ValueError, OSError, FloatingPointError) as error:
        Console(stderr=True, highlight=False).print(f"lrt: {error}", style="red", soft_wrap=True, markup=False)
        sys.exit(2)
    except KeyboardInterrupt:
        verb = next(iter(sys.argv[1:] if arguments is None else arguments), "")
        kept = "; what was done is kept, and the same command goes on from there" if verb in RESUMED else ""
        print(f"lrt: interrupted{kept}", file=sys.stderr)
        sys.exit(130)
