"""The log of a key-value store: SET, INCR, MOVE, DEL and GET over keys of a Zipf law, answered by `sqlite3`.

A row is BOS and statements, each ended by a newline. Every word is one token:

    SET k v     k is v, one of 0 … 7
    INCR k      k is one more, modulo 8; 1 where k is missing, as in Redis
    MOVE k j    j is what k is, and k is gone; nothing where k is missing, or is j
    DEL k       k is gone
    GET k v     a question and its answer: what k is, or NULL

Operations, keys and values are drawn one by one, each with a known chance: that is the floor. Newlines and answers cost
nothing. A row ends where its length ends, within a statement if need be.

The store is a table of SQLite, empty at the start of each row. `half_and_half` mixes such rows with text: does a model
that is trained to keep the state pay for it on the text?
"""

from __future__ import annotations

import functools
import math
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from lrt.data.packing import cut_pieces
from lrt.data.prepared import SPLITS, Documents, Prepared
from lrt.experiments.state_data.rows import BOS, NOTHING, Benchmark, Rows, Sampler

OPERATIONS = ("SET", "INCR", "MOVE", "DEL", "GET")
OPERATION_CHANCES = (0.2, 0.4, 0.1, 0.05, 0.25)
KEYS, VALUES = 16, 8
ZIPF = tuple(1 / rank for rank in range(1, KEYS + 1))
"""The keys' chances, before they are made to sum to 1: Zipf's law with exponent 1."""

FIRST_OPERATION = 1
FIRST_KEY = FIRST_OPERATION + len(OPERATIONS)
FIRST_VALUE = FIRST_KEY + KEYS
NULL = FIRST_VALUE + VALUES
NEWLINE = NULL + 1
WORDS = (
    "",
    *OPERATIONS,
    *(f" {chr(ord('a') + key)}" for key in range(KEYS)),
    *(f" {value}" for value in range(VALUES)),
    " NULL",
    "\n",
)
"""Keys and values have their space before them, so that the words one after another are the log."""
SHORTEST_STATEMENT = 3
"""Words of INCR and DEL."""

TABLE = "CREATE TABLE store (k INTEGER PRIMARY KEY, v INTEGER NOT NULL)"
SQL: dict[str, str] = {
    "SET": "INSERT OR REPLACE INTO store VALUES (:key, :value)",
    "INCR": f"INSERT INTO store VALUES (:key, 1) ON CONFLICT (k) DO UPDATE SET v = (v + 1) % {VALUES}",
    "MOVE": "UPDATE OR REPLACE store SET k = :target WHERE k = :key",
    "DEL": "DELETE FROM store WHERE k = :key",
    "GET": "SELECT v FROM store WHERE k = :key",
}
"""What each statement is for SQLite."""


class Statement(NamedTuple):
    """What was drawn for one; which of it is written depends on the operation."""

    operation: str
    key: int
    target: int
    value: int


class Word(NamedTuple):
    """One token of a row."""

    token: int
    floor: float
    asked: int = NOTHING


@dataclass(frozen=True)
class Choice:
    """A word that is drawn: the chances of the words from `first` on."""

    first: int
    weights: tuple[float, ...]

    @property
    def chances(self) -> np.ndarray:
        """(n,) float64, of sum 1."""
        return np.array(self.weights) / sum(self.weights)

    def draw(self, shape: tuple[int, int], generator: torch.Generator) -> list[list[int]]:
        """Which of them, from 0 on."""
        bounds = torch.from_numpy(self.chances.cumsum())[:-1]
        return torch.bucketize(torch.rand(shape, generator=generator), bounds.float(), right=True).tolist()

    def words(self) -> list[Word]:
        """Each word with its nats."""
        return [Word(self.first + n, -math.log(chance)) for n, chance in enumerate(self.chances)]


OPERATION = Choice(FIRST_OPERATION, OPERATION_CHANCES)
KEY = Choice(FIRST_KEY, ZIPF)
VALUE = Choice(FIRST_VALUE, (1,) * VALUES)
OPERATION_WORDS: dict[str, Word] = dict(zip(OPERATIONS, OPERATION.words(), strict=True))
KEY_WORDS, VALUE_WORDS = KEY.words(), VALUE.words()
END = Word(NEWLINE, 0.0)


def sample_log(rows: int, length: int, generator: torch.Generator) -> Rows:
    """Rows of the log, all of `length` tokens."""
    shape = (rows, -(-(length - 1) // SHORTEST_STATEMENT))
    operations = OPERATION.draw(shape, generator)
    keys, targets = KEY.draw(shape, generator), KEY.draw(shape, generator)
    values = VALUE.draw(shape, generator)
    words: list[Word] = []
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as store:
        store.execute(TABLE)
        for row in zip(operations, keys, targets, values, strict=True):
            statements = [Statement(OPERATIONS[o], *rest) for o, *rest in zip(*row, strict=True)]
            words += write_row(statements, length, store)
    return make_rows(words, rows, length)


def make_rows(words: list[Word], rows: int, length: int) -> Rows:
    """Words of rows of equal length, one after another, as tensors."""
    tokens, floor, asked = zip(*words, strict=True) if words else ((), (), ())
    shape = (rows, length)
    return Rows(
        torch.tensor(tokens, dtype=torch.int64).view(shape),
        torch.tensor(floor, dtype=torch.float32).view(shape),
        torch.tensor(asked, dtype=torch.int64).view(shape),
        torch.full((rows,), length),
    )


def write_row(statements: list[Statement], length: int, store: sqlite3.Connection) -> list[Word]:
    """BOS and as many statements as `length` words hold, the last one cut, carried out on an emptied store."""
    store.execute("DELETE FROM store")
    updates = [0] * KEYS
    words = [Word(BOS, 0.0)]
    for statement in statements:
        if len(words) >= length:
            break
        words += write_statement(statement, store, updates)
    return words[:length]


def write_statement(statement: Statement, store: sqlite3.Connection, updates: list[int]) -> list[Word]:
    """The words of a statement, which is carried out; `updates`, per key, is brought up to date."""
    operation, key, target, value = statement
    cursor = store.execute(SQL[operation], {"key": key, "target": target, "value": value})
    words = [OPERATION_WORDS[operation], KEY_WORDS[key]]
    if operation == "SET":
        words.append(VALUE_WORDS[value])
    elif operation == "MOVE":
        words.append(KEY_WORDS[target])
    elif operation == "GET":
        answer = cursor.fetchone()
        words.append(Word(NULL if answer is None else FIRST_VALUE + answer[0], 0.0, updates[key]))
    count_update(statement, cursor.rowcount > 0, updates)
    return [*words, END]


def count_update(statement: Statement, hit: bool, updates: list[int]) -> None:
    """Count the updates of each key since the log last showed what it is; `hit`: SQLite has changed a row.

    SET, GET and DEL show it, and MOVE shows that its first key is gone. A moved value brings its count along. A move of
    nothing leaves a value that only those know who know both keys.
    """
    operation, key, target, _ = statement
    if operation == "INCR":
        updates[key] += 1
    elif operation != "MOVE":
        updates[key] = 0
    elif key != target:
        updates[target] = 1 + (updates[key] if hit else max(updates[key], updates[target]))
        updates[key] = 0


LOG = Benchmark("log", WORDS, "updates since the value was last shown", math.nan, sample_log)
"""The log alone."""


@dataclass(frozen=True, eq=False)
class Pieces:
    """Pieces of documents, each a row's text."""

    documents: Documents
    starts: np.ndarray
    """(n,) int64: where in `documents.tokens` each begins."""
    lengths: np.ndarray
    """(n,) int64: its tokens."""

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.documents.tokens[self.starts[index] : self.starts[index] + self.lengths[index]]


def half_and_half(prepared: Prepared, split: str = "train") -> Benchmark:
    """Rows that are the log or text, each with a chance of one half; text is of the `split` of a prepared folder.

    The words of the log are as in `LOG`; behind them stand the tokenizer's: its token i is len(WORDS) + i, and BOS is
    0. A row of text is BOS and a piece of a document, padded where the document ends: floor NaN, `asked` NOTHING. All
    pieces are equally likely. Val and test leave out those that a split before them has, so that no row is shared.

    ValueError for a split that there is not, and, when rows are drawn, where it has no piece left.
    """
    prepared.split(split)
    pieces = functools.cache(lambda length: read_pieces(prepared, split, length))
    words = (prepared.tokenizer.spelling(token).decode(errors="replace") for token in range(prepared.vocab_size))
    return Benchmark(
        f"log and text, {split}", (*WORDS, *words), LOG.distance, math.nan, mix(sample_log, sample_text(pieces))
    )


def read_pieces(prepared: Prepared, split: str, length: int) -> Pieces:
    """The pieces of a split that fit rows of `length` tokens and are in no split before it."""
    earlier = [cut_documents(prepared, name, length) for name in SPLITS[: SPLITS.index(split)]]
    before = {texts[n].tobytes() for texts in earlier for n in range(len(texts))}
    pieces = cut_documents(prepared, split, length)
    new = [n for n in range(len(pieces)) if pieces[n].tobytes() not in before]
    if len(new) == 0:
        raise ValueError(f"{split} has no piece that the splits before it have not; prepare more text")
    return Pieces(pieces.documents, pieces.starts[new], pieces.lengths[new])


def cut_documents(prepared: Prepared, split: str, length: int) -> Pieces:
    """All pieces of a split, of length - 1 tokens at most: BOS comes before them."""
    documents = prepared.split(split)
    return Pieces(documents, *cut_pieces(documents.offsets, length - 1))


def sample_text(pieces: Callable[[int], Pieces]) -> Sampler:
    """Rows of text, of the pieces for their length."""

    def sample(rows: int, length: int, generator: torch.Generator) -> Rows:
        texts = pieces(length)
        tokens = np.full((rows, length), BOS, np.int64)
        picked = torch.randint(len(texts), (rows,), generator=generator).tolist()
        for row, index in zip(tokens, picked, strict=True):
            row[1 : 1 + texts.lengths[index]] = len(WORDS) + texts[index].astype(np.int64)
        lengths = 1 + torch.from_numpy(texts.lengths[picked])
        places = torch.arange(length)
        text = (places >= 1) & (places < lengths.unsqueeze(1))
        floor = torch.where(text, math.nan, 0.0)
        return Rows(torch.from_numpy(tokens), floor, torch.full((rows, length), NOTHING), lengths)

    return sample


def mix(first: Sampler, second: Sampler) -> Sampler:
    """Each row of the one or of the other, with a chance of one half."""

    def sample(rows: int, length: int, generator: torch.Generator) -> Rows:
        coin = torch.rand(rows, generator=generator) < 0.5
        heads = int(coin.sum())
        both = first(heads, length, generator).then(second(rows - heads, length, generator))
        order = torch.where(coin, coin.cumsum(0) - 1, heads + (~coin).cumsum(0) - 1)
        return both.take(order)

    return sample
