"""A study's results as a section of `lrt report`: its tables and its figure, from its lines alone."""

from __future__ import annotations

import html
from pathlib import Path

from lrt.config import require
from lrt.report import inline
from lrt.runsections import table
from lrt.studies import grid, runner
from lrt.studies.kinds import kind


def section(file: Path) -> str:
    """HTML of a file STUDY.EDITION.jsonl. ValueError where there is no such file, or nothing in it."""
    lines = runner.finished(file)
    require(bool(lines), f"{file} holds no results of a study; `lrt study` writes them")
    study, edition = lines[-1]["study"], lines[-1]["edition"]
    if study in grid.known() and edition in grid.editions(study):
        known = grid.read(study, edition)
        lines = runner.of(known, lines) or runner.newest(lines)
        done, cells = len(lines), len(runner.left(known, lines))
        progress = f"{done} cells are done, {cells} are left to run."
    else:
        lines = runner.newest(lines)
        progress = f"{len(lines)} cells are done."
    shown = kind(lines[0].get("kind") or grid.read(study, edition).kind)
    parts = [f"<section><h2>{html.escape(study)}, {html.escape(edition)}</h2><p>{progress}</p>"]
    for each in shown.tables(lines):
        if each.body:
            head, *body = each.shown()
            parts += [f"<h3>{html.escape(each.title)}</h3>" if each.title else "", table(head, body)]
    parts.append(f"<figure>{inline(lambda: shown.figure(lines), study)}</figure></section>")
    return "\n".join(parts)
