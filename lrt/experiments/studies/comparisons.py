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

Choices = dict[str, list[Line]]
"""Choice of the compared axis -> a line per seed, at its best rate."""
RATE = "rate"
EQUAL = "equal"
"""The axis on which the Transformer is the same run, whatever others have in common with it."""
TRANSFORMER = "transformer"
BASELINES = ("transformer", "token shift", "token shift, 2 channels", "token shift, 2 channels, layerwise")
"""Families that everything is compared with, where a group has them; in the overview the first two and the last."""
PUBLISHED = {
    "transformer": 0.767, "loop 2": 0.753, "loop 3": 0.749, "ponder": 0.753, "shared": 0.752,
}  # fmt: skip
"""Validation BPB at 20 layers, 10 tokens per parameter (arXiv 2605.26797; spec, section 3): another text and size."""


def test_bpb(line: Line) -> float:
    """Live bits per byte on test; infinite where the run diverged."""
    return line["result"]["test"]["live_bpb"] if "test" in line["result"] else math.inf


def val_bpb(line: Line) -> float:
    """Live bits per byte on val, by which choices are made; infinite where the run diverged."""
    return line["result"].get("val_live_bpb", math.inf)


Read = Callable[[Line], float]
"""A number of a line, infinite where the run diverged."""


def group_by_axes(lines: Sequence[Line], val: Read = val_bpb) -> dict[tuple[str, ...], Choices]:
    """(choices of the other axes) -> choice of the compared axis -> its lines, one per seed, at the rate best on val.

    A group without a Transformer of its own, on the axis EQUAL, has that of the group beside it: alone it is the same
    run at equal tokens, FLOPs and time. It stands where the study names it: the first model is the same everywhere.
    """
    by_group: dict[tuple[str, ...], dict[str, list[Line]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        group, choice = split_choices(line)
        by_group[group][choice].append(line)
    groups = {
        group: {choice: lines_at_best_rate(of_choice, val) for choice, of_choice in choices.items()}
        for group, choices in by_group.items()
    }
    axes = group_axes(lines)
    if EQUAL in axes:
        at, order = axes.index(EQUAL), dict.fromkeys(split_choices(line)[1] for line in lines)
        for group, choices in groups.items():
            if TRANSFORMER not in choices:
                beside = (g for k, g in groups.items() if (k[:at], k[at + 1 :]) == (group[:at], group[at + 1 :]))
                shared = next(({TRANSFORMER: g[TRANSFORMER]} for g in beside if TRANSFORMER in g), {})
                both = {**shared, **choices}
                groups[group] = {choice: both[choice] for choice in order if choice in both}
    return groups


def split_choices(line: Line) -> tuple[tuple[str, ...], str]:
    """(its choices on the axes that make groups, its choice on the axis that is compared)."""
    *group, compared = (choice for axis, choice in line["choices"].items() if axis != RATE)
    return tuple(group), compared


def group_axes(lines: Sequence[Line]) -> list[str]:
    """The axes that make groups: neither the rate nor the compared one, which is the last."""
    return [axis for axis in (lines[0]["choices"] if lines else ()) if axis != RATE][:-1]


def lines_at_best_rate(lines: Sequence[Line], val: Read = val_bpb) -> list[Line]:
    """Of the rates of one choice, the lines of that which is best on val with the seed that has most rates."""
    # A sweep runs all rates with its first seed only: among others, one rate would win by being alone.
    rates = {line["choices"].get(RATE) for line in lines}
    first = max({line["seed"] for line in lines}, key=lambda seed: (sum(line["seed"] == seed for line in lines), -seed))
    best = min((line for line in lines if line["seed"] == first), key=val)["choices"].get(RATE)
    assert best in rates
    return sorted((line for line in lines if line["choices"].get(RATE) == best), key=lambda line: line["seed"])


def rates_tried(lines: Sequence[Line], group: tuple[str, ...], choice: str) -> list[float]:
    """The rates that a choice was tried at, as factors, in order."""
    return sorted({float(line["fields"].get(RATE, 1)) for line in lines if split_choices(line) == (group, choice)})


def comparison_tables(lines: Sequence[Line], published: Mapping[str, float] | None = None) -> list[Table]:
    """One per group. Choices are made by the column of val; test is reported; the last column is what was published."""
    tables = []
    for group, choices in group_by_axes(lines).items():
        baselines = [name for name in BASELINES if name in choices] or [next(iter(choices))]
        head = [
            "model", "rate (of)", "seeds", "parameters", "without tables", "forwards / token", "FLOPs / token",
            "training FLOPs", "step", "schedule", "decode", "tokens", "live, val", "parallel", "**live**",
            *(f"live vs {name}" for name in baselines), "memory zero", "memory embedding", "64 refinements",
            "published, 20L",
        ]  # fmt: skip
        body = [
            [
                *table_row(name, choices, baselines, rates_tried(lines, group, name)),
                format_value((published or {}).get(name), ".3f"),
            ]
            for name in choices
        ]
        tables.append(Table(", ".join(group), head, body))
    return tables


def overview_tables(lines: Sequence[Line]) -> list[Table]:
    """A row per model: what it costs, and its live score in every group; a table for each thing that is equal.

    The cost in FLOPs is that of the first group which has the model; *step* and *decode* are one measurement.
    """
    groups, axes = group_by_axes(lines), group_axes(lines)
    tables = []
    for equal in dict.fromkeys(equal_choice(group, axes) for group in groups):
        columns = {
            ", ".join(other_choices(group, axes)): choices
            for group, choices in groups.items()
            if equal_choice(group, axes) == equal
        }
        names = list(dict.fromkeys(name for choices in columns.values() for name in choices))
        controls = [name for name in BASELINES if name in names]
        baselines = controls[:2] + controls[2:][-1:]  # the last is the strongest control without recurrence
        head = ["model", "forwards / token", "training FLOPs", "step", "decode"]
        for column in columns:
            head += [f"{column} {what}".strip() for what in ("live", *(f"vs {name}" for name in baselines))]
        body = [overview_row(name, columns, baselines) for name in names]
        tables.append(Table(f"equal {equal}" if equal else "", head, body))
    return tables


def overview_row(name: str, columns: Mapping[str, Choices], baselines: Sequence[str]) -> list[str]:
    """A model's entries; empty in a column that has no finished run of it."""
    choices = next(choices for choices in columns.values() if name in choices)
    counted, base = choices[name][0]["result"], choices[baselines[0]][0]["result"] if baselines else {}
    costs = [
        format_value(ratio_of(counted, base, "training_flops"), ".2f"),
        *(format_value(counted.get(key), ".2f") for key in ("step_ratio", "decode_ratio")),
    ]
    scores = []
    for choices in columns.values():
        scored = scored_lines(choices.get(name, ()))
        scores.append(f"{statistics.fmean(map(test_bpb, scored)):.4f}" if scored else "")
        for other in baselines:
            difference = None if other == name else paired_difference(scored, choices.get(other, ()))
            scores.append(format_difference(difference))
    return [name, str(counted["forwards"]), *costs, *scores]


def scored_lines(lines: Sequence[Line]) -> list[Line]:
    """Those whose run did not diverge."""
    return [line for line in lines if "test" in line["result"]]


def equal_choice(group: Sequence[str], axes: Sequence[str]) -> str:
    """What is equal in a group; nothing where the study does not say."""
    return next((choice for choice, axis in zip(group, axes, strict=True) if axis == EQUAL), "")


def other_choices(group: Sequence[str], axes: Sequence[str]) -> list[str]:
    """A group's choices but for what is equal."""
    return [choice for choice, axis in zip(group, axes, strict=True) if axis != EQUAL]


def table_row(name: str, choices: Choices, baselines: Sequence[str], rates: Sequence[float]) -> list[str]:
    """One choice's entries; empty where nothing was measured."""
    lines = choices[name]
    scored = scored_lines(lines)
    counted = (scored or lines)[0]["result"]
    base = next((line["result"] for line in scored_lines(choices[baselines[0]])), {})
    seeds = seeds_cell(lines)
    counts = [f"{counted['parameters']:,}", f"{counted['parameters_without_tables']:,}", str(counted["forwards"])]
    start = [
        name,
        rate_cell(lines, rates),
        seeds,
        *counts,
        format_value(ratio_of(counted, base, "flops_per_generated_token"), ".2f"),
    ]
    if not scored:
        return start + [""] * (11 + len(baselines))

    def mean(read: Callable[[Mapping[str, Any]], Any]) -> float | None:
        values = [read(line["result"]) for line in scored]
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
        *("" if other == name else format_difference(paired_difference(scored, choices[other])) for other in baselines),
        format_value(mean(lambda r: r["test"].get("live_bpb_memory_zero")), ".4f"),
        format_value(mean(lambda r: r["test"].get("live_bpb_memory_embedding")), ".4f"),
        ", ".join(sorted({line["result"]["verdict"] for line in scored if "verdict" in line["result"]})),
    ]


def rate_cell(lines: Sequence[Line], rates: Sequence[float]) -> str:
    """The rate of a choice's lines, and those that it was tried at, if it was in this group."""
    best = float(lines[0]["fields"].get(RATE, 1))
    if not rates:
        return f"{best:g}"
    edge = ", edge" if is_at_edge(best, rates) else ""
    return f"{best:g} ({', '.join(f'{factor:g}' for factor in rates)}{edge})"


def is_at_edge(best: float, rates: Sequence[float]) -> bool:
    """Whether the best rate is the lowest or highest of those that were tried: the sweep was too narrow then."""
    return len(rates) > 1 and best in (rates[0], rates[-1])


def seeds_cell(lines: Sequence[Line]) -> str:
    """How many seeds were scored, and how many diverged."""
    scored = len(scored_lines(lines))
    return f"{scored}" + (f", {len(lines) - scored} diverged" if scored < len(lines) else "")


def format_value(value: float | None, form: str) -> str:
    """A number, or nothing."""
    return "" if value is None else format(value, form)


def format_difference(difference: Difference | None) -> str:
    """A difference, or nothing."""
    return "" if difference is None else str(difference)


def ratio_of(counted: Mapping[str, Any], base: Mapping[str, Any], key: str) -> float | None:
    """A quantity over the baseline's; None where either lacks it."""
    return counted[key] / base[key] if key in counted and key in base else None


@dataclass(frozen=True)
class Difference:
    """Mean paired difference of a score, in per cent of the other's mean."""

    mean: float
    half: float | None
    """Half its 95 % t-interval over seeds, from three on."""
    seeds: int

    def __str__(self) -> str:
        if self.half is None:
            return f"{self.mean:+.1f} % ({self.seeds} seed{'s' * (self.seeds > 1)})"
        return f"{self.mean:+.1f} % ± {self.half:.1f}"


def paired_difference(lines: Sequence[Line], others: Sequence[Line], read: Read = test_bpb) -> Difference | None:
    """Of `lines` from `others` in what is read of them, over the seeds that both have; None where there is none."""
    pairs = paired(lines, others, read)
    if not pairs:
        return None
    unit = statistics.fmean(other for _, other in pairs) / 100  # a hundredth of the others' mean: differences in %
    per_cent = [(one - other) / unit for one, other in pairs]
    half = t_half_width(per_cent) if len(pairs) >= 3 else None  # three seeds at least (contract, section 5)
    return Difference(statistics.fmean(per_cent), half, len(pairs))


def paired(lines: Sequence[Line], others: Sequence[Line], read: Read) -> list[tuple[float, float]]:
    """What is read of `lines` and of `others`, seed by seed; those that diverged left out."""
    by_seed = {line["seed"]: read(line) for line in others}
    pairs = [(read(line), by_seed[line["seed"]]) for line in lines if line["seed"] in by_seed]
    return [pair for pair in pairs if all(map(math.isfinite, pair))]


def t_half_width(differences: Sequence[float]) -> float:
    """Half the width of the 95 % t-interval of the mean."""
    from scipy import stats

    spread = statistics.stdev(differences) / math.sqrt(len(differences))
    return float(stats.t.ppf(0.975, len(differences) - 1)) * spread


def interval(values: Sequence[float], form: str) -> str:
    """Mean ± half of the 95 % t-interval; fewer than three seeds have none."""
    if not values:
        return ""
    mean = format(statistics.fmean(values), form)
    if len(values) < 3:
        return f"{mean} ({len(values)} seed{'s' * (len(values) > 1)})"
    return f"{mean} ± {format(t_half_width(values), form.removeprefix('+'))}"


@dataclass(frozen=True)
class Size:
    """One size of a family in a study of scaling, the mean over its seeds."""

    group: tuple[str, ...]
    """Its choices, which other families have too."""
    flops: float
    """Of its training, all passes."""
    loss: float
    """Live BPB on test."""
    flops_at_equal_tokens: float | None
    """What the Transformer spends on as many tokens; None where that was not run."""
    flops_at_equal_time: float | None
    """What the Transformer spends in as long a training, by the paired ratio of step times; None likewise."""


def sizes_by_family(lines: Sequence[Line]) -> dict[str, list[Size]]:
    """family -> its sizes, in the order of the Transformer's FLOPs, or of its own where that was not run."""
    families: dict[str, list[Size]] = defaultdict(list)
    for group, choices in group_by_axes(lines).items():
        # The Transformer's FLOPs on as many tokens are the same with every seed.
        plain = [line["result"]["training_flops"] for line in scored_lines(choices.get(TRANSFORMER, ()))]
        base = plain[0] if plain else None
        for name, of_choice in choices.items():
            scored = scored_lines(of_choice)
            if scored:
                ratio = statistics.fmean(line["result"]["step_ratio"] for line in scored)
                flops = statistics.fmean(line["result"]["training_flops"] for line in scored)
                loss = statistics.fmean(map(test_bpb, scored))
                families[name].append(Size(group, flops, loss, base, base and base * ratio))
    return {
        name: sorted(sizes, key=lambda size: size.flops_at_equal_tokens or size.flops)
        for name, sizes in families.items()
    }


def scaling_table(lines: Sequence[Line]) -> Table:
    """The fits, and how many times what a family's largest model had the Transformer needs for the same loss.

    On three axes (contract, section 5): how much more compute the Transformer's law of loss along the ladder of sizes
    asks for than the Transformer spends on as many tokens, than the family spends, and than the Transformer spends in
    the family's time. Law against law over the sizes that both have, fit by fit of the two bootstraps, in which size
    stands by size: against itself a family has exactly 1.
    """
    families = sizes_by_family(lines)
    head = ["family", "sizes", "floor", "exponent", "× at equal tokens", "× at equal FLOPs", "× at equal time"]
    body = []
    for name, all_sizes in families.items():
        # Paired, size by size: of either family only the sizes that the other has too.
        base = [s for s in families.get(TRANSFORMER, ()) if s.group in {other.group for other in all_sizes}]
        sizes = [s for s in all_sizes if s.group in {other.group for other in base}]
        if len(sizes) < power_law.FEWEST:
            body.append([name, str(len(sizes)), f"{power_law.FEWEST} sizes are needed", "", "", "", ""])
            continue
        law, laws = power_law.fit_with_bootstrap([s.flops for s in sizes], [s.loss for s in sizes])
        base_law, base_laws = power_law.fit_with_bootstrap([s.flops for s in base], [s.loss for s in base])
        floor, exponent = (power_law.estimate(law, laws, q) for q in (lambda p: p.floor, lambda p: p.exponent))
        last = sizes[-1]
        gains = [
            str(power_law.multiplier(base_law, base_laws, law, laws, last.flops, spent)) if spent else ""
            for spent in (last.flops_at_equal_tokens, last.flops, last.flops_at_equal_time)
        ]
        body.append([name, str(len(sizes)), str(floor), str(exponent), *gains])
    return Table("Power laws", head, body)
