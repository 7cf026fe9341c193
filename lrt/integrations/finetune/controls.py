"""Controls of a retrofitted model's training: equal rows without its pathway, and with the previous embedding alone.

What the second gains too is not recurrence's. At equal tokens all see the same rows in the same order; at equal
wall-clock the controls are trained for as many more steps as the pathway's step takes longer.

OUT/pathway, OUT/token-shift, OUT/plain, OUT/plain-in-equal-time, …   the models that were trained
OUT/comparison.jsonl                                                 a line for each (`comparison.py`)
OUT/request.json                                                     what is compared
"""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lrt.integrations.finetune.comparison import FILE, PATHWAY, PLAIN, SHIFT, Line, read_lines
from lrt.integrations.finetune.finetune import check_pathway, finetune, make_trainer, request_of, split_rows
from lrt.integrations.finetune.options import FinetuneOptions, check_options
from lrt.integrations.finetune.targets import FinetuneTarget, TransformersTarget
from lrt.integrations.retrofit import retrofit
from lrt.schedules.parse import parse
from lrt.utils import files
from lrt.utils.timing import Timing, Work, alternate, weighted

EQUAL = ("tokens", "wall_clock")
ROUNDS = 5
"""In which steps are timed beside each other."""
SHIFTED = "plain()"
"""The schedule of token shift: the embedding before a token is known at once."""


def train_with_controls(
    target: FinetuneTarget,
    rows: Sequence[dict[str, Any]],
    out: Path,
    options: FinetuneOptions,
    device: str = "cpu",
    equal: Sequence[str] = ("tokens",),
    announce: Callable[[str], object] = print,
) -> list[Line]:
    """Train a retrofitted model and its controls on the same rows, into folders in `out`, and compare them.

    Interrupted, the same call goes on. ValueError for a model without a pathway, or whose pathway is its own control,
    and where `out` holds something else.
    """
    check_options(options)
    check_pathway(target, options)
    check_target(target, options)
    if not equal or not set(equal) <= set(EQUAL):
        raise ValueError(f"controls is {tuple(equal)}; name some of {', '.join(EQUAL)}")
    begin_comparison(out, request_of(target, rows, options))
    lines = read_lines(out)
    plan = [("tokens", name) for name in (PATHWAY, SHIFT, PLAIN)]
    plan = [step for step in plan if "tokens" in equal or step[1] == PATHWAY]
    plan += [("wall_clock", name) for name in (SHIFT, PLAIN) if "wall_clock" in equal]
    known = {(line["equal"], line["model"]) for line in lines}
    for equal_in, name in plan:
        if (equal_in, name) in known:
            continue
        announce(f"{name}, equal {equal_in.replace('_', '-')}")
        chosen, ratio = options, None
        if equal_in == "wall_clock":
            ratio = step_ratio(target, name, rows, out, options, device)
            steps = next(line["steps"] for line in lines if line["model"] == PATHWAY)
            chosen = dataclasses.replace(options, steps=max(1, round(steps * ratio)))
        folder = out / (name.replace(" ", "-") + ("" if equal_in == "tokens" else "-in-equal-time"))
        # Whole, but without its line: the process ended between the two. The request says that it is ours.
        shutil.rmtree(folder, ignore_errors=True)
        tuned = finetune(variant(target, name), rows, folder, without_pathway(chosen, name), device)
        line: Line = {
            "model": name,
            "equal": equal_in,
            "steps": tuned.steps,
            "tokens": tuned.tokens,
            "seconds": round(tuned.seconds, 1),
            "steps_over_pathway": None if ratio is None else round(ratio, 3),
            "before": round(tuned.before.mean, 6),
            "nats": [round(nats, 5) for nats in tuned.after.nats],
            "learned": list(tuned.after.tokens),
        }
        files.append_durably(out / FILE, json.dumps(line) + "\n")
        lines.append(line)
    return lines


def check_target(target: FinetuneTarget, options: FinetuneOptions) -> None:
    """ValueError where there is nothing to compare."""
    if not target.has_pathway:
        raise ValueError(
            f"controls are of retrofitted models, and {target.source} is none; `lrt retrofit` adds a pathway"
        )
    if not any(target.model.config.pathway.sources(target.model.config.num_hidden_layers)):
        raise ValueError(f"{target.source} remembers the embedding alone, which is the control; give another source")
    if options.freeze:
        raise ValueError("freeze trains the pathway alone, and a control without one has then nothing to train")


def begin_comparison(out: Path, request: dict[str, Any]) -> None:
    """Make the folder, or see that it holds the same comparison. ValueError where it does not."""
    file = out / "request.json"
    if file.is_file() and files.read_json(file) == request:
        return
    if out.exists() and any(out.iterdir()):
        raise ValueError(
            f"{out} is not empty, and holds no comparison of this model, rows and settings; choose another"
        )
    out.mkdir(parents=True, exist_ok=True)
    files.replace_atomically(file, json.dumps(request))


def variant(target: FinetuneTarget, name: str) -> TransformersTarget:
    """A copy of the target with its pathway, with token shift in its place, or without any."""
    model = copy.deepcopy(target.model)
    if name != PATHWAY:
        about = model.config.pathway
        model.detach()
        if name == SHIFT:
            fields = {"layers": about.layers, "projection": about.projection, "prefill": about.prefill}
            retrofit(model, source=0, schedule=SHIFTED, **fields)
    return TransformersTarget.of(target.source, model, target.tokenizer)


def without_pathway(options: FinetuneOptions, name: str) -> FinetuneOptions:
    """The same, for a model that may have no pathway."""
    return dataclasses.replace(options, pathway_rate=None, gate_rate=None) if name == PLAIN else options


def step_ratio(
    target: FinetuneTarget,
    name: str,
    rows: Sequence[dict[str, Any]],
    out: Path,
    options: FinetuneOptions,
    device: str,
) -> float:
    """The time of the pathway's forward and backward over a control's, by the shares of its schedule's parts."""
    works: dict[str, Work] = {}
    parts: list[tuple[float, str]] = []
    for share, part in parse(target.model.config.pathway.schedule).shares():
        one = variant(target, PATHWAY)
        one.model.config.latent_memory["schedule"] = repr(part)
        parts.append((share, repr(part)))
        works[repr(part)] = step(one, rows, out, options, device)
    works[name] = step(variant(target, name), rows, out, without_pathway(options, name), device)
    times = alternate(works, ROUNDS, warmup=1, device=device, title="timing steps")
    whole: Timing = weighted([(share, times[part]) for share, part in parts])
    return whole.ratio(times[name])[0]


def step(
    target: TransformersTarget, rows: Sequence[dict[str, Any]], out: Path, options: FinetuneOptions, device: str
) -> Work:
    """Forward and backward of the first batch."""
    train, val = split_rows(rows, options)
    trainer = make_trainer(target, train, val, out / ".timing", options, device)
    model: Any = trainer.model
    batch = next(iter(trainer.get_train_dataloader()))
    model.train()

    def work() -> None:
        model(**batch).loss.backward()
        model.zero_grad()

    return work
