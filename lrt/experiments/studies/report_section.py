"""A study's results as a section of `lrt report`: its tables and its figure, from its lines alone."""

from __future__ import annotations

import html
from pathlib import Path

from lrt.eval.report.html import inline_svg
from lrt.experiments.studies import grid, runner
from lrt.experiments.studies.kinds import kind


def section(file: Path) -> str:
    """HTML of a file STUDY.EDITION.jsonl. ValueError where there is no such file, or nothing in it."""
    every = runner.finished_cells(file)
    if not bool(every):
        raise ValueError(f"{file} holds no results of a study; `lrt study` writes them")
    study, edition = every[-1]["study"], every[-1]["edition"]
    shown = kind(every[-1].get("kind") or grid.read_study(study, edition).kind)
    lines, progress = runner.newest(every), ""
    if study in grid.known_studies() and edition in grid.editions(study):
        known = grid.read_study(study, edition)
        lines = runner.of(known, [line for line in every if shown.current(line)])
        progress = f"{len(lines)} cells are done, {len(runner.cells_left(known, lines))} are left to run."
        if not lines:
            lines = runner.newest(every)
            progress = f"{len(lines)} cells of other fields, code or data than these: outdated."
    progress = progress or f"{len(lines)} cells are done."
    parts = [f"<section><h2>{html.escape(study)}, {html.escape(edition)}</h2><p>{progress}</p>"]
    parts += [table.html() for table in shown.tables(lines) if table.body]
    parts.append(f"<figure>{inline_svg(lambda: shown.figure(lines), study)}</figure></section>")
    return "\n".join(parts)
