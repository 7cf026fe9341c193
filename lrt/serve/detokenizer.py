"""Tokens to text as they come: no half characters, and nothing of a stop string.

Stop strings are text, so they are searched for after decoding: a string may begin and end within tokens. What might
begin one is held back until it is known not to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lrt.data.tokenizer import Stream
from lrt.inference.request import Logprob


@dataclass(frozen=True)
class EmittedToken:
    """A token that is part of an answer."""

    token: int
    logprob: Logprob | None
    offset: int
    """Where its text begins in the answer, in characters."""


@dataclass(frozen=True)
class TextDelta:
    """What can be shown now."""

    text: str
    tokens: tuple[EmittedToken, ...]
    stopped: bool = False
    """A stop string came: nothing follows."""


class Detokenizer:
    """Writes one answer."""

    def __init__(self, stream: Stream, stop_strings: Sequence[str], strip: bool = False) -> None:
        """stop_strings: none empty. strip: leave out white space at the beginning."""
        self.stream, self.stop_strings, self.strip = stream, tuple(stop_strings), strip
        self.emitted = 0
        """Characters that were given out."""
        self.held_text = ""
        self.held_tokens: list[EmittedToken] = []
        """Tokens whose text is not given out yet."""
        self.token_count = 0
        """Tokens that were drawn for it, those held back and a stop token included."""

    def push(self, token: int, logprob: Logprob | None) -> TextDelta:
        """What a token lets out."""
        self.token_count += 1
        self.held_tokens.append(EmittedToken(token, logprob, self.emitted + len(self.held_text)))
        return self._append(self.stream.push(token))

    def count_stop_token(self) -> None:
        """A token ended the answer that is not part of its text."""
        self.token_count += 1

    def finish(self) -> TextDelta:
        """The rest, after the last token; an incomplete character is U+FFFD."""
        delta = self._append(self.stream.finish())
        if delta.stopped:
            return delta
        text, tokens = self.held_text, tuple(self.held_tokens)
        self.held_text, self.held_tokens = "", []
        return TextDelta(delta.text + text, delta.tokens + tokens)

    def _append(self, text: str) -> TextDelta:
        self.held_text += text
        if self.strip:
            self.held_text = self.held_text.lstrip()
            self.strip = not self.held_text
        stops = [at for stop in self.stop_strings if (at := self.held_text.find(stop)) >= 0]
        if stops:  # the earliest decides, whichever string it is
            end = self.emitted + min(stops)
            tokens = tuple(t for t in self.held_tokens if t.offset < end)
            delta = self._emit(self.held_text[: min(stops)], tokens, stopped=True)
            self.held_text, self.held_tokens = "", []
            return delta
        # So many characters at the end may be the beginning of a stop string, and stay.
        keep = max((overlap(self.held_text, stop) for stop in self.stop_strings), default=0)
        free = self.held_text[: len(self.held_text) - keep]
        self.held_text = self.held_text[len(free) :]
        end = self.emitted + len(free)
        # A token without text of its own (a part of a character) goes out with the one that completes it.
        tokens = tuple(t for t in self.held_tokens if t.offset < end)
        self.held_tokens = self.held_tokens[len(tokens) :]
        return self._emit(free, tokens)

    def _emit(self, text: str, tokens: tuple[EmittedToken, ...], stopped: bool = False) -> TextDelta:
        self.emitted += len(text)
        return TextDelta(text, tokens, stopped)


def overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text may be the beginning of a stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def display_token(spelling: bytes) -> str:
    """A token as text; one that is no whole characters by its bytes, as OpenAI does: bytes:\\xe2\\x82."""
    try:
        return spelling.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelling)
