"""Train a model into a folder: steps, live scores on the way, snapshots, a metrics log. It knows no recurrence.

`train` opens or resumes a run; `run_steps` is its loop; below it stand the parts of one step, in their order. The
optimiser step itself is `Trainer.step`, and what is measured on the way is in `monitor`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lrt.data.prepared import Prepared
from lrt.distributed.single_process import SINGLE_PROCESS, SingleProcess
from lrt.model import checkpoint
from lrt.model.checkpoint import drop_snapshots, snapshot_path, snapshot_step, snapshots
from lrt.model.execution import EAGER, Execution
from lrt.model.fingerprint import fingerprint
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.training.config import EvalConfig, RunConfig, SnapshotConfig
from lrt.training.loggers import LogStep, MetricsLine, MetricsLog, check_loggers, open_loggers, rewrite_metrics
from lrt.training.monitor import (
    FINAL_TARGETS,
    PATIENCE,
    gap_warning,
    has_exploded,
    live_scores,
    memory_by_layer,
    memory_weight,
    report_divergence,
)
from lrt.training.precision import resolve_precision
from lrt.training.resume import is_of_run, resume, tokens_trained
from lrt.training.snapshots import drop_finished
from lrt.training.trainer import Diverged, OutOfMemory, Trainer, TrainingSummary
from lrt.utils.device import peak_flops
from lrt.utils.progress import Advance, bar, warn


@dataclass(frozen=True)
class TrainingRun:
    """A run on disk: what computes it, its folder, its metrics log, and what is saved and measured on the way."""

    trainer: Trainer
    out: Path
    """The run's folder: metrics.jsonl, snapshots/, best/, checkpoint/."""
    lines: MetricsLog
    """The metrics log so far, also of the steps before this process. Grows with every step, on every rank."""
    snapshot_config: SnapshotConfig
    eval_config: EvalConfig
    progress: bool
    """Whether bars are drawn: of the steps, and below it of live scores."""


def train(
    run: RunConfig,
    data: Prepared,
    out: Path,
    device: str | torch.device = "cpu",
    progress: bool = True,
    title: str = "training",
    snapshots: SnapshotConfig | None = None,
    evaluation: EvalConfig | None = None,
    resume_from: str = "auto",
    ranks: SingleProcess = SINGLE_PROCESS,
    execution: Execution = EAGER,
    log_to: Sequence[str] = (),
    begin: LatentRecurrentTransformer | None = None,
) -> tuple[LatentRecurrentTransformer, TrainingSummary]:
    """Train into folder `out`: metrics.jsonl (a line per step), snapshots/, best/, and checkpoint/ at the end.

    Interrupted (Ctrl-C, SIGTERM), it ends its step, saves a snapshot and raises KeyboardInterrupt; called again, it
    goes on from the newest snapshot, bit for bit on a CPU; of a finished run nothing is done again. `resume_from` is
    `auto`, `never` or a snapshot's folder. `log_to` names loggers that get the numbers too. `execution` says how steps
    are computed, on which no number depends beyond rounding; which path runs is said on standard error. `begin` is the
    model whose weights it begins with, where `run.init` is its fingerprint. Without `evaluation` nothing is scored on
    the way. A precision of `auto` is measured first (`resolve_precision`), and said beside the path. A loss or gradient
    that is not finite, or a loss that explodes, raises Diverged, naming the step and the last good snapshot, which
    stays. Out of memory, it raises OutOfMemory, a ValueError that says with what the run may go on. A single process
    saves a snapshot first, but not in an update, of which the weights may have only half.

    All `ranks` call it, with one folder on a disk they share; the first writes. The model that comes back is this
    rank's, under FSDP2 its shards.
    """
    if run.model.vocab_size != data.vocab_size:
        raise ValueError(
            f"the model's vocab_size is {run.model.vocab_size}, the data's {data.vocab_size}; make them equal"
        )
    if run.init != (None if begin is None else fingerprint(begin)):
        raise ValueError(
            f"the run begins with the weights of the model {run.init}, and another is here; give that model as `begin`"
        )
    check_loggers(log_to)
    evaluation = evaluation or EvalConfig(every=0)
    on_device = dataclasses.replace(ranks, device=str(device))
    run, precision = resolve_precision(run, data, out, on_device, execution, resume_from)
    trainer = Trainer(run, data, device, ranks, execution, begin)
    with ranks.collective():
        out.mkdir(parents=True, exist_ok=True)
        if evaluation.every != 0:
            data.split("val")  # a damaged one is an error now, not at the first evaluation
    lines = resume(trainer, out, resume_from)
    training = TrainingRun(trainer, out, lines, snapshots or SnapshotConfig(), evaluation, progress)
    if not result_is_saved(training):
        if ranks.first:
            print(f"{title}: {'; '.join(filter(None, (trainer.path, precision)))}", file=sys.stderr)
        with bar(title, trainer.steps, progress and ranks.first) as advance, stop_requests() as stop:
            advance(trainer.progress.step)
            with open_log(training, log_to) as log:
                run_steps(training, log, advance, stop)
            save_result(training, advance)
    trainer.close()
    if result_is_saved(training) and ranks.first:  # nothing goes before what replaces it is whole
        drop_finished(out)
    return trainer.model, trainer.summary(recent_loss(training.lines))


@contextmanager
def open_log(training: TrainingRun, log_to: Sequence[str]) -> Iterator[Callable[[MetricsLine], None]]:
    """The metrics log and the loggers of the first rank, open for the block; elsewhere a step is only remembered.

    What fails in opening them fails on all ranks.
    """
    trainer, out, lines = training.trainer, training.out, training.lines
    with ExitStack() as stack:
        writers: list[LogStep] = []
        with trainer.ranks.collective():
            if trainer.ranks.first:
                rewrite_metrics(out, lines)
                file = stack.enter_context((out / "metrics.jsonl").open("a"))
                settings, step = trainer.run.to_dict(), trainer.progress.step
                writers.append(lambda _, line: file.write(json.dumps(line) + "\n"))
                writers.append(lambda *_: file.flush())  # never behind a snapshot, and there to be followed
                writers.append(stack.enter_context(open_loggers(log_to, out, settings, step)))

        def log(line: MetricsLine) -> None:
            lines.append(line)
            for write in writers:
                write(line["step"], line)

        yield log


def run_steps(training: TrainingRun, log: Callable[[MetricsLine], None], advance: Advance, stop: Stop) -> None:
    """Steps, evaluations and snapshots, until the horizon, a request to stop, or divergence."""
    trainer, ranks = training.trainer, training.trainer.ranks
    while trainer.progress.step < trainer.steps:
        line = step_or_report(training)
        if ranks.first:  # only now, when the newest one has shown that its loss is finite
            drop_snapshots(snapshots(training.out)[: -training.snapshot_config.last])
        problem: OutOfMemory | OSError | None = None  # the step is done: it is logged and saved before this is raised
        if training.eval_config.due(line["step"] + 1, trainer.steps):
            advance(0, "scoring live")
            try:
                line |= evaluate_step(training, training.eval_config.targets)
                save_if_best(training, line)
            except OutOfMemory as error:
                if ranks.ranks > 1:  # the others have ended
                    raise
                problem = error
        line |= throughput(trainer, training.lines, line)
        try:
            log(line)
        except OSError as error:  # a full disk
            problem = problem or error
        if "gap" in line and ranks.first and (warning := gap_warning(training.lines)):
            warn(warning)
        advance(1, progress_text(training.lines))
        # A signal reaches one process, or a disk is full for one: all ranks stop at the same step.
        stopping = ranks.any(stop.requested or problem is not None)
        save_if_due(training, stopping)
        if problem is not None:
            raise problem
        if stopping:
            raise KeyboardInterrupt


def step_or_report(training: TrainingRun) -> MetricsLine:
    """One optimiser step's line. Where it diverges, the last good weights are saved and Diverged says how to go on."""
    trainer, lines = training.trainer, training.lines
    step = trainer.progress.step
    try:
        if has_exploded(lines, trainer.run.model.vocab_size):
            reason = f"the loss at step {step - 1} is {lines[-1]['loss']:.3f}, worse than knowing nothing"
            # The first of the PATIENCE bad losses, of step - PATIENCE, was computed with spoilt weights.
            raise Diverged(reason, step - PATIENCE - 1)
        return trainer.step()
    except Diverged as error:
        # The update was not made: these weights are the last good ones.
        if error.last_good_step == step and not snapshots(training.out):
            save_snapshot(training)
        raise Diverged(report_failure(training, error), error.last_good_step) from error
    except OutOfMemory as error:
        if step > 0 and error.weights_whole:
            save_out_of_memory(training)
        raise


def save_out_of_memory(training: TrainingRun) -> None:
    """Save a snapshot before OutOfMemory ends a single process; of several, the others are still at work."""
    if training.trainer.ranks.ranks == 1:
        with suppress(OSError):  # what is on the disk stays, and the message is the one about memory
            save_snapshot(training)


def report_failure(training: TrainingRun, error: Diverged) -> str:
    """Report a divergence; returns what to tell the user. Snapshots of spoilt weights go: no run can use them."""
    trainer, out = training.trainer, training.out
    if not trainer.ranks.first:
        return str(error)
    drop_snapshots([s for s in snapshots(out) if snapshot_step(s) > error.last_good_step])
    last_good = next(reversed(snapshots(out)), None)
    return report_divergence(out, str(error), training.lines, last_good, trainer.run.to_dict())


def evaluate_step(training: TrainingRun, targets: int) -> dict[str, Any]:
    """Live scores on `targets` tokens, the memory's weight, and its part by layer.

    All ranks call it; the first's numbers are everybody's. Raises OutOfMemory, weights untouched.
    """
    trainer = training.trainer
    scores: dict[str, Any] = {}
    with trainer.memory_errors(advise_scoring_memory(trainer)):
        model = trainer.ranks.gathered_model(trainer.model)  # under FSDP2 no rank has whole weights by itself
        with trainer.ranks.collective():
            if trainer.ranks.first:
                scores = live_scores(model, trainer.data, trainer.schedule, targets, training.progress)
                scores |= memory_weight(model) | memory_by_layer(model, trainer.data)
    return trainer.ranks.broadcast(scores)


def advise_scoring_memory(trainer: Trainer) -> str:
    """What to tell a user whose memory suffices for the training, but not for its live scores."""
    return (
        f"out of memory while scoring live after {trainer.progress.step} steps on {trainer.device}; give --eval.every "
        "0, which scores nothing, and the same command goes on; lrt evaluate --batch-size 1 scores its result in parts"
    )


def save_if_best(training: TrainingRun, line: MetricsLine) -> None:
    """Write best/ where the live score of `line` is the best so far: weights only, not to be trained on."""
    trainer, lines = training.trainer, training.lines
    if training.snapshot_config.best and line["live_bpb"] < best_live_bpb(lines):
        about = trainer.about(recent_loss([*lines, line])) | {"scores": newest_scores([line])}
        checkpoint.save(training.out / "best", trainer.model, trainer.data.tokenizer, about, ranks=trainer.ranks)


def throughput(trainer: Trainer, lines: MetricsLog, line: MetricsLine) -> dict[str, float]:
    """Tokens per second of a step, whose line follows `lines`, and on a known GPU its MFU, over all ranks."""
    before = lines[-1] if lines else {"seconds": 0.0, "flops": 0.0}
    seconds = line["seconds"] - before["seconds"]
    speed = {"tokens_per_second": trainer.run.batch_tokens / seconds}
    peak = peak_flops(trainer.device)
    if peak is not None:
        speed["mfu"] = (line["flops"] - before["flops"]) / seconds / (peak * trainer.ranks.ranks)
    return speed


def save_if_due(training: TrainingRun, stopping: bool) -> None:
    """Save a snapshot where one is due, or the run stops. A full disk stops no run that was not stopping anyway."""
    every = training.snapshot_config.every
    if not stopping and not (every and training.trainer.progress.step % every == 0):
        return
    try:
        save_snapshot(training)
    except OSError as error:  # on all ranks alike
        if stopping:
            raise
        warn(f"{error}. Going on; the next try is {every} steps from here")


def save_snapshot(training: TrainingRun) -> None:
    """Save where the run stands. Older snapshots stay until the next step has shown that this one is sound."""
    trainer = training.trainer
    trainer.save(snapshot_path(training.out, trainer.progress.step), trainer.about(recent_loss(training.lines)))


def save_result(training: TrainingRun, advance: Advance) -> None:
    """Score the final weights, where anything is scored, and write checkpoint/, which can be trained on."""
    trainer = training.trainer
    scores: dict[str, Any] = {}
    if training.eval_config.every != 0:
        advance(0, "scoring live")
        try:
            scores = evaluate_step(training, max(training.eval_config.targets, FINAL_TARGETS))
        except OutOfMemory:
            save_out_of_memory(training)
            raise
    about = trainer.about(recent_loss(training.lines)) | {"scores": newest_scores([scores])}
    trainer.save(training.out / "checkpoint", about)


def result_is_saved(training: TrainingRun) -> bool:
    """Whether checkpoint/ is whole, of this very run, and of its last step. All ranks call it."""
    trainer, path = training.trainer, training.out / "checkpoint"
    saved = False
    with trainer.ranks.collective():
        if trainer.ranks.first and path.exists():
            with suppress(ValueError):  # damaged: it is made again
                about = checkpoint.about(path)
                saved = is_of_run(about, trainer.run) and tokens_trained(about) == trainer.run.tokens
    return trainer.ranks.broadcast(saved)


def recent_loss(lines: MetricsLog) -> float:
    """Mean of the last 5 % of the losses."""
    last = lines[-max(1, len(lines) // 20) :]  # one at least
    return sum(line["loss"] for line in last) / max(1, len(last))


def newest_scores(lines: MetricsLog) -> dict[str, float]:
    """The newest evaluation in the metrics log; empty where there was none."""
    newest = next((line for line in reversed(lines) if "live_bpb" in line), {})
    return {name: newest[name] for name in ("live_bpb", "parallel_bpb", "gap", "targets") if name in newest}


def best_live_bpb(lines: MetricsLog) -> float:
    """The best live score in the metrics log; infinite where there was none."""
    return min((line["live_bpb"] for line in lines if "live_bpb" in line), default=math.inf)


def progress_text(lines: MetricsLog) -> str:
    """The text beside the bar: the newest step, and the newest evaluation."""
    line, scores = lines[-1], newest_scores(lines)
    text = f"loss {recent_loss(lines):.3f} |g| {line['gradient_norm']:.2f}"
    gamma = next((past["memory_gamma"] for past in reversed(lines) if "memory_gamma" in past), None)
    if scores:
        text += f" live {scores['live_bpb']:.4f} gap {scores['gap']:+.4f}"
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
