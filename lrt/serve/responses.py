"""An Ask, carried out: the events of its requests become pieces of text, and these one answer or a stream of events."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

import torch
from starlette.requests import Request as HttpRequest

from lrt.inference.engine import log_probability
from lrt.inference.prefill import prefill
from lrt.inference.request import Event, Request
from lrt.serve.async_engine import Done, Ticket, WorkerEvent
from lrt.serve.detokenizer import Detokenizer, EmittedToken, TextDelta
from lrt.serve.errors import ApiError, too_long
from lrt.serve.models import ModelRegistry, ServedModel
from lrt.serve.openai_format import SHAPES, usage_of
from lrt.serve.protocol import ChatCompletion, TextCompletion
from lrt.serve.request_parsing import GenerationTask


class ClientDisconnected(Exception):
    """The client has gone away."""


class Running:
    """An Ask in the worker's hands. Left in whatever way, its rows are free."""

    def __init__(self, ask: GenerationTask, told: asyncio.Queue[Any]) -> None:
        self.ask, self.told = ask, told
        worker = ask.served.worker
        self.tickets = [worker.submit(request, told) for request in ask.requests]
        self.place = {ticket: i for i, ticket in enumerate(self.tickets)}
        decoder = ask.served.tokenizer.decoder
        self.writings = [
            [Detokenizer(decoder(request.tokens), ask.stops, ask.strip) for _ in range(request.samples)]
            for request in ask.requests
        ]
        self.over = [[False] * request.samples for request in ask.requests]
        self.reused = 0

    @property
    def drawn(self) -> int:
        """Tokens that belong to the answers."""
        return sum(writing.count for some in self.writings for writing in some)

    async def pieces(self) -> AsyncIterator[tuple[int, int, TextDelta, str | None]]:
        """(prompt, sample, what it lets out, and why it ended) until all have ended. ApiError or Gone ends it early."""
        left = len(self.tickets)
        while left:
            ticket, told = await self.told.get()
            if isinstance(told, Exception):
                raise told
            if isinstance(told, Done):
                left -= 1
                self.reused += told.completions[0].reused_tokens
                continue
            prompt = self.place[ticket]
            for piece, finish in self._heard(ticket, prompt, told):
                yield prompt, told.sample, piece, finish

    def _heard(self, ticket: Ticket, prompt: int, event: Event) -> list[tuple[TextDelta, str | None]]:
        if self.over[prompt][event.sample]:  # its stop string came; what was drawn since does not count
            return []
        writing, found = self.writings[prompt][event.sample], []
        if event.token is not None and event.token in ticket.request.stop:
            writing.stop_token()
        elif event.token is not None:
            found.append((writing.push(event.token, event.logprob), None))
        if found and found[0][0].ended:
            self.over[prompt][event.sample] = True
            if event.finish is None:
                self.ask.served.worker.cancel(ticket, event.sample)
            return [(found[0][0], "stop")]
        if event.finish is not None:
            self.over[prompt][event.sample] = True
            rest = writing.finish()
            found.append((rest, "stop" if rest.ended else event.finish))
        return found

    def leave(self) -> None:
        """Free the rows of what has not ended."""
        for ticket in self.tickets:
            self.ask.served.worker.cancel(ticket)


@asynccontextmanager
async def running(ask: GenerationTask, library: ModelRegistry, http: HttpRequest) -> AsyncIterator[Running]:
    """Submit, watch the client and the clock, and clean up."""
    library.admit(ask.served, ask.samples)
    told: asyncio.Queue[tuple[Ticket | None, WorkerEvent | Exception]] = asyncio.Queue()
    seconds = library.limits.request_seconds
    alarm = asyncio.get_running_loop().call_later(seconds, told.put_nowait, (None, too_long(seconds)))
    watch = asyncio.create_task(watch_disconnect(http, lambda: told.put_nowait((None, ClientDisconnected()))))
    work = Running(ask, told)
    try:
        yield work
    finally:
        work.leave()
        alarm.cancel()
        watch.cancel()
        with suppress(asyncio.CancelledError):
            await watch


async def watch_disconnect(http: HttpRequest, gone: Callable[[], None]) -> None:
    """Tell when the client has gone away."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
    gone()


async def full_response(
    ask: GenerationTask, library: ModelRegistry, http: HttpRequest
) -> TextCompletion | ChatCompletion:
    """The answer at once."""
    shape = SHAPES[ask.chat](ask, head(ask))
    async with running(ask, library, http) as work:
        prompts = await echo_prompt(ask)
        texts = [[[""] for _ in range(r.samples)] for r in ask.requests]
        spoken: list[list[list[EmittedToken]]] = [[[] for _ in range(r.samples)] for r in ask.requests]
        finish = [[""] * r.samples for r in ask.requests]
        async for prompt, sample, piece, why in work.pieces():
            texts[prompt][sample].append(piece.text)
            spoken[prompt][sample] += piece.spoken
            finish[prompt][sample] = why or finish[prompt][sample]
    choices = []
    for prompt in range(len(ask.requests)):
        for sample in best_samples(spoken[prompt], ask.kept):
            text = "".join(texts[prompt][sample])
            choices.append(
                shape.choice(len(choices), prompts[prompt], text, spoken[prompt][sample], finish[prompt][sample])
            )
    return shape.answer(choices, usage_of(ask, work.drawn, work.reused))


def best_samples(spoken: list[list[EmittedToken]], kept: int) -> list[int]:
    """Which samples are given, in order: all, or those whose tokens are most likely in the mean."""
    if kept == len(spoken):
        return list(range(kept))

    def mean(i: int) -> float:
        found = [s.logprob.logprob for s in spoken[i] if s.logprob is not None]
        return sum(found) / len(found) if found else 0.0

    return sorted(range(len(spoken)), key=lambda i: -mean(i))[:kept]


async def stream_response(ask: GenerationTask, library: ModelRegistry, http: HttpRequest) -> AsyncIterator[str]:
    """The answer as server-sent events, the first with the first token. ApiError before that; later it is an event of
    its own, the last."""
    shape, begun = SHAPES[ask.chat](ask, head(ask)), False
    try:
        async with running(ask, library, http) as work:
            prompts = await echo_prompt(ask)
            async for prompt, sample, piece, why in work.pieces():
                for index in range(0 if begun else ask.samples):
                    if opening := shape.opening(index, prompts[index // ask.kept]):
                        yield sse(opening)
                begun = True
                for chunk in shape.chunks(prompt * ask.kept + sample, prompts[prompt], piece, why):
                    yield sse(chunk)
            if ask.usage:
                yield sse(shape.chunk([], usage_of(ask, work.drawn, work.reused)))
            yield "data: [DONE]\n\n"
    except ApiError as error:
        if not begun:
            raise
        yield sse(error.body)
    except ClientDisconnected:
        return


async def echo_prompt(ask: GenerationTask) -> list[TextDelta]:
    """By prompt, what stands before the answer: its text and, where they are asked for, its tokens' scores."""
    if not ask.echo:
        return [TextDelta("", ())] * len(ask.requests)
    found = []
    for request in ask.requests:
        text = ask.served.tokenizer.decode(request.tokens)
        scores = await prompt_scores(ask.served, request, ask.bare) if ask.scores else ()
        found.append(TextDelta(text, tuple(scores)))
    return found


def head(ask: GenerationTask) -> dict[str, Any]:
    """What every chunk of an answer begins with."""
    kind = "chatcmpl" if ask.chat else "cmpl"
    return {
        "id": f"{kind}-{secrets.token_hex(12)}",
        "created": int(time.time()),
        "model": ask.served.name,
        "system_fingerprint": ask.served.fingerprint,
    }


def sse(data: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


CHUNK = 64
"""Positions whose logits are made at once."""


async def prompt_scores(served: ServedModel, request: Request, bare: bool) -> list[EmittedToken]:
    """One entry per token of the prompt. The first has no log-probability; `bare` leaves it out: nobody wrote it."""
    found = await served.worker.call(partial(score_prompt, served, request))
    return found[1:] if bare else found


@torch.no_grad()
def score_prompt(served: ServedModel, request: Request) -> list[EmittedToken]:
    """In the worker's thread: the entries of all tokens of the prompt."""
    model, tokens, alternatives = served.model, request.tokens, request.logprobs
    assert alternatives is not None
    spelling = served.tokenizer.decoder()
    found = [EmittedToken(tokens[0], None, 0)]
    offset = len(spelling.push(tokens[0]))
    if len(tokens) == 1:
        return found
    mode = request.prefill or served.settings.prefill
    row = torch.tensor([tokens[:-1]], device=model.embedding.weight.device)
    done = prefill(
        model, row, model.empty_state(1, len(tokens) - 1), mode, calibration=served.worker.engine.calibration
    )
    for begin in range(0, len(tokens) - 1, CHUNK):
        for logits in model.logits(done.sequence[0, begin : begin + CHUNK]):
            token = tokens[len(found)]
            found.append(EmittedToken(token, log_probability(logits, token, alternatives), offset))
            offset += len(spelling.push(token))
    return found
