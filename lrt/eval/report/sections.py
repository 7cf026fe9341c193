"""The sections of `lrt report`: each turns what is known of some runs into HTML, or into nothing."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lrt.eval import results
from lrt.eval.report import figures
from lrt.eval.report.html import figure_row, number, table
from lrt.eval.report.text import ROUNDING
from lrt.eval.results import Result


@dataclass(frozen=True)
class Run:
    """What is known of one run."""

    name: str
    diary: list[dict[str, Any]]
    about: dict[str, Any]
    """The checkpoint's config.json; empty where there is none."""
    results: list[Result]

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Read a run's folder. ValueError where it holds neither diary nor checkpoint nor results."""
        diary = folder / "metrics.jsonl"
        lines = [json.loads(line) for line in diary.read_text().splitlines()] if diary.is_file() else []
        configs = [f for f in (folder / "checkpoint" / "config.json", folder / "config.json") if f.is_file()]
        about = json.loads(configs[0].read_text()) if configs else {}
        found = results.read_results(folder / "evaluation")
        if not bool(lines or about or found):
            raise ValueError(
                f"{folder} is no run: it has no metrics.jsonl, checkpoint or evaluation; give a folder of `lrt train`"
            )
        return cls(folder.name, lines, about, found)

    def of(self, kind: str) -> list[Result]:
        """The results of a kind."""
        return [result for result in self.results if result.kind == kind]

    def values(self, kind: str) -> dict[str, Any]:
        """The first result of a kind, empty where there is none."""
        return next((result.values for result in self.of(kind)), {})


def scores(runs: Sequence[Run], colours: Mapping[str, str]) -> list[str]:
    """Bits per byte with intervals, and where recurrence helps."""
    body, gains = [], {}
    for run in runs:
        for result in (*run.of("bpb"), *run.of("bfloat16")):
            both = {**result.values["columns"], **result.values["differences"]}
            for name, row in both.items():
                body.append([run.name, result.subject, name] + [number(row[k]) for k in ("bpb", "low", "high")])
        if run.values("bpb") and abs(run.values("bpb")["differences"]["off - live"]["bpb"]) > NEGLIGIBLE:
            gains[run.name] = run.values("bpb")
    plain = plain_scores(runs)
    if not body:
        return ["<section><h2>Bits per byte</h2>", *plain, "</section>"] if plain else []
    cuts = (
        ("by_place_in_window", "tokens of context"),
        ("by_position_in_document", "position in the document"),
        ("by_document_length", "length of the document, tokens"),
    )
    pictures = [
        (partial(lambda by, label, ax: figures.gains(ax, gains, colours, by, label), by, label), f"Gain by {label}")
        for by, label in cuts
    ]
    return [
        "<section><h2>Bits per byte</h2>",
        *plain,
        table(["run", "corpus", "scored", "BPB", "low", "high"], body),
        "<p>Intervals of 95 % over documents drawn anew. <i>off</i>: nothing recurrent is read, one forward.</p>",
        figure_row(*pictures, caption="What recurrence gains: bits per byte with nothing recurrent read, less live.")
        if gains
        else "",
        "</section>",
    ]


NEGLIGIBLE = 1e-6
"""Bits per byte: a figure of smaller differences would show rounding."""


def plain_scores(runs: Sequence[Run]) -> list[str]:
    """What `lrt evaluate` found, a row per run and corpus."""
    shown = ("parallel_bpb", "live_bpb", "gap", "live_bpb_memory_zero", "live_bpb_memory_embedding")
    rows = [
        [run.name, name, f"{found['targets']:,}", *(f"{found[k]:.4f}" if k in found else "" for k in shown)]
        for run in runs
        for result in run.of("scores")
        for name, found in result.values["corpora"].items()
    ]
    head = ["run", "corpus", "tokens", "parallel", "live", "gap", "memory zeroed", "previous embedding"]
    return [table(head, rows)] if rows else []


def sweep_curves(runs: Sequence[Run]) -> list[str]:
    """Two figures and a verdict per run."""
    parts = []
    for run in runs:
        for result in run.of("sweeps"):
            values = result.values
            bpb = [point["bpb"] for points in values["curves"].values() for point in points]
            if max(bpb) - min(bpb) < NEGLIGIBLE:
                told = (
                    f"{result.subject}. Nothing recurs: every refinement gives {values['live_bpb']:.4f} bits per byte."
                )
                parts.append(
                    f"<h3>{html.escape(run.name)}: {html.escape(values['verdict'])}</h3><p>{html.escape(told)}</p>"
                )
                continue
            factors = ", ".join(f"{g}: {value:.2f}" for g, value in values["contraction"].items())
            parts += [
                f"<h3>{html.escape(run.name)}: {html.escape(values['verdict'])}</h3>",
                figure_row(
                    (partial(lambda v, ax: figures.draw_sweeps(ax, v), values), f"Sweep curve of {run.name}"),
                    (partial(lambda v, ax: figures.distances(ax, v), values), f"Distances of {run.name}"),
                    caption=f"{result.subject}. 64 against 63 full refinements: {values['even_odd']:+.4f} bits per "
                    f"byte. Contraction by stride: {factors}.",
                ),
            ]
    return ["<section><h2>Sweep curves</h2>", *parts, "</section>"] if parts else []


def ablation_table(runs: Sequence[Run]) -> list[str]:
    """Live bits per byte with the memory replaced, a column per run."""
    having = {run.name: run.values("ablations") for run in runs if run.values("ablations")}
    names = list(dict.fromkeys(n for v in having.values() for n in v if n.startswith("live_bpb")))
    if not having:
        return []

    def cell(values: Mapping[str, float], name: str) -> str:
        return f"{values[name]:.4f} ({100 * (values[name] / values['live_bpb'] - 1):+.1f} %)" if name in values else ""

    rows = [
        [
            name.removeprefix("live_bpb").strip("_").replace("_", " ") or "live",
            *(cell(v, name) for v in having.values()),
        ]
        for name in names
    ]
    return [
        "<section><h2>The memory replaced at test time</h2>",
        table(["live bits per byte", *having], rows),
        "<p>Two forwards: every token is refined once more with its own memory: depth, not recurrence.</p></section>",
    ]


INSIDE = (
    ("gamma", "γ"),
    ("gates", "mean memory gate"),
    ("residual_ratio", "γ m over the residual stream, RMS"),
    ("key_ratio", "memory over local keys, RMS"),
    ("value_ratio", "memory over local values, RMS"),
)
"""What is shown by block over training."""
SHARES = ("gamma", "residual_ratio", "key_ratio", "value_ratio")


def over_training(run: Run) -> list[str]:
    """γ, gates and the memory's share by block over training: from the diary, and from snapshots that were there."""
    known = {line["step"] + 1: line["memory_layers"] for line in run.diary if "memory_layers" in line}
    known |= {s["step"]: s["layers"] for s in run.values("memory").get("snapshots", []) if "layers" in s}
    points = sorted(known.items())
    if len(points) < 2:
        return []
    pictures = [
        (partial(lambda key, name, ax: figures.by_block(ax, points, key, name), key, name), f"{name} of {run.name}")
        for key, name in INSIDE
        if any(key in row for row in points[0][1])
    ]
    return [figure_row(*pictures, caption="Over training, by block, on validation text.")] if pictures else []


def memories(runs: Sequence[Run], colours: Mapping[str, str]) -> list[str]:
    """Gate heat maps, scales and reach."""
    having = {run.name: run.values("memory") for run in runs if run.values("memory").get("layers")}
    reaching = {name: values for name, values in having.items() if values["reach"]}
    histories = {run.name: over_training(run) for run in runs}
    parts = []
    for name in (run.name for run in runs):
        rows_known = [row for row in having.get(name, {}).get("layers", []) if row["injected"]]
        if rows_known or histories[name]:
            parts += [f"<h3>{html.escape(name)}</h3>", *histories[name]]
        if not rows_known:
            continue
        values = having[name]
        if any("gates" in row for row in rows_known):
            draw = partial(lambda v, ax: figures.gates(ax, v), values)
            parts.append(figure_row((draw, f"Gates of {name}"), caption="Mean gates over text."))
        rows = [
            [
                str(row["layer"]),
                *(" ".join(f"{v:.3f}" for v in row.get(k, [])) for k in SHARES),
            ]
            for row in values["layers"]
            if "gamma" in row or "gates" in row
        ]
        if rows:
            head = ["block", "γ by channel", "memory over residual stream", "over local keys", "over local values"]
            parts.append(table(head, rows))
    if reaching:
        pictures = (partial(lambda v, ax: figures.draw_reach(ax, v, colours), reaching), "Reach of the memory")
        caption = (
            "How far back the memory reaches: one memory gets noise of a tenth of its norm, live decoding goes on."
        )
        parts.append(figure_row(pictures, caption=caption))
    return ["<section><h2>Inside the memory</h2>", *parts, "</section>"] if parts else []


def texts(runs: Sequence[Run]) -> list[str]:
    """A text, each token on the colour of what recurrence gains on it."""
    parts = []
    for run in runs:
        values = run.values("text")
        if values and any(abs(a - b) > ROUNDING for a, b in zip(values["live"], values["off"], strict=True)):
            spans = map(token_span, values["pieces"], values["live"], values["off"])
            parts.append(f'<h3>{html.escape(run.name)}</h3><div class="text">{"".join(spans)}</div>')
    note = "<p>Green: recurrence makes the token likelier; red: less likely. The strongest colour is 2 bits.</p>"
    return ["<section><h2>What recurrence gains, token by token</h2>", note, *parts, "</section>"] if parts else []


def token_span(piece: str, live: float, off: float) -> str:
    """One token; a tooltip gives the numbers."""
    gain = off - live
    colour, strength = ("46,160,67" if gain > 0 else "218,54,51"), min(1.0, abs(gain) / 2)
    back = f' style="background:rgba({colour},{0.7 * strength:.2f})"' if strength > 0.03 else ""
    return f'<span{back} title="{live:.2f} bits, {gain:+.2f}">{html.escape(piece)}</span>'


def core(runs: Sequence[Run]) -> list[str]:
    """CORE: accuracy by task and mode, other models' centred beside."""
    parts = []
    for run in runs:
        values = run.values("core")
        if not values:
            continue
        modes, references = values["modes"], values["references"]
        head = ["task", "shots", "items", "chance"]
        head += [f"{m.replace('_', ' ')}{what}" for m in modes for what in ("", ", centred")] + list(references)
        body = [
            [label, str(t["shots"]), f"{t['items']:,}", f"{t['random']:.3f}"]
            + [
                cell
                for m in modes
                for cell in (f"{t['accuracy'][m]:.3f} ± {t['error'][m]:.3f}", f"{t['centred'][m]:+.3f}")
            ]
            + [f"{s[label]:+.3f}" for s in references.values()]
            for label, t in values["tasks"].items()
        ]
        total = [values["name"], "", "", ""] + [c for m in modes for c in ("", f"{values['score'][m]:+.4f}")]
        body.append(total + [f"{s['same tasks']:+.4f}" for s in references.values()])
        missing = f"<p>Not in the bundle: {', '.join(values['missing'])}.</p>" if values["missing"] else ""
        parts.append(f"<h3>{html.escape(run.name)}</h3>{table(head, body)}{missing}")
    return ["<section><h2>CORE</h2>", *parts, "</section>"] if parts else []
