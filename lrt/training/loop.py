"""Train a model: steps, live scores on the way, snapshots, a diary. It knows an objective, not recurrence."""

from __future__ import annotations

import json
import math
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from lrt.data.prepared import Prepared
from lrt.distributed.single import SINGLE_PROCESS, SingleProcess
from lrt.model import checkpoint
from lrt.model.checkpoint import drop_snapshots, snapshot_path, snapshot_step, snapshots
from lrt.model.execution import EAGER, Execution
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.training import loggers
from lrt.training.config import RunConfig
from lrt.training.loggers import MetricsLog, rewrite_metrics
from lrt.training.monitor import (
    FINAL,
    PATIENCE,
    EvalConfig,
    gap_warning,
    has_exploded,
    live_scores,
    memory_by_layer,
    memory_weight,
    report_divergence,
)
from lrt.training.resume import resume
from lrt.training.snapshots import SnapshotConfig
from lrt.training.trainer import Diverged, Trained, Trainer
from lrt.utils.device import peak_flops
from lrt.utils.progress import Advance, bar, warn

Note = Callable[[dict[str, Any]], None]


def recent(lines: MetricsLog) -> float:
    """Mean of the last 5 % of the losses."""
    last = lines[-max(1, len(lines) // 20) :]
    return sum(line["loss"] for line in last) / max(1, len(last))


def newest_scores(lines: MetricsLog) -> dict[str, float]:
    """The newest evaluation in the diary; empty where there was none."""
    found = next((line for line in reversed(lines) if "live_bpb" in line), {})
    return {k: found[k] for k in ("live_bpb", "parallel_bpb", "gap") if k in found}


def train(
    run: RunConfig,
    data: Prepared,
    out: Path,
    device: str | torch.device = "cpu",
    progress: bool = True,
    title: str = "training",
    keeping: SnapshotConfig | None = None,
    watching: EvalConfig | None = None,
    resume_from: str = "auto",
    ranks: SingleProcess = SINGLE_PROCESS,
    execution: Execution = EAGER,
) -> tuple[LatentRecurrentTransformer, Trained]:
    """Train into folder `out`: metrics.jsonl (a line per step), snapshots/, best/, and checkpoint/ at the end.

    Interrupted (Ctrl-C, SIGTERM), it ends its step, saves a snapshot and raises KeyboardInterrupt; called again, it
    goes on from the newest snapshot, bit for bit on a CPU; of a finished run nothing is done again. `resume_from` is
    `auto`, `never` or a snapshot's folder. `execution` says how steps are computed, on which no number depends beyond
    rounding; which path runs is said on standard error. Without `watching` nothing is scored on the way. A loss or
    gradient that is not finite, or a loss that explodes, raises Diverged, naming the step and the last good snapshot,
    which stays.

    All `ranks` call it, with one folder on a disk they share; the first writes. The model that comes back is this
    rank's, under FSDP2 its shards.
    """
    if run.model.vocab_size != data.vocab_size:
        raise ValueError(
            f"the model's vocab_size is {run.model.vocab_size}, the data's {data.vocab_size}; make them equal"
        )
    keeping, watching = keeping or SnapshotConfig(), watching or EvalConfig(every=0)
    training = Trainer(run, data, device, ranks, execution)
    with ranks.collective():
        out.mkdir(parents=True, exist_ok=True)
        if watching.every != 0:
            data.split("val")  # a damaged one is an error now, not at the first evaluation
    lines = resume(training, out, resume_from)
    if training.progress.step < training.steps:
        if ranks.first:
            print(f"{title}: {training.path}", file=sys.stderr)
        with bar(title, training.steps, progress and ranks.first) as advance, stop_requests() as stop:
            with open_log(training, out, lines, watching) as note:
                advance(training.progress.step)
                loop(training, out, lines, keeping, watching, note, advance, stop)
            if watching.every != 0:
                advance(0, "scoring live")
            final = evaluate_step(training, max(watching.targets, FINAL)) if watching.every != 0 else {}
            training.save(out / "checkpoint", training.about(recent(lines)) | {"scores": newest_scores([final])})
    training.close()
    if ranks.first:
        shutil.rmtree(out / "snapshots", ignore_errors=True)
    return training.model, training.trained(recent(lines))


@contextmanager
def open_log(training: Trainer, out: Path, lines: MetricsLog, watching: EvalConfig) -> Iterator[Note]:
    """The diary and the sinks of the first rank, open for the block; elsewhere a step is only remembered.

    What fails in opening them fails on all ranks.
    """
    ranks, stack = training.ranks, ExitStack()
    with stack:
        write: list[Callable[[int, dict[str, Any]], object]] = []
        with ranks.collective():
            if ranks.first:
                rewrite_metrics(out, lines)
                diary = stack.enter_context((out / "metrics.jsonl").open("a"))
                settings, step = training.run.to_dict(), training.progress.step
                write.append(lambda _, line: diary.write(json.dumps(line) + "\n"))
                write.append(lambda *_: diary.flush())  # never behind a snapshot, and there to be followed
                write.append(stack.enter_context(loggers.open_loggers(watching.log_to, out, settings, step)))

        def note(line: dict[str, Any]) -> None:
            lines.append(line)
            for each in write:
                each(line["step"], line)

        yield note


def loop(
    training: Trainer,
    out: Path,
    lines: MetricsLog,
    keeping: SnapshotConfig,
    watching: EvalConfig,
    note: Note,
    advance: Advance,
    stop: Stop,
) -> None:
    """Steps, evaluations and snapshots, until the horizon, a request to stop, or divergence."""
    run, ranks = training.run, training.ranks
    failure: OSError | None = None
    while (step := training.progress.step) < training.steps:
        try:
            if has_exploded(lines, run.model.vocab_size):
                reason = f"the loss at step {step - 1} is {lines[-1]['loss']:.3f}, worse than knowing nothing"
                raise Diverged(reason, step - PATIENCE - 1)  # the first of them was computed with spoilt weights
            line = training.step()
        except Diverged as error:
            if error.good == step and not snapshots(out):  # the update was not made: these weights are the last good
                snapshot(training, out, lines)
            raise Diverged(report_failure(training, out, lines, error), error.good) from error
        if ranks.first:  # only now, when the newest one has shown that its loss is finite
            drop_snapshots(snapshots(out)[: -keeping.last])
        if watching.due(step + 1, training.steps):
            advance(0, "scoring live")
            line |= evaluate_step(training, watching.targets)
            if keeping.best and line["live_bpb"] < best_live_bpb(lines):
                about = training.about(recent([*lines, line])) | {"scores": newest_scores([line])}
                checkpoint.save(out / "best", training.model, training.data.tokenizer, about, ranks=ranks)
        measure(training, lines, line)
        try:
            note(line)
        except OSError as error:  # a full disk: the other ranks are told, and all stop together
            failure = error
        if "gap" in line and ranks.first and (warning := gap_warning(lines)):
            warn(warning)
        advance(1, progress_text(lines))
        stopping = ranks.any(stop.requested or failure is not None)
        if stopping or (keeping.every and training.progress.step % keeping.every == 0):
            try:
                snapshot(training, out, lines)
            except OSError as error:  # on all ranks alike
                if stopping:
                    raise
                warn(f"{error}. Going on; the next try is {keeping.every} steps from here")
        if failure is not None:
            raise failure
        if stopping:
            raise KeyboardInterrupt


def snapshot(training: Trainer, out: Path, lines: MetricsLog) -> None:
    """Save where the run stands. Older snapshots stay until the next step has shown that this one is sound."""
    training.save(snapshot_path(out, training.progress.step), training.about(recent(lines)))


def measure(training: Trainer, lines: MetricsLog, line: dict[str, Any]) -> None:
    """Add what a step's line says beside the one before: tokens per second and, on a known GPU, MFU."""
    run, before = training.run, lines[-1] if lines else {"seconds": 0.0, "flops": 0.0}
    seconds = line["seconds"] - before["seconds"]
    line["tokens_per_second"] = run.batch_tokens / seconds
    peak = peak_flops(training.device)
    if peak is not None:
        line["mfu"] = (line["flops"] - before["flops"]) / seconds / (peak * training.ranks.ranks)


def evaluate_step(training: Trainer, targets: int) -> dict[str, Any]:
    """Live scores, the memory's weight and its inside. All ranks call it; the first's numbers are everybody's."""
    model = training.ranks.gathered_model(training.model)
    with training.ranks.collective():
        found: dict[str, Any] = {}
        if training.ranks.first:
            found = live_scores(model, training.data, training.schedule, targets, False)
            found |= memory_weight(model) | memory_by_layer(model, training.data)
    return training.ranks.broadcast(found)


def best_live_bpb(lines: MetricsLog) -> float:
    """The best live score in the diary."""
    return min((line["live_bpb"] for line in lines if "live_bpb" in line), default=math.inf)


def report_failure(training: Trainer, out: Path, lines: MetricsLog, error: Diverged) -> str:
    """Report a divergence; returns what to tell the user. Snapshots of spoilt weights go: no run can use them."""
    if not training.ranks.first:
        return str(error)
    drop_snapshots([s for s in snapshots(out) if snapshot_step(s) > error.good])
    good = snapshots(out)[-1:]
    return report_divergence(out, str(error), lines, good[0] if good else None, training.run.to_dict())


def progress_text(lines: MetricsLog) -> str:
    """The text beside the bar."""
    line, found = lines[-1], newest_scores(lines)
    text = f"loss {recent(lines):.3f} |g| {line['gradient_norm']:.2f}"
    gamma = next((each["memory_gamma"] for each in reversed(lines) if "memory_gamma" in each), None)
    if found:
        text += f" live {found['live_bpb']:.4f} gap {found['gap']:+.4f}"
    if gamma is not None:
        text += f" γ {gamma:.2f}"
    text += f" {line['tokens_per_second']:,.0f} tok/s"
    return text + (f" MFU {line['mfu']:.0%}" if "mfu" in line else "")


class Stop:
    """Whether somebody asked the process to end: Ctrl-C or SIGTERM. A second Ctrl-C ends it at once.

    A second SIGTERM does not: a cluster's comes twice, from its scheduler and from torchrun.
    """

    requested = False

    def __call__(self, number: int, frame: object) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True


@contextmanager
def stop_requests() -> Iterator[Stop]:
    """Within the block a first SIGINT or SIGTERM is noted, not obeyed, so that a step can end and be saved."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield stop
        return
    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
