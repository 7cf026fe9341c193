"""A study's results as a section of `lrt report`: its tables and its figure, from its lines alone."""

from __future__ import annotations

from pathlib import Path

from markupsafe import Markup

from lrt.eval.report.html import inline_svg
from lrt.eval.report.render import render
from lrt.eval.report.render import section as make_section
from lrt.experiments.studies import grid, runner
from lrt.experiments.studies.kinds import find_kind


def section(file: Path) -> Markup:
    """HTML of a file STUDY.EDITION.jsonl. ValueError where there is no such file, or nothing in it."""
    written = runner.read_lines(file)
    if not written:
        raise ValueError(f"{file} holds no results of a study; `lrt study` writes them")
    name, edition = written[-1]["study"], written[-1]["edition"]
    # The first results did not say what kind of cells theirs are.
    study_kind = find_kind(written[-1].get("kind") or grid.read_study(name, edition).kind)
    lines, progress = runner.newest_lines(written), ""
    if name in grid.known_studies() and edition in grid.editions(name):
        study = grid.read_study(name, edition)
        lines = runner.study_lines(study, [line for line in written if study_kind.is_current(line)])
        progress = f"{len(lines)} cells are done, {len(runner.cells_left(study, lines))} are left to run."
        if not lines:
            lines = runner.newest_lines(written)
            progress = f"{len(lines)} cells of other fields, code or data than these: outdated."
    progress = progress or f"{len(lines)} cells are done."
    figure = inline_svg(lambda: study_kind.figure(lines), name)
    tables = [table.html() for table in study_kind.tables(lines) if table.body]
    (made,) = make_section(f"{name}, {edition}", [progress], [render("figures", figures=[figure], caption=""), *tables])
    return made
