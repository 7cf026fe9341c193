"""Train a model: steps, live scores on the way, snapshots, a diary. It knows an objective, not recurrence."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lrt import checkpoint, sinks
from lrt.config import require
from lrt.data.prepared import Prepared
from lrt.distributed import ALONE, Alone
from lrt.execution import EAGER, Execution
from lrt.keeping import (
    Keeping,
    drop_snapshots,
    read_diary,
    rewrite_diary,
    snapshot_path,
    snapshot_step,
    snapshots,
    stop_requests,
)
from lrt.model.flops import peak_flops
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.progress import Advance, bar
from lrt.run import RunConfig
from lrt.training import Trained, Training
from lrt.watching import (
    PATIENCE,
    Diverged,
    Watching,
    exploded,
    live_scores,
    memory_weight,
    report_divergence,
    warn,
    widened,
)

FREE = ("optim", "schedule", "horizon")
"""What may differ from the snapshot that `resume` names; with `auto` everything must be the same."""
Diary = list[dict[str, Any]]
"""One line per step, as in metrics.jsonl."""


def resume(training: Training, out: Path, source: str) -> Diary:
    """Bring a run to where `source` says (`auto`, `never`, a snapshot's folder); returns the diary up to there.

    `auto` takes the finished checkpoint, else the newest snapshot that is whole, and starts anew where there is none.
    A named snapshot may have been trained at other rates, under another schedule or for another horizon.
    """
    ranks = training.ranks
    with ranks.together():
        found = chosen_snapshot(out, source) if ranks.first else None
    path = ranks.agreed(found)
    if path is None:
        return []
    with ranks.together():
        training.restore(path, () if source == "auto" else FREE)
        step = training.progress.step
        if source != "auto" and ranks.first:  # later ones are of a path not taken
            drop_snapshots([s for s in snapshots(out) if snapshot_step(s) > step])
        return read_diary(path.parent.parent if path.parent.name == "snapshots" else path.parent, step)


def chosen_snapshot(out: Path, source: str) -> Path | None:
    """The checkpoint to go on from; None to start anew."""
    if source == "never":  # an old run's later snapshot would pass for this one's newest
        shutil.rmtree(out / "snapshots", ignore_errors=True)
        return None
    if source != "auto":
        return checkpoint.verified(Path(source))
    for path in [*(out / "checkpoint",) * (out / "checkpoint").exists(), *reversed(snapshots(out))]:
        try:
            return checkpoint.verified(path)
        except ValueError as error:
            warn(f"passing over a damaged snapshot: {error}")
    return None


def recent(lines: Diary) -> float:
    """Mean of the last 5 % of the losses."""
    last = lines[-max(1, len(lines) // 20) :]
    return sum(line["loss"] for line in last) / max(1, len(last))


def scores(lines: Diary) -> dict[str, float]:
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
    keeping: Keeping | None = None,
    watching: Watching | None = None,
    resume_from: str = "auto",
    ranks: Alone = ALONE,
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
    require(
        run.model.vocab_size == data.vocab_size,
        f"the model's vocab_size is {run.model.vocab_size}, the data's {data.vocab_size}; make them equal",
    )
    keeping, watching = keeping or Keeping(), watching or Watching(every=0)
    training = Training(run, data, device, ranks, execution)
    with ranks.together():
        out.mkdir(parents=True, exist_ok=True)
    lines = resume(training, out, resume_from)
    if training.progress.step < training.steps:
        if ranks.first:
            print(f"{title}: {training.path}", file=sys.stderr)
            rewrite_diary(out, lines)
        with (
            (out / "metrics.jsonl" if ranks.first else Path(os.devnull)).open("a") as diary,
            bar(title, training.steps, progress and ranks.first) as advance,
            sinks.opened(watching.log_to if ranks.first else (), out, run.to_dict(), training.progress.step) as log,
        ):

            def note(line: dict[str, Any]) -> None:
                lines.append(line)
                diary.write(json.dumps(line) + "\n")
                diary.flush()  # never behind a snapshot, and there to be followed
                log(line["step"], line)

            advance(training.progress.step)
            loop(training, out, lines, keeping, watching, note, advance)
        training.save(out / "checkpoint", training.about(recent(lines)) | {"scores": scores(lines)})
    if ranks.first:
        shutil.rmtree(out / "snapshots", ignore_errors=True)
    return training.model, training.trained(recent(lines))


def loop(
    training: Training,
    out: Path,
    lines: Diary,
    keeping: Keeping,
    watching: Watching,
    note: Callable[[dict[str, Any]], None],
    advance: Advance,
) -> None:
    """Steps, evaluations and snapshots, until the horizon, a request to stop, or divergence."""
    run, ranks, peak = training.run, training.ranks, peak_flops(training.device)

    def snapshot() -> None:
        training.save(snapshot_path(out, training.progress.step), training.about(recent(lines)))
        if ranks.first:
            drop_snapshots(snapshots(out)[: -keeping.last])

    with stop_requests() as stop:
        while (step := training.progress.step) < training.steps:
            try:
                if exploded(lines, run.model.vocab_size):
                    last = lines[-1]["loss"]
                    raise Diverged(f"the loss at step {step - 1} is {last:.3f}, worse than knowing nothing")
                line = training.step()
            except Diverged as error:
                before = step - PATIENCE if exploded(lines, run.model.vocab_size) else step
                if before == step and not snapshots(out):  # the update was not made: these weights are the last good
                    snapshot()
                raise Diverged(diagnosed(training, out, str(error), lines, before)) from error
            if watching.due(step + 1, training.steps):
                advance(0, "scoring live")
                line |= watched(training, watching)
                if keeping.best and line["live_bpb"] < best(lines):
                    about = training.about(recent([*lines, line])) | {"scores": scores([line])}
                    checkpoint.save(out / "best", training.model, training.data.tokenizer, about, ranks=ranks)
            rate = run.batch_tokens / (line["seconds"] - (lines[-1]["seconds"] if lines else 0.0))
            if peak is not None:
                line["mfu"] = rate * run.flops_per_token / (peak * ranks.ranks)
            note(line)
            if "gap" in line and ranks.first and (warning := widened(lines)):
                warn(warning)
            advance(1, describe(lines, rate))
            due = keeping.every and training.progress.step % keeping.every == 0
            stopping = ranks.any(stop.requested)
            if stopping or due:
                snapshot()
            if stopping:
                raise KeyboardInterrupt


def watched(training: Training, watching: Watching) -> dict[str, float]:
    """Live scores and the weight of the memory. All ranks call it; the first one's numbers are everybody's."""
    model = training.ranks.evaluable(training.model)
    with training.ranks.together():
        found: dict[str, float] = {}
        if training.ranks.first:
            found = live_scores(model, training.data, training.schedule, watching.targets, False) | memory_weight(model)
    return training.ranks.agreed(found)


def best(lines: Diary) -> float:
    """The best live score in the diary."""
    return min((line["live_bpb"] for line in lines if "live_bpb" in line), default=math.inf)


def diagnosed(training: Training, out: Path, reason: str, lines: Diary, before: int) -> str:
    """Report a divergence that began after step `before`; returns what to tell the user."""
    good = [s for s in snapshots(out) if snapshot_step(s) <= before][-1:]
    if not training.ranks.first:
        return reason
    return report_divergence(out, reason, lines, good[0] if good else None, training.run.to_dict())


def describe(lines: Diary, rate: float) -> str:
    """The text beside the bar."""
    line, found = lines[-1], scores(lines)
    text = f"loss {recent(lines):.3f}  |g| {line['gradient_norm']:.2f}"
    if found:
        text += f"  live {found['live_bpb']:.4f}  gap {found['gap']:+.4f}"
    text += f"  {rate:,.0f} tokens/s"
    return text + (f"  MFU {line['mfu']:.0%}" if "mfu" in line else "")
