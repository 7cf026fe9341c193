"""`lrt try`: a Transformer and an LRT on one's own text, in three minutes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from lrt.cli.options import Paths


@dataclass(frozen=True)
class Try:
    """Train a small Transformer and an LRT on your own text, compare them, and show what both write.

    It takes about three minutes: how many tokens that is, is measured here. Stopped, the same command goes on.
    """

    text: tyro.conf.Positional[Paths] = ()
    """Text files, or folders of them: a book is enough."""
    minutes: float = 3.0
    """How long it may take in all, about."""
    out: Path = Path("runs/try")
    """Folder for the models, report.html and summary.json."""
    seed: int = 0
    """Seed of weights, data order and samples."""
    prompt: str | None = None
    """What both continue. None: the first line of a held-out text."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    open: bool = True
    """Open the report in the browser, on a desktop; never where the output is no terminal."""

    def run(self) -> None:
        from lrt.experiments.first_look import first_look, open_report
        from lrt.utils.device import choose_device

        first_look(self.out, self.text, self.minutes, self.seed, choose_device(self.device), self.prompt)
        if self.open:
            open_report(self.out / "report.html")
