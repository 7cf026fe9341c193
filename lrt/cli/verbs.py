"""The verbs: a dataclass each, which runs itself. Importing this loads torch; `lrt.cli.main` does so when it runs.

tyro makes flags, their types and --help from the dataclasses: a field's docstring is its help.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import tyro

from lrt.cli.bench import Bench, Calibrate
from lrt.cli.checks import check_verb
from lrt.cli.demo import Demo
from lrt.cli.evaluate import Diagnose, Evaluate, Report
from lrt.cli.export_import import Export, Import
from lrt.cli.fair import Fair
from lrt.cli.finetune import Finetune
from lrt.cli.generate import Chat, Sample
from lrt.cli.prepare import Prepare
from lrt.cli.retrofit import Retrofit
from lrt.cli.serve import Serve
from lrt.cli.study import RunStudy
from lrt.cli.train import Train
from lrt.cli.try_ import Try

ABOUT = (
    "Prepare text, train latent recurrent transformers, score them live, let them write, and serve them. "
    "`lrt --plugin FILE.py VERB …` runs a file of your own first, which registers injections, schedules, tasks, … "
    "(docs/extending.md); it may be given several times."
)
Verb = (
    Prepare | Train | Evaluate | Diagnose | Report | Sample | Chat | Serve | Calibrate | Bench | Export | Import
    | Retrofit | Finetune | Demo | Try | Fair | Annotated[RunStudy, tyro.conf.subcommand("study")]
)  # fmt: skip


def parse(arguments: Sequence[str]) -> Verb:
    """The verb that a command line names, with its flags.

    SystemExit, after a message, where tyro cannot read it; ValueError or OSError for what no flag takes.
    """
    # Cascading: flags of a verb may stand before or behind its subcommand, as `lrt train d4 --out X`.
    verb = tyro.cli(Verb, prog="lrt", description=ABOUT, args=arguments, config=(tyro.conf.CascadeSubcommandArgs,))
    check_verb(verb)
    return verb
