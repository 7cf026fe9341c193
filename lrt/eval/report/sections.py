"""The sections of `lrt report`: a function turns what is known of some runs into a section of HTML, or into none.

Each says first in words what its figures and tables show.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from markupsafe import Markup

from lrt.eval.report import figures, sentences
from lrt.eval.report.html import figure_row
from lrt.eval.report.names import KINDS
from lrt.eval.report.render import heading, notes, render, section
from lrt.eval.report.result_tables import ablation_table, block_table, core_table, number, probe_tables
from lrt.eval.report.score_tables import score_tables, texts_scored
from lrt.eval.report.sentences import NEGLIGIBLE, ROUNDING
from lrt.eval.report.table import Table
from lrt.eval.runs import Run, ScoredOn

BUCKETS = (
    ("by_place_in_window", "tokens of context"),
    ("by_position_in_document", "position in the document"),
    ("by_document_length", "length of the document, tokens"),
)
"""How a bpb result cuts its tokens, and the label of that axis."""
BLOCK_QUANTITIES = (
    ("gamma", "γ"),
    ("gates", "mean memory gate"),
    ("residual_ratio", "γ m over the residual stream, RMS"),
    ("key_ratio", "memory over local keys, RMS"),
    ("value_ratio", "memory over local values, RMS"),
)
"""What is shown by block over training."""
SCORE_NOTE = (
    "A table for each text, split and size of windows: numbers of two tables are not comparable. Best live score "
    "first. Intervals of 95 % over documents drawn anew. Off: nothing recurrent is read, one forward.",
)


def score_section(runs: Sequence[Run], colours: Mapping[str, str]) -> list[Markup]:
    """Bits per byte, a table for each text, with intervals, and where recurrence helps."""
    parts: list[Markup] = []
    for on, table in score_tables(runs).items():
        details = detail_table(runs, on)
        recurrent = recurrent_values(runs, on)
        pictures = [
            (partial(figures.draw_gains, runs=recurrent, colours=colours, by=by, label=label), f"Gain by {label}")
            for by, label in (BUCKETS if recurrent else ())
        ]
        caption = f"What recurrence gains: bits per byte with nothing recurrent read, less live. {table.title}."
        parts += [figure_row(*pictures, caption=caption)] if pictures else []
        parts += [table.html(), *([details.html()] if details.body else ())]
    leads = [sentences.worth(run.name, result.values) for run in runs for result in run.of("bpb")]
    return section(KINDS["bpb"], list(dict.fromkeys(leads)), [*parts, notes(*SCORE_NOTE)] if parts else [])


def detail_table(runs: Sequence[Run], on: ScoredOn) -> Table:
    """Columns and differences of the token-by-token results on one text."""
    body = [
        [run.name, name, *(number(row[k]) for k in ("bpb", "low", "high"))]
        for run in runs
        for result in (*run.of("bpb"), *run.of("bfloat16"))
        if run.scored_on(result) == on
        for name, row in {**result.values["columns"], **result.values["differences"]}.items()
    ]
    return Table("", ["run", "scored", "BPB", "95 %: low", "high"], body)


def recurrent_values(runs: Sequence[Run], on: ScoredOn) -> dict[str, dict[str, Any]]:
    """The bpb results on one text of runs in which something recurs, by run."""
    return {
        run.name: result.values
        for run in runs
        for result in run.of("bpb")
        if run.scored_on(result) == on and abs(result.values["differences"]["off - live"]["bpb"]) > NEGLIGIBLE
    }


def sweep_section(runs: Sequence[Run]) -> list[Markup]:
    """Two figures and a verdict per run; a sentence where nothing recurs."""
    leads, parts = [], []
    for run in runs:
        for result in run.of("sweeps"):
            leads.append(sentences.settled(run.name, result.values))
            parts += sweep_parts(run.name, result.subject, result.values)
    return section("Sweep curves", leads, parts)


def sweep_parts(name: str, subject: str, values: Mapping[str, Any]) -> list[Markup]:
    """The figures of one sweep curve below its verdict."""
    head = heading(f"{name}: {values['verdict']}")
    bpb = [point["bpb"] for points in values["curves"].values() for point in points]
    if max(bpb) - min(bpb) < NEGLIGIBLE:
        live = f"{values['live_bpb']:.4f} bits per byte"
        return [head, notes(f"{subject}. Nothing recurs: every refinement gives {live}.")]
    factors = ", ".join(f"{stride}: {factor:.2f}" for stride, factor in values["contraction"].items())
    caption = (
        f"{subject}. 64 against 63 full refinements: {values['even_odd']:+.4f} bits per byte. "
        f"Contraction by stride: {factors}."
    )
    curve = (partial(figures.draw_sweeps, values=values), f"Sweep curve of {name}")
    return [
        head,
        figure_row(curve, (partial(figures.draw_distances, values=values), f"Distances of {name}"), caption=caption),
    ]


def values_by_text(runs: Sequence[Run], kind: str) -> dict[ScoredOn, dict[str, dict[str, Any]]]:
    """Results of a kind by what they were measured on, and there by run."""
    by_text: dict[ScoredOn, dict[str, dict[str, Any]]] = {}
    for run in runs:
        for result in run.of(kind):
            by_text.setdefault(run.scored_on(result), {})[run.name] = result.values
    return by_text


def hop_section(runs: Sequence[Run], colours: Mapping[str, str]) -> list[Markup]:
    """How far each run is from live by hops, a figure for each text, and a verdict per run."""
    leads, parts = [], []
    for on, measured in values_by_text(runs, "hops").items():
        recurrent = {name: values for name, values in measured.items() if len(values["points"]) > 1}
        if recurrent:
            draw = partial(figures.draw_hops, runs=recurrent, colours=colours)
            caption = f"{on.label}. Nats per token above live where the memory holds what n hops brought, ± 2 errors."
            parts.append(figure_row((draw, "Loss by hops"), caption=caption))
        body = [[name, *hop_cells(values)] for name, values in measured.items()]
        head = ["run", "live, nats per token", "the memory gives, nats per token", "verdict"]
        parts.append(Table(on.label, head, body).html())
        leads += [sentences.survived(name, values) for name, values in measured.items()]
    return section(KINDS["hops"], leads, parts)


def hop_cells(values: Mapping[str, Any]) -> list[str]:
    """Live, what the memory gives and its standard error, the verdict."""
    first = values["points"][0]
    error = "" if first["error"] is None else f" ± {first['error']:.4f}"
    return [f"{values['live']:.4f}", f"{first['gap']:+.4f}{error}", values["verdict"]]


def ablation_section(runs: Sequence[Run]) -> list[Markup]:
    """Live bits per byte with the memory replaced: a table for each text, in it a column per run."""
    by_text = values_by_text(runs, "ablations")
    labels = texts_scored(runs)
    parts = [ablation_table(labels[on], measured).html() for on, measured in by_text.items()]
    leads = [sentences.replaced(name, values) for measured in by_text.values() for name, values in measured.items()]
    note = notes("Two forwards: every token is refined once more with its own memory: depth, not recurrence.")
    return section(KINDS["ablations"], leads, [*parts, note] if parts else [])


def figures_over_training(run: Run) -> list[Markup]:
    """Curves over training, one per block: γ, gates, the memory's share. None for fewer than two points.

    A point comes from the metrics log, or from a snapshot that `lrt diagnose` measured: of these only the newest stay.
    """
    # The log counts steps from 0; a snapshot is named by the steps done. Where both have a step the snapshot stands: it
    # was measured on the text of the rest of this section, the log's on a smaller sample.
    by_step = {line["step"] + 1: line["memory_layers"] for line in run.metrics if "memory_layers" in line}
    by_step |= {s["step"]: s["layers"] for s in run.values("memory").get("snapshots", []) if "layers" in s}
    points = sorted(by_step.items())
    if len(points) < 2:
        return []
    pictures = [
        (partial(figures.draw_by_block, points=points, key=key, label=label), f"{label} of {run.name}")
        for key, label in BLOCK_QUANTITIES
        if any(key in row for row in points[0][1])  # the injection decides what there is: all points have the same
    ]
    return [figure_row(*pictures, caption="Over training, by block, on validation text.")] if pictures else []


def memory_section(runs: Sequence[Run], colours: Mapping[str, str]) -> list[Markup]:
    """Gate heat maps, scales and reach."""
    leads, parts = [], []
    reaching = {run.name: run.values("memory") for run in runs if run.values("memory").get("layers")}
    reaching = {name: values for name, values in reaching.items() if values["reach"]}
    if reaching:
        leads = [sentences.reach(name, values["reach"]) for name, values in reaching.items()]
        draw = partial(figures.draw_reach, runs=reaching, colours=colours)
        caption = "One memory gets noise of a tenth of its norm, live decoding goes on."
        parts.append(figure_row((draw, "Reach of the memory"), caption=caption))
    for run in runs:
        values, history = run.values("memory"), figures_over_training(run)
        injected = any(row["injected"] for row in values.get("layers", []))
        if injected or history:
            parts += [heading(run.name), *history]
        if injected:
            parts += block_parts(run.name, values)
    return section(KINDS["memory"], leads, parts)


def block_parts(name: str, values: Mapping[str, Any]) -> list[Markup]:
    """Of one run: the heat map of its gates, and a table of its blocks."""
    parts = []
    if any("gates" in row for row in values["layers"] if row["injected"]):
        draw = partial(figures.draw_gates, values=values)
        parts.append(figure_row((draw, f"Gates of {name}"), caption="Mean gates over text."))
    table = block_table(values)
    return [*parts, table.html()] if table.body else parts


def text_section(runs: Sequence[Run]) -> list[Markup]:
    """A text, each token on the colour of what recurrence gains on it."""
    leads, parts = [], []
    for run in runs:
        values = run.values("text")
        if values and any(abs(a - b) > ROUNDING for a, b in zip(values["live"], values["off"], strict=True)):
            tokens = list(map(token_span, values["pieces"], values["live"], values["off"]))
            parts.append(render("tokens", name=run.name, tokens=tokens))
            leads.append(sentences.helped(run.name, values))
    note = notes("Green: recurrence makes the token likelier; red: less likely. The strongest colour is 2 bits.")
    return section(KINDS["text"], leads, [note, *parts] if parts else [])


def token_span(piece: str, live: float, off: float) -> dict[str, str]:
    """One token, the style of its colour, and a tooltip: its surprisal live, in bits, and the gain over off."""
    gain = off - live
    colour, strength = ("46,160,67" if gain > 0 else "218,54,51"), min(1.0, abs(gain) / 2)  # green or red
    # Most tokens gain next to nothing: without a style of their own the page is much smaller.
    style = f"background:rgba({colour},{0.7 * strength:.2f})" if strength > 0.03 else ""
    return {"piece": piece, "style": style, "title": f"{live:.2f} bits, {gain:+.2f}"}


def probe_section(runs: Sequence[Run]) -> list[Markup]:
    """What linear probes read of known states, a table for each run and kind of text."""
    measured = [(run.name, result) for run in runs for result in run.of("probe")]
    leads = [sentences.readable(name, result.values) for name, result in measured]
    tables = [Table(name, t.head, t.body).html() for name, result in measured for t in probe_tables(result.values)]
    return section(KINDS["probe"], leads, tables)


def core_section(runs: Sequence[Run]) -> list[Markup]:
    """CORE: accuracy by task and mode, other models' centred beside."""
    scored = [run for run in runs if run.values("core")]
    parts = []
    for run in scored:
        values = run.values("core")
        parts.append(core_table(run.name, values).html())
        parts += [notes(f"Not in the bundle: {', '.join(values['missing'])}.")] if values["missing"] else []
    return section(KINDS["core"], [sentences.core_sentence(run.name, run.values("core")) for run in scored], parts)
