"""Small checkpoints, and servers in a thread, for the tests of `lrt serve`."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import tokenizers
import torch
from tokenizers import AddedToken

from lrt import LatentRecurrentTransformer, MemoryConfig, ModelConfig
from lrt.cli.main import main
from lrt.data.tokenizer import Tokenizer
from lrt.model import checkpoint
from lrt.serve.app import create_app
from lrt.serve.config import Limits, Settings
from lrt.serve.metrics import ServerMetrics
from lrt.serve.models import model_names
from lrt.serve.registry import ModelRegistry
from lrt.serve.server import Server, create_server

CHATML = ("<|im_start|>", "<|im_end|>")
TEXT = "User: hello there, naïve café 漢字かな 🙂🙃\nAssistant: the end of it all\n"
EXACT = Settings(rows=6, prefill="exact")


def saved(
    folder: Path, *special: str, seed: int = 0, vocab_size: int = 300, corpus: str = "mine", **fields: Any
) -> Path:
    """A checkpoint of a random model that writes all kinds of bytes."""
    inner = tokenizers.Tokenizer.from_str(Tokenizer.train([TEXT] * 3, vocab_size).to_json())
    inner.add_special_tokens([AddedToken(name, special=True) for name in special])
    words = Tokenizer(inner)
    torch.manual_seed(seed)
    fields = {"depth": 2, "width": 16, "heads": 2, "context": 256, "memory": MemoryConfig()} | fields
    model = LatentRecurrentTransformer(ModelConfig(vocab_size=words.vocab_size, **fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    checkpoint.save(folder, model, words, {"corpus": corpus})
    return folder


@dataclass
class Live:
    """A server that runs."""

    url: str
    registry: ModelRegistry
    server: Server

    def client(self, key: str = "none", **fields: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60, **fields)

    def idle(self, seconds: float = 10.0) -> bool:
        """Whether, soon, no row is in use and nobody is counted any more."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            models = [*self.registry.models.values(), *self.registry.retired]
            engines = [worker.engine for model in models for worker in model.workers]
            if all(e.engine.idle and e.engine.rows.used == 0 and e.load == 0 and not e._submissions for e in engines):
                return True
            time.sleep(0.02)
        return False


@contextmanager
def live(
    *paths: Path,
    settings: Settings = EXACT,
    limits: Limits | None = None,
    tokens: Sequence[str] = (),
    hosts: Any = None,
    origins: Sequence[str] = (),
    models_dir: Path | None = None,
) -> Iterator[Live]:
    """A server over checkpoints, in a thread of this process, on a port of its own."""
    named = dict(zip(model_names(paths), paths, strict=True))
    registry = ModelRegistry(named, settings, limits or Limits(), ServerMetrics(), models_dir)
    running = create_server(create_app(registry, tokens, hosts, origins), registry, "127.0.0.1", 0)
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = running.servers[0].sockets[0].getsockname()[1]
    try:
        yield Live(f"http://127.0.0.1:{port}", registry, running)
    finally:
        running.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


def sample(capsys: Any, path: Path, prompt: str, seed: int, tokens: int, *more: str) -> str:
    """What `lrt sample` continues a prompt with."""
    capsys.readouterr()
    main(
        ["sample", str(path), "--prompt", prompt, "--seed", str(seed), "--max-new-tokens", str(tokens),
         "--temperature", "1", "--top-p", "1", "--prefill", "exact", "--device", "cpu", *more]
    )  # fmt: skip
    return capsys.readouterr().out.removeprefix(prompt).removesuffix("\n")
