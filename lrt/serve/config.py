"""What requests may cost, and how models are decoded. Plain data: importing it needs nothing of the extra."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lrt.inference.prefill import PrefillMode


@dataclass(frozen=True)
class Limits:
    """Beyond them a request is refused, or ended, with an error that says which limit it was."""

    body_bytes: int = 1_000_000
    """Size of a request's body (else 413)."""
    body_values: int = 32_768
    """JSON values in a body, names counted too: these are what takes time to read, not text (else 413)."""
    body_seconds: float = 10.0
    """Time for its head and again for its body to arrive (else the connection is closed; 408)."""
    prompt_tokens: int | None = None
    """Tokens of a prompt. None: what the context holds (else 400)."""
    new_tokens: int | None = None
    """Tokens of an answer. None: what the context holds (else 400)."""
    choices: int = 32
    """Continuations that one request may ask for: prompts times n or best_of (else 400)."""
    queue: int = 128
    """Continuations that wait for a row (else 429)."""
    queue_seconds: float = 60.0
    """How long one waits for a row (else 503)."""
    request_seconds: float = 300.0
    """How long an answer may take (else 504, or an error event at the end of a stream)."""
    models: int = 8
    """Models loaded at once, of those that `--models-dir` has and the others (else 503)."""
    connections: int = 512
    """Connections at once; further ones are closed."""
    inspect_tokens: int = 512
    """Tokens of a text that the page looks into."""
    grace_seconds: float = 20.0
    """How long answers may go on after SIGTERM, before they are ended with an error event."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            minimum = 0 if name in ("queue", "grace_seconds") else 1 if isinstance(value, int) else 0.01
            if value is not None and value < minimum:
                raise ValueError(f"limits.{name} is {value}; it must be at least {minimum}")


@dataclass(frozen=True)
class Settings:
    """How models are decoded."""

    rows: int = 16
    """Sequences of each model that are decoded at once."""
    prefill: PrefillMode = "converged"
    """How prompts are computed, where a request does not say; one prompt at a time, so that it is computed as alone."""
    mode: str = "fused"
    """Which path decodes: eager, fused, packed, compiled or best."""
    prefixes: int = 0
    """Bytes for rows of earlier requests, whose beginnings later prompts reuse. 0: none."""
    template: str | None = None
    """How conversations are written: nanochat, chatml or plain. None: by the checkpoint's own template, if it has one,
    or the tokenizer's special tokens, if any."""
    devices: tuple[str, ...] = ("cpu",)
    """A worker each, with an engine of its own."""
    held_out_examples: bool = False
    """Whether the page offers beginnings of the runs' own held-out documents as prompts."""
