"""Tables and figures of the studies of language, from their lines alone.

The last axis of a study, or the one before `rate`, is what is compared; every other axis makes groups of their own.
Each choice stands with the learning rate that was best on val, and is scored on test. Better or worse is said of the
mean paired difference per seed, with its 95 % t-interval (contract, section 5).
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lrt import scaling
from lrt.studies.runner import Line

Draw = Callable[[Sequence[Line], Path], None]
Rows = dict[str, list[Line]]
"""choice -> a line per seed, at its best rate."""
RATE = "rate"
AGAINST = ("transformer", "token shift")
"""Families that everything is compared with, where a group has them."""
PUBLISHED = {
    "transformer": 0.767, "loop 2": 0.753, "loop 3": 0.749, "ponder": 0.753, "shared": 0.752,
}  # fmt: skip
"""Validation BPB at 20 layers, 10 tokens per parameter (arXiv 2605.26797; spec, section 3): another text and size."""


def bpb(line: Line) -> float:
    """Live, on test; infinite where the run diverged."""
    return line["result"]["test"]["live_bpb"] if "test" in line["result"] else math.inf


def on_val(line: Line) -> float:
    """Live, on val."""
    return line["result"].get("val_live_bpb", math.inf)


def grouped(lines: Sequence[Line]) -> dict[tuple[str, ...], Rows]:
    """(choices of the other axes) -> choice of the compared axis -> its lines, one per seed."""
    found: dict[tuple[str, ...], dict[str, list[Line]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        *others, compared = (value for axis, value in line["choices"].items() if axis != RATE)
        found[tuple(others)][compared].append(line)
    return {key: {name: at_best_rate(each) for name, each in rows.items()} for key, rows in found.items()}


def at_best_rate(lines: Sequence[Line]) -> list[Line]:
    """Of the rates of one choice, the lines of that which is best on val with the seed that has most rates."""
    rates = {line["choices"].get(RATE) for line in lines}
    first = max({line["seed"] for line in lines}, key=lambda seed: (sum(line["seed"] == seed for line in lines), -seed))
    best = min((line for line in lines if line["seed"] == first), key=on_val)["choices"].get(RATE)
    assert best in rates
    return sorted((line for line in lines if line["choices"].get(RATE) == best), key=lambda line: line["seed"])


def trials(lines: Sequence[Line], group: tuple[str, ...], choice: str) -> int:
    """How many rates a choice was tried at."""
    found = set()
    for line in lines:
        *others, compared = (value for axis, value in line["choices"].items() if axis != RATE)
        if (tuple(others), compared) == (group, choice):
            found.add(line["choices"].get(RATE))
    return len(found)


def table(lines: Sequence[Line]) -> str:
    """Markdown, one table per group."""
    parts = []
    for group, rows in grouped(lines).items():
        against = [name for name in AGAINST if name in rows] or [next(iter(rows))]
        head = [
            "model", "rate (tried)", "seeds", "parameters", "forwards / token", "training FLOPs", "step", "decode",
            "tokens", "parallel", "**live**", *(f"live vs {name}" for name in against), "memory zero",
            "memory embedding", "64 refinements", "published, 20L",
        ]  # fmt: skip
        body = [row(name, each, rows, against, trials(lines, group, name)) for name, each in rows.items()]
        keep = [i for i in range(len(head)) if any(r[i] for r in body)]
        title = f"### {', '.join(group)}\n\n" if group else ""
        marks = "|".join("---" for _ in keep)
        shown = "\n".join("| " + " | ".join(r[i] for i in keep) + " |" for r in [head, *body])
        first, *rest = shown.split("\n")
        parts.append(title + "\n".join([first, f"|{marks}|", *rest]))
    return "\n\n".join(parts)


def row(name: str, lines: Sequence[Line], rows: Rows, against: Sequence[str], tried: int) -> list[str]:
    """One choice's entries; empty where nothing was measured."""
    whole = [line for line in lines if "test" in line["result"]]
    rate = f"{lines[0]['fields'].get('rate', 1):g} ({tried})"
    counted = lines[0]["result"]
    base = rows[against[0]][0]["result"]
    seeds = f"{len(whole)}" + (f", {len(lines) - len(whole)} diverged" if len(whole) < len(lines) else "")
    start = [name, rate, seeds, f"{counted['parameters']:,}", str(counted["forwards"])]
    if not whole:
        return start + [""] * (10 + len(against))

    def mean(read: Callable[[Mapping[str, Any]], Any]) -> float | None:
        values = [read(line["result"]) for line in whole]
        return None if any(v is None for v in values) else statistics.fmean(values)

    def spelled(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    return [
        *start,
        spelled(ratio_of(counted, base, "training_flops"), ".2f"),
        spelled(mean(lambda r: r.get("step_ratio")), ".2f"),
        spelled(mean(lambda r: r.get("decode_ratio")), ".2f"),
        f"{counted['tokens']:,}",
        spelled(mean(lambda r: r["test"]["parallel_bpb"]), ".4f"),
        "**" + spelled(mean(lambda r: r["test"]["live_bpb"]), ".4f") + "**",
        *(difference(whole, rows[other]) if other != name else "" for other in against),
        spelled(mean(lambda r: r["test"].get("live_bpb_memory_zero")), ".4f"),
        spelled(mean(lambda r: r["test"].get("live_bpb_memory_embedding")), ".4f"),
        ", ".join(sorted({r["verdict"] for r in (line["result"] for line in whole) if "verdict" in r})),
        spelled(PUBLISHED.get(name), ".3f"),
    ]


def ratio_of(mine: Mapping[str, Any], base: Mapping[str, Any], key: str) -> float | None:
    """A quantity over the baseline's."""
    return mine[key] / base[key] if key in mine and key in base else None


def difference(mine: Sequence[Line], others: Sequence[Line]) -> str:
    """Mean paired difference in live BPB, in per cent of the other's mean, with its 95 % t-interval over seeds."""
    theirs = {line["seed"]: bpb(line) for line in others if "test" in line["result"]}
    pairs = [(bpb(line), theirs[line["seed"]]) for line in mine if line["seed"] in theirs]
    if not pairs:
        return ""
    unit = statistics.fmean(other for _, other in pairs) / 100
    mean = statistics.fmean(a - b for a, b in pairs) / unit
    if len(pairs) < 3:
        return f"{mean:+.1f} % ({len(pairs)} seed{'s' * (len(pairs) > 1)})"
    return f"{mean:+.1f} % ± {half_interval([a - b for a, b in pairs]) / unit:.1f}"


def half_interval(differences: Sequence[float]) -> float:
    """Half the width of the 95 % t-interval of the mean."""
    from scipy import stats

    spread = statistics.stdev(differences) / math.sqrt(len(differences))
    return float(stats.t.ppf(0.975, len(differences) - 1)) * spread


# --- figures -----------------------------------------------------------------------------------------------------


def frontier(lines: Sequence[Line], path: Path) -> None:
    """Live BPB against the paired step time, a panel per group; bars are the deviation over seeds."""
    groups = {
        key: {n: r for n, r in rows.items() if any("test" in x["result"] for x in r)}
        for key, rows in grouped(lines).items()
    }
    figure, panels = panels_for([", ".join(key) for key in groups])
    for panel, rows in zip(panels, groups.values(), strict=True):
        for name, each in rows.items():
            values = [bpb(line) for line in each if "test" in line["result"]]
            x = statistics.fmean(line["result"]["step_ratio"] for line in each)
            error = statistics.stdev(values) if len(values) > 1 else 0.0
            panel.errorbar([x], [statistics.fmean(values)], yerr=[error], marker="o", capsize=3)
            panel.annotate(name, (x, statistics.fmean(values)), xytext=(5, 3), textcoords="offset points", fontsize=7)
        panel.set(xlabel="step time over the Transformer's (paired)", ylabel="live bits per byte")
    figure.savefig(path, format="svg", metadata={"Date": None})


def source_curve(lines: Sequence[Line], path: Path) -> None:
    """Live BPB against the source layer, in the order of the choices; memory zeroed beside it."""
    groups = grouped(lines)
    figure, panels = panels_for([", ".join(key) for key in groups])
    for panel, rows in zip(panels, groups.values(), strict=True):
        names = list(rows)
        for label, read in (("live", "live_bpb"), ("memory zeroed", "live_bpb_memory_zero")):
            points = [
                (i, [x["result"]["test"][read] for x in rows[n] if read in x["result"].get("test", {})])
                for i, n in enumerate(names)
            ]
            points = [(i, values) for i, values in points if values]
            errors = [statistics.stdev(v) if len(v) > 1 else 0.0 for _, v in points]
            panel.errorbar(
                [i for i, _ in points],
                [statistics.fmean(v) for _, v in points],
                errors,
                marker="o",
                label=label,
                capsize=3,
            )
        panel.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=7)
        panel.set_ylabel("bits per byte")
        panel.legend(fontsize=7)
    figure.savefig(path, format="svg", metadata={"Date": None})


def laws(lines: Sequence[Line]) -> dict[str, list[tuple[float, float]]]:
    """family -> (training FLOPs, live BPB) of each size, mean over seeds."""
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for rows in grouped(lines).values():
        for name, each in rows.items():
            whole = [line for line in each if "test" in line["result"]]
            if whole:
                flops = statistics.fmean(line["result"]["training_flops"] for line in whole)
                found[name].append((flops, statistics.fmean(bpb(line) for line in whole)))
    return {name: sorted(points) for name, points in found.items()}


def scaling_curves(lines: Sequence[Line], path: Path) -> None:
    """Live BPB against training FLOPs, a power law through each family of at least 4 sizes, with the bootstrap's band
    from 8 on. Nothing is drawn beyond what was run."""
    import numpy as np

    figure, (panel,) = panels_for(["scaling"])
    for number, (name, points) in enumerate(laws(lines).items()):
        compute, loss = zip(*points, strict=True)
        colour = f"C{number}"
        panel.plot(compute, loss, "o", color=colour, label=name)
        grid = np.geomspace(min(compute), max(compute), 50)
        if len(points) >= 4:
            law = scaling.fit(compute, loss)
            panel.plot(grid, [law.loss(c) for c in grid], color=colour, linewidth=1)
        if len(points) >= scaling.FEWEST:
            drawn = [[each.loss(c) for c in grid] for each in scaling.bootstrap(compute, loss, resamples=200)]
            low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
            panel.fill_between(grid, low, high, color=colour, alpha=0.15, linewidth=0)
    panel.set(xscale="log", yscale="log", xlabel="training FLOPs, all passes", ylabel="live bits per byte")
    panel.legend(fontsize=7)
    figure.savefig(path, format="svg", metadata={"Date": None})


def panels_for(titles: Sequence[str]) -> tuple[Any, list[Any]]:
    """A figure with a panel per title, two in a row."""
    from matplotlib.figure import Figure

    columns = min(2, max(1, len(titles)))
    rows = max(1, math.ceil(len(titles) / columns))
    figure = Figure(figsize=(5.2 * columns, 3.8 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flatten())
    for panel, title in zip(panels, titles, strict=False):
        panel.set_title(title, fontsize=9)
    for panel in panels[len(titles) :]:
        panel.set_axis_off()
    return figure, panels[: len(titles)]


def scaling_table(lines: Sequence[Line]) -> str:
    """The fits, and how much compute, tokens and time the Transformer would need for each family's best model.

    Multipliers are read inside the range of the Transformer's fit; outside of it, with their interval.
    """
    found = laws(lines)
    rows = ["| family | sizes | floor | exponent | compute multiplier |", "|---|---|---|---|---|"]
    base = found.get(AGAINST[0], [])
    for name, points in found.items():
        if len(points) < scaling.FEWEST or len(base) < scaling.FEWEST:
            rows.append(f"| {name} | {len(points)} | {scaling.FEWEST} sizes are needed | | |")
            continue
        compute, loss = zip(*points, strict=True)
        law, drawn = scaling.fit(compute, loss), scaling.bootstrap(compute, loss)
        base_compute, base_loss = zip(*base, strict=True)
        there, laws_there = scaling.fit(base_compute, base_loss), scaling.bootstrap(base_compute, base_loss)
        floor, exponent = (scaling.estimate(law, drawn, q) for q in (lambda p: p.floor, lambda p: p.exponent))
        gain = scaling.multiplier(there, laws_there, compute[-1], loss[-1])
        rows.append(f"| {name} | {len(points)} | {floor} | {exponent} | {gain} |")
    return "\n".join(rows)
