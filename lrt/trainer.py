"""Train a model: batches, an objective, an optimiser, a diary. It knows an objective, not recurrence."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrt import checkpoint, schedules, sinks
from lrt.config import require
from lrt.data.loader import Batch, Position, Rows, prefetch
from lrt.data.prepared import Prepared
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
from lrt.loss import StepLoss
from lrt.model.flops import peak_flops, training_flops
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.optim import Optimiser
from lrt.precision import compute
from lrt.progress import Advance, bar
from lrt.run import RunConfig
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


@dataclass(frozen=True)
class Trained:
    """What a run came to."""

    tokens: int
    seconds: float
    """Wall-clock of the training steps, without scoring and saving."""
    flops: float
    """Training FLOPs, all passes counted."""
    loss: float
    """Mean of the last 5 % of the steps' losses."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands; with the weights and the optimisers, all there is to know of it."""

    step: int = 0
    """Optimiser steps done."""
    position: Position = field(default_factory=Position)
    """The next row of data."""
    seconds: float = 0.0
    flops: float = 0.0


class Objective(nn.Module):
    """A micro-batch's share in the loss of its step, as one call of one module: what is cast, or sharded, around it."""

    def __init__(self, model: LatentRecurrentTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, step_loss: StepLoss, batch: Batch) -> Tensor:
        return step_loss(self.model, batch.tokens, batch.targets, batch.documents)


class Session:
    """A run in memory: model, optimiser, data, progress."""

    def __init__(self, run: RunConfig, data: Prepared, device: str | torch.device) -> None:
        torch.manual_seed(run.seed)
        self.run, self.data, self.device = run, data, device
        self.model = LatentRecurrentTransformer(run.model).to(device).train()
        self.objective = Objective(self.model)
        self.optimiser = Optimiser(self.model, run.model.width, run.batch_tokens, run.steps, run.optim)
        self.rows = Rows(data.split("train"), run.model.context, run.seed)
        self.schedule = schedules.parse(run.schedule)
        self.steps = run.steps
        self.progress = Progress()
        self.loader: Generator[tuple[Batch, Position], None, None] | None = None
        """Batches from `progress` on, read in advance; begun by the first step."""
        self.costs: dict[schedules.Schedule, float] = {}

    def step(self) -> dict[str, Any]:
        """One optimiser step; returns its line of the diary. Raises Diverged, weights untouched, if it cannot be."""
        run, done, begun = self.run, self.progress, time.perf_counter()
        current = self.schedule.at(done.step, self.steps, run.seed)
        batches, position = self._batches()
        step_loss = StepLoss.of(current, [b.targets for b in batches])
        shares = []
        for batch in batches:
            share = compute(self.objective, run.precision, step_loss, batch)
            share.backward()
            shares.append(share.detach())
        loss, norm = float(torch.stack(shares).sum()), float(self.optimiser.clip())
        for name, value in (("loss", loss), ("norm of the gradient", norm)):
            if not math.isfinite(value):
                self.optimiser.zero_grad()
                raise Diverged(f"the {name} at step {done.step} is {value}")
        rate = self.optimiser.step(done.step)
        if current not in self.costs:
            self.costs[current] = training_flops(run.model, current, run.model.context)
        self.progress = Progress(
            done.step + 1,
            position,
            done.seconds + time.perf_counter() - begun,
            done.flops + self.costs[current] * run.batch_tokens,
        )
        return {
            "step": done.step,
            "tokens": self.progress.step * run.batch_tokens,
            "loss": loss,
            "rate": rate,
            "gradient_norm": norm,
            "seconds": self.progress.seconds,
            "flops": self.progress.flops,
            "schedule": repr(current),
        }

    def _batches(self) -> tuple[list[Batch], Position]:
        """The micro-batches of the next step, and the position after them."""
        parts = self.run.micro_batches(1)
        if self.loader is None:
            self.loader = prefetch(self.rows, self.progress.position, self.run.batch_size // parts)
        batches, position = [], self.progress.position
        for _ in range(parts):
            batch, position = next(self.loader)
            batches.append(batch.to(self.device))
        return batches, position

    def trained(self, loss: float) -> Trained:
        done = self.progress
        return Trained(done.step * self.run.batch_tokens, done.seconds, done.flops, loss)

    def about(self, loss: float) -> dict[str, Any]:
        """How the weights came to be: what a checkpoint says of itself."""
        return {
            "run": self.run.to_dict(),
            "schedule": self.run.schedule,
            "trained": dataclasses.asdict(self.trained(loss)),
            "data": self.data.fingerprint,
            "packing": dataclasses.asdict(self.rows.packing),  # of the shards read since the run was last begun
        }

    def save(self, path: Path, about: dict[str, Any]) -> None:
        """A checkpoint that can be trained on."""
        training = {
            "run": json.dumps(self.run.to_dict(), sort_keys=True),
            "data": self.data.fingerprint,
            "progress": dataclasses.asdict(self.progress),
            "optimisers": [part.state_dict() for part in self.optimiser.parts],
        }
        checkpoint.save(path, self.model, self.data.tokenizer, about, training)

    def restore(self, path: Path, may_differ: tuple[str, ...] = ()) -> None:
        """Go on from a checkpoint that `save` wrote. Raises ValueError where it is of another run, or of other data."""
        training = checkpoint.load_training(path, self.model)
        mine = json.loads(json.dumps(self.run.to_dict()))
        theirs = json.loads(training["run"])
        differing = [k for k in mine if mine[k] != theirs.get(k)]
        spelled = "; ".join(f"{k}: {theirs.get(k)} there, {mine[k]} here" for k in differing)
        require(
            set(differing) <= set(may_differ),
            f"{path} is of another run ({spelled}); choose another --out, or start anew with --resume never",
        )
        if differing:
            warn(f"going on from {path} with other settings ({spelled})")
        require(training["data"] == self.data.fingerprint, f"{path} was trained on other data; choose another --out")
        for part, state in zip(self.optimiser.parts, training["optimisers"], strict=True):
            part.load_state_dict(state)
        saved = training["progress"]
        self.progress = Progress(**{**saved, "position": Position(**saved["position"])})
        self.loader = None


def resume(session: Session, out: Path, source: str) -> list[dict[str, Any]]:
    """Bring a session to where `source` says (`auto`, `never`, a snapshot's folder); returns the diary up to there.

    `auto` takes the finished checkpoint, else the newest snapshot that is whole, and starts anew where there is none.
    A named snapshot may have been trained at other rates, under another schedule or for another horizon.
    """
    if source == "never":  # an old run's later snapshot would pass for this one's newest
        shutil.rmtree(out / "snapshots", ignore_errors=True)
        return []
    if source != "auto":
        path = checkpoint.verified(Path(source))
        session.restore(path, FREE)
        drop_snapshots([s for s in snapshots(out) if snapshot_step(s) > session.progress.step])
        origin = path.parent.parent if path.parent.name == "snapshots" else path.parent
        return read_diary(origin, session.progress.step)
    for path in [*(out / "checkpoint",) * (out / "checkpoint").exists(), *reversed(snapshots(out))]:
        try:
            checkpoint.verified(path)
        except ValueError as error:
            warn(f"passing over a damaged snapshot: {error}")
            continue
        session.restore(path)
        return read_diary(out, session.progress.step)
    return []


def recent(lines: list[dict[str, Any]]) -> float:
    """Mean of the last 5 % of the losses."""
    last = lines[-max(1, len(lines) // 20) :]
    return sum(line["loss"] for line in last) / max(1, len(last))


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
) -> tuple[LatentRecurrentTransformer, Trained]:
    """Train into folder `out`: metrics.jsonl (a line per step), snapshots/, best/, and checkpoint/ at the end.

    Interrupted (Ctrl-C, SIGTERM), it ends its step, saves a snapshot and raises KeyboardInterrupt; called again, it
    goes on from the newest snapshot, bit for bit on a CPU; of a finished run nothing is done again. `resume_from` is
    `auto`, `never` or a snapshot's folder. Without `watching` nothing is scored on the way. A loss or gradient that is
    not finite, or a loss that explodes, raises Diverged, naming the step and the last good snapshot, which stays.
    """
    require(
        run.model.vocab_size == data.vocab_size,
        f"the model's vocab_size is {run.model.vocab_size}, the data's {data.vocab_size}; make them equal",
    )
    keeping, watching = keeping or Keeping(), watching or Watching(every=0)
    out.mkdir(parents=True, exist_ok=True)
    session = Session(run, data, device)
    lines = resume(session, out, resume_from)
    if session.progress.step < session.steps:
        rewrite_diary(out, lines)
        with (
            (out / "metrics.jsonl").open("a") as diary,
            bar(title, session.steps, progress) as advance,
            sinks.opened(watching.log_to, out, run.to_dict(), session.progress.step) as log,
        ):

            def note(line: dict[str, Any]) -> None:
                lines.append(line)
                diary.write(json.dumps(line) + "\n")
                diary.flush()  # never behind a snapshot, and there to be followed
                log(line["step"], line)

            advance(session.progress.step)
            loop(session, out, lines, keeping, watching, note, advance)
        session.save(out / "checkpoint", session.about(recent(lines)) | {"scores": scores(lines)})
    shutil.rmtree(out / "snapshots", ignore_errors=True)
    return session.model, session.trained(recent(lines))


def scores(lines: list[dict[str, Any]]) -> dict[str, float]:
    """The newest evaluation in the diary; empty where there was none."""
    found = next((line for line in reversed(lines) if "live_bpb" in line), {})
    return {k: found[k] for k in ("live_bpb", "parallel_bpb", "gap") if k in found}


def loop(
    session: Session,
    out: Path,
    lines: list[dict[str, Any]],
    keeping: Keeping,
    watching: Watching,
    note: Callable[[dict[str, Any]], None],
    advance: Advance,
) -> None:
    """Steps, evaluations and snapshots, until the horizon, a request to stop, or divergence."""
    run, peak = session.run, peak_flops(session.device)
    best = min((line["live_bpb"] for line in lines if "live_bpb" in line), default=math.inf)

    def snapshot() -> None:
        session.save(snapshot_path(out, session.progress.step), session.about(recent(lines)))
        drop_snapshots(snapshots(out)[: -keeping.last])

    with stop_requests() as stop:
        while (step := session.progress.step) < session.steps:
            try:
                if exploded(lines, run.model.vocab_size):
                    last = lines[-1]["loss"]
                    raise Diverged(f"the loss at step {step - 1} is {last:.3f}, worse than knowing nothing")
                line = session.step()
            except Diverged as error:
                before = step - PATIENCE if exploded(lines, run.model.vocab_size) else step
                if before == step and not snapshots(out):  # the update was not made: these weights are the last good
                    snapshot()
                good = [s for s in snapshots(out) if snapshot_step(s) <= before]
                told = report_divergence(out, str(error), lines, good[-1] if good else None, run.to_dict())
                raise Diverged(told) from error
            if watching.due(step + 1, session.steps):
                advance(0, "scoring live")
                line |= live_scores(session.model, session.data, session.schedule, watching.targets, False)
                line |= memory_weight(session.model)
                if keeping.best and line["live_bpb"] < best:
                    best = line["live_bpb"]
                    about = session.about(recent([*lines, line])) | {"scores": scores([line])}
                    checkpoint.save(out / "best", session.model, session.data.tokenizer, about)
            rate = run.batch_tokens / (line["seconds"] - (lines[-1]["seconds"] if lines else 0.0))
            if peak is not None:
                line["mfu"] = rate * run.flops_per_token / peak
            note(line)
            if "gap" in line and (warning := widened(lines)):
                warn(warning)
            advance(1, describe(lines, rate))
            due = keeping.every and session.progress.step % keeping.every == 0
            if stop.requested or due:
                snapshot()
            if stop.requested:
                raise KeyboardInterrupt


def describe(lines: list[dict[str, Any]], rate: float) -> str:
    """The text beside the bar."""
    line, found = lines[-1], scores(lines)
    text = f"loss {recent(lines):.3f}  |g| {line['gradient_norm']:.2f}"
    if found:
        text += f"  live {found['live_bpb']:.4f}  gap {found['gap']:+.4f}"
    text += f"  {rate:,.0f} tokens/s"
    return text + (f"  MFU {line['mfu']:.0%}" if "mfu" in line else "")
