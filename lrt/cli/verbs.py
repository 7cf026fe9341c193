"""The verbs by name, and what reads one: a dataclass each, which runs itself.

tyro makes flags, their types and --help from the dataclass of the verb that is named; a field's docstring is its help.
Only that verb's module is imported, and torch only when it runs, so that help comes at once. To add a verb, write such
a dataclass in a file of its own and give it a line in `GROUPS`.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import inspect
import platform
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from lrt.cli import flag_names
from lrt.cli.checks import check_verb
from lrt.utils.imports import DISTRIBUTION
from lrt.utils.validation import near_matches

GROUPS = {
    "Begin": {
        "try": "lrt.cli.try_:Try",
        "demo": "lrt.cli.demo:Demo",
        "doctor": "lrt.cli.doctor:Doctor",
    },
    "Train": {
        "prepare": "lrt.cli.prepare:Prepare",
        "train": "lrt.cli.train:Train",
        "retrofit": "lrt.cli.retrofit:Retrofit",
        "finetune": "lrt.cli.finetune:Finetune",
    },
    "Measure and compare": {
        "evaluate": "lrt.cli.evaluate:Evaluate",
        "diagnose": "lrt.cli.evaluate:Diagnose",
        "compare": "lrt.cli.compare:Compare",
        "fair": "lrt.cli.fair:Fair",
        "report": "lrt.cli.evaluate:Report",
        "study": "lrt.cli.study:RunStudy",
        "bench": "lrt.cli.bench:Bench",
    },
    "Use": {
        "sample": "lrt.cli.generate:Sample",
        "chat": "lrt.cli.generate:Chat",
        "serve": "lrt.cli.serve:Serve",
        "calibrate": "lrt.cli.bench:Calibrate",
        "export": "lrt.cli.export_import:Export",
        "import": "lrt.cli.export_import:Import",
    },
}
"""Title -> verb -> module and class."""
PLACES = {name: place for group in GROUPS.values() for name, place in group.items()}
OTHER_NAMES = {"generate": "sample"}
"""What a verb is called elsewhere -> its name here."""
PLUGINS = (
    "`lrt --plugin FILE.py VERB …` runs a file of your own first, which registers injections, schedules, tasks, … "
    "(docs/extending.md); it may be given several times."
)


class Verb(Protocol):
    """A verb with its flags."""

    def run(self) -> None:
        """Do it."""
        ...


def load(name: str) -> type[Any]:
    """The dataclass of a verb."""
    module, _, kind = PLACES[name].partition(":")
    return vars(importlib.import_module(module))[kind]


def parse(arguments: Sequence[str]) -> Verb:
    """The verb that a command line names, with its flags.

    SystemExit where the text that is asked for was printed (--help, --version), or, after a message, where tyro cannot
    read it. ValueError or OSError for what no verb or flag takes.
    """
    first = arguments[0] if arguments else "--help"
    if first in ("--help", "-h"):
        print("\n".join(help_lines()))
        raise SystemExit(0)
    if first == "--version":
        print(version_line())
        raise SystemExit(0)
    name = OTHER_NAMES.get(first, first)
    if name not in PLACES:
        near = near_matches(first, (*PLACES, *OTHER_NAMES))
        raise ValueError(f"there is no verb {first!r}{near}; `lrt --help` lists them")
    import tyro  # the list of the verbs does not need it

    rest = flag_names.translate(name, arguments[1:])
    # Cascading: flags of a verb may stand before or behind its subcommand, as `lrt train d4 --out X`.
    config = (tyro.conf.CascadeSubcommandArgs,)
    verb: Verb = tyro.cli(load(name), prog=f"lrt {name}", description=describe(name), args=rest, config=config)
    check_verb(verb)
    return verb


def describe(name: str) -> str:
    """What `lrt VERB --help` begins with: the class's docstring, and the names that its flags have elsewhere."""
    paragraphs = [*(inspect.getdoc(load(name)) or "").split("\n\n"), *flag_names.help_lines(name)]
    return "\n\n".join(textwrap.fill(text, width(), break_on_hyphens=False) for text in paragraphs)


def summary(name: str) -> str:
    """The first sentence of a verb's docstring, from the source: importing all of them takes several times as long."""
    module, _, kind = PLACES[name].partition(":")
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    body = ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body
    (own,) = (node for node in body if isinstance(node, ast.ClassDef) and node.name == kind)
    text = " ".join((ast.get_docstring(own) or "").split())
    return text.partition(". ")[0].removesuffix(".")


def help_lines() -> Iterator[str]:
    """`lrt --help`: the verbs by what they are for."""
    yield "usage: lrt VERB …      lrt VERB --help explains its flags      lrt --version"
    longest = max(map(len, PLACES))
    for title, group in GROUPS.items():
        yield ""
        yield title
        for name in group:
            yield from hanging(f"  {name:<{longest}}  ", summary(name))
    yield ""
    yield from textwrap.wrap(PLUGINS, width())


def width() -> int:
    """Columns that text is wrapped at."""
    return max(40, min(120, shutil.get_terminal_size().columns))


def hanging(head: str, text: str) -> list[str]:
    """Text behind a head, its later lines under the first one's beginning."""
    return textwrap.wrap(text, width(), initial_indent=head, subsequent_indent=" " * len(head))


def version_line() -> str:
    """This library's version, and those of what it stands on."""
    own, torch = (importlib.metadata.version(name) for name in (DISTRIBUTION, "torch"))
    return f"lrt {own}, Python {platform.python_version()}, torch {torch}"
