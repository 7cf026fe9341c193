"""Answers in the two shapes of OpenAI's interface: completions, and chat."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from lrt.data.tokenizer import Tokenizer
from lrt.serve.detokenizer import EmittedToken, TextDelta, displayed
from lrt.serve.protocol import (
    Alternative,
    ChatAnswer,
    ChatChoice,
    ChatCompletion,
    ChatLogprob,
    ChatLogprobs,
    CompletionChoice,
    CompletionLogprobs,
    PromptDetails,
    TextCompletion,
    Usage,
)
from lrt.serve.request_parsing import GenerationTask


class ResponseFormat(Protocol):
    """How one route answers."""

    def __init__(self, ask: GenerationTask, head: dict[str, Any]) -> None: ...
    def choice(self, index: int, prompt: TextDelta, text: str, spoken: list[EmittedToken], finish: str) -> Any: ...
    def answer(self, choices: list[Any], usage: Usage) -> Any: ...
    def opening(self, index: int, prompt: TextDelta) -> dict[str, Any] | None:
        """A choice's first event in a stream, if it has one of its own."""
        ...

    def chunks(
        self, index: int, prompt: TextDelta, piece: TextDelta, finish: str | None
    ) -> Iterable[dict[str, Any]]: ...
    def chunk(self, choices: list[dict[str, Any]], usage: Usage | None = None) -> dict[str, Any]: ...


class Streams:
    """What both have in common."""

    kind = ""

    def __init__(self, ask: GenerationTask, head: dict[str, Any]) -> None:
        self.ask, self.head, self.tokenizer = ask, head, ask.served.tokenizer

    def chunk(self, choices: list[dict[str, Any]], usage: Usage | None = None) -> dict[str, Any]:
        """One event; `usage` is part of every one where it was asked for, and null but in the last."""
        told = {"usage": None if usage is None else usage.model_dump()} if self.ask.usage else {}
        return {**self.head, "object": self.kind, "choices": choices, **told}


class CompletionFormat(Streams):
    kind = "text_completion"

    def choice(
        self, index: int, prompt: TextDelta, text: str, spoken: list[EmittedToken], finish: str
    ) -> CompletionChoice:
        listed = self.logprobs([*prompt.spoken, *spoken], len(prompt.spoken), len(prompt.text))
        return CompletionChoice.model_construct(
            text=prompt.text + text, index=index, logprobs=listed, finish_reason=finish
        )

    def answer(self, choices: list[CompletionChoice], usage: Usage) -> TextCompletion:
        return TextCompletion.model_construct(**self.head, choices=choices, usage=usage)

    def opening(self, index: int, prompt: TextDelta) -> dict[str, Any] | None:
        if not prompt.text and not prompt.spoken:
            return None
        listed = self.logprobs(list(prompt.spoken), len(prompt.spoken), 0)
        return self.chunk([self._piece(index, prompt.text, listed, None)])

    def chunks(self, index: int, prompt: TextDelta, piece: TextDelta, finish: str | None) -> Iterable[dict[str, Any]]:
        if piece.text or piece.spoken or finish is not None:
            listed = self.logprobs(list(piece.spoken), 0, len(prompt.text))
            yield self.chunk([self._piece(index, piece.text, listed, finish)])

    def _piece(self, index: int, text: str, logprobs: CompletionLogprobs | None, finish: str | None) -> dict[str, Any]:
        listed = None if logprobs is None else logprobs.model_dump()
        return {"text": text, "index": index, "logprobs": listed, "finish_reason": finish}

    def logprobs(self, spoken: list[EmittedToken], own: int, before: int) -> CompletionLogprobs | None:
        """The list of OpenAI's older interface; the first `own` entries are of the prompt, the rest begins `before`."""
        if not self.ask.scores:
            return None
        top = [None if s.logprob is None else alternatives(self.tokenizer, s) for s in spoken]
        return CompletionLogprobs.model_construct(
            tokens=[displayed(self.tokenizer.spelling(s.token)) for s in spoken],
            token_logprobs=[None if s.logprob is None else finite(s.logprob.logprob) for s in spoken],
            top_logprobs=top,
            text_offset=[s.offset + (0 if i < own else before) for i, s in enumerate(spoken)],
        )


class ChatFormat(Streams):
    kind = "chat.completion.chunk"

    def choice(self, index: int, prompt: TextDelta, text: str, spoken: list[EmittedToken], finish: str) -> ChatChoice:
        answer = ChatAnswer(content=text)
        return ChatChoice.model_construct(
            index=index, message=answer, logprobs=self.logprobs(spoken), finish_reason=finish
        )

    def answer(self, choices: list[ChatChoice], usage: Usage) -> ChatCompletion:
        return ChatCompletion.model_construct(**self.head, choices=choices, usage=usage)

    def opening(self, index: int, prompt: TextDelta) -> dict[str, Any] | None:
        return self.chunk([self._piece(index, {"role": "assistant", "content": ""}, None, None)])

    def chunks(self, index: int, prompt: TextDelta, piece: TextDelta, finish: str | None) -> Iterable[dict[str, Any]]:
        if piece.text or piece.spoken:
            yield self.chunk([self._piece(index, {"content": piece.text}, self.logprobs(list(piece.spoken)), None)])
        if finish is not None:
            yield self.chunk([self._piece(index, {}, None, finish)])

    def _piece(
        self, index: int, delta: dict[str, Any], logprobs: ChatLogprobs | None, finish: str | None
    ) -> dict[str, Any]:
        listed = None if logprobs is None else logprobs.model_dump()
        return {"index": index, "delta": delta, "logprobs": listed, "finish_reason": finish}

    def logprobs(self, spoken: list[EmittedToken]) -> ChatLogprobs | None:
        if not self.ask.scores:
            return None
        content = []
        for s in spoken:
            assert s.logprob is not None
            top = [self._entry(token, value) for token, value in s.logprob.alternatives]
            own = self._entry(s.token, s.logprob.logprob)
            content.append(ChatLogprob.model_construct(**own.model_dump(), top_logprobs=top))
        return ChatLogprobs.model_construct(content=content, refusal=None)

    def _entry(self, token: int, value: float) -> Alternative:
        spelling = self.tokenizer.spelling(token)
        return Alternative.model_construct(token=displayed(spelling), logprob=finite(value), bytes=list(spelling))


SHAPES: dict[bool, type[ResponseFormat]] = {False: CompletionFormat, True: ChatFormat}
"""By whether it is a chat."""


def alternatives(tokenizer: Tokenizer, spoken: EmittedToken) -> dict[str, float]:
    """The likeliest tokens by their text. Of several that are shown alike the likeliest stays."""
    assert spoken.logprob is not None
    found: dict[str, float] = {}
    for token, value in spoken.logprob.alternatives:
        found.setdefault(displayed(tokenizer.spelling(token)), finite(value))
    return found


def finite(value: float) -> float:
    """JSON knows no infinities."""
    return max(value, -9999.0)


def usage_of(ask: GenerationTask, drawn: int, reused: int) -> Usage:
    """The counts of tokens."""
    prompts = sum(len(request.tokens) for request in ask.requests)
    return Usage(
        prompt_tokens=prompts,
        completion_tokens=drawn,
        total_tokens=prompts + drawn,
        prompt_tokens_details=PromptDetails(cached_tokens=reused),
    )
