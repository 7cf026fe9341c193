"""`lrt diagnose`: measure one checkpoint in every way there is a table for, and keep the results beside it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrt import checkpoint, schedules
from lrt.bench.measure import hardware
from lrt.config import require
from lrt.data.loader import Windows, windows
from lrt.data.prepared import Prepared
from lrt.data.tokenizer import Tokenizer
from lrt.evaluate import EVERY, evaluate
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.results import Result
from lrt.sweepcurve import sweep_curve


@dataclass(frozen=True)
class Subject:
    """A checkpoint and what it is measured on."""

    model: LatentRecurrentTransformer
    tokenizer: Tokenizer
    weights: str
    """SHA-256 of the weights."""
    schedule: schedules.Schedule
    """The one trained with."""
    windows: Windows
    batch_size: int
    progress: bool
    run: Path
    """The run's folder, or the checkpoint's."""

    @property
    def token_bytes(self) -> Any:
        return self.tokenizer.token_bytes()

    @property
    def prefix_bytes(self) -> int:
        return self.tokenizer.prefix_bytes("a")


def same_tokenizer(data: Prepared, tokenizer: Tokenizer, folder: Path) -> None:
    """Require that a corpus was prepared with the checkpoint's tokenizer."""
    require(
        data.tokenizer.sha256 == tokenizer.sha256,
        f"{data.path} was prepared with another tokenizer than {folder}'s; "
        f"prepare it with --tokenizer {folder / 'tokenizer.json'}",
    )


def subject(
    path: Path, data: Prepared, split: str, at_least: int | None, batch_size: int, device: str, progress: bool = True
) -> Subject:
    """Load a checkpoint, or a run's, and the windows it is measured on."""
    folder = checkpoint.verified(path)
    model, tokenizer = checkpoint.load(folder, device)
    same_tokenizer(data, tokenizer, folder)
    spelled = checkpoint.about(folder).get("schedule", "plain()")
    found = windows(data.split(split), model.config.context, at_least)
    weights = checkpoint.sha256(folder / "model.safetensors")
    return Subject(model, tokenizer, weights, schedules.parse(spelled), found, batch_size, progress, path)


def sweeps(s: Subject) -> dict[str, Any]:
    """The sweep curve."""
    found = sweep_curve(
        s.model,
        s.windows,
        s.token_bytes,
        s.schedule,
        batch_size=s.batch_size,
        progress=s.progress,
        prefix_bytes=s.prefix_bytes,
    )
    return found.to_dict()


def ablations(s: Subject) -> dict[str, Any]:
    """Live, and live with the memory replaced in every way."""
    return evaluate(
        s.model, s.windows, s.token_bytes, s.schedule, EVERY, s.batch_size, s.progress, s.prefix_bytes
    ).to_dict()


MEASURES: dict[str, Callable[[Subject], dict[str, Any]]] = {"sweeps": sweeps, "ablations": ablations}
"""Kind of result -> how it is measured."""


def diagnose(s: Subject, name: str, out: Path, measures: tuple[str, ...] = tuple(MEASURES)) -> list[Result]:
    """Measure `s`, called `name`, into the folder `out`; each result is written as soon as it is there."""
    found = []
    for kind in measures:
        begun = time.perf_counter()
        values = MEASURES[kind](s)
        settings = {"targets": s.windows.targets, "complete": s.windows.complete, "schedule": repr(s.schedule)}
        spent = time.perf_counter() - begun
        device = s.model.embedding.weight.device
        found.append(Result(kind, name, s.weights, settings, values, spent, hardware(device)))
        found[-1].write(out)
    return found


def lines(result: Result) -> list[str]:
    """A result as text for the terminal."""
    return {"sweeps": sweep_lines, "ablations": ablation_lines}[result.kind](result.values)


def sweep_lines(values: Mapping[str, Any]) -> list[str]:
    """Bits per byte by refinements and stride, and the verdict."""
    curves = {int(g): points for g, points in values["curves"].items()}
    counts = [point["refinements"] for point in curves[1]]
    return [
        f"bits per byte after n refinements ({values['targets']:,} tokens); parallel {values['parallel_bpb']:.4f} "
        f"under {values['schedule']}, live {values['live_bpb']:.4f}",
        "n      " + "".join(f"{n:>8}" for n in counts) + "  contraction",
        *(
            ("full   " if g == 1 else f"g = {g:<3}")
            + "".join(f"{point['bpb']:8.4f}" for point in points)
            + f"{_by_stride(values['contraction'], g):13.3f}"
            for g, points in curves.items()
        ),
        "away   " + "".join(f"{point['distance']:8.1e}" for point in curves[1]) + "  full, from the live memory",
        f"64 against 63 refinements: {values['even_odd']:+.4f} bits per byte",
        f"verdict: {values['verdict']}",
    ]


def _by_stride(values: Mapping[Any, float], groups: int) -> float:
    """A value by stride; JSON spells keys as text."""
    return values[groups] if groups in values else values[str(groups)]


def ablation_lines(values: Mapping[str, Any]) -> list[str]:
    """Live scores with the memory replaced, each against live."""
    live = values["live_bpb"]
    found = {name: value for name, value in values.items() if name.startswith("live_bpb")}
    named = {name: name.removeprefix("live_bpb").strip("_").replace("_", " ") or "live" for name in found}
    return [
        f"live bits per byte ({values['targets']:,} tokens)",
        *(f"{named[name]:22} {value:.4f} {100 * (value / live - 1):+7.1f} %" for name, value in found.items()),
    ]
