"""`lrt fair`: models on a text at equal parameters, each at its own best rate, over seeds, within some minutes.

It is a study (`experiments.studies`) that is made from the command line: its cells run, go on and are reported as any
other's. What is of its own is the plan (`fair_plan`): the minutes are turned into tokens once, by timed steps of every
model, and kept beside the results, so that a call that goes on, or adds seeds, rates or models, trains for as long.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from lrt.data.prepare import prepare
from lrt.eval.report.html import inline_svg
from lrt.eval.report.render import notes, render, section
from lrt.eval.report.style import save_figure
from lrt.eval.report.table import TableFormat, aside, print_tables
from lrt.experiments.fair_cells import WALL_CLOCK, Comparison, Plan, rate_label
from lrt.experiments.fair_plan import comparison_key, kept_plan
from lrt.experiments.plans import Plans, check_length
from lrt.experiments.studies import runner
from lrt.experiments.studies.fair import OwnText, narrow_sweeps, terminal_tables, verdict
from lrt.experiments.studies.grid import Study
from lrt.experiments.studies.kinds import find_kind
from lrt.utils.files import place_and_size, replace_atomically
from lrt.utils.provenance import hardware_line
from lrt.utils.timing import format_duration

PLAN = "plan.json"
"""Beside the results: what the minutes came to."""
REPORT, FIGURES = "report.html", ("difference.svg", "difference.pdf")
"""The page; the figure alone, for pages and for papers."""


def fair(
    out: Path,
    texts: Sequence[Path],
    comparison: Comparison,
    device: str = "cpu",
    dry_run: bool = False,
    progress: bool = True,
    form: TableFormat = "text",
) -> list[runner.Line]:
    """Run what is left of a comparison into `out`, and write report.html and the figure; returns its lines.

    `form` is that of the table which is printed at the end. With `dry_run` only the plan is made and printed. The
    report of another text or other sizes is set aside. ValueError for no text or one that is too short, a model larger
    than those before it, and where the minutes are too few.
    """
    if not texts:
        raise ValueError("no text is given; name text files or folders of them, as in: lrt fair texts/")
    console = Console(highlight=False)
    data = prepare(out / "data", texts, progress=progress)
    check_length(data, comparison.batch_tokens)
    plans = Plans(out / PLAN)
    plan = kept_plan(plans, data, comparison, device)
    study, kind = comparison.make_study(data, plan), OwnText(data, out)
    with aside(form):
        console.print(say_plan(study, comparison, plan), markup=False, soft_wrap=True)
        if dry_run:
            return []
        lines = runner.run_study(study, kind, out / study.results, progress=progress, device=device)
        for sentence in verdict(lines):
            console.print(f"\n{sentence}", style="bold", markup=False, soft_wrap=True)
    print_tables(terminal_tables(lines) if form == "text" else kind.tables(lines), form, console)
    plans.make_room(comparison_key(data, comparison, device), REPORT, *FIGURES)
    for figure in FIGURES:
        save_figure(lambda: kind.figure(lines), out / figure)
    write_report(out / REPORT, lines, say_plan(study, comparison, plan), hardware_line(device))
    with aside(form):
        for sentence in narrow_sweeps(lines):
            console.print(sentence, markup=False, soft_wrap=True)
        written = f"{place_and_size(out / REPORT)}; its figure alone is {' and '.join(FIGURES)}"
        console.print(f"\n{written}", markup=False, soft_wrap=True)
    return lines


def say_plan(study: Study, comparison: Comparison, plan: Plan) -> str:
    """What is about to be run: cells, tokens of each, time of all."""
    cells = runner.cells_left(study, [])
    total = format_duration(60 * sum(cell.minutes for cell in cells))
    rates = " ".join(map(rate_label, comparison.rates))
    later = f", then seeds up to {comparison.seeds - 1} at each model's best rate" if comparison.seeds > 1 else ""
    return (
        f"{len(cells)} runs: {len(comparison.models)} models, seed 0 at rates {rates}{later}; "
        f"{say_tokens(comparison, plan)}, scored on {plan.targets:,} of test. About {total} in all."
    )


def say_tokens(comparison: Comparison, plan: Plan) -> str:
    """How long a cell trains."""
    tokens, groups = f"{plan.tokens:,}", comparison.groups()
    if WALL_CLOCK not in groups:
        return f"{tokens} tokens a cell"
    alike = "are the Transformer's tokens, and the others train for as long"
    return f"{tokens} {alike}" if len(groups) == 1 else f"{tokens} tokens a cell, which at equal {WALL_CLOCK} {alike}"


CAPTION = (
    "Live bits per byte against the first model, in per cent; lower is better. Bars are the 95 % t-interval over seeds."
)
COLUMNS = (
    "Live BPB: bits per byte decoded token by token, on test, the mean over seeds. Differences are from the first "
    "model, paired by seed. Step: time of a training step over the first model's. Rate: a factor on all learning "
    "rates, the best on val with the first seed, and those that were tried."
)


def write_report(path: Path, lines: Sequence[runner.Line], plan: str, hardware: str) -> None:
    """Write the page: the verdict, a figure, the tables, and how it was made."""
    kind = find_kind("fair")
    figure = inline_svg(lambda: kind.figure(lines), "Live bits per byte against the first model")
    scores = [render("figures", figures=[figure], caption=CAPTION), *(table.html() for table in kind.tables(lines))]
    parts = [
        *section("Scores", verdict(lines), [*scores, notes(*narrow_sweeps(lines), COLUMNS)]),
        *section("Settings", [], [notes(f"{plan} {hardware}.")]),
    ]
    replace_atomically(path, render("page", title="A fair comparison", parts=parts))
