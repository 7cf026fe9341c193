"""Results as lines of text for the terminal: `LINES` has a function for each kind of result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lrt.eval.report.names import ablation_name, name_of
from lrt.eval.results import Result

ROUNDING = 0.01
"""Bits by which scores of a token differ at most where nothing recurs."""
TASK = {"task": 34, "shots": 6, "items": 7, "chance": 8}
"""Characters of a CORE table's first columns."""
ACCURACY, CENTRED, REFERENCE = 9, 7, 14
"""Characters of a mode's two columns, which share one heading, and of another model's."""


def result_lines(result: Result) -> list[str]:
    """A result of any kind as text for the terminal."""
    return LINES[result.kind](result.values)


def score_lines(values: Mapping[str, Any]) -> list[str]:
    """Every score on a line; of several corpora, each by itself and then all together.

    "corpora" maps names to scores of their own; the other entries of `values` are those of all together.
    """

    def block(scores: Mapping[str, Any]) -> list[str]:
        cells = {k: cell_text(v) for k, v in scores.items()}
        return [f"{name_of(key):26} {cell}" for key, cell in cells.items()]

    corpora, values = values["corpora"], {**values, "corpora": ", ".join(values["corpora"])}
    if len(corpora) == 1:
        return block(values)
    single = [line for name, scores in corpora.items() for line in (name, *block(scores), "")]
    return [*single, "together", *block(values)]


def cell_text(value: Any) -> str:
    """A score to four places, yes or no, counts with commas."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def sweep_lines(values: Mapping[str, Any]) -> list[str]:
    """Bits per byte by refinements and stride, and the verdict."""
    curves = {int(stride): points for stride, points in values["curves"].items()}
    # Keys are numbers in a result that was just measured, and text in one that was read from JSON.
    contraction = {int(stride): factor for stride, factor in values["contraction"].items()}
    counts = [point["refinements"] for point in curves[1]]
    return [
        f"bits per byte after n refinements ({values['targets']:,} tokens); parallel {values['parallel_bpb']:.4f} "
        f"under {values['schedule']}, live {values['live_bpb']:.4f}",
        "n      " + "".join(f"{n:>8}" for n in counts) + "  contraction",
        *(
            ("full   " if stride == 1 else f"g = {stride:<3}")
            + "".join(f"{point['bpb']:8.4f}" for point in points)
            + f"{contraction[stride]:13.3f}"
            for stride, points in curves.items()
        ),
        "away   " + "".join(f"{point['distance']:8.1e}" for point in curves[1]) + "  full, from the live memory",
        f"64 against 63 refinements: {values['even_odd']:+.4f} bits per byte",
        f"verdict: {values['verdict']}",
    ]


def hop_lines(values: Mapping[str, Any]) -> list[str]:
    """Nats per token by hops, how far that is from live, and the verdict."""
    points = values["points"]
    basis = f"{values['targets']:,} tokens, {values['rows']:,} windows"
    table = [
        "hops   " + "".join(f"{point['hops']:>9}" for point in points),
        "nats   " + "".join(f"{point['nats']:9.4f}" for point in points),
        "- live " + "".join(f"{point['gap']:+9.4f}" for point in points),
        # A single window has no error.
        "±      " + "".join("        -" if point["error"] is None else f"{point['error']:9.4f}" for point in points),
    ]
    return [
        f"nats per token where the memory holds what n hops brought ({basis}); live {values['live']:.4f}",
        *(table if len(points) > 1 else ()),
        f"verdict: {values['verdict']}",
        f"(live: within {values['tolerance']:.0%} of what the memory gives, or within {values['errors']} errors ±)",
    ]


def ablation_lines(values: Mapping[str, Any]) -> list[str]:
    """Live scores with the memory replaced, each against live."""
    live = values["live_bpb"]
    scores = {key: bpb for key, bpb in values.items() if key.startswith("live_bpb")}
    return [
        f"live bits per byte ({values['targets']:,} tokens)",
        *(f"{ablation_name(key):26} {bpb:.4f} {100 * (bpb / live - 1):+7.1f} %" for key, bpb in scores.items()),
    ]


def bpb_lines(values: Mapping[str, Any]) -> list[str]:
    """Columns and differences with their intervals."""
    basis = f"{values['targets']:,} tokens of {values['documents']:,} documents, schedule {values['schedule']}"
    rows = {**values["columns"], **values["differences"]}
    return [
        f"bits per byte with 95 % intervals over documents ({basis})",
        *(f"{name:34} {row['bpb']:+8.4f}  {interval_text(row)}" for name, row in rows.items()),
    ]


def number(value: float | None) -> str:
    """Four places. What rounds to zero has no sign, and what is not known is a dash."""
    return "–" if value is None else f"{value:.4f}".replace("-0.0000", "0.0000")


def interval_text(row: Mapping[str, Any]) -> str:
    """An interval in brackets, or why there is none."""
    return "one document has none" if row["low"] is None else f"[{row['low']:+.4f}, {row['high']:+.4f}]"


def memory_lines(values: Mapping[str, Any]) -> list[str]:
    """Gates and ratios by layer, and the reach."""

    def channels(row: Mapping[str, Any], key: str) -> str:
        return " ".join(f"{value:.3f}" for value in row.get(key, [])) or "-"

    gates = [[f"{sum(g) / len(g):.3f}" for g in row.get("gates", [])] for row in values["layers"]]
    return [
        "layer   γ                gates: local, memory   memory over local: keys   values",
        *(
            f"{row['layer']:>5}   {channels(row, 'gamma'):16} {' '.join(g) or '-':22} {channels(row, 'key_ratio'):25} "
            f"{channels(row, 'value_ratio')}"
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


def core_lines(values: Mapping[str, Any]) -> list[str]:
    """Accuracy and centred accuracy of each mode by task, other models' centred beside; last the means."""
    modes, references = values["modes"], values["references"]
    both = ACCURACY + CENTRED
    first, *numbers = TASK
    head = f"{first:{TASK[first]}}" + "".join(f"{name:>{TASK[name]}}" for name in numbers)
    head += "".join(f"{mode.replace('_', ' '):>{both}}" for mode in modes)
    lines = [head + "".join(f"{name:>{REFERENCE}}" for name in references)]
    for label, task in values["tasks"].items():
        line = f"{label:{TASK['task']}}{task['shots']:>{TASK['shots']}}{task['items']:>{TASK['items']}}"
        line += f"{task['random']:>{TASK['chance']}.3f}"
        for mode in modes:
            line += f"{task['accuracy'][mode]:>{ACCURACY}.4f}{task['centred'][mode]:>+{CENTRED}.3f}"
        lines.append(line + "".join(f"{scores[label]:>+{REFERENCE}.3f}" for scores in references.values()))
    total = f"{values['name']:{sum(TASK.values())}}" + "".join(f"{values['score'][m]:>+{both}.4f}" for m in modes)
    # Beside its scores by task, a reference has their mean over the tasks that ran here.
    lines.append(total + "".join(f"{scores['same tasks']:>+{REFERENCE}.4f}" for scores in references.values()))
    if values["missing"]:
        lines.append(f"not in the bundle: {', '.join(values['missing'])}")
    lines.append("accuracy and centred accuracy, (accuracy - chance) / (1 - chance); other models: centred")
    return lines


LINES: dict[str, Callable[[Mapping[str, Any]], list[str]]] = {
    "scores": score_lines,
    "sweeps": sweep_lines,
    "hops": hop_lines,
    "ablations": ablation_lines,
    "bpb": bpb_lines,
    "bfloat16": bpb_lines,
    "memory": memory_lines,
    "text": text_lines,
    "core": core_lines,
}
"""Kind of result -> its values as lines."""
