"""What cells of language take: paired ratios of times, measured once and kept, and how long a cell will run.

Ratios are kept in a file beside the texts, or in a study's own folder (`ratios.json`). Measured anew by each process
and each resumption, they would give the seeds and rates of a family different horizons at equal wall-clock (contract,
section 5).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import filelock
import torch

from lrt.data.prepared import Prepared
from lrt.distributed.objective import make_objective
from lrt.distributed.single_process import SingleProcess
from lrt.eval.scoring import BATCH
from lrt.experiments.studies import texts
from lrt.inference.decoders import decoder
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.schedules import library as schedules
from lrt.schedules.base import Schedule
from lrt.schedules.flops import forward_flops
from lrt.schedules.loss import StepLoss
from lrt.schedules.parse import parse
from lrt.training.config import RunConfig
from lrt.training.matching import PAIRS, step_time_ratio
from lrt.training.speed import measure_speed
from lrt.utils.files import replace_atomically
from lrt.utils.provenance import hardware
from lrt.utils.timing import Work, alternate

Ratios = dict[str, float]
"""`step`: a training step over the Transformer's, optimiser included. `schedule`: forward and backward over `plain()`
of the same model (contract, section 6). `decode`: a decoded token over the Transformer's."""
TEXTS, TURNS = 4, 16
"""Texts of `context` tokens in one row that are decoded to compare, and the turns that each is decoded in: a busy
machine changes within a text, so that pairs of whole texts say little."""
REFINEMENTS = 64
"""Of the test whether an iteration settles (contract, section 4: stable, two-cycle)."""


def ratios_file(folder: Path | None = None) -> Path:
    """Where ratios are kept (`texts.study_folder`)."""
    return texts.study_folder(folder) / "ratios.json"


def paired_ratios(run: RunConfig, other: RunConfig, data: Prepared, device: str, folder: Path | None = None) -> Ratios:
    """The ratios of a run and the Transformer's beside it: those that are kept in `folder`, or measured now."""
    if run.model == other.model and run.schedule == other.schedule:
        return {"step": 1.0, "schedule": 1.0, "decode": 1.0}

    def measure() -> Ratios:
        return {
            "step": step_time_ratio(run, other, data, SingleProcess(device)),
            "schedule": schedule_ratio(run, device),
            "decode": decode_ratio(run, other, device),
        }

    return keep(ratios_key(run, other, device), measure, folder)


def keep(key: str, measure: Callable[[], Ratios], folder: Path | None = None) -> Ratios:
    """The ratios that are kept under a key, or measured now."""
    file = ratios_file(folder)
    file.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(file.with_suffix(".lock")):  # held while measuring: two at once would disturb each other
        measured: dict[str, Ratios] = json.loads(file.read_text()) if file.exists() else {}
        key = next((saved for saved in measured if fill_key(saved) == key), key)
        if key not in measured:
            measured[key] = measure()
            replace_atomically(file, json.dumps(measured, indent=1))
    return measured[key]


def ratios_key(run: RunConfig, other: RunConfig, device: str) -> str:
    """Two runs and a machine as JSON, without what takes no time of a step."""
    untimed = {"horizon": "", "seed": 0, "optim": None}
    return machine_key([{**config.to_dict(), **untimed} for config in (run, other)], device)


def machine_key(timed: Sequence[dict[str, Any]], device: str) -> str:
    """What is timed, as plain data, and the machine, as JSON."""
    return json.dumps([*timed, hardware(device)], sort_keys=True, default=str)


def fill_key(key: str) -> str:
    """A key as this version writes it: a field that its runs lack means that field's default."""
    *runs, machine = json.loads(key)
    timed = {"horizon": "steps=1", "optim": {}}  # any that can be read
    try:
        filled = [{**RunConfig.from_dict({**run, **timed}).to_dict(), "horizon": "", "optim": None} for run in runs]
    except ValueError:  # of a version that had other fields
        return key
    return json.dumps([*filled, machine], sort_keys=True)


def schedule_ratio(run: RunConfig, device: str) -> float:
    """Forward and backward of a batch over `plain()` of the same model: median of pairs, parts by their shares."""
    parts = parse(run.schedule).shares()
    plain = schedules.plain()
    if [part for _, part in parts] == [plain]:
        return 1.0
    model = LatentRecurrentTransformer(run.model).to(device).train()
    rows = run.device_batch or run.batch_size
    tokens = torch.randint(run.model.vocab_size, (2, rows, run.model.context), device=device)
    objective = make_objective(model, run.dtype)

    def step(schedule: Schedule) -> Work:
        loss = StepLoss.of(schedule, [tokens[1]])

        def work() -> None:
            model.zero_grad()
            objective(loss, tokens[0], tokens[1], None).backward()

        return work

    work = {repr(schedule): step(schedule) for schedule in (plain, *(part for _, part in parts))}
    times = alternate(work, PAIRS, device=device, progress=False)
    return sum(share * times[repr(part)].ratio(times[repr(plain)])[0] for share, part in parts)


def decode_ratio(run: RunConfig, other: RunConfig, device: str) -> float:
    """Time to decode a token of one row over the other model's: the median of alternated turns through whole texts."""
    work = {}
    for name, config in (("this", run.model), ("other", other.model)):
        model = LatentRecurrentTransformer(config).to(device).eval()
        work[name] = decode_in_turns(model, config.context)
    times = alternate(work, TEXTS * TURNS, device=device, progress=False)
    return times["this"].ratio(times["other"])[0]


def decode_in_turns(model: LatentRecurrentTransformer, context: int) -> Work:
    """Decode the next part of a text of `context` tokens; behind its end, of a new one."""
    size = max(1, context // TURNS)

    def parts() -> Iterator[None]:
        while True:
            step: Any = decoder(model, model.empty_state(1, context))
            for position in range(context):
                step.logits(step(torch.zeros(1, dtype=torch.long, device=model.embedding.weight.device), [position]))
                if (position + 1) % size == 0:
                    yield

    turns = parts()
    return lambda: next(turns)


def estimate_minutes(run: RunConfig, data: Prepared, targets: int, settling: int, device: str) -> float:
    """Minutes of a cell: training by one step of each part of its schedule, scores by some decoded tokens."""
    speed = measure_speed(run, data, SingleProcess(device), rounds=1, rows=BATCH)
    has_memory = bool(run.model.stored_sources)
    live = (4 if has_memory else 2) * targets * speed.live  # val, test, and test with two ablations
    forward = speed.train * sum(forward_flops(run.model, run.model.context)) / run.flops_per_token
    settled = settling * forward * (REFINEMENTS + 1) if has_memory else 0.0
    return (run.tokens * speed.train + live + targets * speed.parallel + settled) / 60
