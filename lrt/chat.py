"""A conversation in turns: a session and the template that says how turns are written."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lrt.calibration import Calibration
from lrt.config import require
from lrt.data.tokenizer import Tokenizer
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.prefill import Mode
from lrt.sampling import Sampling
from lrt.session import Session

TURNS = "turns.json"
"""Beside a saved session: where its turns began."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    text: str


@dataclass(frozen=True)
class Template:
    """How a turn is written: text, and special tokens by their names."""

    user: tuple[str, ...]
    """What comes before the user's text."""
    assistant: tuple[str, ...]
    """What comes between the user's text and the answer."""
    end: str | None
    """The special token that ends an answer. None: a line's end does."""
    system: tuple[tuple[str, ...], tuple[str, ...]] | None = None
    """What stands before and after a system message. None: such a message opens the first user's turn."""

    @property
    def special(self) -> set[str]:
        """The special tokens that a tokenizer must have."""
        return set() if self.end is None else {p for p in (*self.user, *self.assistant, self.end) if p.startswith("<|")}

    def parts(self, messages: Sequence[Message]) -> list[tuple[str, bool]]:
        """A conversation up to where the next answer begins: pieces, and whether each is what somebody said.

        ValueError where its turns are in no order that the template can write.
        """
        turns = list(messages)
        opening = [turns.pop(0).text] if turns and turns[0].role == "system" else []
        require(
            bool(turns) and turns[0].role == turns[-1].role == "user" and all(t.role != "system" for t in turns),
            f"the messages are of {', '.join(m.role for m in messages) or 'nobody'}; give at most one of the system, "
            "the first, then turns that begin and end with the user's",
        )
        pieces: list[tuple[str, bool]] = []
        if opening and self.system is not None:
            before, after = self.system
            pieces += [*((p, False) for p in before), (opening.pop(), True), *((p, False) for p in after)]
        for role, group in itertools.groupby(turns, lambda turn: turn.role):
            text = "\n\n".join([*opening, *(turn.text for turn in group)])
            opening = []
            if role == "user":
                pieces += [(p, False) for p in self.user] + [(text, True)] + [(p, False) for p in self.assistant]
            else:
                pieces += [(text, True), (self.end or "\n", False)]
        return pieces


TEMPLATES = {
    "nanochat": Template(("<|user_start|>",), ("<|user_end|>", "<|assistant_start|>"), "<|assistant_end|>"),
    "chatml": Template(
        ("<|im_start|>", "user\n"),
        ("<|im_end|>", "\n", "<|im_start|>", "assistant\n"),
        "<|im_end|>",
        (("<|im_start|>", "system\n"), ("<|im_end|>", "\n")),
    ),
    "plain": Template(("User: ",), ("\nAssistant:",), None),
}
"""In order of preference: the first whose special tokens the tokenizer has. `plain` serves any."""


def template_of(tokenizer: Tokenizer) -> str:
    """The name of the template that a tokenizer is made for."""
    known = specials(tokenizer)
    return next(name for name, template in TEMPLATES.items() if template.special <= set(known))


def specials(tokenizer: Tokenizer) -> dict[str, int]:
    """Special tokens by name."""
    added = tokenizer.inner.get_added_tokens_decoder()
    return {added[i].content: i for i in tokenizer.special}


def written(tokenizer: Tokenizer, template: Template, parts: Sequence[tuple[str, bool]]) -> list[int]:
    """The tokens of a conversation's pieces: special tokens by their names, except in what somebody said."""
    names, ids = specials(tokenizer), []
    for part, said in parts:
        ids += [names[part]] if part in template.special and not said else tokenizer.encode(part)
    return ids


class Chat:
    """One conversation with one model. Turns are exact continuations of the session, and can be taken back."""

    def __init__(
        self,
        model: LatentRecurrentTransformer,
        tokenizer: Tokenizer,
        sampling: Sampling,
        seed: int = 0,
        template: str | None = None,
        prefill: Mode = "converged",
        calibration: Calibration | None = None,
    ) -> None:
        """template: a name in TEMPLATES; None takes the one that the tokenizer is made for."""
        name = template_of(tokenizer) if template is None else template
        require(name in TEMPLATES, f"unknown template {name!r}; choose one of {', '.join(TEMPLATES)}")
        missing = sorted(TEMPLATES[name].special - set(specials(tokenizer)))
        require(not missing, f"template {name!r} needs the special tokens {', '.join(missing)}; use another template")
        self.model, self.tokenizer, self.sampling, self.seed = model, tokenizer, sampling, seed
        self.name, self.template = name, TEMPLATES[name]
        self.prefill: Mode = prefill
        self.calibration = calibration
        self.session: Session | None = None
        self.turns: list[int] = []
        """How many tokens the session had before each turn; 0 before the first."""
        self.stop = self._stop()

    def say(self, text: str, max_new_tokens: int, tell: Callable[[str], None]) -> str:
        """One turn: the user's text in, the answer out; `tell` is told its pieces as they come.

        ValueError where the context has no room; the conversation is then as it was before.
        """
        before = len(self.session.tokens) if self.session is not None else 0
        ids = self.turn(text)
        room = max_new_tokens if self.model.config.unbounded else self.model.config.context - before - len(ids)
        require(
            room > 0,
            f"the conversation has {before} tokens and this turn {len(ids)}, the context is "
            f"{self.model.config.context}; take turns back (/undo), or start anew",
        )
        session = (
            Session.start(self.model, ids, self.prefill, self.seed, self.calibration)
            if self.session is None
            else self.session.extend(ids, self.prefill, self.calibration)
        )
        decoder, pieces = self.tokenizer.decoder(session.tokens), []

        def told(token: int) -> None:
            pieces.append(decoder.push(token))
            tell(pieces[-1])

        session = session.generate(min(max_new_tokens, room), self.sampling, self.stop, told)
        pieces.append(decoder.finish())
        tell(pieces[-1])
        self.session = session
        self.turns.append(before)
        return "".join(pieces).strip()

    def turn(self, text: str) -> list[int]:
        """The tokens of a turn, up to where the answer begins."""
        opening = [] if self.session is not None else [self.tokenizer.bos]
        return opening + written(self.tokenizer, self.template, self.template.parts([Message("user", text)]))

    def undo(self) -> None:
        """Take the last turn back, exactly."""
        require(len(self.turns) > 0, "there is no turn to take back")
        length = self.turns[-1]
        self.session = self.session.crop(length) if self.session is not None and length else None
        self.turns.pop()

    def save(self, path: Path) -> None:
        """Write the conversation to a folder."""
        require(self.session is not None, "there is nothing to save yet; say something first")
        assert self.session is not None
        self.session.save(path)
        (path / TURNS).write_text(json.dumps(self.turns) + "\n")

    def load(self, path: Path) -> None:
        """Go on with the conversation of a folder."""
        self.session = dataclasses.replace(Session.load(path, self.model), seed=self.seed)
        try:
            turns = json.loads((path / TURNS).read_text())
        except (OSError, ValueError):
            turns = []  # a session that is no conversation: nothing to take back
        self.turns = [int(n) for n in turns]

    def _stop(self) -> frozenset[int]:
        """The tokens that end an answer: the template's, a new document, or, in plain text, a line's end."""
        if self.template.end is not None:
            return frozenset({self.tokenizer.bos, specials(self.tokenizer)[self.template.end]})
        lines = (i for i in range(self.tokenizer.vocab_size) if "\n" in self.tokenizer.decode([i]))
        return frozenset({self.tokenizer.bos, *lines})
