"""Results as tables of text: `TABLES` has a function for each kind of result. `sentences` says what they show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lrt.eval.report.names import KINDS, ablation_name, name_of
from lrt.eval.report.table import Table
from lrt.eval.results import Result

COUNTED = ("schedule", "targets", "bytes", "complete")
"""What a result of scores has beside bits per byte."""


def result_tables(result: Result) -> list[Table]:
    """A result of any kind as tables, each with the kind and what was measured in its title. None for a text."""
    title = f"{KINDS[result.kind]}, {result.subject}"
    tables = TABLES[result.kind](result.values)
    return [Table(". ".join(filter(None, (title, table.title))), table.head, table.body) for table in tables]


def number(value: float | None) -> str:
    """Four places. What rounds to zero has no sign, and what is not known is a dash."""
    return "–" if value is None else f"{value:.4f}".replace("-0.0000", "0.0000")


def difference(value: float | None) -> str:
    """The same, with a sign where it is above zero too."""
    text = number(value)
    return f"+{text}" if value is not None and value > 0 and text != "0.0000" else text


def interval_text(row: Mapping[str, Any], form: Callable[[float], str]) -> str:
    """An interval in brackets, its ends in `form`; or why there is none."""
    return "one document has none" if row["low"] is None else f"[{form(row['low'])}, {form(row['high'])}]"


def cell_text(key: str, value: Any) -> str:
    """A score to four places, a count with commas, yes or no."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return difference(value) if key == "gap" else number(value)
    return "" if value is None else str(value)


def score_table(values: Mapping[str, Any], full: bool = True) -> Table:
    """A row per score and a column per corpus; of several, all together last. `full`: how much was scored, too.

    "corpora" maps names to scores of their own; the other entries of `values` are those of all together.
    """
    texts: dict[str, Mapping[str, Any]] = dict(values["corpora"])
    if len(texts) > 1:
        texts["together"] = values
    counted = [key for key in COUNTED if full and key in values]
    keys = [key for key in values if key not in (*COUNTED, "corpora")] + counted
    body = [[name_of(key), *(cell_text(key, scores.get(key)) for scores in texts.values())] for key in keys]
    return Table("Bits per byte (BPB), lower is better", ["score", *texts], body)


def sweep_tables(values: Mapping[str, Any]) -> list[Table]:
    """Bits per byte by refinements, a column per stride, and how far the full ones are from the live memory."""
    curves = {int(stride): points for stride, points in values["curves"].items()}
    # Keys are numbers in a result that was just measured, and text in one that was read from JSON.
    contraction = {int(stride): factor for stride, factor in values["contraction"].items()}
    rows = zip(*curves.values(), strict=True)
    body = [
        [str(points[0]["refinements"]), *(number(p["bpb"]) for p in points), f"{points[0]['distance']:.1e}"]
        for points in rows
    ]
    body.append(["64 less 63", difference(values["even_odd"]), *[""] * len(curves)])
    body.append(["contraction", *(f"{contraction[stride]:.3f}" for stride in curves), ""])
    title = (
        f"Bits per byte after n refinements of {values['targets']:,} tokens; parallel {values['parallel_bpb']:.4f} "
        f"under {values['schedule']}, live {values['live_bpb']:.4f}; distance: full refinements, from the live memory"
    )
    strides = ["full" if stride == 1 else f"stride {stride}" for stride in curves]
    return [Table(title, ["n", *strides, "distance"], body)]


def hop_tables(values: Mapping[str, Any]) -> list[Table]:
    """Nats per token by hops, and how far that is from live, with its standard error."""
    body = [
        # A single window has no error.
        [str(p["hops"]), number(p["nats"]), difference(p["gap"]), "–" if p["error"] is None else number(p["error"])]
        for p in values["points"]
    ]
    title = (
        f"Nats per token where the memory holds what n hops brought ({values['targets']:,} tokens, "
        f"{values['rows']:,} windows); live {values['live']:.4f}"
    )
    return [Table(title, ["hops", "nats per token", "less live", "± standard error"], body)]


def ablation_tables(values: Mapping[str, Any]) -> list[Table]:
    """Live scores with the memory replaced, each against live."""
    return [ablation_table(f"{values['targets']:,} tokens", {"score (against live)": values})]


def ablation_table(title: str, measured: Mapping[str, Mapping[str, Any]]) -> Table:
    """The ablations of runs, by name, on one text."""
    keys = list(dict.fromkeys(key for values in measured.values() for key in values if key.startswith("live_bpb")))

    def cell(values: Mapping[str, float], key: str) -> str:
        return f"{values[key]:.4f} ({100 * (values[key] / values['live_bpb'] - 1):+.1f} %)" if key in values else ""

    body = [[ablation_name(key), *(cell(values, key) for values in measured.values())] for key in keys]
    return Table(title, ["live bits per byte", *measured], body)


def bpb_tables(values: Mapping[str, Any]) -> list[Table]:
    """Columns and differences with their intervals."""
    forms = ((number, values["columns"]), (difference, values["differences"]))
    body = [[name, form(row["bpb"]), interval_text(row, form)] for form, rows in forms for name, row in rows.items()]
    basis = f"{values['targets']:,} tokens of {values['documents']:,} documents, schedule {values['schedule']}"
    return [Table(basis, ["scored", "bits per byte", "95 % interval over documents"], body)]


def memory_tables(values: Mapping[str, Any]) -> list[Table]:
    """Gates and ratios by block, and the reach."""
    reach = [[str(point["back"]), f"{point['kl']:.1e}"] for point in values["reach"]]
    return [block_table(values), Table("Reach", ["tokens ago", "divergence of the next token, nats"], reach)]


def block_table(values: Mapping[str, Any]) -> Table:
    """What each block does with the memory, a number per memory channel; blocks that read none are left out."""
    head = ["block", "γ by channel", "mean gates: local, memory"]
    head += ["memory over residual stream", "over local keys", "over local values"]
    body = [
        [
            str(row["layer"]),
            numbers(row.get("gamma", [])),
            numbers([sum(gate) / len(gate) for gate in row.get("gates", [])]),
            *(numbers(row.get(key, [])) for key in ("residual_ratio", "key_ratio", "value_ratio")),
        ]
        for row in values["layers"]
        if "gamma" in row or "gates" in row
    ]
    return Table("", head, body)


def numbers(values: Sequence[float]) -> str:
    """To three places, side by side."""
    return " ".join(f"{value:.3f}" for value in values)


def core_tables(values: Mapping[str, Any]) -> list[Table]:
    """Accuracy by task and mode, other models' centred beside."""
    missing = f"Not in the bundle: {', '.join(values['missing'])}" if values["missing"] else ""
    return [core_table(missing, values)]


def core_table(title: str, values: Mapping[str, Any]) -> Table:
    """A row per task, and the score last."""
    modes, references = values["modes"], values["references"]
    head = ["task", "shots", "items", "chance"]
    head += [f"{m.replace('_', ' ')}{what}" for m in modes for what in ("", ", centred")] + list(references)
    body = [
        [label, str(t["shots"]), f"{t['items']:,}", f"{t['random']:.3f}"]
        + [cell for m in modes for cell in (f"{t['accuracy'][m]:.3f} ± {t['error'][m]:.3f}", f"{t['centred'][m]:+.3f}")]
        + [f"{scores[label]:+.3f}" for scores in references.values()]
        for label, t in values["tasks"].items()
    ]
    total = [values["name"], "", "", ""] + [c for m in modes for c in ("", f"{values['score'][m]:+.4f}")]
    # Of other models the mean over the same tasks, so that a partial CORE stands beside a partial one.
    body.append(total + [f"{scores['same tasks']:+.4f}" for scores in references.values()])
    return Table(title, head, body)


def probe_tables(values: Mapping[str, Any]) -> list[Table]:
    """Held-out accuracy by variable, in all, and of the whole state, a column per thing that is read."""
    sources = list(values["accuracy"])

    def row(name: str, chance: float | None, accuracy: Mapping[str, float]) -> list[str]:
        return [name, number(chance), *(number(accuracy[source]) for source in sources)]

    body = [row(name, scores["chance"], scores["accuracy"]) for name, scores in values["variables"].items()]
    body.append(row("all variables", values["chance"], values["accuracy"]))
    body.append(row("the whole state at once", None, values["whole"]))
    basis = f"accuracy on {values['tokens']['held_out']:,} held-out tokens, fitted to {values['tokens']['fitted']:,}"
    return [Table(basis, [values["state"], "chance", *sources], body)]


def task_table(results: Mapping[str, Mapping[str, Any]]) -> Table:
    """The metrics of lm-eval's tasks, each with its standard error where it has one."""
    body = []
    for task, metrics in results.items():
        for key, value in metrics.items():
            metric, _, answers = key.partition(",")
            if isinstance(value, float) and not metric.endswith("_stderr"):
                error = metrics.get(f"{metric}_stderr,{answers}")
                words = metric.replace("_", " ") + ("" if answers in ("", "none") else f", {answers}")
                body.append([task, words, f"{value:.4f}", f"{error:.4f}" if isinstance(error, float) else ""])
    return Table("", ["task", "metric", "score", "± standard error"], body)


TABLES: dict[str, Callable[[Mapping[str, Any]], list[Table]]] = {
    "scores": lambda values: [score_table(values)],
    "sweeps": sweep_tables,
    "hops": hop_tables,
    "ablations": ablation_tables,
    "bpb": bpb_tables,
    "bfloat16": bpb_tables,
    "memory": memory_tables,
    "text": lambda values: [],  # a sentence says it; its colours are in the report
    "probe": probe_tables,
    "core": core_tables,
}
"""Kind of result -> its values as tables."""
