"""A Python session over a few names, run by CPython: what does `print` show?

Statements are drawn word by word, so that every word's probability is known, and run as they are written. Before the
first one the names hold 0, 1, 2, …, the list `s` is empty and the dictionary is `m = {0: 0, 1: 1, 2: 2, 3: 3}`. All
values count modulo 7: what is shown is `x % 7`, and an answer is one word. (Modulo a power of two, doubling would
forget.)

    a += 3            a, b = b, a       s.append(a)       m[2] = a          if a % 7 > 3: b = 5
    a = b             a = s.pop()       a = m[2]          print(a % 7)

An answer's distance is the longest chain of updates that leads to it from a value in plain sight (a constant, or one
that was shown): 0 right behind `a = 3`, 1 behind `a += b` if a and b were just shown, and so on.

With `hidden`, so large a part of the constants is written `?`, and run with a number nobody sees (the weakness of
linear RNNs that arXiv 2602.14814 describes). Then there is no `if`, every value is a linear form of the hidden numbers,
and an answer costs log 7 or nothing (`Form`).
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

import torch

from lrt.experiments.state_data.rows import BOS, NOTHING, Benchmark, Rows

MODULUS = 7
"""Answers are 0 … 6."""
KEYS = ("0", "1", "2", "3")
"""Of the dictionary."""
DIGITS = tuple(str(n) for n in range(MODULUS))
NAMES = "abcdefgh"
HIDDEN = "?"
WORDS = (
    "", *DIGITS, "\n", " = ", " += ", ", ", "print(", " % 7)\n", "s.append(", ")\n", "s.pop()\n", "m[", "] = ", "]\n",
    "if ", " % 7 > 3: ", HIDDEN, *NAMES,
)  # fmt: skip
"""The vocabulary, BOS first."""
IDS = {word: n for n, word in enumerate(WORDS)}
OPERATORS = {" = ": 0.45, " += ": 0.25, ", ": 0.3}
"""What follows the name that a statement begins with, and how likely."""
OF_NAMES = {" = ": 0.75, " += ": 0.2}
"""How many of the operands are names; the others are constants. Few sums are of two names: a table of 49 entries is
arithmetic to be learned, not state."""
Form = dict[int, int]
"""A linear form of hidden numbers, which are uniform and independent: number to coefficient, modulo 7, a field. What is
known of a value but for a constant: without hidden numbers it is certain, with one it is uniform."""


@dataclass(frozen=True)
class Repl:
    """How sessions are drawn."""

    names: int = 5
    """How many there are, 2 to 8."""
    shows: float = 0.3
    """The probability that a statement is a `print`."""
    hidden: float = 0.0
    """The part of the constants that nobody sees."""
    others: Mapping[str, float] = field(
        default_factory=lambda: {"if ": 0.08, "s.append(": 0.08, "m[": 0.08}, hash=False
    )
    """The probabilities of statements that begin with no name, apart from `print`."""

    def __post_init__(self) -> None:
        if not 2 <= self.names <= len(NAMES):
            raise ValueError(f"{self.names} names; give 2 to {len(NAMES)}")
        if self.hidden and "if " in self.others:
            raise ValueError("what `if` makes of hidden numbers has no floor; leave it out of `others`")
        if not (0 < self.shows < 1 and 0 <= self.hidden < 1 and self.shows + sum(self.others.values()) < 1):
            raise ValueError(
                f"shows is {self.shows}, hidden {self.hidden}; they are probabilities, and something has to be assigned"
            )

    def sample(self, rows: int, length: int, generator: torch.Generator) -> Rows:
        """Fresh sessions of `length` tokens, BOS counted, cut where they are full."""
        seeds = torch.randint(2**62, (rows,), generator=generator).tolist()
        sessions = [Session(self, random.Random(seed)).run(length) for seed in seeds]
        return Rows(
            torch.tensor([session.tokens[:length] for session in sessions]),
            torch.tensor([session.floor[:length] for session in sessions]),
            torch.tensor([session.asked[:length] for session in sessions]),
            torch.full((rows,), length),
        )


def add_forms(a: Form, b: Form, times: int = 1) -> Form:
    """a + times b."""
    total = {n: (a.get(n, 0) + times * b.get(n, 0)) % MODULUS for n in {*a, *b}}
    return {n: c for n, c in total.items() if c}


def solve_for_one(form: Form) -> tuple[int, Form]:
    """A hidden number of a form whose value is shown, and the form of it that the others leave, up to a constant."""
    number, coefficient = next(iter(form.items()))
    inverse = pow(coefficient, -1, MODULUS)
    return number, {n: -inverse * c % MODULUS for n, c in form.items() if n != number}


@dataclass
class Value:
    """What is known of a value that CPython holds."""

    distance: int = 0
    form: Form = field(default_factory=dict)
    """Empty: the value can be known."""


class Session:
    """One row as it is written and run."""

    def __init__(self, repl: Repl, draw: random.Random) -> None:
        self.repl, self.draw = repl, draw
        self.tokens, self.floor, self.asked = [BOS], [0.0], [NOTHING]
        self.names = NAMES[: repl.names]
        self.space: dict[str, Any] = {name: n for n, name in enumerate(self.names)}
        self.space |= {"s": [], "m": {int(key): int(key) for key in KEYS}}
        self.known: dict[str, Value] = {name: Value() for name in (*self.names, *KEYS)}
        self.stack: list[Value] = []
        self.hidden = 0  # how many numbers nobody saw

    def run(self, length: int) -> Session:
        """Statements until there are `length` tokens."""
        while len(self.tokens) < length:
            self.statement()
        return self

    def write(self, *words: str, nats: float = 0.0, asked: int = NOTHING) -> None:
        """Words that follow from what stands before them, or the one that was drawn."""
        for word in words:
            self.tokens.append(IDS[word])
            self.floor.append(nats)
            self.asked.append(asked)

    def choose(self, weights: Mapping[str, float]) -> str:
        """Draw a word by its weight, and write it."""
        (word,) = self.draw.choices(list(weights), list(weights.values()))
        self.write(word, nats=math.log(sum(weights.values()) / weights[word]))
        return word

    def choose_name(self, without: str = "") -> str:
        return self.choose({name: 1.0 for name in self.names if name != without})

    def execute(self, code: str, **hidden: int) -> None:
        """Let CPython run a statement."""
        self.space.update(hidden)
        exec(compiled(code), self.space)

    def statement(self) -> None:
        repl = self.repl
        rest = (1 - repl.shows - sum(repl.others.values())) / repl.names
        word = self.choose({"print(": repl.shows, **repl.others, **dict.fromkeys(self.names, rest)})
        if word in self.names:
            self.assign(word)
        else:
            {"print(": self.show, "if ": self.guarded, "s.append(": self.push, "m[": self.put}[word]()

    def show(self) -> None:
        """print(a % 7), and what it shows."""
        name = self.choose_name()
        self.write(" % 7)\n")
        value = self.known[name]
        shown: list[int] = []
        self.space["print"] = shown.append
        self.execute(f"print({name} % {MODULUS})")
        if value.form:  # nobody can know it, and then everybody does
            self.write(str(shown[0]), nats=math.log(MODULUS))
            self.substitute(*solve_for_one(value.form))
        else:
            self.write(str(shown[0]), asked=value.distance)
        self.write("\n")
        value.distance = 0

    def substitute(self, number: int, form: Form) -> None:
        """Put a form in a hidden number's place, in all that is known."""
        for value in (*self.known.values(), *self.stack):
            value.form = add_forms(value.form, form, value.form.pop(number, 0))

    def push(self) -> None:
        name = self.choose_name()
        self.write(")\n")
        self.execute(f"s.append({name})")
        self.stack.append(self.after(self.known[name]))

    def put(self) -> None:
        key = self.choose(dict.fromkeys(KEYS, 1.0))
        self.write("] = ")
        name = self.choose_name()
        self.write("\n")
        self.execute(f"m[{key}] = {name}")
        self.known[key] = self.after(self.known[name])

    def guarded(self) -> None:
        """An assignment that is run where a name's value is above 3; whether, is to be known behind it."""
        name = self.choose_name()
        self.write(" % 7 > 3: ")
        target = self.choose_name()
        before, condition = self.known[target], self.known[name].distance
        code, value = self.simple(target, {" = ": 1.0, " += ": 1.0})
        self.execute(f"if {name} % {MODULUS} > 3: {code}")
        self.known[target] = Value(max(1 + condition, 1 + before.distance, value.distance))

    def assign(self, target: str) -> None:
        """A statement that begins with the name that it changes."""
        operator = self.choose(OPERATORS)
        if operator == ", ":
            self.swap(target)
            return
        code, value, hidden = self.right_side(target, operator, whole=True)
        self.execute(code, **hidden)
        self.known[target] = value

    def simple(self, target: str, operators: Mapping[str, float]) -> tuple[str, Value]:
        """`target = …` or `target += …` of a name or a constant: its code, and what is known of the target then."""
        code, value, _ = self.right_side(target, self.choose(operators), whole=False)
        return code, value

    def swap(self, target: str) -> None:
        other = self.choose_name(without=target)
        self.write(" = ", other, ", ", target, "\n")
        self.execute(f"{target}, {other} = {other}, {target}")
        self.known[target], self.known[other] = self.after(self.known[other]), self.after(self.known[target])

    def right_side(self, target: str, operator: str, whole: bool) -> tuple[str, Value, dict[str, int]]:
        """The code of an assignment, what is known of its target behind it, and hidden numbers that it is run with.

        `whole`: also from the list and the dictionary.
        """
        of_names, constants = OF_NAMES[operator], 1 - OF_NAMES[operator]
        seen = (1 - self.repl.hidden) * constants / MODULUS
        weights = {**dict.fromkeys(self.names, of_names / self.repl.names), **dict.fromkeys(DIGITS, seen)}
        if self.repl.hidden:
            weights[HIDDEN] = self.repl.hidden * constants
        if whole and operator == " = ":
            weights |= {"m[": 0.2, **({"s.pop()\n": 0.2} if self.space["s"] else {})}
        word = self.choose(weights)
        if word == "s.pop()\n":
            return f"{target} = s.pop()", self.after(self.stack.pop()), {}
        if word == "m[":
            key = self.choose(dict.fromkeys(KEYS, 1.0))
            self.write("]\n")
            return f"{target} = m[{key}]", self.after(self.known[key]), {}
        self.write("\n")
        hidden = {"hidden": self.draw.randrange(MODULUS)} if word == HIDDEN else {}
        self.hidden += len(hidden)
        value = self.known[word] if word in self.names else Value(0, {self.hidden: 1} if hidden else {})
        code = f"{target}{operator}{'hidden' if hidden else word}"
        if operator == " += ":
            old = self.known[target]
            distance = 1 + max(old.distance, value.distance)
            return code, Value(distance, add_forms(old.form, value.form)), hidden
        return code, self.after(value) if word in self.names else value, hidden

    @staticmethod
    def after(value: Value) -> Value:
        """A value one update further on."""
        return Value(value.distance + 1, dict(value.form))


@functools.cache
def compiled(code: str) -> CodeType:
    """A statement, compiled once: there are few of them."""
    return compile(code, "<repl>", "exec")


def repl_benchmark(name: str, repl: Repl) -> Benchmark:
    """Sessions as a benchmark."""
    return Benchmark(name, WORDS, "updates since a value in plain sight", 1 / MODULUS, repl.sample)


REPL = repl_benchmark("repl", Repl())
REPL_HIDDEN = repl_benchmark("repl_hidden", Repl(hidden=0.1, others={"s.append(": 0.08, "m[": 0.08}))
