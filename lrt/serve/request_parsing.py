"""From a body to the library's terms: prompts to tokens, parameters to `Request`s. What is wrong is said here."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from typing import Literal

from lrt.inference.chat_template import ChatTemplate, Message, turn_tokens
from lrt.inference.request import Request
from lrt.inference.sampling import Sampling, Steering
from lrt.serve.config import Limits
from lrt.serve.errors import ApiError
from lrt.serve.models import ServedModel
from lrt.serve.protocol import ChatBody, ChatTurn, CompletionBody, GenerationBody, StreamOptions
from lrt.serve.structured import answer_grammar

DEFAULT_MAX_TOKENS = 16
"""Tokens of a completion that asks for no number, as OpenAI's have."""


@dataclass(frozen=True)
class GenerationTask:
    """What one HTTP request wants."""

    model: ServedModel
    requests: tuple[Request, ...]
    """One per prompt."""
    stop_strings: tuple[str, ...]
    choices_per_prompt: int
    """Answers that are given: n. More may be drawn (best_of)."""
    chat: bool = False
    strip: bool = False
    """Leave out white space at an answer's beginning."""
    echo: bool = False
    logprobs: bool = False
    """Give log-probabilities. Requests may have them without, to rank the samples."""
    implicit_bos: bool = False
    """The prompts begin with a BOS that nobody wrote."""
    stream: bool = False
    include_usage: bool = False
    """At the end of a stream."""
    continuous_usage: bool = False
    """With every event of it."""

    @property
    def samples(self) -> int:
        """Continuations in all."""
        return sum(request.samples for request in self.requests)


def parse_completion(body: CompletionBody, model: ServedModel, limits: Limits) -> GenerationTask:
    """What a body of /v1/completions asks for. ApiError 400 where it cannot be served."""
    n = body.n or 1
    samples = n if body.best_of is None else body.best_of
    if samples < n:
        raise ApiError(400, f"best_of is {samples} and n is {n}; best_of must be at least n", param="best_of")
    if body.stream and samples > n:
        raise ApiError(400, "best_of cannot be streamed: the best is known at the end only", param="best_of")
    texts, prompts = parse_prompts(body)
    check_choices((len(texts) + len(prompts)) * samples, limits)  # before any of them is tokenized
    prompts += [[model.tokenizer.bos, *tokens] for tokens in encode_texts(model, texts)]
    # A number that was asked for is refused where there is no room for it; the default is cut.
    max_tokens = body.max_tokens if "max_tokens" in body.model_fields_set else None
    request = promptless_request(body, model)
    if body.logprobs is not None:
        request = replace(request, logprobs=body.logprobs)
    elif samples > n:
        request = replace(request, logprobs=0)  # what best_of ranks by
    requests = [
        fit_to_context(
            replace(request, tokens=tuple(tokens), samples=samples), max_tokens, model, limits, DEFAULT_MAX_TOKENS
        )
        for tokens in prompts
    ]
    return GenerationTask(
        model,
        tuple(requests),
        stop_strings(body),
        n,
        echo=bool(body.echo),
        logprobs=body.logprobs is not None,
        implicit_bos=bool(texts),
        **stream_fields(body),
    )


def parse_prompts(body: CompletionBody) -> tuple[list[str], list[list[int]]]:
    """The prompts, as texts or as tokens; one of the two is empty. ApiError 400 where there are none."""
    prompt = body.prompt
    if prompt is None:
        return [""], []
    if isinstance(prompt, str):
        return [prompt], []
    if not prompt:
        raise ApiError(400, "prompt is an empty list; give at least one", param="prompt")
    texts = [p for p in prompt if isinstance(p, str)]
    lists = [p for p in prompt if isinstance(p, list)]
    tokens = [p for p in prompt if isinstance(p, int)]
    return texts, lists or ([tokens] if tokens else [])


def parse_chat(body: ChatBody, model: ServedModel, limits: Limits) -> GenerationTask:
    """What a body of /v1/chat/completions asks for. ApiError 400 where it cannot be served."""
    template = check_chat(body, model, limits)
    try:
        template.check_options(body.chat_template_kwargs or {})
    except ValueError as error:
        raise ApiError(400, str(error), param="chat_template_kwargs") from error
    try:
        messages = [Message(message_role(turn), message_text(turn)) for turn in body.messages]
        parts = template.parts(messages, body.chat_template_kwargs)
    except ValueError as error:
        raise ApiError(400, str(error), param="messages") from error
    tokens = turn_tokens(model.tokenizer, template, parts)
    request = promptless_request(body, model)
    if template.end is not None and not body.ignore_eos:
        (end,) = turn_tokens(model.tokenizer, template, [(template.end, False)])
        request = replace(request, stop=request.stop | {end})
    request = replace(
        request,
        tokens=(model.tokenizer.bos, *tokens),
        samples=body.n or 1,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    max_tokens = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    plain = template.end is None and request.grammar is None  # a line's end then ends an answer
    ends = ("\n",) if plain and not body.ignore_eos else ()
    return GenerationTask(
        model,
        (fit_to_context(request, max_tokens, model, limits),),
        (*stop_strings(body), *ends),
        body.n or 1,
        chat=True,
        logprobs=bool(body.logprobs),
        strip=plain,
        **stream_fields(body),
    )


def check_chat(body: ChatBody, model: ServedModel, limits: Limits) -> ChatTemplate:
    """The template of a model that can chat. ApiError 400 where the body contradicts itself, or there is none."""
    if model.template is None:
        raise ApiError(
            400,
            f"the tokenizer of {model.name} has no chat template; use /v1/completions, or start the server with "
            "--template plain",
            param="model",
            code="no_chat_template",
        )
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    check_choices(body.n or 1, limits)
    both = {body.max_tokens, body.max_completion_tokens} - {None}
    if len(both) > 1:
        message = (
            f"max_tokens is {body.max_tokens} and max_completion_tokens is {body.max_completion_tokens}; they mean the "
            "same: give one of them"
        )
        raise ApiError(400, message, param="max_tokens")
    return model.template


def message_role(turn: ChatTurn) -> Literal["system", "user", "assistant"]:
    return "system" if turn.role == "developer" else turn.role  # OpenAI's newer name for it


def message_text(turn: ChatTurn) -> str:
    return turn.content if isinstance(turn.content, str) else "".join(part.text for part in turn.content or ())


def encode_texts(model: ServedModel, texts: list[str]) -> list[list[int]]:
    """Tokens of texts, without the interpreter: `encode` of one long text would hold it, and with it all threads."""
    return model.tokenizer.encode_batch(texts)


def promptless_request(body: GenerationBody, model: ServedModel) -> Request:
    """A request with what both routes have in common, without its prompt."""
    temperature = 1.0 if body.temperature is None else body.temperature
    top_p = 1.0 if body.top_p is None else body.top_p
    if top_p == 0:  # only the most likely token
        temperature, top_p = 0.0, 1.0
    bias = tuple((int(token), float(value)) for token, value in (body.logit_bias or {}).items())
    top_k = body.top_k if body.top_k and body.top_k > 0 else None  # -1 and 0 are vLLM's words for none
    repetition = 1.0 if body.repetition_penalty is None else body.repetition_penalty
    return Request(
        (),
        sampling=Sampling(temperature, top_k, top_p, body.min_p or None),
        seed=secrets.randbelow(2**31) if body.seed is None else body.seed,
        stop=frozenset() if body.ignore_eos else frozenset({model.tokenizer.bos}),
        steering=Steering(body.frequency_penalty or 0.0, body.presence_penalty or 0.0, bias, repetition),
        prefill=body.prefill,
        grammar=answer_grammar(body, model),
    )


def stop_strings(body: GenerationBody) -> tuple[str, ...]:
    return () if body.stop is None else (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)


def stream_fields(body: GenerationBody) -> dict[str, bool]:
    """What a task says of its stream. ApiError 400 for options of a stream that was not asked for."""
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options needs stream: true", param="stream_options")
    options = body.stream_options or StreamOptions()
    return {
        "stream": bool(body.stream),
        "include_usage": options.include_usage,
        "continuous_usage": bool(options.continuous_usage_stats),
    }


def fit_to_context(
    request: Request, max_tokens: int | None, model: ServedModel, limits: Limits, default: int | None = None
) -> Request:
    """The request with the number of tokens that it may have: `max_tokens`, else `default`, else what is left.

    ApiError 400 where `max_tokens` is more than is left, and for whatever else makes the request unservable: what
    passes is not checked again. A default that is more is cut.
    """
    length, room = len(request.tokens), model.room(len(request.tokens))
    context, code = model.config.context, "context_length_exceeded"
    if limits.prompt_tokens is not None and length > limits.prompt_tokens:
        message = f"the prompt has {length} tokens, this server takes {limits.prompt_tokens}; shorten it"
        raise ApiError(400, message, param="prompt", code=code)
    if room is not None and room < 1:
        message = f"the prompt has {length} tokens, the context of {model.name} is {context}; shorten it"
        raise ApiError(400, message, param="prompt", code=code)
    if max_tokens is not None and limits.new_tokens is not None and max_tokens > limits.new_tokens:
        message = f"max_tokens is {max_tokens}, this server gives {limits.new_tokens} at most; ask for fewer"
        raise ApiError(400, message, param="max_tokens")
    if max_tokens is not None and room is not None and max_tokens > room:
        message = (
            f"the prompt has {length} tokens, and max_tokens is {max_tokens}: together more than the context of "
            f"{model.name}, {context}; shorten one of them"
        )
        raise ApiError(400, message, param="max_tokens", code=code)
    # Without end a model answers no longer than its context, so that every answer ends.
    bounds = (default if max_tokens is None else max_tokens, context if room is None else room, limits.new_tokens)
    request = replace(request, max_new_tokens=min(n for n in bounds if n is not None))
    try:
        request.check(model.config, context)
    except ValueError as error:
        raise ApiError(400, str(error)) from error
    return request


def check_choices(samples: int, limits: Limits) -> None:
    """ApiError 400 where one request asks for too many continuations."""
    if samples > limits.choices:
        raise ApiError(
            400, f"{samples} continuations are asked for, this server gives {limits.choices} at once; ask for fewer"
        )
