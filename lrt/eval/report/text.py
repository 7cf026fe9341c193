"""Results as text for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lrt.eval.results import Result

ROUNDING = 0.01
"""Bits by which scores of a token differ at most where nothing recurs."""


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


def score_lines(values: Mapping[str, Any]) -> list[str]:
    """Every score on a line; of several corpora, each by itself and then all together."""

    def block(found: Mapping[str, Any]) -> list[str]:
        shown = {k: f"{v:.4f}" if isinstance(v, float) else f"{v}" for k, v in found.items()}
        return [f"{name:26} {value}" for name, value in shown.items()]

    corpora, values = values["corpora"], {**values, "corpora": ", ".join(values["corpora"])}
    if len(corpora) == 1:
        return block(values)
    each = [line for name, found in corpora.items() for line in (name, *block(found), "")]
    return [*each, "together", *block(values)]


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
        *(f"{name:34} {row['bpb']:+8.4f}  {span(row)}" for name, row in rows.items()),
    ]


def span(row: Mapping[str, Any]) -> str:
    """An interval."""
    return "one document has none" if row["low"] is None else f"[{row['low']:+.4f}, {row['high']:+.4f}]"


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
    if max(map(abs, gains)) < ROUNDING:
        return ["nothing recurs: live and off are one"]
    return [
        f"recurrence helps {better} of {len(gains)} tokens of the text, by {sum(gains) / len(gains):+.3f} bits each"
    ]


LINES: dict[str, Callable[[Mapping[str, Any]], list[str]]] = {
    "scores": score_lines,
    "sweeps": sweep_lines,
    "ablations": ablation_lines,
    "bpb": bpb_lines,
    "bfloat16": bpb_lines,
    "memory": memory_lines,
    "text": text_lines,
}


def core_lines(values: dict[str, Any]) -> list[str]:
    """A CORE result as text: accuracy and centred accuracy of each mode, other models' centred beside."""
    modes, references = values["modes"], values["references"]
    head = f"{'task':34}{'shots':>6}{'items':>7}{'chance':>8}"
    head += "".join(f"{mode.replace('_', ' '):>16}" for mode in modes) + "".join(f"{name:>14}" for name in references)
    lines = [head]
    for label, task in values["tasks"].items():
        line = f"{label:34}{task['shots']:>6}{task['items']:>7}{task['random']:>8.3f}"
        for mode in modes:
            line += f"{task['accuracy'][mode]:>9.4f}{task['centred'][mode]:>+7.3f}"
        lines.append(line + "".join(f"{scores[label]:>+14.3f}" for scores in references.values()))
    total = f"{values['name']:55}" + "".join(f"{values['score'][mode]:>+16.4f}" for mode in modes)
    lines.append(total + "".join(f"{scores['same tasks']:>+14.4f}" for scores in references.values()))
    if values["missing"]:
        lines.append(f"not in the bundle: {', '.join(values['missing'])}")
    lines.append("accuracy and centred accuracy, (accuracy - chance) / (1 - chance); other models: centred")
    return lines
