"""The tasks: seeded generators of tokens and of what a tracked state makes of them. No files.

A task draws rows (B, T) of tokens and, at each position, the class that is asked there (IGNORED where nothing is).
Published formats, and where ours differs:

- `parity`, `mod5`, `mod5_brackets`: Delétang et al. 2023 (arXiv 2207.02098), the regular and the deterministic
  context-free level; at most 40 long in training, up to 256 in tests, as in Grazzi et al. 2024 (arXiv 2411.12537). They
  ask once, at the end; in training we ask after every symbol that completes a value, and score the last, as they do.
- `s3`, `a5`, `s5`: word problems, one answer per symbol (Merrill et al. 2024, arXiv 2404.08819); `s5_swaps` has the
  permutations of at most two elements only (Grazzi et al.), the identity included: else the length tells the sign.
- `flip_flop`: Liu et al. 2023 (arXiv 2306.00946): 512 tokens, instruction and bit in turn, the first a write, the last
  a read; p(ignore) 0.8 in training, 0.98 in the sparse, 0.1 in the dense test; write and read share the rest alike.
- `recall`: multi-query associative recall, Arora et al. 2023 (arXiv 2312.04927): pairs first, then queries. Theirs has
  8,192 tokens, and asks each key once, at distances from a power law; ours 16 keys, asked evenly, with repetition.
- `dyck`: Dyck-(k, depth) words, Hewitt et al. 2020 (arXiv 2010.07515); asked is the top of the stack. At even
  lengths the stack may be empty, and guessing gives 7/16.
- `tracked_retrieval`: keys hold values, permutations move the values, a query asks what a key holds now: retrieval that
  needs the state of an S5 word problem.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lrt.data.batch import IGNORED
from lrt.utils.registry import Registry

Permutation = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Group:
    """A finite group of permutations, its elements numbered in lexicographic order (the identity is 0)."""

    elements: tuple[Permutation, ...]
    """g[i] is where g takes i."""
    table: Tensor
    """(n, n) int: table[a, b] is the element "a, then b"."""
    identity: int = 0

    @property
    def order(self) -> int:
        return len(self.elements)

    def moving_at_most(self, places: int) -> tuple[int, ...]:
        """The elements that move at most so many places; 2: the swaps and the identity."""
        return tuple(n for n, g in enumerate(self.elements) if sum(i != j for i, j in enumerate(g)) <= places)


def symmetric_group(places: int) -> Group:
    """S_n: all permutations."""
    return make_group(list(itertools.permutations(range(places))))


def alternating_group(places: int) -> Group:
    """A_n: the even ones."""
    return make_group([g for g in itertools.permutations(range(places)) if is_even(g)])


def is_even(g: Permutation) -> bool:
    """Whether a permutation has an even number of inversions."""
    return sum(a > b for a, b in itertools.combinations(g, 2)) % 2 == 0


def make_group(elements: list[Permutation]) -> Group:
    """The group of these elements, which must be closed."""
    number = {g: n for n, g in enumerate(elements)}
    # "a, then b" takes place i to b[a[i]].
    table = [[number[tuple(b[i] for i in a)] for b in elements] for a in elements]
    return Group(tuple(elements), torch.tensor(table))


class Examples(NamedTuple):
    """Rows, and what is asked in them."""

    tokens: Tensor
    """(B, T) int."""
    classes: Tensor
    """(B, T) int, IGNORED where nothing is asked."""
    floor: float = 0.0
    """Mean nats that a class costs who knows the state: 0 where the state decides all that is asked."""


Pair = tuple[Tensor, Tensor]
"""Tokens and classes, where the floor is 0."""
Sampler = Callable[[int, int, torch.Generator], Pair | Examples]
"""(rows, length, generator) -> tokens and classes."""


@dataclass(frozen=True)
class Task:
    """Something to track: how rows are drawn, how many tokens and classes there are, what guessing gives."""

    name: str
    tokens: int
    """Size of the input alphabet."""
    classes: int
    chance: float
    """Accuracy of the best guess that ignores the input, of the last answer; for `dyck`, in rows of odd length."""
    sampler: Sampler
    shortest: int = 1
    multiple: int = 1
    """Lengths are `shortest` plus a multiple of this."""

    @property
    def vocabulary(self) -> int:
        """Tokens and classes share the model's vocabulary."""
        return max(self.tokens, self.classes)

    def sample(self, rows: int, length: int, generator: torch.Generator) -> Examples:
        """`rows` fresh sequences of `length` tokens. ValueError for a length that the format does not have."""
        if length < self.shortest or (length - self.shortest) % self.multiple != 0:
            raise ValueError(
                f"{self.name} has no sequences of {length} tokens; take {self.shortest} plus a multiple of "
                f"{self.multiple}"
            )
        examples = self.sampler(rows, length, generator)
        return examples if isinstance(examples, Examples) else Examples(*examples)

    def length(self, wanted: int) -> int:
        """The longest length of the format that is at most `wanted`."""
        return wanted - (wanted - self.shortest) % self.multiple


def integers(high: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Uniform in 0 … high - 1."""
    return torch.randint(high, shape, generator=generator)


def ask_nothing(tokens: Tensor) -> Tensor:
    """Classes of which none is asked yet."""
    return torch.full_like(tokens, IGNORED)


def parity(rows: int, length: int, generator: torch.Generator) -> Pair:
    """Bits; after each, whether the ones so far are odd."""
    tokens = integers(2, (rows, length), generator)
    return tokens, tokens.cumsum(1) % 2


MODULUS = 5
PLUS, MINUS, TIMES, OPEN, CLOSE = range(MODULUS, MODULUS + 5)
"""Tokens behind the digits 0 … 4."""


def arithmetic(rows: int, length: int, generator: torch.Generator) -> Pair:
    """digit (operator digit)*, operators + - *, * first; after each digit, the value modulo 5 of what stands so far."""
    tokens = integers(MODULUS, (rows, length), generator)
    tokens[:, 1::2] = PLUS + integers(3, (rows, length // 2), generator)
    return tokens, flat_values(tokens)


def flat_values(tokens: Tensor) -> Tensor:
    """The value of every prefix of flat expressions (B, T) that ends in a digit; IGNORED at operators."""
    values = ask_nothing(tokens)
    # `term` is the product that is still open, `total` the sum of those before it: * binds first.
    total, term = torch.zeros_like(tokens[:, 0]), tokens[:, 0]
    values[:, 0] = term
    for t in range(2, tokens.shape[1], 2):
        operator, digit = tokens[:, t - 1], tokens[:, t]
        times = operator == TIMES
        total = torch.where(times, total, total + term) % MODULUS
        term = torch.where(times, term * digit, torch.where(operator == PLUS, digit, -digit)) % MODULUS
        values[:, t] = (total + term) % MODULUS
    return values


def brackets(rows: int, length: int, generator: torch.Generator) -> Pair:
    """Expressions of exactly `length` tokens, Delétang et al.'s grammar without *; the value is asked at the last."""
    expressions = [expression(length, generator) for _ in range(rows)]
    tokens = torch.tensor([words for words, _ in expressions])
    values = ask_nothing(tokens)
    values[:, -1] = torch.tensor([value for _, value in expressions])
    return tokens, values


def expression(length: int, generator: torch.Generator) -> tuple[list[int], int]:
    """d, -d, (d), (-d), or (left ± right), of `length` tokens; and its value modulo 5."""
    if length <= 4:
        digit = int(integers(MODULUS, (), generator))
        words = [digit] if length in (1, 3) else [MINUS, digit]
        value = digit if length in (1, 3) else -digit % MODULUS
        return ([OPEN, *words, CLOSE] if length >= 3 else words), value
    left = 1 + int(integers(length - 4, (), generator))  # two brackets and the sign take 3, each side at least 1
    (a, x), (b, y) = expression(left, generator), expression(length - 3 - left, generator)
    minus = bool(integers(2, (), generator))
    return [OPEN, *a, MINUS if minus else PLUS, *b, CLOSE], (x - y if minus else x + y) % MODULUS


def word_problem(group: Group, letters: tuple[int, ...]) -> Sampler:
    """Elements of `group`, drawn from `letters`; after each, the product so far."""

    def sample(rows: int, length: int, generator: torch.Generator) -> Pair:
        alphabet = torch.tensor(letters)
        tokens = integers(len(letters), (rows, length), generator)
        return tokens, prefix_products(group, alphabet[tokens])

    return sample


def prefix_products(group: Group, elements: Tensor) -> Tensor:
    """Products (B, T) of all prefixes of elements (B, T): each new one acts after those before it."""
    product = torch.full_like(elements[:, 0], group.identity)
    products = []
    for element in elements.unbind(1):
        product = group.table[product, element]
        products.append(product)
    return torch.stack(products, 1)


WRITE, READ, IGNORE = 2, 3, 4
"""Tokens of the flip-flop language; 0 and 1 are the bits."""


def flip_flop(ignore: float) -> Sampler:
    """Instruction and bit in turn; after a read stands the bit last written: asked at the read, one token before it."""

    def sample(rows: int, length: int, generator: torch.Generator) -> Pair:
        pairs = length // 2
        u = torch.rand(rows, pairs, generator=generator)
        # What is not ignored is half writes, half reads.
        instructions = torch.where(u < ignore, IGNORE, torch.where(u < (1 + ignore) / 2, WRITE, READ))
        instructions[:, 0], instructions[:, -1] = WRITE, READ
        bits = integers(2, (rows, pairs), generator)
        steps = torch.arange(pairs).expand(rows, -1)
        # At each step, the step of the last write.
        written = torch.where(instructions == WRITE, steps, -1).cummax(1).values
        bits = torch.where(instructions == READ, bits.gather(1, written), bits)
        tokens = torch.stack((instructions, bits), 2).flatten(1)
        asked = torch.where(instructions == READ, bits, IGNORED)
        return tokens, torch.stack((asked, torch.full_like(asked, IGNORED)), 2).flatten(1)

    return sample


KEYS, VALUES = 16, 16
"""Of associative recall: keys are the tokens 0 … 15, values stand behind them."""


def recall(rows: int, length: int, generator: torch.Generator) -> Pair:
    """Half of the row: different keys, each with its value; then queries, each asking for its key's value."""
    pairs = min(KEYS, length // 4)
    keys = torch.rand(rows, KEYS, generator=generator).argsort(1)[:, :pairs]  # a random order: no key twice
    values = integers(VALUES, (rows, pairs), generator)
    queried = integers(pairs, (rows, length - 2 * pairs), generator)
    shown = torch.stack((keys, KEYS + values), 2).flatten(1)
    tokens = torch.cat((shown, keys.gather(1, queried)), 1)
    return tokens, torch.cat((ask_nothing(shown), values.gather(1, queried)), 1)


KINDS, DEPTH = 2, 8
"""Of brackets, and the most that are open at once."""


def dyck(rows: int, length: int, generator: torch.Generator) -> Pair:
    """Prefixes of Dyck-(2, 8): opening brackets 0 and 1, closing 2 and 3; asked: the one on top, 2 for none."""
    tokens = integers(KINDS, (rows, length), generator)
    coin = torch.rand(rows, length, generator=generator) < 0.5
    stack = torch.zeros(rows, DEPTH + 1, dtype=torch.long)  # entry d: the bracket opened at depth d
    depth, index, tops = torch.zeros(rows, dtype=torch.long), torch.arange(rows), []
    for t in range(length):
        # An empty stack must open, a full one must close.
        opens = (depth == 0) | ((depth < DEPTH) & coin[:, t])
        tokens[:, t] = torch.where(opens, tokens[:, t], KINDS + stack[index, depth])
        depth = torch.where(opens, depth + 1, depth - 1)
        stack[index, depth] = torch.where(opens, tokens[:, t], stack[index, depth])
        tops.append(torch.where(depth > 0, stack[index, depth], KINDS))
    return tokens, torch.stack(tops, 1)


ITEMS = 5
"""Places of tracked retrieval: what S5 permutes."""


def tracked_retrieval(group: Group) -> Sampler:
    """Five values in places 0 … 4, then permutations that move them, then a query of a place: which value is there now?

    Tokens: values 0 … 15, places 16 … 20, permutations of at most two places 21 ….
    """
    swaps = torch.tensor(group.moving_at_most(2))
    places = torch.tensor(group.elements)

    def sample(rows: int, length: int, generator: torch.Generator) -> Pair:
        values = integers(VALUES, (rows, ITEMS), generator)
        moves = integers(len(swaps), (rows, length - ITEMS - 1), generator)
        place = integers(ITEMS, (rows,), generator)
        reached = prefix_products(group, swaps[moves])[:, -1] if moves.shape[1] else torch.full((rows,), group.identity)
        tokens = torch.cat((values, VALUES + ITEMS + moves, VALUES + place.unsqueeze(1)), 1)
        asked = ask_nothing(tokens)
        # Element g takes what is in place i to place g(i).
        origin = (places[reached] == place.unsqueeze(1)).int().argmax(1)
        asked[:, -1] = values.gather(1, origin.unsqueeze(1)).squeeze(1)
        return tokens, asked

    return sample


def word_task(name: str, group: Group, letters: tuple[int, ...]) -> Task:
    return Task(name, len(letters), group.order, 1 / group.order, word_problem(group, letters))


def flip_flop_task(name: str, ignore: float) -> Task:
    return Task(name, 5, 2, 0.5, flip_flop(ignore), shortest=4, multiple=2)


S3, S5, A5 = symmetric_group(3), symmetric_group(5), alternating_group(5)
BUILT_IN = (
    Task("parity", 2, 2, 0.5, parity),
    Task("mod5", MODULUS + 3, MODULUS, 1 / MODULUS, arithmetic, multiple=2),
    Task("mod5_brackets", MODULUS + 5, MODULUS, 1 / MODULUS, brackets),
    word_task("s3", S3, tuple(range(S3.order))),
    word_task("a5", A5, tuple(range(A5.order))),
    word_task("s5", S5, tuple(range(S5.order))),
    word_task("s5_swaps", S5, S5.moving_at_most(2)),
    flip_flop_task("flip_flop", 0.8),
    flip_flop_task("flip_flop_sparse", 0.98),
    flip_flop_task("flip_flop_dense", 0.1),
    Task("recall", KEYS + VALUES, VALUES, 1 / VALUES, recall, shortest=4),
    Task("dyck", 2 * KINDS, KINDS + 1, 0.5, dyck),
    Task(
        "tracked_retrieval",
        VALUES + ITEMS + len(S5.moving_at_most(2)),
        VALUES,
        1 / VALUES,
        tracked_retrieval(S5),
        ITEMS + 1,
    ),
)
TASKS: Registry[Task] = Registry("task", {task.name: task for task in BUILT_IN})
"""By name."""


def register_task(task: Task) -> None:
    """Let studies of state tracking have `task: NAME` of one's own. ValueError where the name is taken.

    >>> import lrt, torch
    >>> from lrt.experiments.state_tracking.tasks import Task
    >>> def last_bit(rows, length, generator):
    ...     tokens = torch.randint(2, (rows, length), generator=generator)
    ...     return tokens, tokens  # asked at every position: the bit that stands there
    >>> lrt.register_task(Task("last_bit", tokens=2, classes=2, chance=0.5, sampler=last_bit))
    """
    TASKS.register(task.name, task, stacklevel=2)
