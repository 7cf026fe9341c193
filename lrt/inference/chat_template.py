"""How the turns of a conversation are written as tokens: a table by the tokenizer's special tokens.

A checkpoint's folder may have a Jinja template of its own (`jinja_template.py`); the table is for all others.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from lrt.data.tokenizer import Tokenizer

Part = tuple[str, bool]
"""A piece of a conversation, and whether somebody wrote it: a special token that is spelled there is plain text."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    text: str


class ChatTemplate(Protocol):
    """How conversations are written."""

    @property
    def special(self) -> Set[str]:
        """The special tokens that stand for themselves in its parts."""
        ...

    @property
    def end(self) -> str | None:
        """The special token that ends an answer. None: a line's end does."""
        ...

    def parts(self, messages: Sequence[Message], options: Mapping[str, Any] | None = None) -> list[Part]:
        """A conversation up to where the next answer begins. ValueError where the template cannot write it."""
        ...

    def continuation(self, messages: Sequence[Message], ended: bool = False) -> list[Part]:
        """What stands between the last answer of a conversation and the next; `ended`: its end is there already."""
        ...

    def closing(self, ended: bool = False) -> list[Part]:
        """What stands behind a last answer; `ended`: without what ends it, which is there already."""
        ...

    @property
    def ending(self) -> list[Part]:
        """What ends an answer: the first parts of `closing`."""
        ...

    def check_options(self, options: Mapping[str, Any]) -> None:
        """ValueError where `parts` cannot be given these."""
        ...


@dataclass(frozen=True)
class Template:
    """How a turn is written: text, and special tokens by their names."""

    user: tuple[str, ...]
    """What comes before the user's text."""
    assistant: tuple[str, ...]
    """What comes between the user's text and the answer."""
    end: str | None
    """The special token that ends an answer. None: a line's end does."""
    between: str = ""
    """What stands between the end of an answer and the next turn."""
    system: tuple[tuple[str, ...], tuple[str, ...]] | None = None
    """What stands before and after a system message. None: such a message opens the first user's turn."""

    @property
    def special(self) -> set[str]:
        """The special tokens that a tokenizer must have."""
        return set() if self.end is None else {p for p in (*self.user, *self.assistant, self.end) if p.startswith("<|")}

    def parts(self, messages: Sequence[Message], options: Mapping[str, Any] | None = None) -> list[Part]:
        """A conversation up to where the next answer begins.

        ValueError where its turns are in no order that the template can write, and for any options: it has none.
        """
        self.check_options(options or {})
        turns = list(messages)
        opening = [turns.pop(0).text] if turns and turns[0].role == "system" else []
        if (
            not bool(turns)
            or not turns[0].role == turns[-1].role == "user"
            or (not all(t.role != "system" for t in turns))
        ):
            raise ValueError(
                f"the messages are of {', '.join(m.role for m in messages) or 'nobody'}; give at most one of the "
                "system, the first, then turns that begin and end with the user's"
            )
        parts: list[Part] = []
        if opening and self.system is not None:
            before, after = self.system
            parts += [*((p, False) for p in before), (opening.pop(), True), *((p, False) for p in after)]
        # Messages of one role that follow each other are one turn.
        for role, group in itertools.groupby(turns, lambda turn: turn.role):
            text = "\n\n".join([*opening, *(turn.text for turn in group)])
            opening = []
            if role == "user":
                parts += [(p, False) for p in self.user] + [(text, True)] + [(p, False) for p in self.assistant]
            else:
                parts += [(text, True), *self.closing()]
        return parts

    def continuation(self, messages: Sequence[Message], ended: bool = False) -> list[Part]:
        """Parts between the last answer of a conversation and the next; `ended`: its end itself is there already."""
        last = max(i for i, message in enumerate(messages) if message.role == "assistant")
        return [*self.closing(ended), *self.parts(messages[last + 1 :])]

    def closing(self, ended: bool = False) -> list[Part]:
        """Parts between an answer and the next turn; `ended`: the end itself is there already."""
        return [*([] if ended else self.ending), *((p, False) for p in (self.between,) if p)]

    @property
    def ending(self) -> list[Part]:
        """What ends an answer."""
        return [(self.end or "\n", False)]

    def check_options(self, options: Mapping[str, Any]) -> None:
        """ValueError for any: it has none."""
        if options:
            raise ValueError(f"this chat template has no options such as {next(iter(options))[:64]!r}; leave them out")


TEMPLATES = {
    "nanochat": Template(("<|user_start|>",), ("<|user_end|>", "<|assistant_start|>"), "<|assistant_end|>"),
    "chatml": Template(
        ("<|im_start|>", "user\n"),
        ("<|im_end|>", "\n", "<|im_start|>", "assistant\n"),
        "<|im_end|>",
        "\n",
        (("<|im_start|>", "system\n"), ("<|im_end|>", "\n")),
    ),
    "plain": Template(("User: ",), ("\nAssistant:",), None),
}
"""In order of preference: the first whose special tokens the tokenizer has. `plain` serves any."""


def default_template(tokenizer: Tokenizer) -> str:
    """The name of the template that a tokenizer is made for."""
    names = special_tokens(tokenizer).keys()
    return next(name for name, template in TEMPLATES.items() if template.special <= names)


def check_template(tokenizer: Tokenizer, name: str) -> Template:
    """The template of a name. ValueError where there is none, or where the tokenizer lacks its special tokens."""
    if name not in TEMPLATES:
        raise ValueError(f"unknown template {name!r}; choose one of {', '.join(TEMPLATES)}")
    missing = sorted(TEMPLATES[name].special - special_tokens(tokenizer).keys())
    if missing:
        raise ValueError(f"template {name!r} needs the special tokens {', '.join(missing)}; use another template")
    return TEMPLATES[name]


def special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Special tokens by name."""
    added = tokenizer.inner.get_added_tokens_decoder()
    return {added[i].content: i for i in tokenizer.special}


def turn_tokens(tokenizer: Tokenizer, template: ChatTemplate, parts: Sequence[Part]) -> list[int]:
    """The tokens of a conversation's parts: special tokens by their names, except in what somebody wrote.

    The texts are encoded as a batch, which leaves the interpreter to other threads.
    """
    special = special_tokens(tokenizer)
    is_text = [by_somebody or part not in template.special for part, by_somebody in parts]
    encoded = iter(tokenizer.encode_batch([part for (part, _), text in zip(parts, is_text, strict=True) if text]))
    tokens = [next(encoded) if text else [special[part]] for (part, _), text in zip(parts, is_text, strict=True)]
    return [token for some in tokens for token in some]
