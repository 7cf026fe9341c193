"""What the page asks for beyond OpenAI's interface: tokens with their surprisal as they come, and what memory did.

The measurements are those of `lrt diagnose`: live scores, with the memory zeroed or replaced by the last embedding,
gates, and how large the injections are.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from starlette.requests import Request as HttpRequest

from lrt.eval.ablations import ablate
from lrt.eval.memory_stats import memory_by_token
from lrt.eval.scoring import score
from lrt.inference.request import Event, Request
from lrt.inference.sampling import Sampling
from lrt.serve.async_engine import Done
from lrt.serve.detokenizer import displayed
from lrt.serve.errors import ApiError, busy, shutting_down
from lrt.serve.models import ModelRegistry, ServedModel
from lrt.serve.protocol import GenerateBody
from lrt.serve.request_parsing import GenerationTask, encode_text, fit_to_context
from lrt.serve.responses import ClientDisconnected, Running, running, sse, watch_disconnect

ALTERNATIVES = 5
BIT = 1 / math.log(2)
WAITING = 8
"""Inspections at once, of which one is at work."""
DIGITS = 4


class Cancelled(Exception):
    """Nobody waits for an inspection any more."""


async def parse_inspection(body: GenerateBody, served: ServedModel, library: ModelRegistry) -> GenerationTask:
    """What the page's form asks for."""
    sampling = Sampling(body.temperature if body.top_p else 0.0, top_p=body.top_p or 1.0)
    bos = served.tokenizer.bos
    request = Request(
        (bos, *await encode_text(served, body.prompt)),
        sampling=sampling,
        seed=body.seed,
        stop=frozenset({bos}),
        logprobs=min(ALTERNATIVES, served.model.config.vocab_size),
        prefill=body.prefill,
    )
    request = fit_to_context(request, body.max_tokens, served, library.limits)
    return GenerationTask(served, (request,), (), 1, stream=True)


async def generate_text(ask: GenerationTask, library: ModelRegistry, http: HttpRequest) -> AsyncIterator[str]:
    """Server-sent events: `prompt` (its tokens), `prefill`, `token`s, `end`; or `error`."""
    (request,), tokenizer = ask.requests, ask.served.tokenizer
    try:
        async with running(ask, library, http) as work:
            decoder = tokenizer.decoder()
            texts = [decoder.push(token) for token in request.tokens]
            yield sse({"type": "prompt", "tokens": list(request.tokens), "texts": texts})
            async for event in events(work):
                if event.certificate is not None:
                    yield sse({"type": "prefill", **json_number(event.certificate.to_dict())})
                if event.token is not None and event.logprob is not None:
                    yield sse(
                        {
                            "type": "token",
                            "token": event.token,
                            "text": "" if event.token in request.stop else decoder.push(event.token),
                            "bits": round(-event.logprob.logprob * BIT, DIGITS),
                            "top": [
                                [displayed(tokenizer.spelling(t)), round(math.exp(v), DIGITS)]
                                for t, v in event.logprob.alternatives
                            ],
                        }
                    )
                if event.finish is not None:
                    yield sse({"type": "end", "finish": event.finish, "rest": decoder.finish()})
    except ApiError as error:
        yield sse({"type": "error", **error.error})
    except ClientDisconnected:
        return


async def events(work: Running) -> AsyncIterator[Event]:
    """The events of its one request."""
    while True:
        _, told = await work.told.get()
        if isinstance(told, Exception):
            raise told
        if isinstance(told, Done):
            return
        yield told


class MemoryInspector:
    """Where texts are looked into: one thread beside the workers, one text at a time."""

    def __init__(self, library: ModelRegistry) -> None:
        threads = torch.get_num_threads()
        self.library, self.waiting = library, 0
        self.pool = ThreadPoolExecutor(1, "inspection", lambda: torch.set_num_threads(threads))

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)

    async def inspect(self, served: ServedModel, tokens: list[int], http: HttpRequest) -> dict[str, Any]:
        """What the memory did with a text. ApiError 400 where it is too long, 429 where too many wait."""
        limit, context = self.library.limits.inspect_tokens, served.model.config.context
        most = limit if served.model.config.unlimited_context else min(limit, context + 1)
        if len(tokens) > most:
            raise ApiError(
                400, f"the text has {len(tokens)} tokens, {most} are looked into; shorten it", param="tokens"
            )
        if max(tokens) >= served.model.config.vocab_size:
            size = served.model.config.vocab_size
            raise ApiError(400, f"token {max(tokens)} is not in the vocabulary of {size}", param="tokens")
        if self.library.ending:
            raise shutting_down()
        if self.waiting >= WAITING:
            raise busy(f"{self.waiting} texts are looked into or wait; try again later")
        self.waiting += 1
        gone = threading.Event()
        watch = asyncio.create_task(watch_disconnect(http, gone.set))
        try:
            return await asyncio.get_running_loop().run_in_executor(self.pool, inspect_text, served, tokens, gone)
        except Cancelled:
            raise ApiError(499, "the client has gone away") from None
        finally:
            gone.set()
            watch.cancel()
            self.waiting -= 1


def inspect_text(served: ServedModel, tokens: list[int], gone: threading.Event) -> dict[str, Any]:
    """Surprisals in bits of tokens 1…T-1, and what each of them read of the memory when it was predicted.

    `live`, and where the model recurs `zero` and `embedding`; `inside` as `memory_by_token` has it. All lists have
    one entry per predicted token: entry i belongs to token i + 1, and to the position before it, which predicts it.
    """

    def advance(amount: float, text: str = "") -> None:
        if gone.is_set():
            raise Cancelled

    model, tokenizer = served.model, served.tokenizer
    row = torch.tensor([tokens], device=model.embedding.weight.device)
    decoder = tokenizer.decoder()
    found: dict[str, Any] = {
        "texts": [decoder.push(token) for token in tokens],
        "bits": {"live": score(model, row, advance=advance)[0].mul(BIT).tolist()},
    }
    if model.config.memory.injection != "none":
        for name in ("zero", "embedding"):
            found["bits"][name] = score(ablate(model, name), row, advance=advance)[0].mul(BIT).tolist()
        advance(0)
        found["inside"] = memory_by_token(model, row[:, :-1])
    return json_number(found)


def json_number(value: Any) -> Any:
    """The same for JSON: rounded, and null for what is no finite number."""
    if isinstance(value, float):
        return (
            (float(f"{value:.{DIGITS}g}") if abs(value) < 1 else round(value, DIGITS)) if math.isfinite(value) else None
        )
    if isinstance(value, dict):
        return {key: json_number(inner) for key, inner in value.items()}
    return [json_number(inner) for inner in value] if isinstance(value, list | tuple) else value
