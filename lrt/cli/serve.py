"""`lrt serve`: checkpoints over HTTP. Imports nothing of the extra until it runs."""

from __future__ import annotations

import dataclasses
import gc
import ipaddress
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from lrt.cli.loading import is_retrofitted, load_model
from lrt.serve.config import Limits
from lrt.utils.imports import extra

if TYPE_CHECKING:
    import uvicorn

Hosts = tuple[str, ...] | None
"""Names that a request may call this server by; None: any."""
TRANSFORMERS_TAKES = ("checkpoints", "host", "port", "token_file", "api_key", "open", "device")
"""What holds for a retrofitted folder too, for which transformers' own server answers."""
SWITCH_SECONDS = 5e-5
"""How long a thread keeps the interpreter when another waits for it; Python's own default is a hundred times that.

torch gives the interpreter away for every operation, of which a token has hundreds. Beside a thread that is busy with
a large request each of them waits so long to get it back."""


@dataclass(frozen=True)
class Serve:
    """Serve checkpoints over HTTP: OpenAI's interface at /v1, and at / a page that shows what the memory does.

    Any OpenAI client works with base_url http://127.0.0.1:8000/v1. A token of an answer is the one that `lrt sample`
    draws with the same seed, whatever else is decoded beside it. SIGTERM or Ctrl-C ends it in an orderly way.
    """

    checkpoints: tyro.conf.Positional[tuple[Path, ...]]
    """Checkpoint folders, or runs'. Several are served by their names, and can be compared on the page. Or one
    retrofitted folder, which transformers' own server answers for, without a page. None are needed with --models-dir.
    """
    models_dir: Path | None = None
    """A folder of checkpoints, or of runs. Each is served by its folder's name, and loaded when it is first asked for.
    With a token, POST /v1/models/load and /v1/models/unload bring one into memory and take it out."""
    adapter: Path | None = None
    """An adapter of `lrt finetune --lora`, made for the one checkpoint that is served."""
    names: tuple[str, ...] = ()
    """What to call them. None: by their folders."""
    host: str = "127.0.0.1"
    """Address to listen on. Others than this machine's own need a token, or --open."""
    port: int = 8000
    """0 takes a free one."""
    token_file: Path | None = None
    """A file whose first line clients must send as their API key (Authorization: Bearer …)."""
    api_key: Annotated[tuple[str, ...], tyro.conf.arg(metavar="KEY…")] = ()
    """Keys of which clients must send one, as with --token-file. They show in this machine's list of processes;
    --token-file does not."""
    open: bool = False
    """Serve anybody who reaches the address, without a token."""
    allowed_origins: Annotated[tuple[str, ...], tyro.conf.arg(metavar="ORIGIN…")] = ()
    """Pages that may ask this server from a browser (CORS), such as https://chat.example; * stands for all."""
    rows: int = 16
    """Sequences of each model that are decoded at once, on each device; more requests wait in a queue."""
    prefill: Literal["exact", "converged", "fast", "one_sweep"] = "converged"
    """How prompts are computed: token by token among the others' tokens, or in parallel, one at a time, until converged
    (1e-5), fast (1e-3), or in one sweep. A request may say otherwise."""
    mode: Literal["eager", "fused", "packed", "compiled", "best"] = "fused"
    """Which path decodes. compiled takes a while to compile; best measures all."""
    prefixes: Annotated[int, tyro.conf.arg(metavar="MEGABYTES")] = 0
    """Memory per model and device for rows of earlier requests: prompts of the same key that begin like them, as a
    conversation's next turn does, start where they part."""
    template: str | None = None
    """How conversations are written: nanochat, chatml or plain. None: by the checkpoint's own chat template, if its
    folder has one, else by the tokenizer's special tokens; without any, /v1/chat/completions is refused."""
    examples: bool = False
    """Offer beginnings of the runs' own held-out documents as prompts on the page: whoever may ask can then read them.
    Without it the page offers prompts that are not of their text."""
    limits: Limits = dataclasses.field(default_factory=Limits)
    """What one request may cost, and all of them together."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    devices: Annotated[tuple[str, ...], tyro.conf.arg(metavar="DEVICE…")] = ()
    """Several devices, each with a copy of every model; a request goes to the one with the least to do, or, with
    --prefixes, to the one that knows the beginning of its prompt. None: --device alone."""

    def run(self) -> None:
        if len(self.checkpoints) == 0 and self.models_dir is None:
            raise ValueError("no checkpoint is given; name at least one folder of `lrt train`, or --models-dir")
        if not 0 <= self.port < 65536:
            raise ValueError(f"port is {self.port}; it must be 0 to 65535")
        tokens = self.read_tokens()
        for origin in self.allowed_origins:
            check_origin(origin)
        private = is_loopback(self.host)
        if not private and len(tokens) == 0 and (not self.open):
            raise ValueError(
                f"{self.host} can be reached from other machines; give --token-file FILE or --api-key KEY, or --open "
                "to serve anybody"
            )
        # Against DNS rebinding: a page could point a name of its own at this machine, and read what is served.
        hosts = ("localhost", "127.0.0.1", "::1", self.host) if private and len(tokens) == 0 else None
        if retrofitted := [folder for folder in self.checkpoints if is_retrofitted(folder)]:
            self.serve_retrofitted(retrofitted[0], tokens, hosts)
        else:
            self.serve_checkpoints(tokens, hosts)

    def read_tokens(self) -> list[str]:
        """What clients may send as their API key; empty for nothing. ValueError for what is too short to be a key."""
        for key in self.api_key:
            check_token(key, "--api-key")
        return [*self.api_key, *([] if self.token_file is None else [read_token(self.token_file)])]

    def serve_checkpoints(self, tokens: Sequence[str], hosts: Hosts) -> None:
        """Serve runs by the engine."""
        from lrt.utils.device import choose_device

        with extra("serve", "serve"):
            from lrt.serve.app import create_app
            from lrt.serve.config import Settings
            from lrt.serve.metrics import ServerMetrics
            from lrt.serve.models import model_names, summary
            from lrt.serve.registry import ModelRegistry
            from lrt.serve.server import create_server
        if self.adapter is not None and len(self.checkpoints) > 1:
            raise ValueError(f"--adapter fits one checkpoint, {len(self.checkpoints)} are given; serve that one alone")
        if self.adapter is not None and self.models_dir is not None:
            raise ValueError("--adapter fits one checkpoint, and --models-dir has others; serve that one alone")
        if self.models_dir is not None and not self.models_dir.is_dir():
            raise ValueError(f"{self.models_dir} is no folder; give one of checkpoints")
        if self.devices and self.device != "auto":
            raise ValueError(f"--device {self.device} and --devices exclude each other; give one of them")
        if self.rows < 1:
            raise ValueError(f"rows is {self.rows}; it must be at least 1")
        if self.prefixes < 0:
            raise ValueError(f"prefixes is {self.prefixes}; give 0 (keep none) or more megabytes")
        names = model_names(self.checkpoints, self.names)
        devices = tuple(choose_device(device) for device in self.devices or (self.device,))
        settings = Settings(
            self.rows, self.prefill, self.mode, self.prefixes * 10**6, self.template, devices, self.examples
        )
        registry = ModelRegistry(
            dict(zip(names, self.checkpoints, strict=True)),
            settings,
            self.limits,
            ServerMetrics(),
            self.models_dir,
            partial(load_model, adapter=self.adapter),
            () if self.adapter is None else (self.adapter,),
        )
        app = create_app(registry, tokens, hosts, self.allowed_origins)
        for name, path in registry.available().items():
            model, config = registry.models.get(name), registry.config(path)
            if model is not None:
                size = summary(name, model.config, settings)["parameters"]
                chat = "with chat" if model.template is not None else "no chat template"
                print(f"{name}: {size:,} parameters, {model.rows} rows, {chat}")
            elif config is not None:
                size = summary(name, config, settings)["parameters"]
                print(f"{name}: {size:,} parameters, loaded when it is first asked for")
        server = create_server(app, registry, self.host, self.port)
        # What stays for ever is not looked through again: torch's modules alone pause all threads for 0.3 seconds.
        gc.collect()
        gc.freeze()
        sys.setswitchinterval(SWITCH_SECONDS)
        self.run_server(server)

    def serve_retrofitted(self, folder: Path, tokens: Sequence[str], hosts: Hosts) -> None:
        """Serve a retrofitted folder by transformers' own server, behind the same guard."""
        fields = [field.name for field in dataclasses.fields(self) if field.name not in TRANSFORMERS_TAKES]
        plain = Serve(self.checkpoints)
        others = [f"--{name.replace('_', '-')}" for name in fields if vars(self)[name] != vars(plain)[name]]
        if len(self.checkpoints) > 1:
            others.append("other models beside it")
        if others:
            raise ValueError(
                f"{folder} is a retrofitted folder, which transformers' own server answers for; it takes no "
                f"{', no '.join(others)}: leave that out"
            )
        from lrt.utils.device import choose_device

        with extra("hf", "serve"):
            from lrt.integrations.retrofit.serving import ROUTES, transformers_app
        with extra("serve", "serve"):
            import uvicorn

            from lrt.serve.metrics import ServerMetrics
            from lrt.serve.middleware import RequestGuard
        app = transformers_app(folder, choose_device(self.device))
        guarded = RequestGuard(app, self.limits, ServerMetrics(), tokens, hosts, ROUTES)
        print(f"{folder}: by transformers' server, under this name", flush=True)
        self.run_server(uvicorn.Server(uvicorn.Config(guarded, self.host, self.port)))

    def run_server(self, server: uvicorn.Server) -> None:
        """Until it is stopped. ValueError where it cannot listen."""
        with suppress(SystemExit):  # uvicorn's, where it cannot listen
            server.run()
        if not server.started:
            raise ValueError(f"cannot listen on {self.host} port {self.port}; choose another with --port")


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_origin(origin: str) -> None:
    """ValueError where it is not what a browser calls a page's origin: scheme, host and port, without a path."""
    if origin != "*" and not re.fullmatch(r"https?://[\w.\-\[\]:]+", origin):
        raise ValueError(
            f"{origin} is no origin of pages; give scheme and host, as in https://chat.example or "
            "http://localhost:3000, without a path, or *"
        )


def read_token(file: Path) -> str:
    """The token in a file. ValueError where it is too short to be one."""
    lines = file.read_text(encoding="utf-8").splitlines()
    token = lines[0].strip() if lines else ""
    check_token(token, f"the first line of {file}")
    return token


def check_token(token: str, place: str) -> None:
    """ValueError, naming the place and not the token, where it is too short or no header can hold it."""
    if len(token) < 16 or not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError(
            f"{place} is no token; give at least 16 ASCII characters without spaces, for example from openssl rand "
            "-hex 32"
        )
