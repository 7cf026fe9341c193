"""A page per study, made from results/STUDY.EDITION.jsonl when the build begins: its tables and its figure."""

from __future__ import annotations

import re
from pathlib import Path

from sphinx.application import Sphinx

from lrt.eval.report.style import save_figure
from lrt.eval.report.table import markdown
from lrt.experiments.studies import grid, runner
from lrt.experiments.studies.kinds import find_kind

STUDIES = Path(grid.__file__).parent
HEADING = re.compile(r"^#+ ", re.MULTILINE)
WRITTEN = ("scaling",)
"""Studies with a page in docs/ instead: their tables take minutes of fits."""


def files_by_study(results: Path) -> dict[str, list[Path]]:
    """The result files of every study that comes with the library."""
    grouped: dict[str, list[Path]] = {}
    for file in sorted(results.glob("*.*.jsonl")):
        if (name := file.name.split(".")[0]) in grid.known_studies() and name not in WRITTEN:
            grouped.setdefault(name, []).append(file)
    return grouped


def question(name: str) -> str:
    """What a study asks: the first comment of its file."""
    first = (STUDIES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
    return re.sub(r" \(docs/[\w.-]+\)", "", first.removeprefix("# "))


def section(name: str, file: Path, folder: Path) -> str:
    """An edition: its command, tables, figure."""
    edition = file.name.split(".")[1]
    lines = runner.newest_lines(runner.read_lines(file))
    kind = find_kind(lines[-1].get("kind") or grid.read_study(name, edition).kind)
    figure = f"{name}.{edition}.svg"
    save_figure(lambda: kind.figure(lines), folder / figure)
    command = f"```\nlrt study {name} --edition {edition} --results results\n```"
    tables = HEADING.sub("### ", markdown(kind.tables(lines)))
    return "\n\n".join([f"## {edition}", command, f"![{name}, {edition}]({figure})", tables])


def write_pages(app: Sphinx, config: object) -> None:
    """Write every study's page into docs/study/, if its results, or this file, are newer than it."""
    folder = Path(app.srcdir) / "study"
    folder.mkdir(exist_ok=True)
    for name, files in files_by_study(folder.parent.parent / "results").items():
        page = folder / f"{name}.md"
        if page.is_file() and all(
            made_of.stat().st_mtime < page.stat().st_mtime for made_of in [*files, Path(__file__)]
        ):
            continue
        sections = [section(name, file, folder) for file in files]
        page.write_text("\n\n".join([f"# Study: {name}", question(name), *sections]) + "\n", encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("config-inited", write_pages)
    return {"parallel_read_safe": True}
