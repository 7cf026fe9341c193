"""A GenerationTask, carried out: the events of its requests become text, and this one answer or a stream of events."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import BaseModel
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lrt.inference.job import log_probability
from lrt.inference.prefill import prefill
from lrt.inference.request import Event, Request
from lrt.serve.async_engine import Done, Submission, WorkerEvent
from lrt.serve.body import off_loop
from lrt.serve.detokenizer import Detokenizer, EmittedToken, TextDelta
from lrt.serve.errors import ApiError, ClientDisconnected, grammar_error, timeout_error
from lrt.serve.models import ServedModel, Worker
from lrt.serve.openai_format import FORMATS, token_usage
from lrt.serve.registry import ModelRegistry
from lrt.serve.request_parsing import GenerationTask

SCORED_AT_ONCE = 64
"""Positions of a prompt whose logits are made at once."""
BYTES_PER_NUMBER = 8
"""What `off_loop` counts for each number of an answer: about 500 are written at once."""
PIECES = 4096
"""Of JSON, a number or a name each, that are sent at once."""


class RunningTask:
    """A task whose requests an engine has. Made and cancelled by `run_generation`."""

    def __init__(self, task: GenerationTask, events: asyncio.Queue[Any], detokenizers: list[list[Detokenizer]]) -> None:
        """detokenizers: by prompt and sample."""
        self.task, self.events, self.detokenizers = task, events, detokenizers
        self.workers: list[Worker] = []
        """By prompt, who computes it."""
        self.submissions: list[Submission] = []
        for request in task.requests:  # one by one, as each makes a worker busier
            self.workers.append(task.model.choose(request))
            self.submissions.append(self.workers[-1].engine.submit(request, events))
        self.prompt_indices = {submission: i for i, submission in enumerate(self.submissions)}
        self.ended = [[False] * request.samples for request in task.requests]
        """By prompt and sample: nothing more is shown of it."""

    @property
    def completion_tokens(self) -> int:
        """Tokens that belong to the answers."""
        return sum(detokenizer.token_count for samples in self.detokenizers for detokenizer in samples)

    async def deltas(self) -> AsyncIterator[tuple[int, int, TextDelta, str | None]]:
        """(prompt's index, sample, its new text, why it ended or None) until all samples have ended.

        ApiError or ClientDisconnected ends it early.
        """
        requests_left = len(self.submissions)
        while requests_left:
            await asyncio.sleep(0)  # a queue that is full would else be emptied before anybody else has a turn
            submission, event = await self.events.get()
            if isinstance(event, Exception):
                raise event
            if isinstance(event, Done):
                requests_left -= 1
                continue
            prompt_index = self.prompt_indices[submission]
            for delta, finish in self._handle(submission, prompt_index, event):
                yield prompt_index, event.sample, delta, finish

    def _handle(self, submission: Submission, prompt_index: int, event: Event) -> list[tuple[TextDelta, str | None]]:
        """(new text, why its sample ended or None) of one event: none, one, or the token's text and then the end's."""
        if self.ended[prompt_index][event.sample]:  # its stop string came; what was drawn since does not count
            return []
        if event.finish == "failed":  # before its token is looked at, which need not fit
            raise grammar_error()
        detokenizer, deltas = self.detokenizers[prompt_index][event.sample], []
        if event.token is not None and event.token in submission.request.stop:
            detokenizer.count_stop_token()
        elif event.token is not None:
            deltas.append((detokenizer.push(event.token, event.logprob), None))
        if deltas and deltas[0][0].stopped:  # the engine knows tokens only, so it has to be stopped
            self.ended[prompt_index][event.sample] = True
            if event.finish is None:
                submission.engine.cancel(submission, event.sample)
            return [(deltas[0][0], "stop")]
        if event.finish is not None:
            self.ended[prompt_index][event.sample] = True
            rest = detokenizer.finish()
            deltas.append((rest, "stop" if rest.stopped else event.finish))
        return deltas

    def cancel(self) -> None:
        """Free the rows of what has not ended."""
        for submission in self.submissions:
            submission.engine.cancel(submission)


@asynccontextmanager
async def run_generation(
    task: GenerationTask, registry: ModelRegistry, http: HttpRequest
) -> AsyncIterator[RunningTask]:
    """Submit a task, and watch its client and the clock. However the block is left, the task's rows are free after.

    Kept rows serve the client whose they are (`RequestGuard`). ApiError 429 or 503 where the model cannot take it.
    """
    owner = http.state.owner
    task = dataclasses.replace(task, requests=tuple(dataclasses.replace(r, owner=owner) for r in task.requests))
    size = sum(len(request.tokens) * request.samples for request in task.requests)
    with task.model.in_use():
        detokenizers = await off_loop(size, make_detokenizers, task)
        registry.admit(task.model, task.samples)
        events: asyncio.Queue[tuple[Submission | None, WorkerEvent | Exception]] = asyncio.Queue()
        seconds = registry.limits.request_seconds
        # The clock and the disconnect are messages in the queue of tokens: there is one thing to wait for.
        alarm = asyncio.get_running_loop().call_later(seconds, events.put_nowait, (None, timeout_error(seconds)))
        watch = asyncio.create_task(watch_disconnect(http, lambda: events.put_nowait((None, ClientDisconnected()))))
        run = RunningTask(task, events, detokenizers)
        try:
            yield run
        finally:
            run.cancel()
            alarm.cancel()
            watch.cancel()
            with suppress(asyncio.CancelledError):
                await watch


def make_detokenizers(task: GenerationTask) -> list[list[Detokenizer]]:
    """By prompt and sample: each goes on where the prompt's text ends."""
    decoder = task.model.tokenizer.decoder
    return [
        [Detokenizer(decoder(request.tokens), task.stop_strings, task.strip) for _ in range(request.samples)]
        for request in task.requests
    ]


async def watch_disconnect(http: HttpRequest, on_disconnect: Callable[[], None]) -> None:
    """Wait until the client has gone away, and call the function."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
    on_disconnect()


@dataclass
class SampleOutput:
    """What a sample has given so far."""

    texts: list[str] = field(default_factory=list)
    tokens: list[EmittedToken] = field(default_factory=list)
    finish: str = ""

    def add(self, delta: TextDelta, finish: str | None) -> None:
        self.texts.append(delta.text)
        self.tokens += delta.tokens
        self.finish = finish or self.finish

    def mean_logprob(self) -> float:
        """Over its tokens, in nats; 0 without any."""
        logprobs = [token.logprob.logprob for token in self.tokens if token.logprob is not None]
        return sum(logprobs) / len(logprobs) if logprobs else 0.0


async def full_response(task: GenerationTask, registry: ModelRegistry, http: HttpRequest) -> Response:
    """The answer at once. ApiError where it fails, ClientDisconnected where nobody waits for it."""
    outputs = [[SampleOutput() for _ in range(request.samples)] for request in task.requests]
    async with run_generation(task, registry, http) as run:
        prompts = await echo_prompts(run)  # it decodes meanwhile: events wait in their queue
        async for prompt_index, sample, delta, finish in run.deltas():
            outputs[prompt_index][sample].add(delta, finish)
    shown = sum(len(request.tokens) for request in task.requests) * task.echo + run.completion_tokens
    numbers = max((request.logprobs or 0) for request in task.requests) + 1  # of each token
    return await off_loop(
        shown * numbers * BYTES_PER_NUMBER, write_answer, task, prompts, outputs, run.completion_tokens
    )


def write_answer(
    task: GenerationTask, prompts: list[TextDelta], outputs: list[list[SampleOutput]], completion_tokens: int
) -> Response:
    """The response of a whole answer, from what each sample gave by prompt."""
    formatter, choices = FORMATS[task.chat](task, response_head(task)), []
    for prompt, samples in zip(prompts, outputs, strict=True):
        for output in best_samples(samples, task.choices_per_prompt):
            choices.append(formatter.choice(len(choices), prompt, "".join(output.texts), output.tokens, output.finish))
    return JsonParts(formatter.answer(choices, token_usage(task, completion_tokens)))


class JsonParts(Response):
    """JSON that is written and sent in parts, each of which is soon done: pydantic and json.dumps write it in one go,
    which keeps all other threads waiting."""

    media_type = "application/json"
    encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=dict)

    def __init__(self, answer: BaseModel) -> None:
        pieces = self.encoder.iterencode(answer)  # a generator of Python's own; a model is the dict of its fields
        self.parts = list(iter(lambda: "".join(itertools.islice(pieces, PIECES)).encode(), b""))
        self.status_code, self.background = 200, None
        self.init_headers({"Content-Length": str(sum(map(len, self.parts)))})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for part in self.parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
            await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def best_samples(samples: list[SampleOutput], count: int) -> list[SampleOutput]:
    """The samples that are given: all, in order, or the `count` whose tokens are most likely in the mean."""
    return samples if count == len(samples) else sorted(samples, key=lambda s: -s.mean_logprob())[:count]


async def stream_response(task: GenerationTask, registry: ModelRegistry, http: HttpRequest) -> AsyncIterator[str]:
    """The answer as server-sent events, the first with the first token. ApiError before that; later it is an event of
    its own, the last."""
    formatter, started = FORMATS[task.chat](task, response_head(task)), False
    n = task.choices_per_prompt
    try:
        async with run_generation(task, registry, http) as run:
            prompts = await echo_prompts(run)
            async for prompt_index, sample, delta, finish in run.deltas():
                # Choices are opened with the first token, so that an error before it is a status of its own.
                for index in range(0 if started else task.samples):
                    if opening := formatter.opening(index, prompts[index // n]):
                        yield sse(opening | counts_so_far(run))
                started = True
                for chunk in formatter.chunks(prompt_index * n + sample, prompts[prompt_index], delta, finish):
                    yield sse(chunk | counts_so_far(run))
            if task.include_usage:
                yield sse(formatter.chunk([], token_usage(task, run.completion_tokens)))
            yield "data: [DONE]\n\n"
    except ClientDisconnected:
        return
    except ApiError as error:
        if not started:
            raise
        yield sse(error.body)


def counts_so_far(run: RunningTask) -> dict[str, Any]:
    """What an event says of them, where that was asked for."""
    return {"usage": token_usage(run.task, run.completion_tokens).model_dump()} if run.task.continuous_usage else {}


async def echo_prompts(run: RunningTask) -> list[TextDelta]:
    """By prompt, what stands before the answer: its text and, where they are asked for, its tokens' scores."""
    task = run.task
    if not task.echo:
        return [TextDelta("", ())] * len(task.requests)
    deltas = []
    for request, worker in zip(task.requests, run.workers, strict=True):
        text = await off_loop(len(request.tokens), task.model.tokenizer.decode, request.tokens)
        tokens = await prompt_logprobs(task, request, worker) if task.logprobs else ()
        deltas.append(TextDelta(text, tuple(tokens)))
    return deltas


def response_head(task: GenerationTask) -> dict[str, Any]:
    """What an answer, and every event of a stream, begins with."""
    kind = "chatcmpl" if task.chat else "cmpl"
    return {
        "id": f"{kind}-{secrets.token_hex(12)}",
        "created": int(time.time()),
        "model": task.model.name,
        "system_fingerprint": task.model.fingerprint,
    }


def sse(data: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def prompt_logprobs(task: GenerationTask, request: Request, worker: Worker) -> list[EmittedToken]:
    """The tokens of a prompt with their log-probabilities; the first has none. A BOS that nobody wrote is left out."""
    loop = asyncio.get_running_loop()
    tokens = await loop.run_in_executor(worker.prefills, score_prompt, task.model, request, worker)
    return tokens[1:] if task.implicit_bos else tokens


@torch.no_grad()
def score_prompt(model: ServedModel, request: Request, worker: Worker) -> list[EmittedToken]:
    """In the thread of prefills: a prompt's tokens, each with its log-probability in nats after those before it."""
    transformer, tokens, alternatives = worker.transformer, request.tokens, request.logprobs
    assert alternatives is not None
    decoder = model.tokenizer.decoder()
    entries = [EmittedToken(tokens[0], None, 0)]
    offset = len(decoder.push(tokens[0]))
    if len(tokens) == 1:
        return entries
    mode = request.prefill or model.settings.prefill
    row = torch.tensor([tokens[:-1]], device=transformer.embedding.weight.device)
    state = transformer.empty_state(1, len(tokens) - 1)
    hidden = prefill(transformer, row, state, mode, calibration=worker.engine.engine.calibration).sequence[0]
    for begin in range(0, len(tokens) - 1, SCORED_AT_ONCE):
        for logits in transformer.logits(hidden[begin : begin + SCORED_AT_ONCE]):
            token = tokens[len(entries)]
            entries.append(EmittedToken(token, log_probability(logits, token, alternatives), offset))
            offset += len(decoder.push(token))
    return entries
