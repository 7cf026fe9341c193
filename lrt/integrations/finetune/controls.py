"""Controls of a retrofitted model's training: equal rows without its pathway, and with the previous embedding alone.

What the second gains too is not recurrence's. At equal tokens all see the same rows in the same order; at equal
wall-clock the controls are trained for as many more steps as the pathway's step takes longer.

OUT/pathway, OUT/token-shift, OUT/plain, OUT/plain-in-equal-time, …   the models that were trained
OUT/comparison.jsonl                                                 what each came to (`comparison.Outcome`)
OUT/request.json, OUT/ratios.json                                    what is compared; the pathway's step over others'
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from lrt.integrations.finetune.comparison import FILE, PATHWAY, PLAIN, SHIFT, Equal, Outcome, read_outcomes
from lrt.integrations.finetune.finetune import (
    check_pathway,
    finetune,
    make_optimiser,
    make_trainer,
    request_of,
    split_rows,
)
from lrt.integrations.finetune.options import FinetuneOptions, check_options
from lrt.integrations.finetune.targets import FinetuneTarget, TransformersTarget
from lrt.integrations.retrofit import retrofit
from lrt.schedules.parse import parse
from lrt.utils import files
from lrt.utils.timing import Work, alternate, weighted

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
    equal: Sequence[Equal] = ("tokens",),
    announce: Callable[[str], object] = print,
) -> list[Outcome]:
    """Train a retrofitted model and its controls on the same rows, into folders in `out`, and compare them.

    Interrupted, the same call goes on. ValueError for a model without a pathway, or whose pathway was trained or is its
    own control, and where `out` holds something else.
    """
    check_options(options)
    check_pathway(target, options)
    check_target(target, options)
    if not equal or not set(equal) <= set(get_args(Equal)):
        raise ValueError(f"controls is {tuple(equal)}; name some of {', '.join(get_args(Equal))}")
    begin_comparison(out, request_of(target, rows, options))
    plan: list[tuple[Equal, str]] = [("tokens", PATHWAY)]
    plan += [(kind, name) for kind in get_args(Equal) if kind in equal for name in (SHIFT, PLAIN)]
    ratios = step_ratios(target, rows, out, options, device) if "wall_clock" in equal else {}
    outcomes = read_outcomes(out)
    for kind, name in plan:
        if any((outcome.equal, outcome.model) == (kind, name) for outcome in outcomes):
            continue
        announce(f"{name}, equal {kind.replace('_', '-')}")
        own = without_pathway(options, name)
        if kind == "wall_clock":
            own = dataclasses.replace(own, steps=max(1, round(outcomes[0].steps * ratios[name])))
        folder = out / (name.replace(" ", "-") + ("" if kind == "tokens" else "-in-equal-time"))
        files.set_aside(folder)  # there without its line: the process ended between the two, or somebody put it there
        tuned = finetune(variant(target, name), rows, folder, own, device)
        nats, learned = tuple(round(one, 5) for one in tuned.after.nats), tuned.after.tokens
        seconds, before = round(tuned.seconds, 1), round(tuned.before.mean, 6)
        outcome = Outcome(name, kind, tuned.steps, tuned.tokens, seconds, before, nats, learned)
        files.append_durably(out / FILE, json.dumps(outcome.to_dict()) + "\n")
        outcomes.append(outcome)
        release(device)
    return outcomes


def check_target(target: FinetuneTarget, options: FinetuneOptions) -> None:
    """ValueError where there is nothing to compare, or it would not be fair."""
    source = target.source
    if not target.has_pathway:
        raise ValueError(f"controls are of retrofitted models, and {source} is none")
    if not any(target.model.config.pathway.sources(target.model.config.num_hidden_layers)):
        raise ValueError(f"{source} remembers the embedding alone, which is the control; give another source")
    if any(bool(p.any()) for name, p in target.model.latent.named_parameters() if not name.startswith("gate")):
        raise ValueError(
            f"the pathway of {source} was trained already, and its decoder with it; controls begin with the decoder as "
            "it was: give the folder as `lrt retrofit` wrote it"
        )
    if options.freeze:
        raise ValueError("freeze trains the pathway alone, and a control without one has then nothing to train")
    if options.lora:
        raise ValueError("controls train all weights: adapters of three models would all name one folder as theirs")


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
            retrofit(model, **dataclasses.replace(about, source=0, schedule=SHIFTED).to_dict())
    return TransformersTarget.of(target.source, model, target.tokenizer)


def without_pathway(options: FinetuneOptions, name: str) -> FinetuneOptions:
    """The same, for a model that may have no pathway."""
    return dataclasses.replace(options, pathway_rate=None, gate_rate=None) if name == PLAIN else options


def step_ratios(
    target: FinetuneTarget, rows: Sequence[dict[str, Any]], out: Path, options: FinetuneOptions, device: str
) -> dict[str, float]:
    """Control -> the time of the pathway's step over its own, by the shares of the schedule's parts.

    Measured once, and kept in `out`: a comparison that goes on is one of equal times still.
    """
    file = out / "ratios.json"
    if not file.is_file():
        parts = [(share, repr(part)) for share, part in parse(target.model.config.pathway.schedule).shares()]
        with tempfile.TemporaryDirectory() as work:
            works = {part: step(target, PATHWAY, rows, Path(work), options, device, part) for _, part in parts}
            works |= {name: step(target, name, rows, Path(work), options, device) for name in (SHIFT, PLAIN)}
            times = alternate(works, ROUNDS, warmup=1, device=device, title="timing steps")
        pathway = weighted([(share, times[part]) for share, part in parts])
        ratios = {name: pathway.ratio(times[name])[0] for name in (SHIFT, PLAIN)}
        files.replace_atomically(file, json.dumps(ratios))
        release(device)
    return files.read_json(file)


def step(
    target: FinetuneTarget,
    name: str,
    rows: Sequence[dict[str, Any]],
    work: Path,
    options: FinetuneOptions,
    device: str,
    schedule: str | None = None,
) -> Work:
    """A step over the first batch, clipping and optimiser included, that moves no weight."""
    own = without_pathway(options, name)
    model_of = variant(target, name)
    if schedule is not None:
        model_of.model.config.latent_memory["schedule"] = schedule
    trainer = make_trainer(model_of, *split_rows(rows, options), work, own, device)
    model: Any = trainer.model
    batch = next(iter(trainer.get_train_dataloader()))
    optimiser = make_optimiser(model, 0.0, own, model_of.has_pathway)
    model.train()

    def run() -> None:
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()

    return run


def release(device: str) -> None:
    """Give back what a trainer held: it and its model know each other."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
