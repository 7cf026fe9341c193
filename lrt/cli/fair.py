"""`lrt fair`: models on one's own text, compared as they should be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from lrt.cli.options import Paths
from lrt.eval.report.table import TableFormat


@dataclass(frozen=True)
class Fair:
    """Compare models on your own text: equal parameters, each at its best learning rate, over several seeds, live.

    The minutes are turned into tokens once, by timed steps. Stopped, the same command goes on.
    """

    text: tyro.conf.Positional[Paths] = ()
    """Text files, or folders of them."""
    models: tuple[str, ...] = ("transformer", "token-shift", "lrt")
    """What is compared, with the first: transformer, token-shift, lrt, loop-2, ponder, … (lrt/experiments/rivals.py
    lists them), or an injection that --plugin registers."""
    seeds: int = 3
    """Seeds of each model; an interval needs three."""
    rates: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Factors on all learning rates, tried with the first seed; each model's best on val is taken."""
    equal: Literal["tokens", "wall_clock", "both"] = "tokens"
    """What the models have in common beside their parameters."""
    minutes: float = 30.0
    """How long all of it may take, about."""
    depth: int = 4
    """Blocks of each model."""
    width: int = 128
    """Width of each model; its heads are 32 wide."""
    context: int = 256
    """Tokens of a row."""
    out: Path = Path("runs/fair")
    """Folder for the prepared text, the results, report.html and its figure as difference.svg and .pdf."""
    format: TableFormat = "text"
    """Of the table that is printed: text, json, csv, md or latex. csv and latex have all of its columns."""
    dry_run: bool = False
    """Only say what would be run, and how long it takes."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""

    def run(self) -> None:
        from lrt.experiments.fair import fair
        from lrt.experiments.fair_cells import Comparison
        from lrt.utils.device import choose_device

        comparison = Comparison(
            self.models, self.seeds, self.rates, self.equal, self.minutes, self.depth, self.width, self.context
        )
        fair(self.out, self.text, comparison, choose_device(self.device), self.dry_run, form=self.format)
