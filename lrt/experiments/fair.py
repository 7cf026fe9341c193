"""`lrt fair`: models on a text at equal parameters, each at its own best rate, over seeds, within some minutes.

It is a study (`experiments.studies`) that is made from the command line: its cells run, go on and are reported as any
other's. What is of its own is the plan: the minutes are turned into tokens once, by timed steps of every model, and
kept beside the results, so that a call that goes on, or adds seeds, rates or models, trains for as long.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from lrt.data.prepare import prepare
from lrt.data.prepared import Prepared
from lrt.distributed.single_process import SingleProcess
from lrt.eval.report.html import inline_svg
from lrt.eval.report.render import notes, render, section
from lrt.eval.report.style import save_figure
from lrt.eval.report.table import TableFormat, aside, print_tables
from lrt.experiments.demo import EPOCHS
from lrt.experiments.rivals import rivals
from lrt.experiments.studies import runner
from lrt.experiments.studies.fair import narrow_sweeps, terminal_tables, verdict
from lrt.experiments.studies.grid import Fields, Study, make_study
from lrt.experiments.studies.kinds import find_kind
from lrt.experiments.studies.language import BASELINE, TARGETS, build_model, build_run
from lrt.experiments.studies.timing import PAIRS
from lrt.model.memory import INJECTIONS
from lrt.model.size import count_parameters
from lrt.schedules import library as schedules
from lrt.schedules.parse import parse
from lrt.training import recipes
from lrt.training.config import RunConfig
from lrt.training.speed import Speed, measure_speed
from lrt.utils.files import place_and_size, read_json, replace_atomically
from lrt.utils.provenance import hardware_line
from lrt.utils.timing import format_duration
from lrt.utils.validation import Limits

Equal = Literal["tokens", "wall_clock", "both"]
LRT = "recommended"
"""The family that `lrt` stands for."""
NUMBERS = {
    "minutes": Limits(0, 10**7, above=True),
    "seeds": Limits(1, 10**4, whole=True),
    "rates": Limits(0, 10**3, above=True),
}
"""What is asked for may be."""
SCORING = 0.3
"""The most of the time that live scores may take."""
HEAD = 32
"""Width of a head."""
FEWEST_STEPS = 20
"""Steps below which nothing is learned that could be compared."""
FIGURES = (".svg", ".pdf")
"""The figure is written for pages, and for papers."""
PLAN = "plan.json"
"""Beside the results: what the minutes came to."""


@dataclass(frozen=True)
class Comparison:
    """What is asked for. ValueError for what cannot be compared."""

    models: tuple[str, ...] = ("transformer", "token-shift", "lrt")
    """Names of families, or of registered injections; the first is what the others are compared with."""
    seeds: int = 3
    """How many, from 0 on."""
    rates: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Factors on all learning rates."""
    equal: Equal = "tokens"
    """What the models have in common beside their parameters."""
    minutes: float = 30.0
    """How long all of it may take, about."""
    depth: int = 4
    """Blocks."""
    width: int = 128
    """Of a model; its heads are HEAD wide."""
    context: int = recipes.CONTEXT
    """Tokens of a row."""

    def __post_init__(self) -> None:
        for name, numbers in (("minutes", [self.minutes]), ("seeds", [self.seeds]), ("rates", self.rates)):
            for number in numbers:
                if not NUMBERS[name].allow(number):
                    raise ValueError(f"--{name} is {number:g}; it must be {NUMBERS[name]}")
        if not self.rates:
            raise ValueError("--rates names none; give at least one factor, such as 1")
        if len(self.models) < 2 or len(set(map(label, self.models))) < len(self.models):
            raise ValueError(f"--models is {' '.join(self.models)}; name at least two, each once")
        for name in self.models:
            family_fields(name, self.depth)

    def make_study(self, text: str, data: Prepared, plan: Plan) -> Study:
        """Its cells, of the prepared folder `text`, for as long as `plan` says."""
        names = {label(name): self.fields(name, text, data, plan.tokens) for name in self.models}
        equal = {"tokens": {"equal": "tokens"}, "wall-clock": {"equal": "wall_clock"}}
        chosen = {"tokens": ["tokens"], "wall_clock": ["wall-clock"], "both": ["tokens", "wall-clock"]}[self.equal]
        content = {
            "seeds": list(range(self.seeds)),
            "sweep": {"axis": "rate", "by": "val_live_bpb"},
            "base": {"targets": plan.targets},
            "axes": {
                "equal": {name: equal[name] for name in chosen},
                "rate": {f"{rate:g}": {"rate": rate} for rate in self.rates},
                "model": {name: {**fields, "minutes": plan.minutes[name]} for name, fields in names.items()},
            },
            # Beside itself the Transformer is the same run at equal time.
            "without": [["wall-clock", BASELINE]] if self.equal == "both" and BASELINE in names else [],
        }
        return make_study("fair", "own", "fair", content)

    def fields(self, name: str, text: str, data: Prepared, tokens: int) -> Fields:
        """A model's cell, apart from seed and rate, widened to the largest model's parameters."""
        fields = {other: self.plain_fields(other, text, tokens) for other in self.models}
        sizes = {
            other: count_parameters(build_model(of_other, data.vocab_size))[0] for other, of_other in fields.items()
        }
        largest = max(sizes, key=sizes.__getitem__)
        return {**fields[name], "widened_to": fields[largest]["family"]}

    def plain_fields(self, name: str, text: str, tokens: int) -> Fields:
        """A model's cell as it is, before it is widened."""
        optim = {k: v for k, v in dataclasses.asdict(recipes.DEMO_OPTIM).items() if v is not None}
        size = {"depth": self.depth, "width": self.width, "heads": max(1, self.width // HEAD), "context": self.context}
        rows = max(1, recipes.DEMO_OPTIM.reference_batch // self.context)
        shared = {"text": text, "size": size, "optim": optim, "batch_size": rows, "horizon": f"tokens={tokens}"}
        return {**shared, **family_fields(name, self.depth)}


@dataclass(frozen=True)
class Plan:
    """What the minutes come to."""

    tokens: int
    """That each model is trained on, the Transformer's at equal time."""
    targets: int
    """Tokens of val and of test that each is scored on, at most."""
    minutes: dict[str, float]
    """By model, of one cell."""


def label(name: str) -> str:
    """A model's name as tables have it: hyphens of the command line are spaces."""
    return name.replace("-", " ")


def family_fields(name: str, depth: int) -> Fields:
    """The fields of a cell that say which model it is: a family's, or those of an injection of the user's own.

    ValueError with the known names.
    """
    families, plain = rivals(depth), label(name)
    if plain in families:
        return {"family": plain}
    if plain == "lrt":
        return {"family": LRT}
    if name in INJECTIONS and name != "none":
        return {"family": "shared", "schedule": schedules.DEFAULT, "model": {"memory": {"injection": name}}}
    known = ", ".join(["lrt", *(family.replace(" ", "-") for family in families)])
    raise ValueError(f"unknown model {name!r}; choose among {known}, or an injection that --plugin registers")


def fair(
    out: Path,
    texts: Sequence[Path],
    comparison: Comparison,
    device: str = "cpu",
    dry_run: bool = False,
    progress: bool = True,
    form: TableFormat = "text",
) -> list[runner.Line]:
    """Run what is left of a comparison into `out`, and write report.html and the figure; returns its lines.

    `form` is that of the table which is printed at the end. With `dry_run` only the plan is made and printed.
    ValueError for no text, and where the minutes are too few.
    """
    if not texts:
        raise ValueError("no text is given; name text files or folders of them, as in: lrt fair texts/")
    console = Console(highlight=False)
    data = prepare(out / "data", texts, progress=progress)
    text = f"{out}/data"  # with a slash: a path, not a name
    plan = kept_plan(out, data, text, comparison, device)
    study, kind = comparison.make_study(text, data, plan), find_kind("fair")
    with aside(form):
        console.print(say_plan(study, comparison, plan), markup=False, soft_wrap=True)
        if dry_run:
            return []
        lines = runner.run_study(study, kind, out / study.results, progress=progress, device=device)
        for sentence in verdict(lines):
            console.print(f"\n{sentence}", style="bold", markup=False, soft_wrap=True)
    print_tables(terminal_tables(lines) if form == "text" else kind.tables(lines), form, console)
    save_figure(lambda: kind.figure(lines), out / "difference.svg")
    write_report(out / "report.html", lines, say_plan(study, comparison, plan), hardware_line(device))
    with aside(form):
        for sentence in narrow_sweeps(lines):
            console.print(sentence, markup=False, soft_wrap=True)
        console.print(f"\n{place_and_size(out / 'report.html')}", markup=False, soft_wrap=True)
    return lines


def say_plan(study: Study, comparison: Comparison, plan: Plan) -> str:
    """What is about to be run: cells, tokens of each, time of all."""
    cells = runner.cells_left(study, [])
    total = format_duration(60 * sum(cell.minutes for cell in cells))
    rates = " ".join(f"{rate:g}" for rate in comparison.rates)
    later = f", then seeds up to {comparison.seeds - 1} at each model's best rate" if comparison.seeds > 1 else ""
    return (
        f"{len(cells)} runs: {len(comparison.models)} models, seed 0 at rates {rates}{later}; {plan.tokens:,} tokens "
        f"each, scored on {plan.targets:,} of test. About {total} in all."
    )


def kept_plan(out: Path, data: Prepared, text: str, comparison: Comparison, device: str) -> Plan:
    """What the minutes come to: as it is kept in `out`, or measured now and kept.

    Its tokens stay for more models, seeds and rates; a model that is new is timed.
    """
    key = plan_key(data, comparison, device)
    file = out / PLAN
    saved = read_json(file) if file.exists() else {}
    kept = Plan(**saved["plan"]) if saved.get("key") == key else None
    if kept is not None and all(label(name) in kept.minutes for name in comparison.models):
        return kept
    runs = {
        label(name): build_run({"seed": 0, **comparison.fields(name, text, data, recipes.DEMO_TOKENS)}, data.vocab_size)
        for name in comparison.models
    }
    speeds = {name: measure_speed(run, data, SingleProcess(device)) for name, run in runs.items()}
    if kept is None:
        plan = make_plan(comparison, runs, speeds, data)
    else:
        plan = dataclasses.replace(kept, minutes={**cell_minutes(speeds, kept.tokens, kept.targets), **kept.minutes})
    replace_atomically(file, json.dumps({"key": key, "plan": dataclasses.asdict(plan)}, indent=2) + "\n")
    return plan


def plan_key(data: Prepared, comparison: Comparison, device: str) -> str:
    """A hash of what one horizon is kept for."""
    sizes = [comparison.minutes, comparison.depth, comparison.width, comparison.context]
    return hashlib.sha256(json.dumps([data.fingerprint, device, *sizes]).encode()).hexdigest()


def make_plan(
    comparison: Comparison, runs: Mapping[str, RunConfig], speeds: Mapping[str, Speed], data: Prepared
) -> Plan:
    """What the minutes come to, with these speeds. ValueError where too little is trained in them."""
    splits = data.manifest["splits"]
    cells = len(comparison.rates) + comparison.seeds - 1
    cells *= 2 if comparison.equal == "both" else 1
    left = 60 * comparison.minutes - sum(ratio_seconds(runs[name], speeds[name]) for name in runs if name != BASELINE)
    scored = cells * sum(map(score_seconds, speeds.values()))
    trained = cells * sum(speed.train for speed in speeds.values())
    most = min(splits["val"]["tokens"], splits["test"]["tokens"], TARGETS)
    targets = max(1, min(most, int(SCORING * left / scored)))
    tokens = min(EPOCHS * splits["train"]["tokens"], int((left - targets * scored) / trained))
    batch = next(iter(runs.values())).batch_tokens
    if tokens < FEWEST_STEPS * batch:
        needed = comparison.minutes + (FEWEST_STEPS * batch * trained / (1 - SCORING) - left) / 60
        raise ValueError(
            f"in --minutes {comparison.minutes:g} each of {cells * len(runs)} runs sees too little text here; give "
            f"--minutes {needed + 0.1:.1f} or more, or fewer models, seeds or rates"
        )
    return Plan(tokens, targets, cell_minutes(speeds, tokens, targets))


def cell_minutes(speeds: Mapping[str, Speed], tokens: int, targets: int) -> dict[str, float]:
    """By model, what a cell takes."""
    return {name: (tokens * speed.train + targets * score_seconds(speed)) / 60 for name, speed in speeds.items()}


def score_seconds(speed: Speed) -> float:
    """Per token: live on val, live and under its schedule on test, and there twice with another memory."""
    return 4 * speed.live + speed.parallel


def ratio_seconds(run: RunConfig, speed: Speed) -> float:
    """What the paired ratios of a model's times take, about: `studies.timing` measures them once."""
    steps = (PAIRS + 2) * (2 * len(parse(run.schedule).shares()) + 2)
    return steps * run.batch_tokens * speed.train


CAPTION = (
    "Live bits per byte against the first model, in per cent; lower is better. Bars are the 95 % t-interval over seeds."
)
COLUMNS = (
    "Live BPB: bits per byte decoded token by token, on test, the mean over seeds. Differences are from the first "
    "model, paired by seed. Step: time of a training step over the first model's. Rate: a factor on all learning "
    "rates, the best on val with the first seed, and those that were tried."
)


def write_report(path: Path, lines: Sequence[runner.Line], plan: str, hardware: str) -> None:
    """Write the page: the verdict, a figure, the tables, and how it was made."""
    kind = find_kind("fair")
    figure = inline_svg(lambda: kind.figure(lines), "Live bits per byte against the first model")
    scores = [render("figures", figures=[figure], caption=CAPTION), *(table.html() for table in kind.tables(lines))]
    parts = [
        *section("Scores", verdict(lines), [*scores, notes(*narrow_sweeps(lines), COLUMNS)]),
        *section("Settings", [], [notes(f"{plan} {hardware}.")]),
    ]
    replace_atomically(path, render("page", title="A fair comparison", parts=parts))
