"""`lrt diagnose`: measure one checkpoint in every way there is a table for, and keep the results beside it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lrt import checkpoint, schedules
from lrt.bench.measure import hardware
from lrt.config import require
from lrt.data.loader import Windows, windows
from lrt.data.prepared import Prepared
from lrt.data.tokenizer import Tokenizer
from lrt.diagnostics import NOISE, coloured, layers, reach, sample, scales
from lrt.distributed import ALONE, Alone
from lrt.evaluate import EVERY, evaluate
from lrt.keeping import snapshot_step, snapshots
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.results import Ledger, Result
from lrt.sweepcurve import sweep_curve
from lrt.tokenscores import Columns, TokenScores, bfloat16, standard, summary, token_scores

SHARED = ("bpb", "bfloat16")
"""Measures whose windows are shared among ranks."""
TEXT = 1500
"""Tokens of the coloured text."""


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
    name: str
    """The corpus and its split."""
    data: str
    """The corpus's fingerprint."""
    out: Path
    """Where results go."""
    ranks: Alone = ALONE

    @property
    def used(self) -> schedules.Schedule:
        """The schedule of parallel scores: `plain` where nothing recurs."""
        recurs = self.model.config.memory.remembered(self.model.config.depth)
        return self.schedule if recurs else schedules.plain()

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
    path: Path,
    data: Prepared,
    split: str,
    at_least: int | None,
    batch_size: int,
    out: Path | None = None,
    ranks: Alone = ALONE,
    progress: bool = True,
) -> Subject:
    """Load a checkpoint, or a run's, and the windows it is measured on."""
    folder = checkpoint.verified(path)
    model, tokenizer = checkpoint.load(folder, ranks.device)
    same_tokenizer(data, tokenizer, folder)
    return Subject(
        model,
        tokenizer,
        checkpoint.sha256(folder / "model.safetensors"),
        schedules.parse(checkpoint.about(folder).get("schedule", "plain()")),
        windows(data.split(split), model.config.context, at_least),
        batch_size,
        progress,
        path,
        f"{data.path.name}-{split}",
        data.fingerprint,
        out or path / "evaluation",
        ranks,
    )


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


def scored(s: Subject, kind: str, columns: Columns) -> TokenScores:
    """The windows' scores token by token; stopped, they go on."""
    settings = {"checkpoint": s.weights, "data": s.data, "schedule": repr(s.schedule)}
    ledger = Ledger(s.out / "partial", f"{kind}-{s.name}", settings, s.ranks)
    return token_scores(s.model, s.windows, s.token_bytes, columns, ledger, s.batch_size, s.prefix_bytes, s.progress)


def bits(s: Subject) -> dict[str, Any]:
    """BPB in every way, by position and document, with intervals."""
    scores = scored(s, "bpb", standard(s.used))
    return {"schedule": repr(s.used)} | summary(scores, (("live", "parallel"), ("off", "live")))


def low_precision(s: Subject) -> dict[str, Any]:
    """bfloat16 beside its control."""
    scores = scored(s, "bfloat16", bfloat16(s.model))
    pairs = (("bfloat16 control", "live"), ("bfloat16 live", "bfloat16 control"))
    return {"schedule": repr(s.used)} | summary(scores, pairs)


def memory(s: Subject) -> dict[str, Any]:
    """Gates, scales and reach; the scales of every snapshot that is there too."""
    inputs = sample(s.windows, min(8, s.batch_size), s.model.embedding.weight.device)
    history = []
    for folder in snapshots(s.run):
        model, _ = checkpoint.load(folder)
        history.append({"step": snapshot_step(folder), **scales(model)})
    found = {"layers": layers(s.model, inputs), "reach": reach(s.model, inputs), "noise": NOISE}
    return found | {"snapshots": history, "scales": scales(s.model), "inputs": list(inputs.shape)}


def text(s: Subject) -> dict[str, Any]:
    """The beginning of a document, with what recurrence gains on each token."""
    scores = scored(s, "bpb", standard(s.used))
    document = int(np.bincount(scores.document).argmax())
    chosen = np.flatnonzero(scores.document == document)[:TEXT]
    return coloured(
        s.tokenizer, *(v[chosen].tolist() for v in (scores.tokens, scores.nats["live"], scores.nats["off"]))
    )


MEASURES: dict[str, Callable[[Subject], dict[str, Any]]] = {
    "bpb": bits,
    "sweeps": sweeps,
    "ablations": ablations,
    "memory": memory,
    "text": text,
    "bfloat16": low_precision,
}
"""Kind of result -> how it is measured."""


def diagnose(s: Subject, measures: Sequence[str] = ("bpb", "sweeps", "ablations", "memory", "text")) -> list[Result]:
    """Measure a subject; each result is written as soon as it is there. All ranks call it.

    bpb and bfloat16 share their windows among ranks; the others are measured by the first.
    """
    found = []
    for kind in measures:
        begun = time.perf_counter()
        if kind in SHARED:
            values = MEASURES[kind](s)
        else:
            with s.ranks.together():
                values = s.ranks.agreed(MEASURES[kind](replace(s, ranks=ALONE)) if s.ranks.first else {})
        settings = {"targets": s.windows.targets, "complete": s.windows.complete, "schedule": repr(s.schedule)}
        spent = time.perf_counter() - begun
        found.append(Result(kind, s.name, s.weights, settings, values, spent, hardware(s.ranks.device)))
        if s.ranks.first:
            found[-1].write(s.out)
    return found


def lines(result: Result) -> list[str]:
    """A result as text for the terminal."""
    return LINES[result.kind](result.values)


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


def bpb_lines(values: Mapping[str, Any]) -> list[str]:
    """Columns and differences with their intervals."""
    about = f"{values['targets']:,} tokens of {values['documents']:,} documents, schedule {values['schedule']}"
    rows = {**values["columns"], **values["differences"]}
    return [
        f"bits per byte with 95 % intervals over documents ({about})",
        *(f"{name:34} {row['bpb']:+8.4f}  [{row['low']:+.4f}, {row['high']:+.4f}]" for name, row in rows.items()),
    ]


def memory_lines(values: Mapping[str, Any]) -> list[str]:
    """Gates and ratios by layer, and the reach."""

    def shown(row: Mapping[str, Any], key: str) -> str:
        return " ".join(f"{value:.3f}" for value in row.get(key, [])) or "-"

    gates = [[f"{sum(g) / len(g):.3f}" for g in row.get("gates", [])] for row in values["layers"]]
    return [
        "layer   γ                gates: local, memory   memory over local: keys   values",
        *(
            f"{row['layer']:>5}   {shown(row, 'gamma'):16} {' '.join(g) or '-':22} {shown(row, 'key_ratio'):25} "
            f"{shown(row, 'value_ratio')}"
            for row, g in zip(values["layers"], gates, strict=True)
        ),
        "reach   "
        + "  ".join(f"{point['back']}: {point['kl']:.1e}" for point in values["reach"])
        + "  (tokens ago: nats of divergence)",
    ]


def text_lines(values: Mapping[str, Any]) -> list[str]:
    """How many tokens recurrence helps."""
    gains = [off - live for off, live in zip(values["off"], values["live"], strict=True)]
    better = sum(gain > 0 for gain in gains)
    return [
        f"recurrence helps {better} of {len(gains)} tokens of the text, by {sum(gains) / len(gains):+.3f} bits each"
    ]


LINES: dict[str, Callable[[Mapping[str, Any]], list[str]]] = {
    "sweeps": sweep_lines,
    "ablations": ablation_lines,
    "bpb": bpb_lines,
    "bfloat16": bpb_lines,
    "memory": memory_lines,
    "text": text_lines,
}
