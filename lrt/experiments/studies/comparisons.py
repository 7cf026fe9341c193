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
from dataclasses import dataclass
from typing import Any

from lrt.eval.report.table import Table
from lrt.experiments.studies import power_law
from lrt.experiments.studies.runner import Line

Rows = dict[str, list[Line]]
"""choice -> a line per seed, at its best rate."""
RATE = "rate"
EQUAL = "equal"
"""The axis on which the Transformer is the same run, whatever others have in common with it."""
AGAINST = ("transformer", "token shift", "token shift, 2 channels", "token shift, 2 channels, layerwise")
"""Families that everything is compared with, where a group has them; at a glance the first two and the last."""
PUBLISHED = {
    "transformer": 0.767, "loop 2": 0.753, "loop 3": 0.749, "ponder": 0.753, "shared": 0.752,
}  # fmt: skip
"""Validation BPB at 20 layers, 10 tokens per parameter (arXiv 2605.26797; spec, section 3): another text and size."""


def live_bpb_of(line: Line) -> float:
    """Live, on test; infinite where the run diverged."""
    return line["result"]["test"]["live_bpb"] if "test" in line["result"] else math.inf


def on_val(line: Line) -> float:
    """Live, on val."""
    return line["result"].get("val_live_bpb", math.inf)


def group_by_axes(lines: Sequence[Line]) -> dict[tuple[str, ...], Rows]:
    """(choices of the other axes) -> choice of the compared axis -> its lines, one per seed.

    A group without a Transformer of its own, on the axis EQUAL, has that of the group beside it.
    """
    found: dict[tuple[str, ...], dict[str, list[Line]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        *others, compared = (value for axis, value in line["choices"].items() if axis != RATE)
        found[tuple(others)][compared].append(line)
    groups = {key: {name: at_best_rate(each) for name, each in rows.items()} for key, rows in found.items()}
    axes = [axis for axis in (lines[0]["choices"] if lines else ()) if axis != RATE][:-1]
    if EQUAL in axes:
        for key, rows in groups.items():
            if AGAINST[0] not in rows:
                at = axes.index(EQUAL)
                alike = (g for k, g in groups.items() if (k[:at], k[at + 1 :]) == (key[:at], key[at + 1 :]))
                lent = next(({AGAINST[0]: g[AGAINST[0]]} for g in alike if AGAINST[0] in g), {})
                groups[key] = {**lent, **rows}
    return groups


def at_best_rate(lines: Sequence[Line]) -> list[Line]:
    """Of the rates of one choice, the lines of that which is best on val with the seed that has most rates."""
    rates = {line["choices"].get(RATE) for line in lines}
    first = max({line["seed"] for line in lines}, key=lambda seed: (sum(line["seed"] == seed for line in lines), -seed))
    best = min((line for line in lines if line["seed"] == first), key=on_val)["choices"].get(RATE)
    assert best in rates
    return sorted((line for line in lines if line["choices"].get(RATE) == best), key=lambda line: line["seed"])


def trials(lines: Sequence[Line], group: tuple[str, ...], choice: str) -> list[float]:
    """The rates that a choice was tried at, as factors."""
    found = set()
    for line in lines:
        *others, compared = (value for axis, value in line["choices"].items() if axis != RATE)
        if (tuple(others), compared) == (group, choice):
            found.add(float(line["fields"].get(RATE, 1)))
    return sorted(found)


def tables(lines: Sequence[Line], published: Mapping[str, float] | None = None) -> list[Table]:
    """One per group. Choices are made by the column of val; test is reported; the last column is what was published."""
    parts = []
    for group, rows in group_by_axes(lines).items():
        against = [name for name in AGAINST if name in rows] or [next(iter(rows))]
        head = [
            "model", "rate (of)", "seeds", "parameters", "without tables", "forwards / token", "FLOPs / token",
            "training FLOPs", "step", "schedule", "decode", "tokens", "live, val", "parallel", "**live**",
            *(f"live vs {name}" for name in against), "memory zero", "memory embedding", "64 refinements",
            "published, 20L",
        ]  # fmt: skip
        body = [
            [
                *row(name, each, rows, against, trials(lines, group, name)),
                format_value((published or {}).get(name), ".3f"),
            ]
            for name, each in rows.items()
        ]
        parts.append(Table(", ".join(group), head, body))
    return parts


def glances(lines: Sequence[Line]) -> list[Table]:
    """A row per model: what it costs, and its live score in every group; a table for each thing that is equal.

    The cost in FLOPs is that of the first group which has the model; *step* and *decode* are one measurement.
    """
    groups = group_by_axes(lines)
    axes = [axis for axis in (lines[0]["choices"] if lines else ()) if axis != RATE][:-1]
    tables = []
    for equal in dict.fromkeys(complete_seeds(key, axes) for key in groups):
        mine = {", ".join(rest(key, axes)): rows for key, rows in groups.items() if complete_seeds(key, axes) == equal}
        names = list(dict.fromkeys(name for rows in mine.values() for name in rows))
        controls = [name for name in AGAINST if name in names]
        against = controls[:2] + controls[2:][-1:]
        head = ["model", "forwards / token", "training FLOPs", "step", "decode"]
        head += [f"{where} {what}".strip() for where in mine for what in ("live", *(f"vs {a}" for a in against))]
        body = []
        for name in names:
            first, rows = next((each[name], each) for each in mine.values() if name in each)
            counted, base = first[0]["result"], rows[against[0]][0]["result"] if against else {}
            costs = [
                format_value(ratio_of(counted, base, "training_flops"), ".2f"),
                *(format_value(counted.get(key), ".2f") for key in ("step_ratio", "decode_ratio")),
            ]
            scores = []
            for rows in mine.values():
                whole = [line for line in rows.get(name, ()) if "test" in line["result"]]
                scores.append(f"{statistics.fmean(map(live_bpb_of, whole)):.4f}" if whole else "")
                scores += ["" if a == name else format_difference(difference(whole, rows.get(a, ()))) for a in against]
            body.append([name, str(counted["forwards"]), *costs, *scores])
        tables.append(Table(f"equal {equal}" if equal else "", head, body))
    return tables


def complete_seeds(group: Sequence[str], axes: Sequence[str]) -> str:
    """What is equal in a group; nothing where the study does not say."""
    return next((choice for choice, axis in zip(group, axes, strict=True) if axis == EQUAL), "")


def rest(group: Sequence[str], axes: Sequence[str]) -> list[str]:
    """A group's other choices."""
    return [choice for choice, axis in zip(group, axes, strict=True) if axis != EQUAL]


def row(name: str, lines: Sequence[Line], rows: Rows, against: Sequence[str], rates: Sequence[float]) -> list[str]:
    """One choice's entries; empty where nothing was measured."""
    whole = [line for line in lines if "test" in line["result"]]
    best = float(lines[0]["fields"].get(RATE, 1))
    edge = ", edge" if len(rates) > 1 and best in (rates[0], rates[-1]) else ""
    rate = f"{best:g} ({', '.join(f'{each:g}' for each in rates)}{edge})"
    counted = (whole or lines)[0]["result"]
    base = next((line["result"] for line in rows[against[0]] if "test" in line["result"]), {})
    seeds = f"{len(whole)}" + (f", {len(lines) - len(whole)} diverged" if len(whole) < len(lines) else "")
    counts = [f"{counted['parameters']:,}", f"{counted['parameters_without_tables']:,}", str(counted["forwards"])]
    start = [name, rate, seeds, *counts, format_value(ratio_of(counted, base, "flops_per_generated_token"), ".2f")]
    if not whole:
        return start + [""] * (11 + len(against))

    def mean(read: Callable[[Mapping[str, Any]], Any]) -> float | None:
        values = [read(line["result"]) for line in whole]
        return None if any(v is None for v in values) else statistics.fmean(values)

    return [
        *start,
        format_value(ratio_of(counted, base, "training_flops"), ".2f"),
        format_value(mean(lambda r: r.get("step_ratio")), ".2f"),
        format_value(mean(lambda r: r.get("schedule_ratio")), ".2f"),
        format_value(mean(lambda r: r.get("decode_ratio")), ".2f"),
        f"{counted['tokens']:,}",
        format_value(mean(lambda r: r["val_live_bpb"]), ".4f"),
        format_value(mean(lambda r: r["test"]["parallel_bpb"]), ".4f"),
        "**" + format_value(mean(lambda r: r["test"]["live_bpb"]), ".4f") + "**",
        *(format_difference(difference(whole, rows[other])) if other != name else "" for other in against),
        format_value(mean(lambda r: r["test"].get("live_bpb_memory_zero")), ".4f"),
        format_value(mean(lambda r: r["test"].get("live_bpb_memory_embedding")), ".4f"),
        ", ".join(sorted({r["verdict"] for r in (line["result"] for line in whole) if "verdict" in r})),
    ]


def format_value(value: float | None, form: str) -> str:
    """A number, or nothing."""
    return "" if value is None else format(value, form)


def format_difference(found: Difference | None) -> str:
    """A difference, or nothing."""
    return "" if found is None else str(found)


def ratio_of(mine: Mapping[str, Any], base: Mapping[str, Any], key: str) -> float | None:
    """A quantity over the baseline's."""
    return mine[key] / base[key] if key in mine and key in base else None


@dataclass(frozen=True)
class Difference:
    """Mean paired difference in live BPB, in per cent of the other's mean."""

    mean: float
    half: float | None
    """Half its 95 % t-interval over seeds, from three on."""
    seeds: int

    def __str__(self) -> str:
        if self.half is None:
            return f"{self.mean:+.1f} % ({self.seeds} seed{'s' * (self.seeds > 1)})"
        return f"{self.mean:+.1f} % ± {self.half:.1f}"


def difference(mine: Sequence[Line], others: Sequence[Line]) -> Difference | None:
    """Of the seeds that both have."""
    theirs = {line["seed"]: live_bpb_of(line) for line in others if "test" in line["result"]}
    pairs = [
        (live_bpb_of(line), theirs[line["seed"]])
        for line in mine
        if "test" in line["result"] and line["seed"] in theirs
    ]
    if not pairs:
        return None
    unit = statistics.fmean(other for _, other in pairs) / 100
    found = [(a - b) / unit for a, b in pairs]
    return Difference(statistics.fmean(found), half_interval(found) if len(found) >= 3 else None, len(found))


def half_interval(differences: Sequence[float]) -> float:
    """Half the width of the 95 % t-interval of the mean."""
    from scipy import stats

    spread = statistics.stdev(differences) / math.sqrt(len(differences))
    return float(stats.t.ppf(0.975, len(differences) - 1)) * spread


@dataclass(frozen=True)
class Size:
    """One size of a family in a study of scaling, the mean over its seeds."""

    group: tuple[str, ...]
    """Its choices, which other families have too."""
    flops: float
    """Of its training, all passes."""
    loss: float
    """Live BPB on test."""
    tokens: float | None
    """The FLOPs of the Transformer on as many tokens; None where that was not run."""
    seconds: float | None
    """The FLOPs of the Transformer in as long a training, by the paired ratio of step times."""


def sizes_by_family(lines: Sequence[Line]) -> dict[str, list[Size]]:
    """family -> its sizes, in the order of the Transformer's FLOPs, or of its own where that was not run."""
    found: dict[str, list[Size]] = defaultdict(list)
    for group, rows in group_by_axes(lines).items():
        plain = [line["result"]["training_flops"] for line in rows.get(AGAINST[0], ()) if "test" in line["result"]]
        for name, each in rows.items():
            whole = [line for line in each if "test" in line["result"]]
            if whole:
                ratio = statistics.fmean(line["result"]["step_ratio"] for line in whole)
                flops = statistics.fmean(line["result"]["training_flops"] for line in whole)
                base = plain[0] if plain else None
                loss = statistics.fmean(live_bpb_of(line) for line in whole)
                found[name].append(Size(group, flops, loss, base, base and base * ratio))
    return {name: sorted(points, key=lambda size: size.tokens or size.flops) for name, points in found.items()}


def scaling_table(lines: Sequence[Line]) -> Table:
    """The fits, and how many times what a family's largest model had the Transformer needs for the same loss.

    On three axes (contract, section 5): how much more compute the Transformer's law of loss along the ladder of sizes
    asks for than the Transformer spends on as many tokens, than the family spends, and than the Transformer spends in
    the family's time. Law against law over the sizes that both have, fit by fit of the two bootstraps, in which size
    stands by size: against itself a family has exactly 1.
    """
    found = sizes_by_family(lines)
    head = ["family", "sizes", "floor", "exponent", "× at equal tokens", "× at equal FLOPs", "× at equal time"]
    body = []
    for name, every in found.items():
        base = [p for p in found.get(AGAINST[0], ()) if p.group in {q.group for q in every}]
        points = [p for p in every if p.group in {q.group for q in base}]
        if len(points) < power_law.FEWEST:
            body.append([name, str(len(points)), f"{power_law.FEWEST} sizes are needed", "", "", "", ""])
            continue
        law, drawn = power_law.fit_with_bootstrap([p.flops for p in points], [p.loss for p in points])
        there, laws_there = power_law.fit_with_bootstrap([p.flops for p in base], [p.loss for p in base])
        floor, exponent = (power_law.estimate(law, drawn, q) for q in (lambda p: p.floor, lambda p: p.exponent))
        last = points[-1]
        gains = [
            str(power_law.multiplier(there, laws_there, law, drawn, last.flops, spent)) if spent else ""
            for spent in (last.tokens, last.flops, last.seconds)
        ]
        body.append([name, str(len(points)), str(floor), str(exponent), *gains])
    return Table("Power laws", head, body)
