"""The models that a server has, each with its tokenizer, chat template and engine."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lrt.data.tokenizer import Tokenizer
from lrt.inference import cost_model
from lrt.inference.chat_template import ChatTemplate
from lrt.inference.engine import Engine
from lrt.inference.grammar import GrammarCompiler
from lrt.inference.jinja_template import choose_template
from lrt.model import checkpoint
from lrt.model.config import ModelConfig
from lrt.model.fingerprint import fingerprint
from lrt.model.size import count_parameters
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.serve.async_engine import AsyncEngine
from lrt.serve.config import Limits, Settings
from lrt.serve.errors import ApiError, busy_error, shutdown_error, unavailable_error
from lrt.serve.metrics import ServerMetrics

GENERIC_FOLDERS = ("checkpoint", "best")
"""Folders that say nothing of the model in them: its name is their parent's."""


@dataclass(eq=False)
class ServedModel:
    """A model under its name, with all that answering needs."""

    name: str
    transformer: LatentRecurrentTransformer
    tokenizer: Tokenizer
    engine: AsyncEngine
    template: ChatTemplate | None
    """None: there is no chat."""
    created: int
    """Seconds since 1970."""
    fingerprint: str
    """Of the weights."""
    settings: Settings
    prefills: ThreadPoolExecutor
    """Where prompts are computed in parallel, and scored, one at a time beside the engine."""
    grammars: GrammarCompiler

    @property
    def config(self) -> ModelConfig:
        return self.transformer.config

    def room(self, prompt_tokens: int) -> int | None:
        """How many tokens an answer may have behind a prompt; None: without end.

        One more than the context has left: the last token drawn is never fed back.
        """
        return None if self.config.unlimited_context else self.config.context + 1 - prompt_tokens

    def summary(self) -> dict[str, Any]:
        """What the page shows of it, ready for JSON."""
        config, memory = self.config, self.config.memory
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


def load_served_model(
    path: Path,
    name: str,
    settings: Settings,
    limits: Limits,
    metrics: ServerMetrics,
    device: str | torch.device,
    load: Callable[[Path, str | torch.device], tuple[LatentRecurrentTransformer, Tokenizer]] = checkpoint.load,
) -> ServedModel:
    """Load a checkpoint to be served, by `load`. ValueError where it is damaged, or settings do not fit."""
    folder = checkpoint.verify(path)
    transformer, tokenizer = load(folder, device)
    calibration = cost_model.read_calibration(folder, transformer)
    created = int((folder / "manifest.json").stat().st_mtime)
    return create_served_model(name, transformer, tokenizer, settings, limits, metrics, calibration, created, folder)


def create_served_model(
    name: str,
    transformer: LatentRecurrentTransformer,
    tokenizer: Tokenizer,
    settings: Settings,
    limits: Limits,
    metrics: ServerMetrics,
    calibration: cost_model.Calibration | None = None,
    created: int = 0,
    folder: Path | None = None,
) -> ServedModel:
    """A model in memory, ready to be served; its engine is not started yet. folder: where its own template may be."""
    tokenizer.decoder(())  # makes its table of bytes: the first request would make it in the event loop

    threads = torch.get_num_threads()  # set in the thread itself: OpenMP keeps the number per thread
    prefills = ThreadPoolExecutor(1, f"prefill of {name}", lambda: torch.set_num_threads(threads))

    def make_engine() -> Engine:
        return Engine(
            transformer,
            rows=settings.rows,
            mode=settings.mode,
            prefill=settings.prefill,
            prefixes=settings.prefixes,
            calibration=calibration,
            background=prefills,  # as they would be alone, and the others' tokens do not wait
        )

    engine = AsyncEngine(name, make_engine, metrics, limits.queue_seconds)
    template_name, template = choose_template(tokenizer, settings.template, folder)
    if settings.template is None and template_name == "plain":
        template = None  # nothing says that the model can chat
    grammars = GrammarCompiler(tokenizer)
    grammars.prepare()  # now, as it would keep all other requests waiting
    weights = f"fp_{fingerprint(transformer)[:12]}"
    return ServedModel(name, transformer, tokenizer, engine, template, created, weights, settings, prefills, grammars)


def model_names(paths: Sequence[Path], names: Sequence[str] = ()) -> list[str]:
    """What the models are called: these names, or by their folders. ValueError where two have one name."""
    if names and len(names) != len(paths):
        raise ValueError(f"{len(names)} names for {len(paths)} checkpoints; give one each")
    names = list(names) or [folder_name(path) for path in paths]
    invalid = [name for name in names if not re.fullmatch(r"[\w.-]{1,200}", name)]
    if invalid:
        raise ValueError(f"{invalid} is no name of a model; use letters, digits, '.', '_' and '-'")
    duplicates = sorted({name for name in names if names.count(name) > 1})
    if duplicates:
        raise ValueError(f"two checkpoints are called {', '.join(duplicates)}; tell them apart with --names")
    return names


def folder_name(path: Path) -> str:
    """The name of a checkpoint's folder, or of its run's, as a name of a model."""
    folder = path.absolute()
    return re.sub(r"[^\w.-]+", "-", (folder.parent if folder.name in GENERIC_FOLDERS else folder).name) or "model"


class ModelRegistry:
    """All models of a server, and whether it still takes requests."""

    def __init__(self, models: Sequence[ServedModel], limits: Limits, metrics: ServerMetrics) -> None:
        self.models = {model.name: model for model in models}
        self.limits, self.metrics = limits, metrics
        self.draining = False
        """No new requests are taken."""

    def start(self) -> None:
        """Start the engines, in the running loop."""
        for model in self.models.values():
            model.engine.start()

    async def stop(self) -> None:
        """End the engines."""
        for model in self.models.values():
            await model.engine.stop()
            model.prefills.shutdown(wait=False, cancel_futures=True)

    def drain(self) -> None:
        """Take no new requests."""
        self.draining = True

    def interrupt(self) -> None:
        """End all requests with an error: the server ends."""
        for model in self.models.values():
            model.engine.interrupt(shutdown_error())

    def find(self, name: str) -> ServedModel:
        """A model by name. ApiError 404 where there is none."""
        if name not in self.models:
            names = ", ".join(self.models)
            raise ApiError(404, f"there is no such model; choose one of {names}", param="model", code="model_not_found")
        return self.models[name]

    def admit(self, model: ServedModel, samples: int) -> None:
        """ApiError 429 or 503 where a model cannot take so many more continuations."""
        engine = model.engine
        if self.draining:
            raise shutdown_error()
        if engine.failed:
            raise unavailable_error("the model has failed; the server has to be started anew", "model_failed")
        if engine.load + samples > engine.rows + self.limits.queue:
            raise busy_error(
                f"{engine.load} continuations are decoded or wait, and {samples} more exceed the "
                f"{engine.rows} rows and {self.limits.queue} places in the queue; try again later"
            )
