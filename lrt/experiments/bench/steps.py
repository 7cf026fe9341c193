"""Whole training steps, optimiser included: a model's over those of the Transformer, or of another, of its size.

All runs of one size are timed in turn, round after round, each part of a schedule by itself. A run's step is the mean
of its parts by their shares of the tokens (contract, section 5). MLPs are widened to equal parameters.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers
from tokenizers import models

from lrt.data.prepared import Documents, Prepared
from lrt.data.tokenizer import BOS, Tokenizer
from lrt.experiments.bench.options import TrainingSteps
from lrt.experiments.bench.peak import peak_bytes
from lrt.experiments.bench.rows import Row
from lrt.experiments.rivals import rivals
from lrt.model.config import ModelConfig
from lrt.model.execution import EAGER, Execution
from lrt.model.memory_config import MemoryConfig
from lrt.model.size import count_parameters
from lrt.schedules.base import Schedule
from lrt.schedules.library import plain, settled
from lrt.schedules.parse import parse
from lrt.training.config import RunConfig
from lrt.training.matching import ReferenceRun, step_under
from lrt.training.recipes import match_parameters
from lrt.training.trainer import Trainer
from lrt.utils.device import peak_flops
from lrt.utils.timing import Timing, alternate, weighted

BASELINE = "transformer"
REFERENCE = f"{BASELINE}: {plain()!r}"
"""The key of what families and folders are held against."""
OPTIMISER = "Muon, AdamW"
"""What a step's rows say of their optimiser (lrt.training.optim)."""
ROWS_OF_TEXT = 64
"""Batches that the random text has: reading on from its end costs nothing more."""


@dataclass(frozen=True)
class Contender:
    """A run whose whole steps are timed, and the one that they are held against."""

    model: str
    run: RunConfig
    over: str
    """The `key` of another contender of its size, or its own."""

    @property
    def key(self) -> str:
        """What it is called among those of its size."""
        return f"{self.model}: {self.run.schedule}"


def step_groups(
    steps: TrainingSteps, precision: Literal["float32", "bfloat16"], seed: int
) -> dict[str, list[Contender]]:
    """The contenders of each size, or folder, the reference first. ValueError for a model that is not known."""
    families = [name for name in steps.models if name in rivals(1)]
    folders = [name for name in steps.models if name not in families]
    for name in folders:
        if not Path(name).exists():
            raise ValueError(
                f"--training.models has {name!r}, which is no folder of a run; of families there are "
                f"{', '.join(rivals(1))}"
            )
    sizes = steps.sizes if families or steps.sources else ()
    groups = {size: sized_group(steps, size, families, precision, seed) for size in sizes}
    return {**groups, **{name: beside_transformer(name, ReferenceRun.read(Path(name)).run) for name in folders}}


def sized_group(
    steps: TrainingSteps, size: str, families: Sequence[str], precision: Literal["float32", "bfloat16"], seed: int
) -> list[Contender]:
    """The families at one size, and what remembers another layer than the last."""
    depth, width = (int(number) for number in size.split("x"))
    shape = ModelConfig.from_depth(depth, width=width, context=steps.context, vocab_size=steps.vocab_size)
    known = rivals(depth)

    def contender(name: str, model: ModelConfig, schedule: str, over: str) -> Contender:
        run = RunConfig(
            model, schedule=schedule, batch_size=steps.batch, horizon="steps=1e6", precision=precision, seed=seed
        )
        return Contender(name, run, over)

    wanted = dict.fromkeys((BASELINE, *families)) if families else {}
    models = widen({name: known[name].model(shape) for name in wanted})
    contenders = [contender(name, model, known[name].schedule, REFERENCE) for name, model in models.items()]
    best = known["recommended"].model(shape)
    for share in steps.sources:
        source = max(1, round(share * depth))
        model = dataclasses.replace(best, memory=remember(best.memory, depth, source))
        name = f"recommended, source {source}"
        for schedule in (plain(), settled(0, 1, 1)):
            contenders.append(contender(name, model, repr(schedule), f"{name}: {plain()!r}"))
    return contenders


def remember(memory: MemoryConfig, depth: int, source: int) -> MemoryConfig:
    """The memory with layer `source` in the place of the last one."""
    sources = tuple(dict.fromkeys(source if s == depth else s for s in memory.sources(depth)))
    return dataclasses.replace(memory, source=sources if isinstance(memory.source, tuple) else sources[0])


def widen(models: dict[str, ModelConfig]) -> dict[str, ModelConfig]:
    """MLPs widened to the largest model's parameters (contract, section 5)."""
    most = max((count_parameters(model)[0] for model in models.values()), default=0)
    return {name: match_parameters(model, most) for name, model in models.items()}


def beside_transformer(name: str, run: RunConfig) -> list[Contender]:
    """A run of the user's, behind a Transformer of its size, which is widened to its parameters where it is smaller."""
    model = rivals(run.model.depth)[BASELINE].model(dataclasses.replace(run.model, loops=1, thoughts=0))
    wanted = count_parameters(run.model)[0]
    if count_parameters(model)[0] < wanted:
        model = match_parameters(model, wanted)
    base = dataclasses.replace(run, model=model, schedule=repr(plain()))
    return [Contender(BASELINE, base, REFERENCE), Contender(name, run, REFERENCE)]


def random_data(vocab_size: int, tokens: int, seed: int = 0) -> Prepared:
    """One document of random tokens, prepared without a file: how long a step takes does not depend on the text."""
    words = {str(token): token for token in range(vocab_size - 1)}
    inner = tokenizers.Tokenizer(models.WordLevel({**words, BOS: vocab_size - 1}))  # type: ignore[call-arg]
    inner.add_special_tokens([BOS])
    text = np.random.default_rng(seed).integers(max(1, vocab_size - 1), size=tokens)
    tokenizer = Tokenizer(inner, "the random text's tokenizer")
    document = Documents(text, np.array([0, tokens]), tokenizer.bos)
    manifest: dict[str, Any] = {"tokenizer_sha256": tokenizer.sha256, "splits": {"train": {"shards": []}}}
    return Prepared(Path("random"), manifest, tokenizer, {"train": document})


@dataclass(frozen=True)
class Timed:
    """What was measured of a contender."""

    contender: Contender
    parts: tuple[tuple[float, Schedule, Timing], ...]
    """(share of the tokens, part of the schedule, its steps)."""
    peak: int
    """Bytes of the part that holds most."""

    @property
    def step(self) -> Timing:
        """The mean step, by shares."""
        return weighted([(share, timing) for share, _, timing in self.parts])

    @property
    def recurrent_share(self) -> float:
        """The share of the tokens that are trained with more than one plain pass."""
        return sum(share for share, part, _ in self.parts if part != plain())


def time_steps(
    contenders: Sequence[Contender],
    execution: Execution,
    device: str,
    rounds: int,
    progress: bool = True,
    limit: float = math.inf,
) -> list[Timed]:
    """Every part of every contender, in turn, round after round; then the bytes that each holds."""
    first = contenders[0].run
    data = random_data(first.model.vocab_size, ROWS_OF_TEXT * first.batch_tokens, first.seed)
    trainers = [Trainer(c.run, data, device, execution=execution) for c in contenders]
    parts = [parse(c.run.schedule).shares() for c in contenders]
    work = {
        (i, j): partial(step_under, trainer, part)
        for i, trainer in enumerate(trainers)
        for j, (_, part) in enumerate(parts[i])
    }
    names = {key: f"{contenders[key[0]].model}: {parts[key[0]][key[1]][1]!r}, {key}" for key in work}
    timings = alternate(
        {names[key]: step for key, step in work.items()},
        rounds, device=device, title="whole training steps", progress=progress, limit=limit,
    )  # fmt: skip
    timed = []
    for i, contender in enumerate(contenders):
        measured = tuple((share, part, timings[names[i, j]]) for j, (share, part) in enumerate(parts[i]))
        timed.append(Timed(contender, measured, step_peak(trainers[i], (part for _, part, _ in measured))))
    for trainer in trainers:
        trainer.close()
    return timed


def step_peak(trainer: Trainer, parts: Iterable[Schedule]) -> int:
    """The most bytes alive in a step of any part, beside weights and the optimisers' moments."""
    counted = trainer
    if trainer.execution.compile == "always" and trainer.model.embedding.weight.device.type != "cuda":
        counted = Trainer(trainer.run, trainer.data, trainer.device, execution=EAGER)
        counted.step()  # makes the moments, which stay
    peaks = []
    for part in parts:
        step, eager = (partial(step_under, t, part) for t in (trainer, counted))
        peaks.append(peak_bytes(counted.model, step, eager, trainer.device))
    counted.close()
    return max(peaks)


def step_rows(group: str, timed: Sequence[Timed], device: str) -> list[Row]:
    """A row for each contender of a size, or of a folder: its whole step over that of what it is held against."""
    by_key = {t.contender.key: t for t in timed}
    return [step_row(group, t, by_key[t.contender.over], peak_flops(device)) for t in timed]


def step_row(group: str, timed: Timed, base: Timed, top: float | None) -> Row:
    """One row; `top` is what the device could do at most, in FLOP/s."""
    contender, run = timed.contender, timed.contender.run
    ratio, spread = timed.step.ratio(base.step)
    seconds, length = timed.step.median, run.model.context
    costs = [parse(r.schedule).cost(length) for r in (run, base.contender.run)]
    figures = {
        "model": contender.model,
        "source": source_text(run.model),
        "schedule": run.schedule,
        "optimiser": OPTIMISER,
        "size": group,
        "over": contender.over,
        "seconds": seconds,
        "ideal": costs[0] / costs[1],
        "tokens_per_second": run.batch_tokens / seconds,
        "mfu": None if top is None else run.flops_per_token * run.batch_tokens / seconds / top,
        "peak_bytes": timed.peak,
        "peak_ratio": timed.peak / base.peak,
        "recurrent_share": timed.recurrent_share,
    }
    parts = [{"schedule": repr(part), "share": share, "seconds": t.median} for share, part, t in timed.parts]
    about = {"parts": parts, "rounds": len(timed.step.seconds), "parameters": count_parameters(run.model)[0]}
    name = f"{contender.model}, {group}: {run.schedule}"
    return Row(name, ratio, spread, measure="ratio", figures=figures, about=about)


def source_text(config: ModelConfig) -> str:
    """The remembered layers in words."""
    return ", ".join(map(str, config.sources)) or "none"
