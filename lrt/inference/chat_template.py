"""How the turns of a conversation are written as tokens: a table by the tokenizer's special tokens."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lrt.data.tokenizer import Tokenizer


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
    between: str = ""
    """What stands between the end of an answer and the next turn."""
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
        if (
            not bool(turns)
            or not turns[0].role == turns[-1].role == "user"
            or (not all(t.role != "system" for t in turns))
        ):
            raise ValueError(
                f"the messages are of {', '.join(m.role for m in messages) or 'nobody'}; give at most one of the "
                "system, the first, then turns that begin and end with the user's"
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
                pieces += [(text, True), *self.closing()]
        return pieces

    def closing(self, ended: bool = False) -> list[tuple[str, bool]]:
        """Pieces between an answer and the next turn; `ended`: the end itself is there already."""
        return [(p, False) for p in ("" if ended else self.end or "\n", self.between) if p]


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


def template_of(tokenizer: Tokenizer) -> str:
    """The name of the template that a tokenizer is made for."""
    known = specials(tokenizer)
    return next(name for name, template in TEMPLATES.items() if template.special <= set(known))


def specials(tokenizer: Tokenizer) -> dict[str, int]:
    """Special tokens by name."""
    added = tokenizer.inner.get_added_tokens_decoder()
    return {added[i].content: i for i in tokenizer.special}


def turn_tokens(tokenizer: Tokenizer, template: Template, parts: Sequence[tuple[str, bool]]) -> list[int]:
    """The tokens of a conversation's pieces: special tokens by their names, except in what somebody said."""
    names, ids = specials(tokenizer), []
    for part, said in parts:
        ids += [names[part]] if part in template.special and not said else tokenizer.encode(part)
    return ids
