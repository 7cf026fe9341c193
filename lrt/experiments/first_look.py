"""`lrt try`: a Transformer and an LRT on a reader's own text, in about three minutes by the clock.

Both are the demo's models, at equal parameters and tokens. How many tokens that is follows from steps timed here. It is
measured once and kept in the output folder, so that a call that goes on trains the same two models.
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
import webbrowser
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lrt.data.prepare import prepare
from lrt.data.prepared import Prepared
from lrt.distributed.single_process import SingleProcess
from lrt.experiments import first_look_report
from lrt.experiments.demo import SAMPLE, check_prompt, first_line, print_continuation, train_families
from lrt.experiments.plans import Budget, Plans, check_length, plan_key
from lrt.inference.generation import Sampling
from lrt.model.checkpoint import load
from lrt.training import recipes
from lrt.training.config import RunConfig
from lrt.training.monitor import FINAL_TARGETS
from lrt.training.speed import Speed, measure_speed
from lrt.utils.device import describe_device
from lrt.utils.files import place_and_size, replace_atomically
from lrt.utils.provenance import hardware_line
from lrt.utils.timing import format_duration
from lrt.utils.validation import Limits

FAMILIES = ("transformer", "lrt")
MINUTES = Limits(0, 10**5, above=True)
"""What the minutes may be."""
SCORING = 0.25
"""The most of the time that scores may take."""
LIVE = {"transformer": 1, "lrt": 3}
"""Times that a family is scored live: with its memory, and where it has one without and with the embedding in its
place (contract, section 5)."""
PLANNED = 0.9
"""The part of the minutes that is planned for: a machine in use slows down now and then."""
ENDING = 6.0
"""Seconds kept for samples and the report."""
COLUMNS = 80
"""Width of the samples side by side, at most."""
HORIZON = "horizon.json"
"""In the output folder: what the minutes came to."""
REPORT, SUMMARY = "report.html", "summary.json"


@dataclass(frozen=True)
class Plan:
    """What the minutes come to."""

    tokens: int
    """That each model is trained on."""
    targets: int
    """Tokens of test that each is scored on, at most."""
    seconds: float
    """That training and scoring will take, about."""


def first_look(
    out: Path,
    texts: Sequence[Path],
    minutes: float = 3.0,
    seed: int = 0,
    device: str = "cpu",
    prompt: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Prepare `texts`, train and score both families into `out`, and write report.html; returns summary.json's content.

    The report of another text or other minutes is set aside. ValueError for no text or one that is too short, a prompt
    that does not fit, or minutes in which nothing is learned.
    """
    begun = time.perf_counter()
    if not texts:
        raise ValueError("no text is given; name a text file or a folder of them, as in: lrt try book.txt")
    if not MINUTES.allow(minutes):
        raise ValueError(f"--minutes is {minutes:g}; it must be {MINUTES}")
    console = Console(highlight=False)
    console.print(f"Preparing {', '.join(map(str, texts[:3]))}{' …' if len(texts) > 3 else ''}", markup=False)
    data = prepare(out / "data", texts, progress=progress)
    check_length(data, recipes.demo_recipe("lrt").batch_tokens)
    prompt = first_line(data) if prompt is None else prompt
    check_prompt(data, prompt)
    plans, key = Plans(out / HORIZON), look_key(data, minutes, seed, device)
    plan = kept_plan(plans, key, data, minutes, seed, device, begun)
    runs = make_runs(data, plan.tokens, seed)
    console.print(
        f"Two models on {plan.tokens:,} tokens each: about {format_duration(plan.seconds)} {describe_device(device)}"
    )
    models, earlier = train_families(runs, data, out, device, console, progress, plan.targets)
    summary = {
        "models": models,
        "minutes": minutes,
        "seed": seed,
        "prompt": prompt,
        "samples": {family: sample(out / family, prompt, seed, device) for family in models},
        "hardware": hardware_line(device),
    }
    console.print(f"\n{verdict(summary)}\n", style="bold", markup=False, soft_wrap=True)
    console.print(side_by_side(summary["samples"], min(COLUMNS, console.width)))
    logs = {family: out / family / "metrics.jsonl" for family in models}
    summary["seconds"] = time.perf_counter() - begun + earlier
    plans.make_room(key, REPORT, SUMMARY)
    first_look_report.write_report(out / REPORT, summary, verdict(summary), logs)
    replace_atomically(out / SUMMARY, json.dumps(summary, indent=2) + "\n")
    console.print(
        f"\n{place_and_size(out)}, after {format_duration(summary['seconds'])}; look at {out / REPORT}",
        markup=False,
        soft_wrap=True,
    )
    console.print(f"Go on with it: lrt sample {out}/lrt, lrt chat {out}/lrt, lrt serve {out}/lrt", markup=False)
    return summary


def make_runs(data: Prepared, tokens: int, seed: int) -> dict[str, RunConfig]:
    """The two runs, at equal parameters and tokens."""
    return {family: recipes.demo_recipe(family, data.vocab_size, tokens, seed) for family in FAMILIES}


def look_key(data: Prepared, minutes: float, seed: int, device: str) -> str:
    """Of all calls that train the same two models."""
    runs = make_runs(data, recipes.DEMO_TOKENS, seed)  # of any horizon
    return plan_key([minutes, device, data.fingerprint, [run.to_dict() for run in runs.values()]])


def kept_plan(plans: Plans, key: str, data: Prepared, minutes: float, seed: int, device: str, begun: float) -> Plan:
    """What the minutes come to: as it is kept for these very settings, or measured now and kept."""
    if (saved := plans.find(key)) is not None:
        return Plan(**saved)
    runs = make_runs(data, recipes.DEMO_TOKENS, seed)
    speeds = {family: measure_speed(run, data, SingleProcess(device)) for family, run in runs.items()}
    left = PLANNED * 60 * minutes - (time.perf_counter() - begun) - ENDING
    plan = make_plan(speeds, left, data, minutes)
    plans.keep(key, vars(plan))
    return plan


def make_plan(speeds: Mapping[str, Speed], left: float, data: Prepared, minutes: float) -> Plan:
    """What `left` seconds come to. ValueError where that is too little; `minutes` is what the user asked for."""
    scored = sum(LIVE[family] * speed.live + speed.parallel for family, speed in speeds.items())
    trained = sum(speed.train for speed in speeds.values())
    budget = Budget(minutes, left, trained, scored, len(speeds), recipes.demo_recipe("lrt").batch_tokens)
    most = min(data.manifest["splits"]["test"]["tokens"], FINAL_TARGETS)
    tokens, targets = budget.divide(data, most, SCORING)
    return Plan(tokens, targets, tokens * trained + targets * scored)


def sample(run: Path, prompt: str, seed: int, device: str) -> str:
    """What a trained family writes behind the prompt, as `lrt demo` draws it."""
    model, tokenizer = load(run / "checkpoint", device)
    return print_continuation(model, tokenizer, prompt, SAMPLE, Sampling(0.8, top_p=0.95), seed, io.StringIO())


def verdict(summary: Mapping[str, Any]) -> str:
    """The comparison in two sentences."""
    lrt, base = (summary["models"][name] for name in ("lrt", "transformer"))
    difference = 100 * (lrt["live_bpb"] / base["live_bpb"] - 1)
    words = f"{abs(difference):.1f} % {'fewer' if difference < 0 else 'more'}"
    return (
        f"After {lrt['tokens']:,} tokens the LRT is at {lrt['live_bpb']:.2f} bits per byte live, the Transformer at "
        f"{base['live_bpb']:.2f}: the LRT needs {words}. This is one seed; lrt fair compares several."
    )


def side_by_side(samples: Mapping[str, str], width: int) -> Table:
    """Texts in columns beside each other, within `width` columns of the terminal."""
    table = Table(width=width, padding=(0, 1), pad_edge=False, box=None)
    for family in samples:
        table.add_column(first_look_report.NAMES[family], ratio=1, overflow="fold")
    table.add_row(*(Text(text) for text in samples.values()))
    return table


def open_report(path: Path, environment: Mapping[str, str] = os.environ) -> bool:
    """Show a page in the browser of a desktop; False where this is none, or no terminal, whom nobody sees."""
    if not sys.stdout.isatty() or "SSH_CONNECTION" in environment:
        return False
    has_desktop = sys.platform in ("darwin", "win32") or {"DISPLAY", "WAYLAND_DISPLAY"} & environment.keys()
    return bool(has_desktop) and webbrowser.open(path.resolve().as_uri())
