"""How long a run takes here, from a few timed steps and decoded tokens on a model of its own.

No number of a run depends on what is measured here, but for a horizon that is given in minutes (`training.minutes`).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lrt.data.prepared import Prepared
from lrt.distributed.single_process import SINGLE_PROCESS, SingleProcess
from lrt.inference.decoders import decoder
from lrt.model.execution import EAGER, Execution
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.schedules.flops import forward_flops
from lrt.schedules.parse import parse
from lrt.training.config import EvalConfig, RunConfig
from lrt.training.matching import seconds_per_token
from lrt.training.monitor import BATCH_TOKENS, scored_tokens
from lrt.training.trainer import Trainer
from lrt.utils.timing import time_once

ROUNDS, WARM = 3, 1
"""Steps of each part of a schedule that are timed, after so many that are not."""
DECODED = 16
"""Tokens of a row that are decoded to say how long scoring takes."""
SHARE = 0.1
"""The most of a run's steps that an estimate of it may take."""


@dataclass(frozen=True)
class Speed:
    """Seconds that a run's work takes on this machine."""

    train: float
    """Of a step, per training token."""
    live: float
    """Per token scored live, with the memory or without."""
    parallel: float
    """Per token scored under the run's schedule."""

    def run_seconds(self, run: RunConfig, evaluation: EvalConfig, available: int, done: int = 0) -> float:
        """Training and live scores of a run, of which `done` steps are behind it.

        `available` is the tokens of the validation split. Compiling, reading and saving are not counted.
        """
        tokens = (run.steps - done) * run.batch_tokens
        scored = scored_tokens(evaluation, run.steps, available, done)
        return tokens * self.train + scored * (self.live + self.parallel)


def measure_speed(
    run: RunConfig,
    data: Prepared,
    ranks: SingleProcess = SINGLE_PROCESS,
    execution: Execution = EAGER,
    rounds: int = ROUNDS,
    rows: int | None = None,
) -> Speed:
    """Time a few steps of one micro-batch, and some decoding of `rows` rows (None: as many as training scores at once).

    An optimiser's update is counted with each micro-batch: where there are several, training is a little faster than
    this says. All ranks call it, and the first one's clock decides.
    """
    decided, _ = execution.resolve(run.steps, ranks.device)
    trainer = Trainer(run.one_micro_batch(ranks.ranks), data, ranks.device, ranks, decided)
    for _ in range(WARM):
        seconds_per_token(trainer)
    train = statistics.median(seconds_per_token(trainer) for _ in range(rounds))
    trainer.close()
    model = ranks.gathered_model(trainer.model).eval()
    live = decode_seconds(model, rows or max(1, BATCH_TOKENS // run.model.context))
    return ranks.broadcast(Speed(train, live, train * parallel_share(run)))


def decode_seconds(model: LatentRecurrentTransformer, rows: int) -> float:
    """Seconds per token of decoding `rows` rows in the middle of the context, where a token takes the mean time."""
    device, middle = model.embedding.weight.device, model.config.context // 2
    with torch.no_grad():
        step = decoder(model, model.empty_state(rows, model.config.context))
    tokens = torch.zeros(rows, dtype=torch.long, device=device)

    def decode(positions: range) -> Callable[[], None]:
        def work() -> None:
            for position in positions:
                step.logits(step(tokens, [position] * rows))

        return work

    decode(range(middle, middle + 1))()  # not timed
    timed = range(middle + 1, min(middle + 1 + DECODED, model.config.context))
    if not timed:  # a context of two tokens
        timed = range(middle, middle + 1)
    return time_once(decode(timed), device) / (len(timed) * rows)


def parallel_share(run: RunConfig) -> float:
    """What a token costs that is scored under the run's schedule, over one that is trained, by their FLOPs."""
    length = run.model.context
    passes = sum(w * len(p.positions) / length for w, s in parse(run.schedule).shares() for p in s.passes(length))
    return passes * sum(forward_flops(run.model, length)) / run.flops_per_token


def estimate_run(
    run: RunConfig,
    data: Prepared,
    evaluation: EvalConfig,
    ranks: SingleProcess = SINGLE_PROCESS,
    execution: Execution = EAGER,
    done: int = 0,
) -> float | None:
    """Seconds that a run takes from step `done` on; None where measuring would take more than a tenth of its steps.

    All ranks call it.
    """
    measured = len(parse(run.schedule).shares()) * (WARM + ROUNDS)
    if measured > SHARE * (run.steps - done) * run.micro_batches(ranks.ranks):
        return None
    speed = measure_speed(run, data, ranks, execution)
    return speed.run_seconds(run, evaluation, validation_tokens(data), done)


def validation_tokens(data: Prepared) -> int:
    """Tokens of the validation split: no more of them can be scored."""
    return data.manifest["splits"]["val"]["tokens"]
