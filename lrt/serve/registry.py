"""All models of a server: which there are, which are loaded, and how they come and go while requests run.

A model that is taken away, or whose checkpoint was saved anew, answers the requests that have it in their hands to
their end; new ones meet what stands under its name now. Everything here is of the event loop but the loading itself.
"""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal, NamedTuple

from lrt.model import checkpoint
from lrt.model.config import ModelConfig
from lrt.serve.config import Limits, Settings
from lrt.serve.errors import (
    ApiError,
    busy_error,
    lasting_error,
    load_error,
    shutdown_error,
    unknown_model_error,
)
from lrt.serve.examples import example_prompts
from lrt.serve.metrics import ServerMetrics
from lrt.serve.models import Loader, ServedModel, checkpoint_version, folder_name, load_served_model

LOG = logging.getLogger("lrt.serve")
PROVIDERS = frozenset(
    {"openai", "text-completion-openai", "custom_openai", "hosted_vllm", "vllm", "litellm_proxy", "lrt"}
)
"""What clients of several services put before a model's name, with a slash, to say how it is asked."""
LOOK_SECONDS = 0.05
"""How often it is looked whether the last request of a model that was taken away has ended."""


LoadOutcome = Literal["loaded", "unchanged"]


class Listed(NamedTuple):
    """A model that can be asked for, loaded or not."""

    name: str
    config: ModelConfig
    created: int
    """Seconds since 1970."""
    examples: tuple[str, ...]
    """Prompts that the page offers; of a model that is not loaded none of its own text."""


class ModelRegistry:
    """All models of a server, and whether it still takes requests."""

    def __init__(
        self,
        checkpoints: Mapping[str, Path],
        settings: Settings,
        limits: Limits,
        metrics: ServerMetrics,
        models_dir: Path | None = None,
        load: Loader = checkpoint.read,
        watched: Sequence[Path] = (),
    ) -> None:
        """Loads `checkpoints`, which are by name.

        models_dir: a folder of checkpoints, each of which is loaded when it is first asked for. load, watched: as
        `load_served_model` has them. ValueError where a checkpoint is damaged, there is none at all,
        or models_dir is one itself.
        """
        self.checkpoints, self.models_dir = dict(checkpoints), models_dir
        self.settings, self.limits, self.metrics = settings, limits, metrics
        self.loader, self.watched = load, watched
        self.secured = False
        """Whether clients with a token may load and unload; `create_app` sets it."""
        self.draining = False
        """No new requests are taken."""
        for path in self.checkpoints.values():
            checkpoint.verify(path)  # undoes a save that was cut off; later, somebody may be saving
        self._configs: dict[Path, tuple[tuple[object, ...], ModelConfig | None]] = {}
        """By checkpoint, its version and what its configuration was then."""
        self._warnings: set[str] = set()
        """What was logged, and need not be again."""
        if models_dir is not None and (models_dir / "manifest.json").exists():
            raise ValueError(f"{models_dir} is a checkpoint itself; give the folder that it lies in")
        if not self.available():
            raise ValueError(
                f"{models_dir} holds no checkpoint that can be served; give a folder whose folders are those of "
                "`lrt train`, each with a name of its own, or name a checkpoint beside it"
            )
        self.models = {name: self._make(path, name) for name, path in self.checkpoints.items()}
        """Those that are loaded."""
        self.retired: dict[ServedModel, asyncio.Task[None]] = {}
        """Models that were taken away and still answer, with what ends them."""
        self._loading = asyncio.Lock()
        self._loads: dict[asyncio.Task[LoadOutcome], str] = {}
        """Loads at work, with their models' names. They go on where the request that began one has gone away."""

    # --- the server's beginning and end ---------------------------------------------------------------------------

    def start(self) -> None:
        """Start the engines, in the running loop."""
        for model in self.models.values():
            model.start()

    async def stop(self) -> None:
        """End the engines."""
        for task in (*self._loads, *self.retired.values()):
            task.cancel()
        for model in (*self.models.values(), *self.retired):
            await model.stop()

    def drain(self) -> None:
        """Take no new requests."""
        self.draining = True

    def interrupt(self) -> None:
        """End all requests with an error: the server ends."""
        for model in (*self.models.values(), *self.retired):
            for worker in model.workers:
                worker.engine.interrupt(shutdown_error())

    # --- requests -------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def use(self, name: str) -> AsyncIterator[ServedModel]:
        """A block that has a model by name, loaded where it has to be. ApiError 404 where there is none, 503 or 500
        where it cannot be loaded."""
        name = self.plain_name(name)
        while name not in self.models:  # it may be unloaded again before this goes on
            at_work = next((task for task, loaded in self._loads.items() if loaded == name), None)
            await asyncio.shield(at_work or self._begin_load(name))
        with (model := self.find(name)).in_use():
            yield model

    def find(self, name: str) -> ServedModel:
        """A loaded model by name. ApiError 404 where there is none."""
        name = self.plain_name(name)
        if name not in self.models:
            raise unknown_model_error([*self.models])
        return self.models[name]

    def plain_name(self, name: str) -> str:
        """A name without the prefixes of providers, where no model has the longer one."""
        provider, slash, rest = name.partition("/")
        while slash and provider in PROVIDERS and name not in self.models:
            name = rest
            provider, slash, rest = name.partition("/")
        return name

    def admit(self, model: ServedModel, samples: int) -> None:
        """ApiError 429 or 503 where a model cannot take so many more continuations."""
        if self.draining:
            raise shutdown_error()
        if model.failed:
            way_out = (
                "POST it to /v1/models/load"
                if self.secured
                else "it works again when the server is started anew, or gets SIGHUP"
            )
            raise lasting_error(f"the model has failed; {way_out}", "model_failed")
        if model.load + samples > model.rows + self.limits.queue:
            raise busy_error(
                f"{model.load} continuations are decoded or wait, and {samples} more exceed the "
                f"{model.rows} rows and {self.limits.queue} places in the queue; try again later"
            )

    # --- which there are ------------------------------------------------------------------------------------------

    def available(self) -> dict[str, Path]:
        """Checkpoints by name: those that were named, then those that lie in `models_dir` now.

        Of several there that have one name none is served, which is logged once.
        """
        by_name: dict[str, list[Path]] = {}
        for path in self._folders():
            if path.is_dir() and not path.name.startswith(".") and self.config(path) is not None:
                by_name.setdefault(folder_name(path), []).append(path)
        others = {name: paths for name, paths in by_name.items() if name not in self.checkpoints}
        for name, paths in others.items():
            if len(paths) > 1:
                folders = " and ".join(path.name for path in paths)
                self._warn_once(f"{folders} in {self.models_dir} are all called {name}; rename them, as none is served")
        return self.checkpoints | {name: paths[0] for name, paths in others.items() if len(paths) == 1}

    def _folders(self) -> list[Path]:
        """What lies in `models_dir`; nothing where that cannot be read, which is logged once."""
        try:
            return [] if self.models_dir is None else sorted(self.models_dir.iterdir())
        except OSError as error:
            self._warn_once(f"the folder of models cannot be read: {error}")
            return []

    def _warn_once(self, message: str) -> None:
        if message not in self._warnings:
            self._warnings.add(message)
            LOG.warning(message)

    def config(self, path: Path) -> ModelConfig | None:
        """The configuration of a checkpoint; None where the folder is none, or none that can be read, which is logged
        once."""
        try:
            version = checkpoint_version(path)
        except OSError:  # it has no manifest
            return None
        if path not in self._configs or self._configs[path][0] != version:
            try:
                config = checkpoint.read_config(path)
            except (ValueError, OSError) as error:
                LOG.warning("a checkpoint is not served: %s", error)
                config = None
            self._configs[path] = version, config
        return self._configs[path][1]

    async def listed(self) -> list[Listed]:
        """Every model that can be asked for, one that is loaded also where its checkpoint is gone."""
        return await asyncio.to_thread(self._listed, dict(self.models))

    def _listed(self, loaded: dict[str, ServedModel]) -> list[Listed]:
        listed = []
        available = self.available()
        for name in {**available, **loaded}:
            if name in loaded:
                model = loaded[name]
                listed.append(Listed(name, model.config, model.created, model.examples))
            elif (entry := self._waiting(name, available[name])) is not None:
                listed.append(entry)
        return listed

    def _waiting(self, name: str, path: Path) -> Listed | None:
        """What is listed of a checkpoint that is not loaded; None where there is none any more."""
        config = self.config(path)
        if config is None:
            return None
        try:
            folder = checkpoint.locate(path)
            created = int((folder / "manifest.json").stat().st_mtime)
            return Listed(name, config, created, example_prompts(path, folder, held_out=False))
        except (OSError, ValueError) as error:  # it was saved anew, or taken away, just now
            LOG.warning("%s is not listed: %s", name, error)
            return None

    # --- coming and going -----------------------------------------------------------------------------------------

    async def load(self, name: str) -> LoadOutcome:
        """See that a model is loaded as its checkpoint is now, and works; requests that have an older one keep that.

        ApiError 404 where there is none, 503 where too many are loaded, 500 where it cannot be loaded: then what was
        there goes on. It goes on where its caller is cancelled.
        """
        return await asyncio.shield(self._begin_load(self.plain_name(name)))

    def _begin_load(self, name: str) -> asyncio.Task[LoadOutcome]:
        task = asyncio.get_running_loop().create_task(self._load(name))
        self._loads[task] = name
        task.add_done_callback(self._end_load)
        return task

    def _end_load(self, task: asyncio.Task[LoadOutcome]) -> None:
        del self._loads[task]
        if not task.cancelled():
            task.exception()  # nobody may be left to hear of it, and asyncio would report that

    async def _load(self, name: str) -> LoadOutcome:
        path = await self._path(name)
        async with self._loading:  # one at a time: a second request for it finds it loaded
            present = self.models.get(name)
            if self.draining:
                raise shutdown_error()
            if present is None and len(self.models) >= max(self.limits.models, len(self.checkpoints)):
                way_out = "or POST one to /v1/models/unload" if self.secured else "or have the server's limit raised"
                message = (
                    f"{len(self.models)} models are loaded, as many as this server holds (--limits.models); "
                    f"use {', '.join(self.models)}, {way_out}"
                )
                raise lasting_error(message, "too_many_models")
            try:
                version = await asyncio.to_thread(checkpoint_version, path, self.watched)
                if present is not None and present.version == version and not present.impaired:
                    return "unchanged"
                model = await asyncio.to_thread(self._make, path, name)
            except Exception:
                LOG.exception("%s cannot be loaded", name)
                raise load_error(name) from None
            model.start()
            self.models[name] = model
            if present is not None:
                self._retire(present)
        return "loaded"

    async def unload(self, name: str) -> None:
        """Take a model out of memory when its requests have ended; the next request loads it again. ApiError 404."""
        name = self.plain_name(name)
        if name not in self.models:  # its checkpoint may be gone
            await self._path(name)
        async with self._loading:
            model = self.models.pop(name, None)
            if model is not None:
                self.metrics.forget(name, len(model.workers))
                self._retire(model)

    async def reload(self) -> None:
        """Load all models anew whose checkpoints have changed; what cannot be loaded goes on as it is."""
        for name in list(self.models):
            try:
                LOG.warning("%s: %s", name, await self.load(name))
            except (ApiError, OSError) as error:
                LOG.warning("%s: %s", name, error)

    async def _path(self, name: str) -> Path:
        """Where a model's checkpoint is. ApiError 404 where there is none."""
        available = await asyncio.to_thread(self.available)
        if name not in available:
            raise unknown_model_error([*available])
        return available[name]

    def _make(self, path: Path, name: str) -> ServedModel:
        return load_served_model(path, name, self.settings, self.limits, self.metrics, self.loader, self.watched)

    def _retire(self, model: ServedModel) -> None:
        """End a model's engines after its last request."""
        self.retired[model] = asyncio.get_running_loop().create_task(self._end(model))

    async def _end(self, model: ServedModel) -> None:
        while model.users:
            await asyncio.sleep(LOOK_SECONDS)
        await model.stop()
        del self.retired[model], model
        collect_garbage()


def collect_garbage() -> None:
    """Free what holds itself, as decoders and their weights do, also of what `lrt serve` froze when it began.

    All threads wait for it.
    """
    frozen = gc.get_freeze_count() > 0
    gc.unfreeze()
    gc.collect()
    if frozen:
        gc.freeze()
