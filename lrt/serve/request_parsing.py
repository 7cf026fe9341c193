"""From a body to the library's terms: prompts to tokens, parameters to `Request`s. What can be wrong is said here."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass, replace
from typing import Literal

from lrt.inference.chat_template import Message, turn_tokens
from lrt.inference.request import Request
from lrt.inference.sampling import Sampling, Steering
from lrt.serve.config import Limits
from lrt.serve.errors import ApiError
from lrt.serve.models import ServedModel
from lrt.serve.protocol import Asked, ChatBody, ChatTurn, CompletionBody

USUAL = 16
"""Tokens of a completion that asks for no number, as OpenAI's have."""
LONG = 4096
"""Characters from which a text is tokenized in a thread, so that the event loop goes on."""


@dataclass(frozen=True)
class GenerationTask:
    """What one HTTP request wants."""

    served: ServedModel
    requests: tuple[Request, ...]
    """One per prompt."""
    stops: tuple[str, ...]
    kept: int
    """Answers per prompt that are given: n. More may be drawn (best_of)."""
    chat: bool = False
    strip: bool = False
    """Leave out white space at an answer's beginning."""
    echo: bool = False
    scores: bool = False
    """Give log-probabilities."""
    bare: bool = False
    """The prompts begin with a BOS that nobody wrote."""
    stream: bool = False
    usage: bool = False
    """At the end of a stream."""

    @property
    def samples(self) -> int:
        """Continuations in all."""
        return sum(request.samples for request in self.requests)


async def completion(body: CompletionBody, served: ServedModel, limits: Limits) -> GenerationTask:
    """What a body of /v1/completions asks for. ApiError 400 where it cannot be served."""
    n = body.n or 1
    drawn = n if body.best_of is None else body.best_of
    if drawn < n:
        raise ApiError(400, f"best_of is {drawn} and n is {n}; best_of must be at least n", param="best_of")
    if body.stream and drawn > n:
        raise ApiError(400, "best_of cannot be streamed: the best is known at the end only", param="best_of")
    texts, ids = prompts(body)
    affordable((len(texts) + len(ids)) * drawn, limits)  # before any of them is tokenized
    asked = body.max_tokens if "max_tokens" in body.model_fields_set else None
    bare = bool(texts)
    for text in texts:
        ids.append([served.tokenizer.bos, *await encode_text(served, text)])
    common = shared_fields(body, served)
    if body.logprobs is not None:
        common = replace(common, logprobs=body.logprobs)
    elif drawn > n:
        common = replace(common, logprobs=0)
    return GenerationTask(
        served,
        tuple(
            fit_to_context(replace(common, tokens=tuple(i), samples=drawn), asked, served, limits, USUAL) for i in ids
        ),
        stops(body),
        n,
        echo=bool(body.echo),
        scores=body.logprobs is not None,
        bare=bare,
        **streaming(body),
    )


def prompts(body: CompletionBody) -> tuple[list[str], list[list[int]]]:
    """The prompts, as texts or as tokens; one of the two is empty."""
    given = body.prompt
    if given is None:
        return [""], []
    if isinstance(given, str):
        return [given], []
    if not given:
        raise ApiError(400, "prompt is an empty list; give at least one", param="prompt")
    texts = [p for p in given if isinstance(p, str)]
    lists = [p for p in given if isinstance(p, list)]
    single = [p for p in given if isinstance(p, int)]
    return texts, lists or ([single] if single else [])


async def chat(body: ChatBody, served: ServedModel, limits: Limits) -> GenerationTask:
    """What a body of /v1/chat/completions asks for. ApiError 400 where it cannot be served."""
    template = served.template
    if template is None:
        raise ApiError(
            400,
            f"the tokenizer of {served.name} has no chat template; use /v1/completions, or start the server with "
            "--template plain",
            param="model",
            code="no_chat_template",
        )
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    affordable(body.n or 1, limits)
    if None not in (body.max_tokens, body.max_completion_tokens):
        raise ApiError(400, "give max_completion_tokens or max_tokens, not both", param="max_tokens")
    try:
        parts = template.parts([Message(role_of(turn), message_text(turn)) for turn in body.messages])
    except ValueError as error:
        raise ApiError(400, str(error), param="messages") from error
    tokenizer = served.tokenizer
    size = sum(len(part) for part, _ in parts)
    work = turn_tokens(tokenizer, template, parts) if size < LONG else await asyncio.to_thread(
        turn_tokens, tokenizer, template, parts
    )  # fmt: skip
    common = shared_fields(body, served)
    if template.end is not None:
        (end,) = turn_tokens(tokenizer, template, [(template.end, False)])
        common = replace(common, stop=common.stop | {end})
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    request = replace(common, tokens=(tokenizer.bos, *work), samples=body.n or 1, logprobs=logprobs)
    most = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    return GenerationTask(
        served,
        (fit_to_context(request, most, served, limits),),
        (*stops(body), *(("\n",) if template.end is None else ())),
        body.n or 1,
        chat=True,
        scores=bool(body.logprobs),
        strip=template.end is None,
        **streaming(body),
    )


def role_of(turn: ChatTurn) -> Literal["system", "user", "assistant"]:
    return "system" if turn.role == "developer" else turn.role


def message_text(turn: ChatTurn) -> str:
    return turn.content if isinstance(turn.content, str) else "".join(part.text for part in turn.content)


async def encode_text(served: ServedModel, text: str) -> list[int]:
    """Tokens of a text; of a long one in a thread."""
    encode = served.tokenizer.encode
    return encode(text) if len(text) < LONG else await asyncio.to_thread(encode, text)


def shared_fields(body: Asked, served: ServedModel) -> Request:
    """A request with what both routes have in common, without its prompt."""
    temperature = 1.0 if body.temperature is None else body.temperature
    top_p = 1.0 if body.top_p is None else body.top_p
    if top_p == 0:  # only the most likely token
        temperature, top_p = 0.0, 1.0
    bias = tuple((int(token), float(value)) for token, value in (body.logit_bias or {}).items())
    return Request(
        (),
        sampling=Sampling(temperature, body.top_k, top_p),
        seed=secrets.randbelow(2**31) if body.seed is None else body.seed,
        stop=frozenset({served.tokenizer.bos}),
        steering=Steering(body.frequency_penalty or 0.0, body.presence_penalty or 0.0, bias),
        prefill=body.prefill,
    )


def stops(body: Asked) -> tuple[str, ...]:
    return () if body.stop is None else (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)


def streaming(body: Asked) -> dict[str, bool]:
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options needs stream: true", param="stream_options")
    options = body.stream_options
    return {"stream": bool(body.stream), "usage": options is not None and options.include_usage}


def fit_to_context(
    request: Request, asked: int | None, served: ServedModel, limits: Limits, usual: int | None = None
) -> Request:
    """The request with the number of tokens that it may have: as asked for, or what is left, `usual` at most."""
    length, room = len(request.tokens), served.room(len(request.tokens))
    longest = limits.prompt_tokens
    if longest is not None and length > longest:
        message = f"the prompt has {length} tokens, this server takes {longest}; shorten it"
        raise ApiError(400, message, param="prompt", code="context_length_exceeded")
    if room is not None and room < 1:
        message = f"the prompt has {length} tokens, the context of {served.name} is {served.slots}; shorten it"
        raise ApiError(400, message, param="prompt", code="context_length_exceeded")
    if asked is not None and limits.new_tokens is not None and asked > limits.new_tokens:
        message = f"max_tokens is {asked}, this server gives {limits.new_tokens} at most; ask for fewer"
        raise ApiError(400, message, param="max_tokens")
    if asked is not None and room is not None and asked > room:
        message = (
            f"the prompt has {length} tokens, and max_tokens is {asked}: together more than the context of "
            f"{served.name}, {served.slots}; shorten one of them"
        )
        raise ApiError(400, message, param="max_tokens", code="context_length_exceeded")
    most = (usual if asked is None else asked, served.slots if room is None else room, limits.new_tokens)
    request = replace(request, max_new_tokens=min(n for n in most if n is not None))
    try:
        request.check(served.model.config, served.slots)
    except ValueError as error:
        raise ApiError(400, str(error)) from error
    return request


def affordable(samples: int, limits: Limits) -> None:
    """ApiError 400 where one request asks for too many continuations."""
    if samples > limits.choices:
        raise ApiError(
            400, f"{samples} continuations are asked for, this server gives {limits.choices} at once; ask for fewer"
        )
