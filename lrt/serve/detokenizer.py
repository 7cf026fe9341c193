"""Tokens to text as they come: no half characters, and nothing of a stop string."""

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
    spoken: tuple[EmittedToken, ...]
    ended: bool = False
    """A stop string came: nothing follows."""


class Detokenizer:
    """One answer. What might be the beginning of a stop string is held back until it is known not to be."""

    def __init__(self, stream: Stream, stops: Sequence[str], strip: bool = False) -> None:
        """stops: strings, none empty. strip: leave out white space at the beginning."""
        self.stream, self.stops, self.strip = stream, tuple(stops), strip
        self.shown = 0
        """Characters that were given out."""
        self.held = ""
        self.waiting: list[EmittedToken] = []
        """Tokens whose text is not given out yet."""
        self.count = 0
        """Tokens that were drawn for it, those held back and a stop token included."""

    def push(self, token: int, logprob: Logprob | None) -> TextDelta:
        """What a token lets out."""
        self.count += 1
        self.waiting.append(EmittedToken(token, logprob, self.shown + len(self.held)))
        return self._grown(self.stream.push(token))

    def stop_token(self) -> None:
        """A token ended the answer that is not part of its text."""
        self.count += 1

    def finish(self) -> TextDelta:
        """The rest, after the last token; an incomplete character is U+FFFD."""
        piece = self._grown(self.stream.finish())
        if piece.ended:
            return piece
        rest, spoken = self.held, tuple(self.waiting)
        self.held, self.waiting = "", []
        return TextDelta(piece.text + rest, piece.spoken + spoken)

    def _grown(self, text: str) -> TextDelta:
        self.held += text
        if self.strip:
            self.held = self.held.lstrip()
            self.strip = not self.held
        found = [at for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if found:
            end = self.shown + min(found)
            spoken = tuple(s for s in self.waiting if s.offset < end)
            piece = self._release(self.held[: min(found)], spoken, ended=True)
            self.held, self.waiting = "", []
            return piece
        keep = max((overlap(self.held, stop) for stop in self.stops), default=0)
        free = self.held[: len(self.held) - keep]
        self.held = self.held[len(free) :]
        shown = self.shown + len(free)
        # A token without text of its own (a part of a character) goes out with the one that completes it.
        out = [s for s in self.waiting if s.offset < shown]
        self.waiting = self.waiting[len(out) :]
        return self._release(free, tuple(out))

    def _release(self, text: str, spoken: tuple[EmittedToken, ...], ended: bool = False) -> TextDelta:
        self.shown += len(text)
        return TextDelta(text, spoken, ended)


def overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text may be the beginning of a stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def displayed(spelling: bytes) -> str:
    """A token as text; one that is no whole characters by its bytes, as OpenAI does: bytes:\\xe2\\x82."""
    try:
        return spelling.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelling)
