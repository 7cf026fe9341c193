"""`lrt doctor`: what this machine has, how fast it is, and what to do about what is missing."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass


@dataclass(frozen=True)
class Doctor:
    """Look at this machine: device, torch, compiler, extras, disk, measured speed, and what to do about each.

    It takes about 20 seconds.
    """

    json: bool = False
    """Print one JSON object instead of lines."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""

    def run(self) -> None:
        from rich.console import Console
        from rich.markup import escape

        from lrt.experiments.doctor import checks
        from lrt.utils.device import choose_device

        measured = checks(choose_device(self.device))
        if self.json:
            print(json.dumps([dataclasses.asdict(check) for check in measured]))
            return
        console = Console(highlight=False)
        for check in measured:  # as they come
            console.print(f"[bold]{escape(check.name):22}[/] {escape(check.state)}", soft_wrap=True)
            if check.advice:
                console.print(f"{'':22} → {escape(check.advice)}", style="yellow", soft_wrap=True)
