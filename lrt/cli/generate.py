"""`lrt sample` and `lrt chat`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from lrt.cli.loading import load_model
from lrt.cli.options import DecodeMode, Prefill

if TYPE_CHECKING:
    from lrt.data.tokenizer import Stream, Tokenizer
    from lrt.inference.chat import Conversation
    from lrt.inference.request import Event

ROWS = 32
"""Continuations that are decoded at once."""
MOST = 100_000
"""Continuations of a prompt: each is kept until it is printed."""


@dataclass(frozen=True)
class Sample:
    """Continue prompts, token by token, with true recurrence; several at once."""

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint folder, or a run's."""
    adapter: Path | None = None
    """An adapter of `lrt finetune --lora`, made for this model."""
    prompt: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT…")] = ("",)
    """What to continue; empty starts a document. Several, of any lengths, are continued at once."""
    n: int = 1
    """Continuations of each prompt, which is computed once; the i-th is drawn with --seed + i."""
    max_new_tokens: int | None = None
    """How many tokens; None goes on to the end of the context (without end where every layer slides)."""
    temperature: float = 0.8
    """0 takes the most likely token."""
    top_k: int | None = None
    """Draw among the k most likely tokens."""
    top_p: float | None = 0.95
    """Draw among the fewest tokens whose probability reaches p."""
    seed: int = 0
    """Equal seeds give equal text, whatever else is continued beside it."""
    prefill: Prefill = "converged"
    """How prompts are computed: token by token, or in parallel until converged (1e-5), fast (1e-3), or one sweep."""
    mode: DecodeMode = "fused"
    """Which path decodes. compiled takes a while to compile; best measures all."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""

    def run(self) -> None:
        from lrt.inference import cost_model
        from lrt.inference.engine import Engine
        from lrt.inference.request import Request
        from lrt.inference.sampling import Sampling
        from lrt.model import checkpoint
        from lrt.utils.device import choose_device

        sampling = Sampling(self.temperature, self.top_k, self.top_p)
        if len(self.prompt) == 0:
            raise ValueError("--prompt names no text; give at least one, or leave it out")
        if not 1 <= self.n <= MOST:
            raise ValueError(f"n is {self.n}; it must be 1 to {MOST:,}")
        folder = checkpoint.verify(self.checkpoint)
        model, tokenizer = load_model(folder, choose_device(self.device), self.adapter)
        prompts = [(tokenizer.bos, *tokenizer.encode(text)) for text in self.prompt]
        requests = [
            Request(ids, self.max_new_tokens, sampling, self.seed, self.n, frozenset({tokenizer.bos}))
            for ids in prompts
        ]
        slots = model.config.context
        for request in requests:  # before any work
            request.check(model.config, slots)
        if self.max_new_tokens is not None:  # no more slots than needed
            slots = min(slots, max(len(ids) for ids in prompts) + max(1, self.max_new_tokens))
        engine = Engine(
            model,
            rows=min(ROWS, self.n * len(requests)),
            slots=None if model.config.unlimited_context else slots,
            mode=self.mode,
            prefill=self.prefill,
            calibration=cost_model.read_calibration(folder, model),
        )
        printer = TextPrinter(tokenizer, list(zip(self.prompt, prompts, strict=True)), self.n)
        for request in requests:
            engine.submit(request)
        while not engine.idle:
            for event in engine.step():
                printer.write(event)


class TextPrinter:
    """Several texts that grow at once, written one after another: the first unfinished one as it comes.

    Texts are named by (request, sample), as events are.
    """

    def __init__(self, tokenizer: Tokenizer, prompts: list[tuple[str, tuple[int, ...]]], samples: int) -> None:
        self.order = [(request, sample) for request in range(len(prompts)) for sample in range(samples)]
        self.streams: dict[tuple[int, int], Stream] = {key: tokenizer.decoder(prompts[key[0]][1]) for key in self.order}
        self.pending: dict[tuple[int, int], list[str]] = {key: [prompts[key[0]][0]] for key in self.order}
        self.ended: set[tuple[int, int]] = set()
        self.current = 0
        """The place, in `order`, of the text that is being written."""
        self._open()

    def write(self, event: Event) -> None:
        """Write what an event adds, now or when its text's turn comes."""
        key = (event.request, event.sample)
        if event.token is not None:
            self.pending[key].append(self.streams[key].push(event.token))
        if event.finish is not None:
            self.pending[key].append(self.streams[key].finish() + "\n")
            self.ended.add(key)
        self._flush()

    def _open(self) -> None:
        if len(self.order) > 1:
            prompt, sample = self.order[self.current]
            sys.stdout.write(f"--- prompt {prompt + 1}, sample {sample + 1}\n")
        self._flush()

    def _flush(self) -> None:
        key = self.order[self.current]
        sys.stdout.write("".join(self.pending[key]))
        sys.stdout.flush()
        self.pending[key].clear()
        if key in self.ended and self.current + 1 < len(self.order):
            self.current += 1
            self._open()


@dataclass(frozen=True)
class Chat:
    """Talk with a model, turn by turn. /undo takes a turn back, /save and /load FOLDER keep it, /exit ends."""

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint folder, or a run's."""
    adapter: Path | None = None
    """An adapter of `lrt finetune --lora`, made for this model."""
    template: str | None = None
    """How turns are written: nanochat, chatml or plain. None: by the checkpoint's own chat template, if its folder has
    one, else by the tokenizer's special tokens, else plain."""
    max_new_tokens: int = 256
    """Tokens of an answer at most."""
    temperature: float = 0.8
    """0 takes the most likely token."""
    top_k: int | None = None
    """Draw among the k most likely tokens."""
    top_p: float | None = 0.95
    """Draw among the fewest tokens whose probability reaches p."""
    seed: int = 0
    """Equal seeds and turns give equal answers."""
    prefill: Prefill = "converged"
    """How your text is computed."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""

    def run(self) -> None:
        from lrt.inference import cost_model
        from lrt.inference.chat import Conversation
        from lrt.inference.sampling import Sampling
        from lrt.model import checkpoint
        from lrt.utils.device import choose_device

        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        sampling = Sampling(self.temperature, self.top_k, self.top_p)
        folder = checkpoint.verify(self.checkpoint)
        model, tokenizer = load_model(folder, choose_device(self.device), self.adapter)
        calibration = cost_model.read_calibration(folder, model)
        chat = Conversation(model, tokenizer, sampling, self.seed, self.template, self.prefill, calibration, folder)
        if sys.stdin.isatty():
            print(f"template {chat.name}; /undo, /save FOLDER, /load FOLDER, /exit")
        while True:
            if sys.stdin.isatty():
                print("> ", end="", flush=True)
            line = sys.stdin.readline()
            if not line or line.strip() == "/exit":
                return
            try:
                self.handle_line(chat, line.strip())
            except (ValueError, OSError) as error:  # the conversation goes on
                print(f"lrt: {error}", file=sys.stderr)

    def handle_line(self, chat: Conversation, line: str) -> None:
        """A command, or the user's text of a turn. ValueError or OSError where it cannot be carried out."""
        verb, _, rest = line.partition(" ")
        if verb == "/undo":
            chat.undo()
            print(f"{len(chat.turns)} turns left")
        elif verb in ("/save", "/load"):
            if rest == "":
                raise ValueError(f"{verb} needs a folder: {verb} FOLDER")
            (chat.save if verb == "/save" else chat.load)(Path(rest))
            print(f"{rest}: {len(chat.turns)} turns")
        elif line.startswith("/"):
            raise ValueError(f"unknown command {verb}; use /undo, /save FOLDER, /load FOLDER or /exit")
        elif line:
            chat.say(line, self.max_new_tokens, lambda piece: print(piece, end="", flush=True))
            print()
