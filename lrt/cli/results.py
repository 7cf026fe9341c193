"""How verbs print what was measured: first what it says, in sentences, then tables in the form that is asked for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lrt.eval.report.table import PROGRAMS, Table, TableFormat
from lrt.utils.files import place_and_size

if TYPE_CHECKING:
    from lrt.eval.results import Result


def choose_format(form: TableFormat, as_json: bool) -> TableFormat:
    """What `--format` and `--json` together ask for. ValueError where they differ."""
    if as_json and form not in ("text", "json"):
        raise ValueError(f"--json and --format {form} name two forms; leave one of them away")
    return "json" if as_json else form


def show_tables(lines: Sequence[str], tables: Sequence[Table], form: TableFormat, out: Path | None) -> None:
    """Sentences, a blank line, tables, and where everything is kept. For programs the tables alone."""
    from rich.console import Console

    from lrt.eval.report.table import print_tables

    console = Console()
    if form in PROGRAMS:
        return print_tables(tables, form, console)
    print("\n".join(lines))
    if any(table.body for table in tables):
        print()
        print_tables(tables, form, console)
    if out is not None:
        print(f"\n{place_and_size(out)}")


def show_scores(name: str, scores: Result, form: TableFormat, full: bool, out: Path) -> None:
    """What `lrt evaluate` prints of bits per byte."""
    from lrt.eval.report.result_tables import score_table
    from lrt.eval.report.sentences import sentence

    values = scores.values
    if form == "json":
        return print(json.dumps(values))
    whole = ", the whole split" if values["complete"] else ""
    basis = f"On {', '.join(values['corpora'])}: {values['targets']:,} tokens, {values['bytes']:,} bytes{whole}."
    table = score_table(values, full or form in PROGRAMS)
    return show_tables([sentence(name, scores), basis], [table], form, out)


def show_core(name: str, scores: Result, form: TableFormat, out: Path) -> None:
    """What `lrt evaluate --core` prints."""
    from lrt.eval.report.result_tables import result_tables
    from lrt.eval.report.sentences import sentence

    if form == "json":
        return print(json.dumps(scores.to_dict()))
    return show_tables([sentence(name, scores)], result_tables(scores), form, out)


def show_diagnosis(name: str, results: Sequence[Result], form: TableFormat, full: bool, out: Path) -> None:
    """What `lrt diagnose` prints: what each corpus comes to, in short and measurement by measurement."""
    from lrt.eval.report.result_tables import result_tables

    if form == "json":
        return print(json.dumps([measured.to_dict() for measured in results]))
    subjects = dict.fromkeys(measured.subject for measured in results)
    lines = [line for subject in subjects for line in describe(name, [r for r in results if r.subject == subject])]
    tables = [table for measured in results for table in result_tables(measured)]
    if full or form != "text":
        return show_tables(lines, tables, form, out)
    return print("\n".join(lines), f"\n{place_and_size(out)}; --full shows the tables behind this", sep="\n")


def describe(name: str, results: Sequence[Result]) -> list[str]:
    """What was measured on one corpus: its name, in short, and a sentence for each measurement."""
    from lrt.eval.report.sentences import in_short, sentence

    first = results[0]
    head, short = f"{first.subject}, {first.settings['targets']:,} tokens", in_short(name, results)
    lines = [sentence(name, measured) for measured in results]
    if short is None:
        return [head, *lines]
    return [head, short, *(f"- {each}" for each in lines if each.removesuffix(".") not in short)]
