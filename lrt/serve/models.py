"""The models that a server has, each with its tokenizer, template and worker."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lrt.data.tokenizer import Tokenizer
from lrt.inference import cost_model
from lrt.inference.chat_template import TEMPLATES, Template, specials, template_of
from lrt.inference.engine import Engine
from lrt.model import checkpoint
from lrt.model.fingerprint import fingerprint
from lrt.model.size import count_parameters
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.serve.async_engine import AsyncEngine
from lrt.serve.config import Limits, Settings
from lrt.serve.errors import ApiError, busy, shutting_down, unavailable
from lrt.serve.metrics import ServerMetrics

PLACES = ("checkpoint", "best")
"""Folders that say nothing of the model in them: its name is their parent's."""


@dataclass(eq=False)
class ServedModel:
    """One model."""

    name: str
    model: LatentRecurrentTransformer
    tokenizer: Tokenizer
    worker: AsyncEngine
    template: Template | None
    """None: there is no chat."""
    created: int
    """Seconds since 1970."""
    fingerprint: str
    """Of the weights."""
    settings: Settings

    @property
    def slots(self) -> int:
        """The longest a prompt and its answer may be."""
        return self.model.config.context

    def room(self, prompt: int) -> int | None:
        """How many tokens an answer may have; None: without end."""
        return None if self.model.config.unlimited_context else self.slots + 1 - prompt

    def about(self) -> dict[str, Any]:
        """For the page."""
        config = self.model.config
        memory = config.memory
        return {
            "id": self.name,
            "parameters": count_parameters(config)[0],
            "depth": config.depth,
            "width": config.width,
            "context": None if config.unlimited_context else config.context,
            "vocabulary": config.vocab_size,
            "recurrent": memory.injection != "none",
            "injection": memory.injection,
            "projection": memory.projection if memory.injection in ("both", "key_value") else None,
            "prefill": self.settings.prefill,
        }


def load_served(
    path: Path, name: str, settings: Settings, limits: Limits, metrics: ServerMetrics, device: str | torch.device
) -> ServedModel:
    """Load a checkpoint to be served. ValueError where it is damaged, or settings do not fit."""
    folder = checkpoint.verify(path)
    model, tokenizer = checkpoint.load(folder, device)
    known = cost_model.read_calibration(folder, model)
    created = int((folder / "manifest.json").stat().st_mtime)
    return make(name, model, tokenizer, settings, limits, metrics, known, created)


def make(
    name: str,
    model: LatentRecurrentTransformer,
    tokenizer: Tokenizer,
    settings: Settings,
    limits: Limits,
    metrics: ServerMetrics,
    known: cost_model.Calibration | None = None,
    created: int = 0,
) -> ServedModel:
    """A model in memory, ready to be served; its worker is not started yet."""

    def engine() -> Engine:
        return Engine(
            model,
            rows=settings.rows,
            mode=settings.mode,
            prefill=settings.prefill,
            prefixes=settings.prefixes,
            calibration=known,
            prompts=1,
        )

    worker = AsyncEngine(name, engine, metrics, limits.queue_seconds)
    mark = fingerprint(model)[:12]
    return ServedModel(
        name, model, tokenizer, worker, choose_template(tokenizer, settings.template), created, f"fp_{mark}", settings
    )


def choose_template(tokenizer: Tokenizer, name: str | None) -> Template | None:
    """The template that was asked for, or the tokenizer's own; None where its special tokens name none."""
    if name is None:
        own = TEMPLATES[template_of(tokenizer)]
        return own if own.special else None
    if name not in TEMPLATES:
        raise ValueError(f"unknown template {name!r}; choose one of {', '.join(TEMPLATES)}")
    missing = sorted(TEMPLATES[name].special - set(specials(tokenizer)))
    if missing:
        raise ValueError(f"template {name!r} needs the special tokens {', '.join(missing)}; use another template")
    return TEMPLATES[name]


def names_of(paths: Sequence[Path], given: Sequence[str] = ()) -> list[str]:
    """What the models are called: as given, or by their folders. ValueError where two have one name."""
    if given and len(given) != len(paths):
        raise ValueError(f"{len(given)} names for {len(paths)} checkpoints; give one each")
    names = list(given)
    for path in paths if not given else ():
        whole = path.absolute()
        names.append(re.sub(r"[^\w.-]+", "-", (whole.parent if whole.name in PLACES else whole).name) or "model")
    wrong = [name for name in names if not re.fullmatch(r"[\w.-]{1,200}", name)]
    if wrong:
        raise ValueError(f"{wrong} is no name of a model; use letters, digits, '.', '_' and '-'")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two checkpoints are called {', '.join(twice)}; tell them apart with --names")
    return names


class ModelRegistry:
    """All models of a server, and whether it still takes requests."""

    def __init__(self, models: Sequence[ServedModel], limits: Limits, metrics: ServerMetrics) -> None:
        self.models = {one.name: one for one in models}
        self.limits, self.metrics = limits, metrics
        self.ending = False

    def start(self) -> None:
        """Start the workers, in the running loop."""
        for one in self.models.values():
            one.worker.start()

    async def stop(self) -> None:
        """End the workers."""
        for one in self.models.values():
            await one.worker.stop()

    def drain(self) -> None:
        """Take no new requests."""
        self.ending = True

    def interrupt(self) -> None:
        """Tell all requests that the server ends."""
        for one in self.models.values():
            one.worker.interrupt(shutting_down())

    def find(self, name: str) -> ServedModel:
        """A model by name. ApiError 404 where there is none."""
        if name not in self.models:
            known = ", ".join(self.models)
            raise ApiError(404, f"there is no such model; choose one of {known}", param="model", code="model_not_found")
        return self.models[name]

    def admit(self, one: ServedModel, samples: int) -> None:
        """ApiError 429 or 503 where a model cannot take so many more continuations."""
        if self.ending:
            raise shutting_down()
        if one.worker.failed:
            raise unavailable("the model has failed; the server has to be started anew", "model_failed")
        if one.worker.load + samples > one.worker.rows + self.limits.queue:
            raise busy(
                f"{one.worker.load} continuations are decoded or wait, and {samples} more exceed the "
                f"{one.worker.rows} rows and {self.limits.queue} places in the queue; try again later"
            )
