"""A comparison of runs for people: the verdict in sentences, a table, a figure, and plain data for programs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lrt.eval.compare import Comparison, Difference
from lrt.eval.report.names import name_of
from lrt.eval.report.score_tables import core_cell, run_family
from lrt.eval.report.table import Table
from lrt.eval.runs import Run, Score

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MORE = ("parallel_bpb", "schedule", "live_bpb_memory_zero", "live_bpb_memory_embedding")
"""Scores that `--full` adds."""


def verdicts(comparison: Comparison) -> list[str]:
    """A sentence for each run but the first: better, worse, or not to be told apart."""
    return [verdict(name, apart, comparison.first) for name, apart in comparison.differences.items()]


def verdict(name: str, apart: Difference, first: str) -> str:
    """Which of two is better, live, by how much, and how sure that is."""
    amount = f"{abs(apart.bpb):.4f} bits per byte ({abs(apart.relative):.1%})".replace("%", " %")
    order = f"{name} is {amount} {'better' if apart.bpb < 0 else 'worse'} than {first}, live"
    if apart.low is None:
        return f"{order}; a single window has no interval"
    if apart.clear:
        return f"{order}; the 95 % interval excludes zero"
    span = f"{apart.bpb:+.4f} bits per byte, 95 % interval {interval_text(apart)}"
    return f"{name} and {first} cannot be told apart, live: {span}"


def interval_text(apart: Difference) -> str:
    """The interval in brackets; empty where there is none."""
    return "" if apart.low is None else f"[{apart.low:+.4f}, {apart.high:+.4f}]"


def basis(comparison: Comparison) -> str:
    """What was scored, and what the intervals are over."""
    return (
        f"Bits per byte (BPB), lower is better, on {comparison.on.label}. Intervals: 95 %, paired, over "
        f"{comparison.units:,} {comparison.unit} of this text. They say nothing of training seeds."
    )


def score_of(comparison: Comparison, run: Run) -> Score:
    """A run's scores on the text of the comparison."""
    return next(score for score in run.scores if score.on == comparison.on)


def comparison_table(comparison: Comparison, full: bool = False) -> Table:
    """A row per run: live, the difference from the first beside it, then what it cost. `full`: everything known."""
    head = ["run", name_of("live_bpb"), f"less {comparison.first}'s", "95 % interval", name_of("gap")]
    head += ["parameters", "tokens", "minutes"]
    head += [*map(name_of, MORE), "training FLOPs", "sweep", "hops", "CORE"] if full else []
    body = []
    for name, run in comparison.runs.items():
        score, apart = score_of(comparison, run), comparison.differences.get(name)
        row = [name, score.cell("live_bpb"), *difference_cells(apart), score.cell("gap"), *cost_cells(run)]
        body.append([*row, *([*map(score.cell, MORE), *detail_cells(run)] if full else ())])
    return Table("", head, body)


def difference_cells(apart: Difference | None) -> list[str]:
    """The difference with its per cent, and its interval; empty of the first run."""
    if apart is None:
        return ["", ""]
    return [f"{apart.bpb:+.4f} ({100 * apart.relative:+.1f} %)", interval_text(apart)]


def cost_cells(run: Run) -> list[str]:
    """Parameters, tokens and minutes of training; empty where not known."""
    seconds = run.trained.get("seconds")
    return [short_count(run.parameters), short_count(run.tokens), "" if seconds is None else f"{seconds / 60:.1f}"]


def short_count(count: int | None) -> str:
    """A number of parameters or tokens with three digits and its unit: 7,200,000 is "7.2 M"."""
    if count is None:
        return ""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def detail_cells(run: Run) -> list[str]:
    """FLOPs, what sweeps and hops came to, CORE."""
    flops = run.trained.get("flops")
    verdicts_of = [run.values(kind).get("verdict", "") for kind in ("sweeps", "hops")]
    return ["" if flops is None else f"{flops:.2e}", *verdicts_of, core_cell(run)]


def to_dict(comparison: Comparison) -> dict[str, Any]:
    """The comparison as plain data for JSON."""
    on = comparison.on
    return {
        "verdicts": verdicts(comparison),
        "on": {"name": on.name, "data": on.data, "split": on.split, "context": on.context, "targets": on.targets},
        "intervals_over": comparison.unit,
        "units": comparison.units,
        "runs": [run_to_dict(comparison, name) for name in comparison.runs],
    }


def run_to_dict(comparison: Comparison, name: str) -> dict[str, Any]:
    """One run of it."""
    run, apart = comparison.runs[name], comparison.differences.get(name)
    return {
        "name": name,
        **score_of(comparison, run).values,
        "difference": None
        if apart is None
        else {"bpb": apart.bpb, "low": apart.low, "high": apart.high, "relative": apart.relative},
        "parameters": run.parameters,
        "tokens": run.tokens,
        **{key: run.trained.get(key) for key in ("flops", "seconds")},
    }


def comparison_figure(comparison: Comparison) -> Figure:
    """A dot per run with its interval, on an axis around zero, which is the first run."""
    from matplotlib.figure import Figure

    from lrt.eval.report.style import run_colours

    names = list(comparison.runs)
    colours = run_colours({name: run_family(run) for name, run in comparison.runs.items()})
    figure = Figure(figsize=(6.4, 1.3 + 0.38 * len(names)), layout="constrained")
    ax = figure.subplots()
    ax.axvline(0, color=colours[comparison.first], linewidth=1.2, linestyle="--")
    for y, (name, apart) in enumerate(comparison.differences.items(), 1):
        ends = None if apart.low is None or apart.high is None else [[apart.bpb - apart.low], [apart.high - apart.bpb]]
        ax.errorbar([apart.bpb], [y], xerr=ends, fmt="o", color=colours[name], capsize=3)
    ax.plot([0], [0], "o", color=colours[comparison.first])
    scores = [score_of(comparison, run).cell("live_bpb") for run in comparison.runs.values()]
    ax.set_yticks(range(len(names)), [f"{name}  {score}" for name, score in zip(names, scores, strict=True)])
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_xlabel(f"live bits per byte less {comparison.first}'s, 95 % interval (left is better)")
    return figure
