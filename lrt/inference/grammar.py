"""Answers that fit a grammar: a JSON schema, a regular expression, a choice of texts, or a context-free grammar.

Before a token is drawn, every token is left out that no fitting text goes on with. Only the logits of that row are
masked: what recurs, its neighbours and the log-probabilities that are reported know nothing of it. llguidance says
which tokens may come next: where one text only may follow, the tokens that the tokenizer writes it in. Its limits bound
what a grammar costs.

Shapes: V vocabulary of the tokenizer, n rows.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from lrt.data.tokenizer import Tokenizer
from lrt.utils.imports import optional_module

EXTRA, WHAT = "serve", "a grammar of answers"
LONGEST = 65_536
"""Characters of a grammar: what is longer is refused before it is read."""
ONE_LINE = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
"""JSON is written on one line, with a space at most behind a comma or colon: white space without end would also fit."""
LIMITS = {
    "initial_lexer_fuel": 100_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 2_000,
    "max_lexer_states": 10_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}
"""llguidance's, per grammar and per token. Its own first limit lets `(a{1000}){1000}` take seconds (docs/log.md);
10,000 states of a lexer take about 20 MB."""
SECONDS, SECONDS_PER_TOKEN = 0.5, 0.005
"""Of its thread's time that an answer's grammar may take: once, and for each token that was drawn."""
T = TypeVar("T")


def json_grammar(schema: Any) -> str:
    """llguidance's form of a JSON schema, an object or its text."""
    return llguidance().LLMatcher.grammar_from_json_schema(schema, defaults=ONE_LINE)


def regex_grammar(pattern: str) -> str:
    r"""… of a regular expression in Rust's syntax, which the whole answer matches; \d and \w are ASCII's."""
    library = llguidance()
    return library.LLMatcher.grammar_from_lark(f"start: /{library.regex_to_lark(pattern, 'dw')}/")


def choice_grammar(texts: Sequence[str]) -> str:
    """… of texts, one of which the answer is."""
    return llguidance().LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, texts)))


def lark_grammar(text: str) -> str:
    """… of a context-free grammar, in llguidance's variant of Lark's notation, or in llama.cpp's GBNF."""
    return llguidance().grammar_from("grammar", text)


KINDS: dict[str, Callable[[Any], str]] = {
    "json": json_grammar,
    "regex": regex_grammar,
    "choice": choice_grammar,
    "grammar": lark_grammar,
}
"""What a grammar may be written as, by the names of vLLM's `structured_outputs`."""


def llguidance() -> Any:
    """The library, which is an extra."""
    return optional_module("llguidance", EXTRA, WHAT)


class GrammarCompiler:
    """Makes grammars over one tokenizer's tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def prepare(self) -> None:
        """Make what all grammars share: for 128,000 tokens it keeps the interpreter for a second.

        Nothing is made where it cannot be; `compile` then says why.
        """
        with suppress(ValueError):
            self._vocabulary  # noqa: B018

    def compile(self, kind: str, source: Any) -> Grammar:
        """The grammar of a kind in KINDS. ValueError, which says why, where it cannot be read or is too large."""
        if kind not in KINDS:
            raise ValueError(f"unknown kind of grammar {kind!r}; choose one of {', '.join(KINDS)}")
        length = len(source if isinstance(source, str) else json.dumps(source))
        if length > LONGEST:
            raise ValueError(f"the grammar has {length:,} characters, {LONGEST:,} are taken; shorten it")
        library = llguidance()
        try:
            text = KINDS[kind](source)
        except (ValueError, TypeError) as error:
            raise refused(kind, str(error)) from None
        limits = library.LLParserLimits(**LIMITS)
        matcher = library.LLMatcher(self._vocabulary, text, log_level=0, limits=limits)
        first = matcher.deep_copy()
        first.compute_bitmask()  # most of the work; all answers share what it leaves
        if matcher.is_error() or first.is_error():
            raise refused(kind, matcher.get_error() or first.get_error())
        return Grammar(matcher, kind, self.tokenizer)

    @functools.cached_property
    def _vocabulary(self) -> Any:
        """llguidance's tokenizer: the bytes of every token."""
        library, tokenizer = llguidance(), self.tokenizer
        if tokenizer.token_bytes() is None:
            raise ValueError(
                "this tokenizer does not say which bytes its tokens stand for, which a grammar needs; use a model "
                "whose tokenizer is byte-level or has byte fallback"
            )
        return library.LLTokenizer(library.TokenizerWrapper(TokenBytes(tokenizer)), n_vocab=tokenizer.vocab_size)


class TokenBytes:
    """A tokenizer as llguidance asks for it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.eos_token_id = self.bos_token_id = tokenizer.bos
        self.special_token_ids = sorted(tokenizer.special)
        names = tokenizer.inner.get_added_tokens_decoder()
        self.tokens = [
            names[i].content.encode() if i in tokenizer.special else tokenizer.spelling(i)
            for i in range(tokenizer.vocab_size)
        ]

    def __call__(self, text: bytes | str) -> list[int]:
        return self.tokenizer.encode(text if isinstance(text, str) else text.decode("utf-8", "replace"))


def refused(kind: str, reason: str) -> ValueError:
    """A grammar that cannot be followed, with the library's reason."""
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    return ValueError(f"the {kind} cannot be followed: {(lines or [reason])[0][:200]}; correct or simplify it")


class Grammar:
    """What an answer may be. Any number of answers can follow it at once: each has its own `start`."""

    def __init__(self, matcher: Any, kind: str, tokenizer: Tokenizer) -> None:
        self.matcher, self.kind, self.tokenizer = matcher, kind, tokenizer

    def __repr__(self) -> str:
        return f"Grammar({self.kind})"

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    def start(self) -> GrammarState:
        """Where an answer begins."""
        return GrammarState(self.matcher.deep_copy(), sorted(self.tokenizer.special), self.tokenizer.bos)


class GrammarState:
    """How far one answer has come in its grammar."""

    def __init__(self, matcher: Any, special: list[int], end: int) -> None:
        """end: a special token, drawn where the answer is whole and no other token may be."""
        self.matcher, self.special, self.end = matcher, special, end
        self.seconds, self.tokens = 0.0, 0
        self.failed = False
        """Whether the grammar can be followed no further: what is drawn then need not fit."""

    def allowed(self, stop: Sequence[int], vocab_size: int) -> Tensor:
        """(vocab_size,) bool: the tokens that may come next; those in `stop` where the answer may end here.

        All of them where it has `failed`.
        """
        bits = np.frombuffer(self._timed(self.matcher.compute_bitmask), dtype=np.uint8)
        allowed = torch.zeros(vocab_size, dtype=torch.bool)
        within = torch.from_numpy(np.unpackbits(bits, bitorder="little")[:vocab_size]).bool()
        allowed[: len(within)] = within
        allowed[self.special] = False
        if self.matcher.is_accepting():
            allowed[list(stop)] = True
            allowed[self.end] |= not bool(allowed.any())
        self.failed = self.failed or not bool(allowed.any())
        return torch.ones_like(allowed) if self.failed else allowed

    def push(self, token: int) -> Literal["stop", "failed"] | None:
        """Note the token that was drawn, no stop token. "stop": the answer is whole, and nothing may follow."""
        if self.failed:
            return "failed"
        if token == self.end:
            return "stop"
        fits = self._timed(lambda: self.matcher.consume_token(token))
        self.tokens += 1
        if not fits or self.failed:
            return "failed"
        if not self.matcher.is_stopped():
            return None
        return "stop" if self.matcher.is_accepting() else "failed"

    def _timed(self, function: Callable[[], T]) -> T:
        """function(), whose time counts; afterwards it has `failed` where a limit was exceeded."""
        begin = time.thread_time()
        value = function()
        self.seconds += time.thread_time() - begin
        spent = self.seconds > SECONDS + SECONDS_PER_TOKEN * self.tokens
        self.failed = self.failed or spent or self.matcher.is_error()
        return value


def mask_rows(logits: Tensor, states: Sequence[GrammarState | None], stops: Sequence[frozenset[int]]) -> Tensor:
    """Logits (n, V), -inf where a row's grammar does not allow the token; rows without a grammar are as they were."""
    if all(state is None for state in states):
        return logits
    rows = [
        row if state is None else row.masked_fill(~state.allowed(list(stop), len(row)).to(row.device), -torch.inf)
        for row, state, stop in zip(logits, states, stops, strict=True)
    ]
    return torch.stack(rows)
