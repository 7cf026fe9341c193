"""What the page asks for beyond OpenAI's interface: tokens with their surprisal as they come, and what memory did.

The measurements are those of `lrt diagnose`: live scores, with the memory zeroed or replaced by the last embedding,
gates, and how large the injections are. They run in a thread beside the engines'.
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

from lrt.data.tokenizer import Stream
from lrt.eval.ablations import ablate
from lrt.eval.memory_stats import memory_by_token
from lrt.eval.scoring import score
from lrt.inference.request import Event, Request
from lrt.inference.sampling import Sampling
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.serve.async_engine import Done
from lrt.serve.body import off_loop
from lrt.serve.config import Limits
from lrt.serve.detokenizer import display_token
from lrt.serve.errors import ApiError, ClientDisconnected, busy_error, shutdown_error
from lrt.serve.models import ServedModel
from lrt.serve.protocol import GenerateBody
from lrt.serve.registry import ModelRegistry
from lrt.serve.request_parsing import GenerationTask, encode_texts, fit_to_context
from lrt.serve.responses import RunningTask, run_generation, sse, watch_disconnect

ALTERNATIVES = 5
"""Likeliest tokens that are shown of each position."""
BITS_PER_NAT = 1 / math.log(2)
MAX_INSPECTIONS = 8
"""Inspections at once, of which one is at work."""
DIGITS = 4
"""Of numbers that are sent: significant ones below 1, decimals above."""


class Cancelled(Exception):
    """Nobody waits for an inspection any more."""


def parse_generation(body: GenerateBody, model: ServedModel, limits: Limits) -> GenerationTask:
    """What the page's form asks for. ApiError 400 where it cannot be served."""
    # top_p = 0 leaves only the most likely token, as a temperature of 0 does.
    sampling = Sampling(body.temperature if body.top_p else 0.0, top_p=body.top_p or 1.0)
    bos = model.tokenizer.bos
    request = Request(
        (bos, *encode_texts(model, [body.prompt])[0]),
        sampling=sampling,
        seed=body.seed,
        stop=frozenset({bos}),
        logprobs=min(ALTERNATIVES, model.config.vocab_size),
        prefill=body.prefill,
    )
    request = fit_to_context(request, body.max_tokens, model, limits)
    return GenerationTask(model, (request,), (), 1, stream=True)


async def stream_generation(task: GenerationTask, registry: ModelRegistry, http: HttpRequest) -> AsyncIterator[str]:
    """Server-sent events: `prompt` (its tokens), `prefill`, `token`s, `end`; or `error`."""
    (request,) = task.requests
    decoder = task.model.tokenizer.decoder()
    try:
        async with run_generation(task, registry, http) as run:
            yield await off_loop(len(request.tokens), prompt_event, request, decoder)
            async for event in request_events(run):
                if event.certificate is not None:
                    yield sse({"type": "prefill", **json_number(event.certificate.to_dict())})
                if event.token is not None and event.logprob is not None:
                    text = "" if event.token in request.stop else decoder.push(event.token)
                    yield sse(token_event(task.model, event, text))
                if event.finish is not None:
                    yield sse({"type": "end", "finish": event.finish, "rest": decoder.finish()})
    except ClientDisconnected:
        return
    except ApiError as error:
        yield sse({"type": "error", **error.error})


def prompt_event(request: Request, decoder: Stream) -> str:
    """The tokens of a prompt and the text that each adds."""
    texts = [decoder.push(token) for token in request.tokens]
    return sse({"type": "prompt", "tokens": list(request.tokens), "texts": texts})


def token_event(model: ServedModel, event: Event, text: str) -> dict[str, Any]:
    """A token, its surprisal in bits, and the likeliest tokens with their probabilities."""
    assert event.logprob is not None
    return {
        "type": "token",
        "token": event.token,
        "text": text,
        "bits": round(-event.logprob.logprob * BITS_PER_NAT, DIGITS),
        "top": [
            [display_token(model.tokenizer.spelling(token)), round(math.exp(logprob), DIGITS)]
            for token, logprob in event.logprob.alternatives
        ],
    }


async def request_events(run: RunningTask) -> AsyncIterator[Event]:
    """The events of a task's one request, until it has ended. ApiError or ClientDisconnected ends it early."""
    while True:
        _, event = await run.events.get()
        if isinstance(event, Exception):
            raise event
        if isinstance(event, Done):
            return
        yield event


class MemoryInspector:
    """Where texts are inspected: one thread beside the engines', one text at a time."""

    def __init__(self, registry: ModelRegistry) -> None:
        threads = torch.get_num_threads()
        self.registry = registry
        self.pending = 0
        """Calls of `inspect` that wait for an answer."""
        # The number of threads is set in the thread itself: OpenMP keeps it per thread.
        self.executor = ThreadPoolExecutor(1, "inspection", lambda: torch.set_num_threads(threads))

    def close(self) -> None:
        """Drop what waits; what is at work ends by itself."""
        self.executor.shutdown(wait=False, cancel_futures=True)

    async def inspect(self, model: ServedModel, tokens: list[int], http: HttpRequest) -> dict[str, Any]:
        """What the memory did with a text.

        ApiError 400 where it is too long or no text of this model, 429 where too many wait, 503 where the server ends;
        ClientDisconnected where nobody waits for it.
        """
        self._admit(model, tokens)
        self.pending += 1
        disconnected = threading.Event()
        watch = asyncio.create_task(watch_disconnect(http, disconnected.set))
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self.executor, inspect_text, model, tokens, disconnected)
        except Cancelled:
            raise ClientDisconnected from None
        finally:
            disconnected.set()  # where this call is cancelled, nobody waits for the worker; else it has ended already
            watch.cancel()
            self.pending -= 1  # counts calls that wait: a worker without one ends before its next chunk of work

    def _admit(self, model: ServedModel, tokens: list[int]) -> None:
        """ApiError where a text cannot be inspected: its length, its tokens, a server that ends or is busy."""
        limit, config = self.registry.limits.inspect_tokens, model.config
        # The last token is scored and not read, so a text may have one more than the context.
        longest = limit if config.unlimited_context else min(limit, config.context + 1)
        if len(tokens) > longest:
            raise ApiError(
                400, f"the text has {len(tokens)} tokens, {longest} are looked into; shorten it", param="tokens"
            )
        if max(tokens) >= config.vocab_size:
            message = f"token {max(tokens)} is not in the vocabulary of {config.vocab_size}"
            raise ApiError(400, message, param="tokens")
        if self.registry.draining:
            raise shutdown_error()
        if self.pending >= MAX_INSPECTIONS:
            raise busy_error(f"{self.pending} texts are looked into or wait; try again later")


def inspect_text(model: ServedModel, tokens: list[int], disconnected: threading.Event) -> dict[str, Any]:
    """Surprisals in bits of tokens 1…T-1, and what each of them read of the memory when it was predicted.

    `live`, and where the model recurs `zero` and `embedding`; `inside` as `memory_by_token` has it. All lists have
    one entry per predicted token: entry i belongs to token i + 1, and to the position before it, which predicts it.
    Where the checkpoint has a probe also `state` (`StateProbe.inspect`), whose entry i is of the state after token i.
    Raises Cancelled, between two chunks of work, once `disconnected` is set.
    """

    def check_connected(amount: float, text: str = "") -> None:
        if disconnected.is_set():
            raise Cancelled

    transformer, decoder = model.workers[0].transformer, model.tokenizer.decoder()
    row = torch.tensor([tokens], device=transformer.embedding.weight.device)

    def surprisals(variant: LatentRecurrentTransformer) -> list[float]:
        return score(variant, row, advance=check_connected)[0].mul(BITS_PER_NAT).tolist()

    bits = {"live": surprisals(transformer)}
    inspection: dict[str, Any] = {"texts": [decoder.push(token) for token in tokens], "bits": bits}
    if model.config.memory.injection != "none":
        for name in ("zero", "embedding"):
            bits[name] = surprisals(ablate(transformer, name))
        check_connected(0)
        inspection["inside"] = memory_by_token(transformer, row[:, :-1])
    if model.probe is not None:
        check_connected(0)
        readable = row if model.config.unlimited_context else row[:, : model.config.context]
        inspection["state"] = model.probe.inspect(transformer, readable, inspection["texts"])
    return json_number(inspection)


def json_number(value: Any) -> Any:
    """The same for JSON: numbers rounded to DIGITS, and null for what is no finite number."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return float(f"{value:.{DIGITS}g}") if abs(value) < 1 else round(value, DIGITS)
    if isinstance(value, dict):
        return {key: json_number(inner) for key, inner in value.items()}
    return [json_number(inner) for inner in value] if isinstance(value, list | tuple) else value
