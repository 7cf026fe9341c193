"""`lrt demo`: a transformer, token shift and the LRT on the same text, scored live, side by side."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console

from lrt.data.loader import Rows
from lrt.data.prepare import prepare
from lrt.data.prepared import Prepared
from lrt.data.tokenizer import Tokenizer
from lrt.data.windows import windows
from lrt.eval.runs import Run
from lrt.eval.scoring import evaluate
from lrt.experiments import demo_report
from lrt.inference.generation import Sampling, generate
from lrt.model.checkpoint import load
from lrt.model.size import count_parameters
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.schedules.parse import parse
from lrt.training import recipes
from lrt.training.config import RunConfig
from lrt.training.loop import train
from lrt.training.monitor import FINAL_TARGETS
from lrt.training.resume import holds_run
from lrt.training.snapshots import set_run_aside
from lrt.utils import files
from lrt.utils.files import place_and_size, replace_atomically
from lrt.utils.provenance import hardware_line
from lrt.utils.timing import format_duration

SAMPLE = 160
"""Tokens of the sample at the end."""
EPOCHS = 8
"""A short text of the user's own is read at most so often."""


def demo(
    out: Path,
    text: list[Path] | None,
    tokens: int | None,
    seed: int,
    device: str,
    prompt: str | None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train and score the three families into `out`; returns what summary.json holds.

    A family that an earlier call finished with the same settings and data is not trained again.
    """
    if tokens is not None and tokens < 1:
        raise ValueError(f"tokens is {tokens}; it must be at least 1")
    begun = time.perf_counter()
    console = Console(highlight=False)
    source = "the standard library of this Python" if text is None else f"{len(text)} text file(s)"
    console.print(f"Preparing {source} …")
    data = prepare(out / "data", text, progress=progress)
    prompt = first_line(data) if prompt is None else prompt
    check_prompt(data, prompt)
    if tokens is None:
        tokens = min(recipes.DEMO_TOKENS, EPOCHS * Rows(data.split("train"), recipes.CONTEXT, seed).targets)
    runs = {family: recipes.demo_recipe(family, data.vocab_size, tokens, seed) for family in recipes.FAMILIES}
    models, earlier = train_families(runs, data, out, device, console, progress)
    model, tokenizer = load(out / "lrt" / "checkpoint", device)
    summary = {
        "models": models,
        "scored_on": Run.read(out / "lrt").scores[0].on.label,  # the same windows for all of them
        "data": {k: data.manifest["splits"][k] for k in ("train", "val", "test")},
        "seed": seed,
        "hardware": hardware_line(device),
        "seconds": time.perf_counter() - begun + earlier,
    }
    console.print(demo_report.terminal_table(summary).rich())
    console.print("\nA sample from the LRT, decoded with its recurrence:\n", style="bold")
    sample = print_continuation(model, tokenizer, prompt, SAMPLE, Sampling(0.8, top_p=0.95), seed)
    summary["seconds"] = time.perf_counter() - begun + earlier
    logs = {family: out / family / "metrics.jsonl" for family in models}
    demo_report.write_report(out / "report.html", summary, logs, sample)
    replace_atomically(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    console.print(
        f"\n{place_and_size(out)}, after {format_duration(summary['seconds'])}; look at {out / 'report.html'}",
        markup=False,
        soft_wrap=True,
    )
    return summary


def train_families(
    runs: Mapping[str, RunConfig],
    data: Prepared,
    out: Path,
    device: str,
    console: Console,
    progress: bool,
    targets: int = FINAL_TARGETS,
) -> tuple[dict[str, dict[str, Any]], float]:
    """(Size, costs and scores of each family, seconds that earlier calls took for those that are kept from them)."""
    models: dict[str, dict[str, Any]] = {}
    earlier = 0.0
    for family, run in runs.items():
        scores, fresh = train_family(family, run, data, out / family, device, console, progress, targets)
        earlier += 0.0 if fresh else scores["seconds"]
        models[family] = {name: score for name, score in scores.items() if name != "seconds"}
    return models, earlier


def train_family(
    family: str,
    run: RunConfig,
    data: Prepared,
    out: Path,
    device: str,
    console: Console,
    progress: bool,
    targets: int,
) -> tuple[dict[str, Any], bool]:
    """(Size, costs and scores of one family on `targets` tokens of test at least, whether it was trained now).

    A key over settings, splits, torch and device stands beside what it came to: with any other it is trained again.
    """
    settings = {
        "run": run.to_dict(),
        "data": data.manifest["splits"],
        "torch": str(torch.__version__),
        "device": device,
        **({} if targets == FINAL_TARGETS else {"targets": targets}),
    }
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    file = out / "result.json"
    complete = (out / "metrics.jsonl").is_file() and (out / "checkpoint" / "manifest.json").is_file()
    saved = _read_result(file) if complete else {}
    if saved.get("key") == key:
        console.print(f"{family}: kept from an earlier call (delete {out} to train it again)")
        return saved["result"], False
    if file.exists() or not holds_run(out, run, data.fingerprint):
        set_run_aside(out)  # of other settings; `train` would refuse to go on from it
        files.set_aside(file)
    begun = time.perf_counter()
    total, dense = count_parameters(run.model)
    console.print(
        f"{family}: {total:,} parameters ({dense:,} without tables and head, MLP {run.model.mlp_dim} wide), "
        f"{run.schedule}, {run.steps} steps of {run.batch_tokens} tokens"
    )
    model, done = train(run, data, out, device, progress, f"training {family}")
    test = windows(data.split("test"), run.model.context, targets)
    metrics = evaluate(
        model,
        test,
        data.tokenizer.token_bytes(),
        parse(run.schedule),
        batch_size=len(test),
        progress=progress,
        prefix_bytes=data.tokenizer.prefix_bytes("a"),
    )
    scores = {
        "parameters": total,
        "parameters_without_tables": dense,
        "tokens": done.tokens,
        "train_seconds": done.seconds,
        "training_flops": done.flops,
        **{k: v for k, v in metrics.to_dict().items() if v is not None},
        "seconds": time.perf_counter() - begun,
    }
    console.print(
        f"  live {metrics.live_bpb:.4f} bits per byte, parallel {metrics.parallel_bpb:.4f} "
        f"({metrics.targets:,} tokens of held-out text; {done.tokens / done.seconds:,.0f} tokens/s in training)"
    )
    replace_atomically(file, json.dumps({"key": key, "result": scores}, indent=2) + "\n")
    return scores, True


def _read_result(path: Path) -> dict[str, Any]:
    """What an earlier call wrote when a family was done; nothing where it is missing, cut short or no object."""
    try:
        return files.read_json(path)
    except ValueError:
        return {}


def check_prompt(data: Prepared, prompt: str) -> None:
    """ValueError for a prompt that leaves no room for a sample in the context."""
    longest = recipes.CONTEXT - SAMPLE  # BOS takes one place more; the last token drawn takes none
    length = len(data.tokenizer.encode(prompt))
    if length > longest:
        raise ValueError(
            f"the prompt has {length} tokens; at most {longest} can be continued in a context of {recipes.CONTEXT}"
        )


def first_line(data: Prepared) -> str:
    """The first line of the first validation document: what the sample starts with."""
    first = data.tokenizer.decode(data.split("val")[0][:64].tolist())
    return first.split("\n", 1)[0] + "\n"


def print_continuation(
    model: LatentRecurrentTransformer,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int | None,
    sampling: Sampling,
    seed: int,
    out: TextIO | None = None,
) -> str:
    """Print the prompt and its continuation as the tokens arrive, up to the end of the document; returns it all."""
    stream: TextIO = out or sys.stdout  # looked up here, so that a redirection counts
    ids = [tokenizer.bos, *tokenizer.encode(prompt)]
    tokens = torch.tensor([ids], device=model.embedding.weight.device)
    decoder, pieces = tokenizer.decoder(ids), [prompt]
    stream.write(prompt)
    for token in generate(model, tokens, max_new_tokens, sampling, seed):
        if int(token) == tokenizer.bos:  # the next document's: this one has ended
            break
        pieces.append(decoder.push(int(token)))
        stream.write(pieces[-1])
        stream.flush()
    pieces.append(decoder.finish())
    stream.write(pieces[-1] + "\n")
    return "".join(pieces)
