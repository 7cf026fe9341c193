"""A conversation in turns: a session and the template that says how turns are written."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from lrt.data.tokenizer import Tokenizer
from lrt.inference.chat_template import Message, special_tokens, turn_tokens
from lrt.inference.cost_model import Calibration
from lrt.inference.jinja_template import choose_template
from lrt.inference.prefill import PrefillMode
from lrt.inference.sampling import Sampling
from lrt.inference.session import TURNS, Session
from lrt.model.transformer import LatentRecurrentTransformer

BEFORE = (Message("user", "hello"), Message("assistant", "hello"))
"""Stands for all turns before the next one: the session has them as tokens."""


class Stripped:
    """A text that comes in pieces, passed on without the white space that it begins and ends with."""

    def __init__(self, on_text: Callable[[str], None]) -> None:
        self.on_text, self.text, self.space = on_text, "", ""

    def push(self, piece: str) -> None:
        """Pass on what is known to be inside: space at the end waits for what follows it."""
        piece = self.space + piece if self.text else piece.lstrip()
        inside = piece.rstrip()
        self.space = piece[len(inside) :]
        if inside:
            self.text += inside
            self.on_text(inside)


class Conversation:
    """One conversation with one model. Turns are exact continuations of the session, and can be taken back."""

    def __init__(
        self,
        model: LatentRecurrentTransformer,
        tokenizer: Tokenizer,
        sampling: Sampling,
        seed: int = 0,
        template: str | None = None,
        prefill: PrefillMode = "converged",
        calibration: Calibration | None = None,
        folder: Path | None = None,
    ) -> None:
        """template: a name in TEMPLATES; None takes the checkpoint's own, from its `folder`, or else the one that the
        tokenizer is made for."""
        self.model, self.tokenizer, self.sampling, self.seed = model, tokenizer, sampling, seed
        self.name, self.template = choose_template(tokenizer, template, folder)
        self.prefill: PrefillMode = prefill
        self.calibration = calibration
        self.session: Session | None = None
        self.turns: list[int] = []
        """How many tokens the session had before each turn; 0 before the first."""
        self.stop = self._stop_tokens()

    def say(self, text: str, max_new_tokens: int, on_text: Callable[[str], None]) -> str:
        """One turn: the text of the user in, the answer out, stripped; `on_text` gets its pieces as they come.

        ValueError where the context has no room; the conversation is then as it was before.
        """
        before = len(self.session.tokens) if self.session is not None else 0
        ids = self.encode_turn(text)
        room = max_new_tokens if self.model.config.unlimited_context else self.model.config.context - before - len(ids)
        if room <= 0:
            raise ValueError(
                f"the conversation has {before} tokens and this turn {len(ids)}, the context is "
                f"{self.model.config.context}; take turns back (/undo), or start anew"
            )
        session = (
            Session.start(self.model, ids, self.prefill, self.seed, self.calibration)
            if self.session is None
            else self.session.extend(ids, self.prefill, self.calibration)
        )
        decoder, answer = self.tokenizer.decoder(session.tokens), Stripped(on_text)

        session = session.generate(
            min(max_new_tokens, room), self.sampling, self.stop, on_token=lambda token: answer.push(decoder.push(token))
        )
        answer.push(decoder.finish())
        self.session = session  # only now: an error or Ctrl-C before leaves the conversation as it was
        self.turns.append(before)
        return answer.text

    def encode_turn(self, text: str) -> list[int]:
        """The tokens of a turn, up to where the answer begins."""
        turn = Message("user", text)
        if self.session is None:
            return [self.tokenizer.bos, *turn_tokens(self.tokenizer, self.template, self.template.parts([turn]))]
        ended = self.session.tokens[-1] in self.stop  # not where the answer was cut by its limit
        parts = self.template.continuation([*BEFORE, turn], ended)
        return turn_tokens(self.tokenizer, self.template, parts)

    def undo(self) -> None:
        """Take the last turn back, exactly."""
        if len(self.turns) == 0:
            raise ValueError("there is no turn to take back")
        length = self.turns[-1]
        self.session = self.session.crop(length) if self.session is not None and length else None
        self.turns.pop()

    def save(self, path: Path) -> None:
        """Write the conversation to a folder."""
        if self.session is None:
            raise ValueError("there is nothing to save yet; say something first")
        assert self.session is not None
        self.session.save(path, {TURNS: json.dumps(self.turns) + "\n"})

    def load(self, path: Path) -> None:
        """Go on with the conversation of a folder. ValueError where it is damaged, or another model's."""
        session = dataclasses.replace(Session.load(path, self.model), seed=self.seed)
        try:
            turns = [int(n) for n in json.loads((path / TURNS).read_text())]
        except (OSError, ValueError, TypeError):
            turns = []  # a session that is no conversation: nothing to take back
        fits = turns == sorted(set(turns)) and all(0 <= n < len(session.tokens) for n in turns)
        if not fits:
            raise ValueError(
                f"{path / TURNS} does not belong to this session; delete it, and no turn can be taken back"
            )
        self.session, self.turns = session, turns

    def _stop_tokens(self) -> frozenset[int]:
        """The tokens that end an answer: the template's, a new document, or, in plain text, a line's end."""
        if self.template.end is not None:
            return frozenset({self.tokenizer.bos, special_tokens(self.tokenizer)[self.template.end]})
        lines = (i for i in range(self.tokenizer.vocab_size) if "\n" in self.tokenizer.decode([i]))
        return frozenset({self.tokenizer.bos, *lines})
