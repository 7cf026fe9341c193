"""`lrt study`: a grid of cells, run once each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from lrt.eval.report.table import TableFormat


@dataclass(frozen=True)
class RunStudy:
    """Run a study's grid, cell by cell, and show its table and figure. What is done is skipped; stopped, it goes on."""

    study: tyro.conf.Positional[str]
    """A study that comes with the library (rivals, schedule, source, injection, onset, scaling, state-data,
    state-tracking), or a .yaml file of one's own."""
    edition: str = "tiny"
    """Which of its sizes: tiny is for two CPU cores."""
    only: tuple[str, ...] = ()
    """Run only the cells that have all of these choices, for example parity sequential."""
    results: Path = Path("runs/studies")
    """Folder of the results, STUDY.EDITION.jsonl."""
    figure: Path | None = None
    """File of the figure: .svg, .png or .pdf. None: an SVG beside the results."""
    format: TableFormat = "text"
    """Of the tables that are printed: text, json, csv, md or latex."""
    show: bool = False
    """Run nothing: only the table and the figure of what is there."""
    dry_run: bool = False
    """Run no cell: only say how many are left and how long they take, for which a few steps may be timed."""
    devices: tuple[str, ...] = ("cpu",)
    """Where cells run: one process for each, side by side. cpu; or for example cuda:0 cuda:1, or cpu cpu, which share
    the cores."""

    def run(self) -> None:
        from rich.console import Console

        from lrt.eval.report.style import check_figure, save_figure
        from lrt.eval.report.table import aside, print_tables
        from lrt.experiments.studies import grid, runner
        from lrt.experiments.studies.kinds import find_kind

        if self.figure is not None:
            check_figure(self.figure)
        study = grid.read_study(self.study, self.edition)
        file, kind = self.results / study.results, find_kind(study.kind)
        if self.dry_run and self.show:
            raise ValueError("--dry-run says what is left, --show what is there; give one of them")
        if len(self.devices) == 0:
            raise ValueError("no device is given; name at least one, such as cpu")
        if self.dry_run:
            runner.announce(study, kind, file, self.only, self.devices[0])
            return
        # Of several devices each gets a process of its own, which runs this verb again for it alone.
        first, *others = self.devices
        if others and not self.show:
            command = ["study", self.study, "--edition", self.edition, "--results", str(self.results)]
            runner.run_on_devices([*command, *(["--only", *self.only] if self.only else [])], self.devices)
        elif not self.show:
            with aside(self.format):
                runner.run_study(study, kind, file, self.only, device=first)
        lines = runner.study_lines(study, runner.current_lines(kind, file))
        print_tables(kind.tables(lines), self.format, Console())
        if lines:
            save_figure(lambda: kind.figure(lines), self.figure or file.with_suffix(".svg"))
