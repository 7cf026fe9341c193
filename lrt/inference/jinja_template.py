"""Chat templates in Jinja, as tokenizers bring them along: chat_template.jinja, or tokenizer_config.json.

The environment is the one that transformers renders them in. It is sandboxed: a template reads no files and runs no
Python. Bounds on its loops, on what `*` and `**` make and on what it writes stop mistakes. They are no defence: one
that is made to can still take much memory and time (by `~`, `center` or `sort`).

What somebody wrote stays text, whatever it spells. While a template is at work, every character of theirs that a
special token begins with has a stand-in; so no special token that is in the result came from them, however a template
cuts and joins its texts. What the template itself looks for in a text (`</think>`) stays readable to it.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.environment import Template as Compiled
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lrt.data.tokenizer import Tokenizer
from lrt.inference.chat_template import ChatTemplate, Message, Part, check_template, default_template, special_tokens
from lrt.utils.files import read_json

TEMPLATE_FILE, CONFIG_FILE = "chat_template.jinja", "tokenizer_config.json"
"""Where a checkpoint's folder has its template; the first where both do."""
LONGEST = 4_000_000
"""Characters that a template may write, or make by repeating a text with `*`."""
MOST_STEPS = 100_000
"""Rounds of loops and calls of macros in one conversation."""
LARGEST_EXPONENT = 64
PRIVATE = range(0xF0000, 0x10FFFE)
"""Characters that Unicode leaves to private use, of which stand-ins are taken."""

ASKED = (Message("user", "hello"),)
"""A turn before and behind the answer by whose surroundings a template is read."""


class Generation(Extension):
    """`{% generation %}` marks answers for training; here it is its content."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """transformers' environment, in which loops, `*` and `**` have an end. Other operators and filters have none."""

    intercepted_binops = frozenset(("*", "**"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])
        self.filters["tojson"] = to_json
        self.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and abs(right) > LARGEST_EXPONENT:
            raise TemplateError(f"an exponent is {right}; at most {LARGEST_EXPONENT} is computed")
        times, sizes = ([x for x in (left, right) if isinstance(x, kind)] for kind in (int, str | list | tuple))
        if operator == "*" and times and sizes and times[0] * len(sizes[0]) > LONGEST:
            raise TemplateError(f"a text is repeated {times[0]} times; at most {LONGEST:,} characters are made")
        return super().call_binop(context, operator, left, right)

    def compile_counted(self, source: str) -> Compiled:
        """A template that calls `_step` in every round of a loop, and whenever a macro is called."""
        tree = self.parse(source)
        for block in list(tree.find_all((nodes.For, nodes.Macro))):
            step = nodes.Call(nodes.Name("_step", "load"), [], [], None, None)
            block.body.insert(0, nodes.ExprStmt(step).set_lineno(block.lineno))
        return Compiled.from_code(self, self.compile(tree), self.make_globals(None))


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it: Jinja's own escapes what HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: str) -> None:
    raise TemplateError(message)


def strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


@functools.cache
def environment() -> ChatEnvironment:
    return ChatEnvironment()


@dataclass(frozen=True)
class JinjaTemplate:
    """A template, and what it may name. ValueError where it is no Jinja, or cannot write an answer."""

    source: str
    special: frozenset[str]
    """The tokenizer's special tokens: what the template writes of these is a token."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """bos_token, eos_token, …"""

    def __post_init__(self) -> None:
        try:
            self._compiled  # noqa: B018 (so that a mistake shows now)
        except TemplateError as error:
            raise ValueError(f"the chat template is no Jinja: {error}; correct it") from None
        self._behind_answer  # noqa: B018

    def parts(self, messages: Sequence[Message], options: Mapping[str, Any] | None = None) -> list[Part]:
        """A conversation up to where the next answer begins; without the BOS, which opens every text.

        `options` are further variables of the template. ValueError, in its words, where the template refuses.
        """
        parts = self._split(*self._render(messages, options or {}))
        return parts[1:] if parts[:1] == [(self.variables.get("bos_token"), False)] else parts

    def check_options(self, options: Mapping[str, Any]) -> None:
        """ValueError where one of them is a variable of ours, or no name."""
        own = {"messages", "add_generation_prompt", *self.variables}
        taken = sorted(name for name in options if name in own or not name.isidentifier() or name.startswith("_"))
        if taken:
            raise ValueError(f"a chat template cannot be given {taken[0][:64]!r}; leave it out")

    def continuation(self, messages: Sequence[Message], ended: bool = False) -> list[Part]:
        """What stands between the last answer of a conversation and the next; `ended`: its end is there already."""
        last = max(i for i, message in enumerate(messages) if message.role == "assistant")
        answer = unused([message.text for message in messages])
        known = [*messages[:last], Message("assistant", answer), *messages[last + 1 :]]
        behind, originals = self._behind(known, answer, True)
        end = shared_parts(self.ending, self._split(behind))  # all of `ending`, unless only last answers have it
        return [*([] if ended else end), *self._split(behind[characters(end) :], originals)]

    def closing(self, ended: bool = False) -> list[Part]:
        """What stands behind a last answer; `ended`: without what ends it."""
        return [*([] if ended else self.ending), *self._split(self._behind_answer[characters(self.ending) :])]

    @property
    def ending(self) -> list[Part]:
        """What ends an answer: all up to a special token that only white space comes before; else a line's end; else
        the text that stands there whether another turn follows or not."""
        return self._ending

    @functools.cached_property
    def _ending(self) -> list[Part]:
        last = self._behind_answer
        ending = re.match(rf"\s*({self._names})|\n", last)
        if ending is not None:
            return self._split(ending[0])
        answer = unused([])
        followed, _ = self._behind([*ASKED, Message("assistant", answer), *ASKED], answer, True)
        if not last:  # a template may write the line's end between turns only
            return [("\n", True)] if followed.startswith("\n") else []
        return shared_parts(self._split(last), self._split(followed))

    @property
    def end(self) -> str | None:
        """The special token that ends an answer. None: a line's end does."""
        ending = re.match(rf"\s*({self._names})", self._behind_answer)
        return ending[1] if ending else None

    @functools.cached_property
    def _behind_answer(self) -> str:
        answer = unused([])
        return self._behind([*ASKED, Message("assistant", answer)], answer, False)[0]

    def _behind(self, messages: Sequence[Message], answer: str, goes_on: bool) -> tuple[str, dict[int, str]]:
        """(what is written behind the text `answer`, in it the originals of stand-ins)."""
        text, originals = self._render(messages, {}, goes_on)
        if text.count(answer) != 1:
            raise ValueError("the chat template does not write an earlier answer as it was; it cannot be used here")
        return text.partition(answer)[2], originals

    def _render(
        self, messages: Sequence[Message], options: Mapping[str, Any], goes_on: bool = True
    ) -> tuple[str, dict[int, str]]:
        """(what the template writes, in it the originals of stand-ins)."""
        self.check_options(options)
        conversation = [{"role": message.role, "content": message.text} for message in messages]
        stand_ins, first = {}, unused(texts_of([conversation, options]), len(self._beginnings))
        for original, other in zip(self._beginnings, first, strict=True):
            stand_ins[original] = other
        conversation, options = (protect(value, self._risky, stand_ins) for value in (conversation, options))
        variables = {**options, **self.variables, "messages": conversation, "add_generation_prompt": goes_on}
        return self._write(variables), {ord(other): original for original, other in stand_ins.items()}

    def _write(self, variables: Mapping[str, Any]) -> str:
        """What the template writes, bounded."""
        steps = iter(range(MOST_STEPS))

        def step() -> None:
            if next(steps, None) is None:
                raise TemplateError(f"it loops more than {MOST_STEPS:,} times")

        pieces, length = [], 0
        try:
            for piece in self._compiled.generate({**variables, "_step": step}):
                pieces.append(piece)
                length += len(piece)
                if length > LONGEST:
                    raise TemplateError(f"it writes more than {LONGEST:,} characters")
        except Exception as error:  # the template is not ours: whatever it raises is about this conversation
            reason = error.message if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
            raise ValueError(f"the chat template refuses these messages: {str(reason)[:500]}") from None
        return "".join(pieces)

    def _split(self, text: str, originals: Mapping[int, str] | None = None) -> list[Part]:
        """Texts, and the special tokens between them."""
        pieces = re.split(f"({self._names})", text)
        return [(piece.translate(originals or {}), i % 2 == 0) for i, piece in enumerate(pieces) if piece]

    @functools.cached_property
    def _compiled(self) -> Compiled:
        return environment().compile_counted(self.source)

    @functools.cached_property
    def _names(self) -> str:
        """Matches a special token."""
        return "|".join(re.escape(name) for name in sorted(self.special, key=len, reverse=True))

    @functools.cached_property
    def _beginnings(self) -> list[str]:
        """The characters that special tokens begin with."""
        return sorted({name[0] for name in self.special})

    @functools.cached_property
    def _risky(self) -> re.Pattern[str]:
        """Matches single characters that get stand-ins, and longer texts that stay: what the template looks for."""
        constants = {node.value for node in environment().parse(self.source).find_all(nodes.Const)}
        kept = [text for text in constants if isinstance(text, str) and self._harmless(text)]
        longest_first = [re.escape(text) for text in sorted(kept, key=len, reverse=True)]
        return re.compile("|".join([*longest_first, *map(re.escape, self._beginnings)]) or r"(?!)")

    def _harmless(self, text: str) -> bool:
        """Whether a text has a beginning of special tokens in it that begins none of them."""
        tails = [text[i:] for i, character in enumerate(text) if character in self._beginnings]
        spelled = any(name.startswith(tail) or tail.startswith(name) for tail in tails for name in self.special)
        return bool(tails) and not spelled


def shared_parts(one: Sequence[Part], other: Sequence[Part]) -> list[Part]:
    """What two lists of parts begin with: whole special tokens, and characters of texts."""
    shared: list[Part] = []
    for (text, by_somebody), part in zip(one, other, strict=False):
        same = os.path.commonprefix([text, part[0]])  # noqa: RUF071 (characters are meant)
        if part[1] == by_somebody and (by_somebody or same == text == part[0]):
            shared += [(same, by_somebody)] * bool(same)
        if part != (same, by_somebody) or text != same:
            break
    return shared


def characters(parts: Sequence[Part]) -> int:
    """How many there are in parts."""
    return sum(len(text) for text, _ in parts)


def texts_of(value: Any) -> Iterator[str]:
    """All texts in JSON data, names too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield name
            yield from texts_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from texts_of(inner)


def unused(texts: Iterable[str], count: int = 1) -> str:
    """So many characters of PRIVATE that no text has. ValueError where there are not enough."""
    used = set().union(*texts)
    free = [c for c, _ in zip((chr(i) for i in PRIVATE if chr(i) not in used), range(count), strict=False)]
    if len(free) < count:
        raise ValueError("the messages use all of Unicode's private characters; leave some out")
    return "".join(free)


def protect(value: Any, risky: re.Pattern[str], stand_ins: Mapping[str, str]) -> Any:
    """JSON data in whose texts risky characters have stand-ins."""
    if isinstance(value, str):
        return risky.sub(lambda match: stand_ins.get(match[0], match[0]), value)
    if isinstance(value, Mapping):
        return {protect(name, risky, stand_ins): protect(inner, risky, stand_ins) for name, inner in value.items()}
    return [protect(inner, risky, stand_ins) for inner in value] if isinstance(value, list) else value


def choose_template(tokenizer: Tokenizer, name: str | None, folder: Path | None) -> tuple[str, ChatTemplate]:
    """(name, template): the one of a name in TEMPLATES; without one the folder's own, or the one that the tokenizer is
    made for. ValueError where it does not fit, or is wrong."""
    own = None if name is not None or folder is None else folder_template(folder, tokenizer)
    if own is not None:
        return "of the checkpoint", own
    name = name or default_template(tokenizer)
    return name, check_template(tokenizer, name)


def folder_template(folder: Path, tokenizer: Tokenizer) -> JinjaTemplate | None:
    """The template in a checkpoint's folder; None without one. ValueError, naming the file, where it is wrong."""
    file, config = folder / TEMPLATE_FILE, folder / CONFIG_FILE
    settings = read_json(config) if config.is_file() else {}
    source = file.read_text(encoding="utf-8") if file.is_file() else default_of(settings.get("chat_template"))
    if source is None:
        return None
    names = {i: name for name, i in special_tokens(tokenizer).items()}
    bos = names[tokenizer.bos]
    variables = {"bos_token": bos, "eos_token": bos} | {
        name: content_of(value) for name, value in settings.items() if name.endswith("_token") and content_of(value)
    }
    try:
        return JinjaTemplate(source, frozenset(names.values()), variables)
    except ValueError as error:
        raise ValueError(f"{file if file.is_file() else config}: {error}") from None


def copy_template(source: Path, out: Path) -> None:
    """Give a checkpoint's folder the template of another."""
    for file in (source / TEMPLATE_FILE, source / CONFIG_FILE):
        if file.is_file():
            shutil.copy(file, out / file.name)


def default_of(templates: Any) -> str | None:
    """The template of a tokenizer's configuration, which may have several by name."""
    if not isinstance(templates, list):
        return templates if isinstance(templates, str) else None
    named = {entry.get("name"): entry.get("template") for entry in templates if isinstance(entry, dict)}
    return named.get("default")


def content_of(token: Any) -> Any:
    """A token's text, which configurations write in two ways; None for what is none."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
