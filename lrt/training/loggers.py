"""Where a run's numbers go beside metrics.jsonl: TensorBoard, Weights & Biases, trackio. Each is an extra to install.

To add one, write a class with `log` and `close` and give it a line in `SINKS`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from lrt.utils.files import replace_atomically
from lrt.utils.imports import optional_module


class Logger(Protocol):
    """Takes the numbers of a step."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in the run's folder, under tensorboard/: `tensorboard --logdir runs`."""

    def __init__(self, out: Path, settings: dict[str, Any], step: int) -> None:
        writer = optional_module("torch.utils.tensorboard", "tensorboard", "logging to tensorboard").SummaryWriter
        # A resumed run takes back what an interrupted one wrote behind its snapshot.
        self.writer = writer(str(out / "tensorboard"), purge_step=step or None)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of project `lrt`, named after the folder; WANDB_MODE=offline keeps it on this machine."""

    def __init__(self, out: Path, settings: dict[str, Any], step: int) -> None:
        wandb = optional_module("wandb", "wandb", "logging to wandb")
        identity = out / "wandb-id"
        known = identity.read_text().strip() if identity.exists() and step else None
        self.run = wandb.init(
            project="lrt", name=out.name, id=known, resume="allow", dir=str(out), config=settings, reinit="create_new"
        )
        identity.write_text(f"{self.run.id}\n")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """A run of project `lrt`, named after the folder, kept on this machine: `trackio show`."""

    def __init__(self, out: Path, settings: dict[str, Any], step: int) -> None:
        trackio = optional_module("trackio", "trackio", "logging to trackio")
        self.run = trackio.init(project="lrt", name=out.name, config=settings, resume="allow" if step else "never")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


SINKS: dict[str, Callable[[Path, dict[str, Any], int], Logger]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
}


@contextmanager
def open_loggers(
    names: Sequence[str], out: Path, settings: dict[str, Any], step: int
) -> Iterator[Callable[[int, Mapping[str, Any]], None]]:
    """Open the named sinks for a run that stands at `step`; gives a function that hands a step's numbers to all."""
    unknown = sorted(set(names) - set(SINKS))
    if unknown:
        raise ValueError(f"cannot log to {', '.join(unknown)}; choose among {', '.join(SINKS)}")
    with ExitStack() as stack:
        sinks = []
        for name in names:
            sink = SINKS[name](out, settings, step)
            stack.callback(sink.close)
            sinks.append(sink)

        def log(at: int, values: Mapping[str, Any]) -> None:
            numbers = {k: float(v) for k, v in values.items() if isinstance(v, int | float)}
            for sink in sinks:
                sink.log(at, numbers)

        yield log


def read_metrics(out: Path, steps: int) -> list[dict[str, Any]]:
    """The first `steps` lines of a run's metrics.jsonl, one per step; empty where there is none."""
    file = out / "metrics.jsonl"
    lines: list[dict[str, Any]] = []
    for number, line in enumerate(file.read_text().splitlines()[:steps] if file.exists() else [], start=1):
        try:
            lines.append(json.loads(line))
        except ValueError:  # numbers are lost, no weights
            print(f"warning: {file}: line {number} is damaged and left out", file=sys.stderr)
    return lines


def rewrite_metrics(out: Path, lines: list[dict[str, Any]]) -> None:
    """Make `lines` all of metrics.jsonl: what stands behind a snapshot goes, and a kill now loses none of the rest."""
    replace_atomically(out / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


MetricsLog = list[dict[str, Any]]
"""One line per step, as in metrics.jsonl."""
