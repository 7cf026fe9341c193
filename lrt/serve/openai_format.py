"""Answers in the two formats of OpenAI's interface: completions, and chat.

Answers are made by `model_construct`, which validates nothing: every field of them is ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from lrt.data.tokenizer import Tokenizer
from lrt.serve.detokenizer import EmittedToken, TextDelta, display_token
from lrt.serve.protocol import (
    Alternative,
    ChatAnswer,
    ChatChoice,
    ChatCompletion,
    ChatLogprob,
    ChatLogprobs,
    CompletionChoice,
    CompletionLogprobs,
    TextCompletion,
    Usage,
)
from lrt.serve.request_parsing import GenerationTask


class ResponseFormat(Protocol):
    """How one route answers. `head` is what every answer and event begins with; `prompt` is what `echo` asks for."""

    def __init__(self, task: GenerationTask, head: dict[str, Any]) -> None: ...
    def choice(self, index: int, prompt: TextDelta, text: str, tokens: Sequence[EmittedToken], finish: str) -> Any: ...
    def answer(self, choices: list[Any], usage: Usage) -> Any: ...
    def opening(self, index: int, prompt: TextDelta) -> dict[str, Any] | None:
        """A choice's first event in a stream, if it has one of its own."""
        ...

    def chunks(
        self, index: int, prompt: TextDelta, delta: TextDelta, finish: str | None
    ) -> Iterable[dict[str, Any]]: ...
    def chunk(self, choices: list[dict[str, Any]], usage: Usage | None = None) -> dict[str, Any]: ...


class BaseFormat:
    """What both have in common."""

    chunk_object = ""

    def __init__(self, task: GenerationTask, head: dict[str, Any]) -> None:
        self.task, self.head, self.tokenizer = task, head, task.model.tokenizer

    def chunk(self, choices: list[dict[str, Any]], usage: Usage | None = None) -> dict[str, Any]:
        """One event; `usage` is part of every one where it was asked for, and null but in the last."""
        counts = {"usage": None if usage is None else usage.model_dump()} if self.task.include_usage else {}
        return {**self.head, "object": self.chunk_object, "choices": choices, **counts}


class CompletionFormat(BaseFormat):
    """/v1/completions."""

    chunk_object = "text_completion"

    def choice(
        self, index: int, prompt: TextDelta, text: str, tokens: Sequence[EmittedToken], finish: str
    ) -> CompletionChoice:
        logprobs = self.logprobs([*prompt.tokens, *tokens], len(prompt.tokens), len(prompt.text))
        return CompletionChoice.model_construct(
            text=prompt.text + text, index=index, logprobs=logprobs, finish_reason=finish
        )

    def answer(self, choices: list[CompletionChoice], usage: Usage) -> TextCompletion:
        return TextCompletion.model_construct(**self.head, choices=choices, usage=usage)

    def opening(self, index: int, prompt: TextDelta) -> dict[str, Any] | None:
        if not prompt.text and not prompt.tokens:
            return None
        logprobs = self.logprobs(prompt.tokens, len(prompt.tokens), 0)
        return self.chunk([self._piece(index, prompt.text, logprobs, None)])

    def chunks(self, index: int, prompt: TextDelta, delta: TextDelta, finish: str | None) -> Iterable[dict[str, Any]]:
        if delta.text or delta.tokens or finish is not None:
            logprobs = self.logprobs(delta.tokens, 0, len(prompt.text))
            yield self.chunk([self._piece(index, delta.text, logprobs, finish)])

    def _piece(self, index: int, text: str, logprobs: CompletionLogprobs | None, finish: str | None) -> dict[str, Any]:
        plain = None if logprobs is None else logprobs.model_dump()
        return {"text": text, "index": index, "logprobs": plain, "finish_reason": finish}

    def logprobs(
        self, tokens: Sequence[EmittedToken], prompt_tokens: int, answer_offset: int
    ) -> CompletionLogprobs | None:
        """Parallel lists, as the older interface has them; None where they were not asked for.

        The first `prompt_tokens` entries are of the prompt; the answer begins at character `answer_offset`.
        """
        if not self.task.logprobs:
            return None
        return CompletionLogprobs.model_construct(
            tokens=[display_token(self.tokenizer.spelling(t.token)) for t in tokens],
            token_logprobs=[None if t.logprob is None else clamp_logprob(t.logprob.logprob) for t in tokens],
            top_logprobs=[None if t.logprob is None else top_logprobs(self.tokenizer, t) for t in tokens],
            text_offset=[t.offset + (0 if i < prompt_tokens else answer_offset) for i, t in enumerate(tokens)],
        )


class ChatFormat(BaseFormat):
    """/v1/chat/completions."""

    chunk_object = "chat.completion.chunk"

    def choice(
        self, index: int, prompt: TextDelta, text: str, tokens: Sequence[EmittedToken], finish: str
    ) -> ChatChoice:
        message = ChatAnswer(content=text)
        return ChatChoice.model_construct(
            index=index, message=message, logprobs=self.logprobs(tokens), finish_reason=finish
        )

    def answer(self, choices: list[ChatChoice], usage: Usage) -> ChatCompletion:
        return ChatCompletion.model_construct(**self.head, choices=choices, usage=usage)

    def opening(self, index: int, prompt: TextDelta) -> dict[str, Any] | None:
        return self.chunk([self._piece(index, {"role": "assistant", "content": ""}, None, None)])

    def chunks(self, index: int, prompt: TextDelta, delta: TextDelta, finish: str | None) -> Iterable[dict[str, Any]]:
        if delta.text or delta.tokens:
            yield self.chunk([self._piece(index, {"content": delta.text}, self.logprobs(delta.tokens), None)])
        if finish is not None:  # in an event of its own, as OpenAI sends it
            yield self.chunk([self._piece(index, {}, None, finish)])

    def _piece(
        self, index: int, delta: dict[str, Any], logprobs: ChatLogprobs | None, finish: str | None
    ) -> dict[str, Any]:
        plain = None if logprobs is None else logprobs.model_dump()
        return {"index": index, "delta": delta, "logprobs": plain, "finish_reason": finish}

    def logprobs(self, tokens: Sequence[EmittedToken]) -> ChatLogprobs | None:
        """An entry per token; None where they were not asked for."""
        if not self.task.logprobs:
            return None
        content = []
        for token in tokens:
            assert token.logprob is not None
            top = [self._entry(*alternative) for alternative in token.logprob.alternatives]
            entry = self._entry(token.token, token.logprob.logprob)
            content.append(ChatLogprob.model_construct(**entry.model_dump(), top_logprobs=top))
        return ChatLogprobs.model_construct(content=content, refusal=None)

    def _entry(self, token: int, logprob: float) -> Alternative:
        spelling = self.tokenizer.spelling(token)
        return Alternative.model_construct(
            token=display_token(spelling), logprob=clamp_logprob(logprob), bytes=list(spelling)
        )


FORMATS: dict[bool, type[ResponseFormat]] = {False: CompletionFormat, True: ChatFormat}
"""By whether it is a chat."""


def top_logprobs(tokenizer: Tokenizer, token: EmittedToken) -> dict[str, float]:
    """The likeliest tokens by their text. Of several that are shown alike the likeliest stays."""
    assert token.logprob is not None
    by_text: dict[str, float] = {}
    for alternative, logprob in token.logprob.alternatives:  # the likeliest come first
        by_text.setdefault(display_token(tokenizer.spelling(alternative)), clamp_logprob(logprob))
    return by_text


def clamp_logprob(logprob: float) -> float:
    """JSON knows no infinities; OpenAI writes -9999 for them."""
    return max(logprob, -9999.0)


def token_usage(task: GenerationTask, completion_tokens: int) -> Usage:
    """The counts of tokens, over all prompts and answers of a task.

    Not how many were taken from earlier rows: it would tell, token by token, what others have asked.
    """
    prompt_tokens = sum(len(request.tokens) for request in task.requests)
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
    )
