"""A model that is served: its tokenizer and chat template, and on each device a worker with an engine."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lrt.data.tokenizer import Tokenizer
from lrt.eval.probe import FILE as PROBE_FILE
from lrt.eval.probe import StateProbe, read_probe
from lrt.eval.text_states import STATE_KINDS
from lrt.inference import cost_model
from lrt.inference.chat_template import ChatTemplate
from lrt.inference.engine import Engine
from lrt.inference.grammar import GrammarCompiler
from lrt.inference.jinja_template import CONFIG_FILE, TEMPLATE_FILE, choose_template
from lrt.inference.request import Request
from lrt.model import checkpoint
from lrt.model.config import ModelConfig
from lrt.model.fingerprint import fingerprint
from lrt.model.size import count_parameters
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.serve.async_engine import AsyncEngine
from lrt.serve.config import Limits, Settings
from lrt.serve.examples import example_prompts
from lrt.serve.metrics import ServerMetrics
from lrt.serve.routing import RecentPrompts
from lrt.utils.device import use_device
from lrt.utils.progress import warn

GENERIC_FOLDERS = ("checkpoint", "best")
"""Folders that say nothing of the model in them: its name is their parent's."""
WORTH_A_WORKER = 32
"""Tokens of a prompt by which what workers know of it is compared: fewer do not outweigh how busy they are."""
BESIDE = (PROBE_FILE, cost_model.FILE, TEMPLATE_FILE, CONFIG_FILE)
"""Files that a checkpoint's manifest does not name, and that its server reads."""
Loader = Callable[[Path, str], tuple[LatentRecurrentTransformer, Tokenizer]]
"""(folder that was checked, device) -> (model, tokenizer)."""


@dataclass(eq=False)
class Worker:
    """A model on one device."""

    transformer: LatentRecurrentTransformer
    engine: AsyncEngine
    prefills: ThreadPoolExecutor
    """Where prompts are computed in parallel, and scored, one at a time beside the engine."""
    recent: RecentPrompts = field(default_factory=RecentPrompts)


@dataclass(eq=False)
class ServedModel:
    """A model under its name, with all that answering needs."""

    name: str
    tokenizer: Tokenizer
    workers: tuple[Worker, ...]
    """One for each device, at least one."""
    grammars: GrammarCompiler
    template: ChatTemplate | None
    """None: there is no chat."""
    created: int
    """Seconds since 1970."""
    fingerprint: str
    """Of the weights."""
    settings: Settings
    version: tuple[object, ...] = ()
    """What differs where its checkpoint was saved anew (`checkpoint_version`)."""
    users: int = 0
    """Requests that have it in their hands; while there are any, its engines go on."""
    examples: tuple[str, ...] = ()
    """Prompts that the page offers."""
    probe: StateProbe | None = None
    """What the page reads the state with, where the checkpoint has one."""

    @property
    def config(self) -> ModelConfig:
        return self.workers[0].transformer.config

    @property
    def failed(self) -> bool:
        """Whether no worker can go on."""
        return all(worker.engine.failed for worker in self.workers)

    @property
    def impaired(self) -> bool:
        """Whether some worker cannot go on."""
        return any(worker.engine.failed for worker in self.workers)

    @property
    def load(self) -> int:
        """Continuations that are decoded or wait."""
        return sum(worker.engine.load for worker in self.workers)

    @property
    def rows(self) -> int:
        """Continuations that are decoded at once."""
        return sum(worker.engine.rows for worker in self.workers if not worker.engine.failed)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """A block in which the model's engines are not stopped."""
        self.users += 1
        try:
            yield
        finally:
            self.users -= 1

    def start(self) -> None:
        """Start its engines, in the running loop."""
        for worker in self.workers:
            worker.engine.start()

    async def stop(self) -> None:
        """End its engines."""
        for worker in self.workers:
            await worker.engine.stop()
            worker.prefills.shutdown(wait=False, cancel_futures=True)

    def choose(self, request: Request) -> Worker:
        """The worker for a request, which has passed `ModelRegistry.admit`.

        Of those with a free row (of all, where none has one) the one that knows most of its prompt's beginning; of
        several the least busy. One whose engine is made anew gets a request only where no other goes on.
        """
        left = [worker for worker in self.workers if not worker.engine.failed] or self.workers  # it failed just now
        going = [worker for worker in left if not worker.engine.replacing] or left
        free = [worker for worker in going if worker.engine.load < worker.engine.rows] or going
        if len(self.workers) == 1 or self.settings.prefixes == 0:
            return min(free, key=lambda worker: worker.engine.load)
        owner, tokens = request.owner, request.tokens
        shared = {worker: worker.recent.shared(owner, tokens) // WORTH_A_WORKER for worker in free}
        worker = min(free, key=lambda worker: (-shared[worker], worker.engine.load))
        worker.recent.add(owner, tokens)
        return worker

    def room(self, prompt_tokens: int) -> int | None:
        """How many tokens an answer may have behind a prompt; None: without end.

        One more than the context has left: the last token drawn is never fed back.
        """
        return None if self.config.unlimited_context else self.config.context + 1 - prompt_tokens


def model_length(config: ModelConfig) -> int | None:
    """Tokens of a prompt and its answer together; None: without end."""
    return None if config.unlimited_context else config.context


def summary(name: str, config: ModelConfig, settings: Settings) -> dict[str, Any]:
    """What the page shows of a model, ready for JSON."""
    memory = config.memory
    return {
        "id": name,
        "parameters": count_parameters(config)[0],
        "depth": config.depth,
        "width": config.width,
        "context": model_length(config),
        "vocabulary": config.vocab_size,
        "recurrent": memory.injection != "none",
        "injection": memory.injection,
        "projection": memory.projection if memory.injection in ("both", "key_value") else None,
        "prefill": settings.prefill,
    }


def load_served_model(
    path: Path,
    name: str,
    settings: Settings,
    limits: Limits,
    metrics: ServerMetrics,
    load: Loader = checkpoint.read,
    watched: Sequence[Path] = (),
) -> ServedModel:
    """Load a checkpoint to be served, by `load`; its engines are not started yet.

    watched: folders beside the checkpoint that are part of the model: it is another one where their files change.
    ValueError where it is damaged, settings do not fit, or examples of its text are asked for and the text is not
    there.
    """
    folder = checkpoint.check(path)  # which moves nothing: somebody may be saving
    version = checkpoint_version(path, watched)  # before it is loaded: what is saved meanwhile is seen as a change
    # One copy of the weights for each device, for two workers on it as well: engines only read them.
    loaded = {device: load(folder, device) for device in dict.fromkeys(settings.devices)}
    transformer, tokenizer = loaded[settings.devices[0]]
    tokenizer.decoder(())  # makes its table of bytes: the first request would make it in the event loop
    workers = tuple(
        create_worker(name, number, loaded[device][0], folder, settings, limits, metrics)
        for number, device in enumerate(settings.devices)
    )
    created = int((folder / "manifest.json").stat().st_mtime)
    template_name, template = choose_template(tokenizer, settings.template, folder)
    if settings.template is None and template_name == "plain":
        template = None  # nothing says that the model can chat
    weights, grammars = f"fp_{fingerprint(transformer)[:12]}", GrammarCompiler(tokenizer)
    grammars.prepare()  # now, as it would keep all other requests waiting
    model = ServedModel(name, tokenizer, workers, grammars, template, created, weights, settings, version)
    model.examples = example_prompts(path, folder, settings.held_out_examples)
    model.probe = usable_probe(folder, transformer)
    return model


def usable_probe(folder: Path, transformer: LatentRecurrentTransformer) -> StateProbe | None:
    """The probe of a checkpoint, if it has one.

    Left out, with a warning, where it is damaged, or a library that follows its state is missing.
    """
    try:
        probe = read_probe(folder, transformer)
        if probe is not None:
            STATE_KINDS[probe.kind].after("", [0])
    except ValueError as error:
        warn(f"{error}. Until then the page does not show the state")
        return None
    return probe


def create_worker(
    name: str,
    number: int,
    transformer: LatentRecurrentTransformer,
    folder: Path,
    settings: Settings,
    limits: Limits,
    metrics: ServerMetrics,
) -> Worker:
    """A worker for a model that is on its device."""
    calibration = cost_model.read_calibration(folder, transformer)
    threads = torch.get_num_threads()  # set in the thread itself: OpenMP keeps the number per thread
    device = transformer.embedding.weight.device

    def begin_thread() -> None:
        torch.set_num_threads(threads)
        use_device(device)

    prefills = ThreadPoolExecutor(1, f"prefill of {name} {number}", begin_thread)

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

    engine = AsyncEngine(name, number, make_engine, begin_thread, metrics, limits.queue_seconds)
    return Worker(transformer, engine, prefills)


def checkpoint_version(path: Path, watched: Sequence[Path] = ()) -> tuple[object, ...]:
    """What differs where a checkpoint, what is BESIDE it, or a file of a watched folder, was saved anew.

    OSError where there is no checkpoint.
    """
    folder = checkpoint.locate(path)
    files = [
        folder / "manifest.json",
        *(folder / name for name in BESIDE if (folder / name).exists()),
        *sorted(file for folder in watched for file in folder.iterdir()),
    ]
    return tuple((str(file), status.st_mtime_ns, status.st_size) for file in files for status in [file.stat()])


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
