"""The true state behind every word of a text whose words change one: programs, logs, games of chess.

These are the texts of docs/state-data.md (`lrt.experiments.state_data` draws them); here a text is read, and followed
by rules that are written once more, so that tests hold the two against each other. Nothing of a text is ever run.

Shapes: V variables of a state.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lrt.utils.imports import optional_module

State = tuple[int, ...]
"""(V,): of each variable, which of the kind's `values` it has."""
Change = tuple[int, State | None]
"""(characters, state): the state from so many characters on. None: nobody can know it, as the text breaks the rules."""


@dataclass(frozen=True)
class StateKind:
    """A kind of text, and what its state is."""

    names: tuple[str, ...]
    """Of the variables."""
    values: tuple[str, ...]
    """What any of them can be."""
    follow: Callable[[str], Iterator[Change]]
    """Text -> its changes in order, the first of them (0, state at the beginning)."""
    layout: str = "table"
    """How a page shows it: "table", or "board" where the variables are the squares of one."""

    def after(self, text: str, ends: Sequence[int]) -> list[State | None]:
        """The state after each of the first `ends` characters of a text; ends ascending."""
        states: list[State | None] = []
        changes = [*self.follow(text)]
        number = 0
        for end in ends:
            while number + 1 < len(changes) and changes[number + 1][0] <= end:
                number += 1
            states.append(changes[number][1])
        return states


Fields = dict[str, int]
"""Variable -> its value; a variable that is missing has none."""
Rule = tuple[re.Pattern[str], Callable[..., object]]
"""A statement's pattern, and what it does: called with the fields, the stack and the pattern's groups."""


def follow_lines(text: str, rules: Sequence[Rule], start: Fields, state: Callable[[Fields], State]) -> Iterator[Change]:
    """The changes of a text of statements, one a line. A line has its effect at its end; the last one may be cut."""
    fields, stack = dict(start), []
    yield 0, state(fields)
    for line in re.finditer(r"(.*)\n", text):
        try:
            carry_out(line[1], rules, fields, stack)
        except (LookupError, ValueError):  # an empty stack, or no statement
            yield line.end(), None
            return
        yield line.end(), state(fields)


def carry_out(line: str, rules: Sequence[Rule], fields: Fields, stack: list[int]) -> None:
    """What a statement does. LookupError or ValueError where it is none, or cannot be done."""
    for pattern, act in rules:
        if matched := pattern.fullmatch(line):
            act(fields, stack, *matched.groups())
            return
    raise ValueError(line)


# repl: a Python session; all counts modulo 7

MODULUS = 7
REPL_NAMES = ("a", "b", "c", "d", "e")
REPL_KEYS = ("m[0]", "m[1]", "m[2]", "m[3]")


def value_of(fields: Fields, word: str) -> int:
    """The value of a name, a key of the dictionary or a digit."""
    return int(word) if word.isdigit() else fields[word]


def assign(fields: Fields, stack: list[int], target: str, operator: str, word: str) -> None:
    old = fields[target] if operator == "+=" else 0
    fields[target] = (old + value_of(fields, word)) % MODULUS


def swap(fields: Fields, stack: list[int], target: str, other: str, first: str, second: str) -> None:
    fields[target], fields[other] = fields[first], fields[second]


def pop(fields: Fields, stack: list[int], target: str) -> None:
    fields[target] = stack.pop()


def push(fields: Fields, stack: list[int], name: str) -> None:
    stack.append(fields[name])


def guarded(fields: Fields, stack: list[int], name: str, *assignment: str) -> None:
    if fields[name] > 3:
        assign(fields, stack, *assignment)


def no_change(fields: Fields, stack: list[int], *groups: str) -> None: ...


def rule(pattern: str, act: Callable[..., object]) -> Rule:
    """NAME stands for a name, WORD for a name or digit, KEY for a key of the dictionary."""
    spelled = pattern.replace("NAME", "([a-e])").replace("WORD", "([a-e0-6])").replace("KEY", r"(m\[[0-3]\])")
    return re.compile(spelled), act


REPL_RULES = (
    rule(r"NAME (\+?=) WORD", assign),
    rule(r"NAME (=) KEY", assign),
    rule(r"KEY (=) NAME", assign),
    rule(r"NAME, NAME = NAME, NAME", swap),
    rule(r"NAME = s\.pop\(\)", pop),
    rule(r"s\.append\(NAME\)", push),
    rule(r"if NAME % 7 > 3: NAME (\+?=) WORD", guarded),
    rule(r"print\(NAME % 7\)", no_change),
    rule(r"[0-6]", no_change),  # what was printed
)


def follow_repl(text: str) -> Iterator[Change]:
    """Names hold 0, 1, 2, … at first, the dictionary its keys."""
    start = {name: n for n, name in enumerate(REPL_NAMES)} | {key: n for n, key in enumerate(REPL_KEYS)}
    return follow_lines(text, REPL_RULES, start, lambda fields: tuple(fields.values()))


# log: a key-value store; a key that is missing has no value

LOG_KEYS = tuple("abcdefghijklmnop")
LOG_VALUES = 8


def put(fields: Fields, stack: list[int], key: str, value: str) -> None:
    fields[key] = int(value)


def increment(fields: Fields, stack: list[int], key: str) -> None:
    fields[key] = (fields[key] + 1) % LOG_VALUES if key in fields else 1


def rename(fields: Fields, stack: list[int], key: str, target: str) -> None:
    if key in fields:
        fields[target] = fields.pop(key)


def delete(fields: Fields, stack: list[int], key: str) -> None:
    fields.pop(key, None)


LOG_RULES = (
    (re.compile(r"SET ([a-p]) ([0-7])"), put),
    (re.compile(r"INCR ([a-p])"), increment),
    (re.compile(r"MOVE ([a-p]) ([a-p])"), rename),
    (re.compile(r"DEL ([a-p])"), delete),
    (re.compile(r"GET ([a-p]) (?:[0-7]|NULL)"), no_change),
)


def follow_log(text: str) -> Iterator[Change]:
    """The store is empty at first. Value 0 is NULL, value n + 1 is n."""
    return follow_lines(text, LOG_RULES, {}, lambda fields: tuple(fields.get(key, -1) + 1 for key in LOG_KEYS))


# chess: from- and to-squares

SQUARES = tuple(file + rank for rank in "12345678" for file in "abcdefgh")
PIECES = "PNBRQKpnbrqk"
MOVE_WORDS = frozenset({*SQUARES, *"nbrq"})
GAMES = ("engine", "random")


def piece_values(board: Any) -> State:
    """What stands on each square: 0 for nothing, else 1 + its place in PIECES."""
    pieces = board.piece_map()
    return tuple(PIECES.index(pieces[square].symbol()) + 1 if square in pieces else 0 for square in range(64))


def follow_chess(text: str) -> Iterator[Change]:
    """A move is done at its last word. MissingExtraError without the library `chess`."""
    board, move = optional_module("chess", "state-data", "the state of chess").Board(), ""
    yield 0, piece_values(board)
    for word in re.finditer(r"\S+", text):
        if word.start() == 0 and word[0] in GAMES:
            continue
        move += word[0]
        if len(move) < 4 and word[0] in SQUARES:
            continue
        legal = [one.uci() for one in board.legal_moves]
        if move in legal:
            board.push_uci(move)
            yield word.end(), piece_values(board)
            move = ""
        elif word[0] not in MOVE_WORDS or not any(one.startswith(move) for one in legal):
            if word.end() < len(text):  # at the end a word may be cut
                yield word.end(), None
            return


STATE_KINDS: Mapping[str, StateKind] = {
    "repl": StateKind((*REPL_NAMES, *REPL_KEYS), tuple(map(str, range(MODULUS))), follow_repl),
    "log": StateKind(LOG_KEYS, ("NULL", *map(str, range(LOG_VALUES))), follow_log),
    "chess": StateKind(SQUARES, ("", *PIECES), follow_chess, "board"),
}
"""By the names of the benchmarks that draw such texts."""
