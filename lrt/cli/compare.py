"""`lrt compare`: runs side by side on the same windows, and the verdict in a sentence."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from lrt.cli.options import Paths
from lrt.eval.report.table import TableFormat

if TYPE_CHECKING:
    from lrt.eval.compare import Comparison


@dataclass(frozen=True)
class Compare:
    """Compare runs with the first of them, live, on the same text: who is better, by how much, and how sure that is.

    What was not scored on it yet is scored, and kept beside the checkpoint. Stopped, it goes on.
    """

    runs: tyro.conf.Positional[Paths]
    """Folders of runs or checkpoints, at least two, of one tokenizer. The first is what others are compared with."""
    data: Path | None = None
    """A folder that `lrt prepare` wrote with their tokenizer. None: the text that the first run was trained on."""
    split: str = "val"
    """train, val or test. Choose on val; report test, once."""
    at_least: int | None = 50_000
    """Score windows until this many tokens; None scores the whole split."""
    batch_size: int = 64
    """Windows scored at once; no score depends on it."""
    full: bool = False
    """Show all that is known of the runs, not only the columns that fit a terminal."""
    format: TableFormat = "text"
    """Of what is printed."""
    figure: Path | None = None
    """Draw the differences with their intervals into this file: .svg, .png or .pdf."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""

    def run(self) -> None:
        from lrt.data.prepared import Prepared
        from lrt.eval.compare import compare
        from lrt.eval.report.score_tables import unique_names
        from lrt.eval.run_data import trained_on
        from lrt.utils.device import choose_device

        if self.figure is not None:
            from lrt.eval.report.style import check_figure  # loads matplotlib

            check_figure(self.figure)
        if len(self.runs) == 0:
            raise ValueError("no run is given; name at least two folders of `lrt train`")
        data = trained_on(self.runs[0]) if self.data is None else Prepared.open(self.data)
        folders = dict(zip(unique_names(self.runs), self.runs, strict=True))
        device = choose_device(self.device)
        self.show(compare(folders, data, self.split, self.at_least, self.batch_size, device))

    def show(self, comparison: Comparison) -> None:
        """Print the verdict and the table, and draw the figure."""
        from rich.console import Console

        from lrt.eval.report import comparison as views
        from lrt.eval.report.table import print_table

        table = views.comparison_table(comparison, self.full)
        if self.format == "json":
            print(json.dumps(views.to_dict(comparison), indent=1, ensure_ascii=False))
        elif self.format in ("csv", "latex"):  # files of the table alone
            print_table(table, self.format, Console())
        else:
            print("\n".join(views.verdicts(comparison)), end="\n\n")
            print_table(table, self.format, Console())
            print("\n" + views.basis(comparison))
        if self.figure is not None:
            from lrt.eval.report.style import save_figure

            save_figure(lambda: views.comparison_figure(comparison), self.figure)
