"""Train in one call: a recipe's name, a text, and what is to be otherwise. What `lrt train` is on the command line."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lrt.data.prepare import prepare
from lrt.data.prepared import Prepared
from lrt.eval.diagnose import check_tokenizer
from lrt.eval.run_folder import Run
from lrt.model import checkpoint
from lrt.model.execution import Execution
from lrt.model.fingerprint import fingerprint
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.model.upcycle import adopt
from lrt.training import loop
from lrt.training.config import USUAL_SNAPSHOTS, EvalConfig, RunConfig, SnapshotConfig
from lrt.training.recipes import RECIPES
from lrt.utils.device import choose_device
from lrt.utils.validation import check_fields, near_matches, shorten

RUNS = Path("runs")
"""Where runs go that are given no folder."""
DATA = RUNS / "data"
"""Where texts are prepared."""


def train(
    recipe: str | RunConfig,
    data: str | Path | Prepared | None = None,
    out: str | Path | None = None,
    device: str | torch.device = "auto",
    *,
    resume: str = "auto",
    snapshots: SnapshotConfig | None = None,
    evaluation: EvalConfig | None = None,
    log_to: Sequence[str] = (),
    execution: Execution | None = None,
    progress: bool = True,
    **changes: Any,
) -> Run:
    """Train a recipe on a text, or go on with it, and return the run.

    - recipe: a name such as `d2`, or a RunConfig.
    - data: a text file or a folder of texts, which is prepared first, once; a folder that `lrt prepare` wrote; or None:
      the standard library of Python. The model's vocabulary is the data's.
    - out: the run's folder. None: runs/ and the recipe's name.
    - device: auto, cpu, cuda, cuda:1, mps.
    - resume: auto goes on from the newest snapshot in `out`, and does nothing again of a run that is done; never starts
      anew and sets the old run aside; a snapshot's folder goes on from that one.
    - snapshots, evaluation, execution: what is saved and measured on the way, and how steps are computed. None: as for
      `lrt train`.
    - log_to: tensorboard, wandb, trackio.
    - changes: fields of RunConfig, such as horizon="tokens=3e6" or seed=1. A nested field takes a dict of what changes
      in it: optim={"matrix_lr": 0.01}, model={"depth": 3, "memory": {"source": 0}}.

    Interrupted, it saves a snapshot, and the same call goes on. ValueError, before any work, for an unknown recipe or
    field and for a value out of range. More, such as `ranks`, is in `lrt.training.loop.train`.
    """
    check_vocabulary(changes)
    config: RunConfig = with_changes(find_recipe(recipe), changes)
    folder, device = run_folder(recipe, out), choose_device(str(device))
    prepared = prepare_data(data, progress)
    run, begin = begin_run(with_vocabulary(config, prepared), prepared)
    loop.train(
        run,
        prepared,
        folder,
        device,
        progress,
        folder.name,
        snapshots or USUAL_SNAPSHOTS,
        evaluation or EvalConfig(),
        resume,
        execution=execution or Execution(),
        log_to=log_to,
        begin=begin,
    )
    return Run(folder, device, prepared)


def find_recipe(recipe: str | RunConfig) -> RunConfig:
    """The settings of a recipe; settings themselves as they are. ValueError, with what is near, for another name."""
    if isinstance(recipe, RunConfig):
        return recipe
    if recipe not in RECIPES:
        near = near_matches(str(recipe), RECIPES)
        raise ValueError(f"unknown recipe {shorten(recipe)}{near}; choose one of {', '.join(RECIPES)}")
    return RECIPES[recipe]()


def run_folder(recipe: str | RunConfig, out: str | Path | None) -> Path:
    """Where the run goes."""
    if out is not None:
        return Path(out)
    if isinstance(recipe, RunConfig):
        raise ValueError("out is None, and settings have no name that a folder could have; give out='runs/NAME'")
    return RUNS / recipe


def with_changes(config: Any, changes: Mapping[str, Any], where: str = "train") -> Any:
    """A dataclass with these fields; a nested one takes a mapping of what changes in it. ValueError where none fits."""
    check_fields(type(config), changes, where)
    fields: dict[str, Any] = {}
    for name, value in changes.items():
        now = vars(config)[name]
        nested = dataclasses.is_dataclass(now) and isinstance(value, Mapping)
        fields[name] = with_changes(now, value, f"{where}.{name}") if nested else value
    return dataclasses.replace(config, **fields)


def check_vocabulary(changes: Mapping[str, Any]) -> None:
    """ValueError where they set the size of the vocabulary, which `with_vocabulary` takes from the data."""
    model = changes.get("model")
    if isinstance(model, Mapping) and "vocab_size" in model:
        raise ValueError(
            f"train.model.vocab_size is {shorten(model['vocab_size'])}; leave it out, as the vocabulary is the data's, "
            "and prepare the data with `lrt prepare --vocab-size`"
        )


def with_vocabulary(run: RunConfig, data: Prepared) -> RunConfig:
    """The run with the vocabulary of its data: a fact of the data, and no choice of the run."""
    return dataclasses.replace(run, model=dataclasses.replace(run.model, vocab_size=data.vocab_size))


def prepare_data(data: str | Path | Prepared | None, progress: bool = True) -> Prepared:
    """The data to train on: as it is, opened, or prepared from a text."""
    if isinstance(data, Prepared):
        return data
    if data is None:
        return prepare(DATA / "stdlib", progress=progress)
    path = Path(data)
    if (path / "manifest.json").is_file():
        return Prepared.open(path)
    return prepare(text_folder(path), [path], progress=progress)


def text_folder(text: Path) -> Path:
    """Where a text is prepared: a folder of its own for every path and every change of a file in it.

    A run goes on, and is scored, on the text that it was trained on; so that is never prepared anew in its place.
    """
    path = text.resolve()
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    state = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.exists()]
    return DATA / f"{path.stem}-{hashlib.sha256(repr((str(path), state)).encode()).hexdigest()[:8]}"


def begin_run(run: RunConfig, data: Prepared) -> tuple[RunConfig, LatentRecurrentTransformer | None]:
    """The run and the model that it begins with: none where weights are random. ValueError where they do not go
    together."""
    if run.init is None:
        return run, None
    folder = checkpoint.verify(Path(run.init))
    begin, tokenizer = checkpoint.load(folder)
    check_tokenizer(data, tokenizer, folder)
    return dataclasses.replace(run, init=fingerprint(begin), model=adopt(run.model, begin.config)), begin
