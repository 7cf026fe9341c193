"""A run's metrics log, and where its numbers go beside it: TensorBoard, Weights & Biases, trackio.

The log is metrics.jsonl in the run's folder, one line of JSON per optimiser step. Live scores stand in the line of
their step, so that a snapshot's step says where the log is cut when the run goes on.

Each logger is an extra to install. To add one, write a class with `log` and `close` and give it a line in `LOGGERS`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from lrt.utils.files import replace_atomically
from lrt.utils.imports import optional_module
from lrt.utils.json_lines import read_json_lines

MetricsLine = dict[str, Any]
"""What an optimiser step was: the keys of `Trainer.step`, `loop.evaluate_step` and `loop.throughput`."""
MetricsLog = list[MetricsLine]
"""A line per optimiser step, as in metrics.jsonl."""
LogStep = Callable[[int, Mapping[str, Any]], object]
"""Takes a step and its line."""


class Logger(Protocol):
    """Takes the numbers of a step."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in the run's folder, under tensorboard/: `tensorboard --logdir runs`."""

    def __init__(self, out: Path, settings: dict[str, Any], step: int) -> None:
        writer = optional_module("torch.utils.tensorboard", "tensorboard", "logging to tensorboard").SummaryWriter
        # A resumed run takes back what an interrupted one wrote behind its snapshot.
        self.writer = writer(str(out / "tensorboard"), purge_step=step or None)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, number in numbers.items():
            self.writer.add_scalar(name, number, step)

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of project `lrt`, named after the folder; WANDB_MODE=offline keeps it on this machine."""

    def __init__(self, out: Path, settings: dict[str, Any], step: int) -> None:
        wandb = optional_module("wandb", "wandb", "logging to wandb")
        id_file = out / "wandb-id"  # so that a run that goes on is one run there too
        run_id = id_file.read_text().strip() if id_file.exists() and step else None
        self.run = wandb.init(
            project="lrt", name=out.name, id=run_id, resume="allow", dir=str(out), config=settings, reinit="create_new"
        )
        replace_atomically(id_file, f"{self.run.id}\n")

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self.run.log(dict(numbers), step=step)

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """A run of project `lrt`, named after the folder, kept on this machine: `trackio show`."""

    def __init__(self, out: Path, settings: dict[str, Any], step: int) -> None:
        trackio = optional_module("trackio", "trackio", "logging to trackio")
        self.run = trackio.init(project="lrt", name=out.name, config=settings, resume="allow" if step else "never")

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self.run.log(dict(numbers), step=step)

    def close(self) -> None:
        self.run.finish()


LOGGERS: dict[str, Callable[[Path, dict[str, Any], int], Logger]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
}
"""Name -> what opens it, from the run's folder, its configuration as plain data, and the step that it stands at."""


def check_loggers(names: Sequence[str]) -> None:
    """ValueError, naming the known ones, where a logger is unknown."""
    unknown = sorted(set(names) - set(LOGGERS))
    if unknown:
        raise ValueError(f"cannot log to {', '.join(unknown)}; choose among {', '.join(LOGGERS)}")


@contextmanager
def open_loggers(names: Sequence[str], out: Path, settings: dict[str, Any], step: int) -> Iterator[LogStep]:
    """Open the named loggers for a run that stands at `step`; gives a function that hands a step's numbers to all.

    All of them are closed at the end of the block, however it ends.
    """
    check_loggers(names)
    with ExitStack() as stack:
        loggers = []
        for name in names:
            logger = LOGGERS[name](out, settings, step)
            stack.callback(logger.close)
            loggers.append(logger)

        def log(at: int, line: Mapping[str, Any]) -> None:
            numbers = {k: float(v) for k, v in line.items() if isinstance(v, int | float)}
            for logger in loggers:
                logger.log(at, numbers)

        yield log


def read_metrics(out: Path, steps: int) -> MetricsLog:
    """The first `steps` lines of a run's metrics.jsonl; empty where there is none. A damaged line is warned of."""
    return read_json_lines(out / "metrics.jsonl", steps)  # of a damaged one numbers are lost, no weights


def rewrite_metrics(out: Path, lines: MetricsLog) -> None:
    """Make `lines` all of metrics.jsonl: what stands behind a snapshot goes, and a kill now loses none of the rest."""
    replace_atomically(out / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
