"""What an engine is asked for, and what it answers: plain data.

Each request has a seed of its own, and a token depends on the seed and its position alone (sampling.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lrt.inference.certificate import Certificate
from lrt.inference.grammar import Grammar
from lrt.inference.prefill import PREFILL_MODES, PrefillMode
from lrt.inference.sampling import Sampling, Steering
from lrt.model.config import ModelConfig
from lrt.utils.short_repr import changed_fields

Finish = Literal["stop", "length", "cancelled", "failed"]
"""A stop token or sequence was drawn, or what its grammar asks for is whole; `max_new_tokens` or the slots ended; it
was cancelled; its grammar grew beyond its limits or took too long, so that the last token may not fit."""


@dataclass(frozen=True)
class Request:
    """A prompt and how it is to be continued."""

    tokens: tuple[int, ...]
    """The prompt, at least one token: BOS will do."""
    max_new_tokens: int | None = None
    """How many tokens at most; None goes on while there are slots (for ever where every layer slides)."""
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    """What else is in the batch does not matter."""
    samples: int = 1
    """Continuations of the prompt, which is computed once; sample i is drawn with seed + i."""
    stop: frozenset[int] = frozenset()
    """Tokens that end it; the one drawn is the last of the answer."""
    stop_sequences: tuple[tuple[int, ...], ...] = ()
    """Sequences of tokens that end it likewise."""
    logprobs: int | None = None
    """Give each token's log-probability (of the model, before temperature and cuts) and this many alternatives'."""
    steering: Steering = field(default_factory=Steering)
    """Penalties and biases."""
    prefill: PrefillMode | None = None
    """How its prompt is computed; None: as the engine's others."""
    owner: str = ""
    """Whose it is: its prompt may begin with kept rows of this owner's requests, and of nobody else's."""
    grammar: Grammar | None = None
    """What the answer may be. It ends when it is whole, also without a stop token."""

    def __repr__(self) -> str:
        return changed_fields(self)

    def check(self, config: ModelConfig, slots: int) -> None:
        """ValueError, which names value, limit and fix, where a model with so many slots cannot serve it."""
        if len(self.tokens) == 0:
            raise ValueError("the prompt is empty; give at least one token: BOS will do")
        unknown = [t for t in self.tokens if not 0 <= t < config.vocab_size]
        if unknown:
            raise ValueError(f"token {unknown[:1]} is not in the vocabulary of {config.vocab_size}; use its tokenizer")
        if self.max_new_tokens is not None and self.max_new_tokens < 0:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 0")
        if self.samples < 1:
            raise ValueError(f"samples is {self.samples}; it must be at least 1")
        if self.logprobs is not None and (not 0 <= self.logprobs <= config.vocab_size):
            raise ValueError(f"logprobs is {self.logprobs}; it must be 0 to {config.vocab_size} alternatives, or None")
        biased = [t for t, _ in self.steering.bias if not 0 <= t < config.vocab_size]
        if biased:
            raise ValueError(f"token {biased[:1]} of the bias is not in the vocabulary of {config.vocab_size}")
        if self.prefill is not None and self.prefill not in PREFILL_MODES:
            raise ValueError(f"prefill is {self.prefill!r}; choose one of {', '.join(PREFILL_MODES)}")
        if self.grammar is not None and self.grammar.vocab_size > config.vocab_size:
            raise ValueError(
                f"the grammar is over {self.grammar.vocab_size} tokens, the vocabulary has {config.vocab_size}; "
                "compile it with this model's tokenizer"
            )
        if not all(self.stop_sequences):
            raise ValueError("a stop sequence is empty; give at least one token in each")
        new = 1 if self.max_new_tokens is None else self.max_new_tokens
        if not config.unlimited_context and len(self.tokens) + max(new, 1) - 1 > slots:
            raise ValueError(
                f"a prompt of {len(self.tokens)} tokens and {new} new ones exceed the {slots} slots of a row (context "
                f"of {config.context}); shorten one of them, or use a model in which every layer has a sliding window"
            )

    def finish_reason(self, new: list[int], slots: int | None) -> Finish | None:
        """Why the answer is complete after the tokens `new`, None where it is not; slots None: there is no limit."""
        if new[-1] in self.stop or any(tuple(new[-len(s) :]) == s for s in self.stop_sequences):
            return "stop"
        full = slots is not None and len(self.tokens) + len(new) > slots  # the last token is never fed back
        return "length" if len(new) == self.max_new_tokens or full else None


@dataclass(frozen=True)
class Logprob:
    """How likely a token was."""

    logprob: float
    alternatives: tuple[tuple[int, float], ...]
    """(token, log-probability) of the most likely ones, in order."""


@dataclass(frozen=True)
class Event:
    """One token of one sample of a request, or its end."""

    request: int
    """The number that `submit` gave."""
    sample: int
    token: int | None
    """None where it ended without another token."""
    finish: Finish | None = None
    logprob: Logprob | None = None
    certificate: Certificate | None = None
    """With the first token: how the prompt was computed, where by parallel prefill."""


@dataclass(frozen=True)
class Completion:
    """One sample, done."""

    request: int
    sample: int
    tokens: tuple[int, ...]
    """What was drawn, the stop token included."""
    finish: Finish
    logprobs: tuple[Logprob, ...]
    prompt_tokens: int
    """Usage: tokens of the prompt …"""
    reused_tokens: int
    """… of which so many were taken from an earlier request or sample."""
    certificate: Certificate | None
    """How the prompt was computed, where by parallel prefill."""

    def __repr__(self) -> str:
        return changed_fields(self)
