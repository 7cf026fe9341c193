"""`lrt demo`: three small models, compared on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lrt.cli.options import Paths


@dataclass(frozen=True)
class Demo:
    """Train a transformer, token shift and an LRT alike, score them live, and write a report."""

    text: Paths = ()
    """Your own UTF-8 text files. None: the source of this Python's own standard library."""
    out: Path = Path("runs/demo")
    """Folder for checkpoints, report.html and summary.json."""
    tokens: int | None = None
    """Training tokens per model. None: 560,000, or 8 times through a short text."""
    seed: int = 0
    """Seed of weights, data order and sample."""
    prompt: str | None = None
    """What the sample continues. None: the first line of a held-out document."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""

    def run(self) -> None:
        from lrt.experiments.demo import demo
        from lrt.utils.device import choose_device

        demo(self.out, list(self.text) or None, self.tokens, self.seed, choose_device(self.device), self.prompt)
