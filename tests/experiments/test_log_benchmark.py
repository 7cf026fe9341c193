"""The log benchmark: answers replayed by a dict, the floor by an exact model, draws by their frequencies, and text."""

from __future__ import annotations

import math
import sqlite3
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from lrt.data.prepare import prepare
from lrt.data.prepared import Documents, Prepared
from lrt.data.tokenizer import Tokenizer
from lrt.experiments.state_data import log
from lrt.experiments.state_data.log import LOG, Statement, half_and_half, write_row
from lrt.experiments.state_data.rows import BOS, NOTHING, Rows

KEYS = "abcdefghijklmnop"
CHANCE = {"SET": 0.2, "INCR": 0.4, "MOVE": 0.1, "DEL": 0.05, "GET": 0.25}
HARMONIC = sum(1 / n for n in range(1, 17))
KEY_CHANCE = {f" {key}": 1 / rank / HARMONIC for rank, key in enumerate(KEYS, 1)}
VALUE_CHANCE = {f" {value}": 1 / 8 for value in range(8)}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def lines(tokens: torch.Tensor) -> list[list[str]]:
    """The statements of a row, the last one perhaps cut short."""
    return [line.split() for line in LOG.text(tokens).split("\n")]


def replay(store: dict[str, str], statement: list[str]) -> None:
    """Carry out one whole statement on a dict."""
    match statement:
        case ["SET", key, value]:
            store[key] = value
        case ["INCR", key]:
            store[key] = str((int(store.get(key, "0")) + 1) % 8)
        case ["MOVE", key, target] if key in store:
            store[target] = store.pop(key)
        case ["DEL", key]:
            store.pop(key, None)


def updates(history: list[tuple[list[str], dict[str, str]]], key: str) -> int:
    """Updates since the log last showed a key, by walking back; `history` has the store before each statement."""
    for at in reversed(range(len(history))):
        match history[at]:
            case (["SET" | "GET" | "DEL", one, *_], _) if one == key:
                return 0
            case (["INCR", one], _) if one == key:
                return 1 + updates(history[:at], key)
            case (["MOVE", one, other], store) if one != other and key in (one, other):
                if one == key:
                    return 0
                there = updates(history[:at], one)
                return 1 + (there if one in store else max(there, updates(history[:at], key)))
    return 0


def predictions(before: list[str], store: dict[str, str]) -> dict[str, float]:
    """The exact model: the chance of each next word after the words of an unfinished statement."""
    match before:
        case []:
            return CHANCE
        case [_] | ["MOVE", _]:
            return KEY_CHANCE
        case ["SET", _]:
            return VALUE_CHANCE
        case ["GET", key]:
            return {f" {store.get(key.strip(), 'NULL')}": 1.0}
    return {"\n": 1.0}


@pytest.fixture(scope="module")
def rows() -> Rows:
    return LOG.sample(400, 128, seeded())


def test_answers_and_distances_are_those_of_a_replay_by_a_dict(rows: Rows):
    answers, distances = 0, []
    for tokens, asked in zip(rows.tokens, rows.asked, strict=True):
        assert tokens[0] == BOS
        store: dict[str, str] = {}
        history: list[tuple[list[str], dict[str, str]]] = []
        expected = []
        for statement in lines(tokens):
            if statement[:1] == ["GET"] and len(statement) == 3:
                assert statement[2] == store.get(statement[1], "NULL")
                expected.append(updates(history, statement[1]))
            history.append((statement, dict(store)))
            replay(store, statement)
        assert asked[asked != NOTHING].tolist() == expected
        answers += len(expected)
        distances += expected
    assert answers > 3000
    assert max(distances) >= 5


def test_the_floor_is_that_of_an_exact_model(rows: Rows):
    for tokens, floor, asked in zip(rows.tokens[:100], rows.floor, rows.asked, strict=False):
        store: dict[str, str] = {}
        statement: list[str] = []
        assert floor[0] == 0
        for token, nats, distance in zip(tokens[1:].tolist(), floor[1:].tolist(), asked[1:].tolist(), strict=True):
            word = LOG.words[token]
            chances = predictions(statement, store)
            assert sum(chances.values()) == pytest.approx(1)
            assert nats == pytest.approx(-math.log(chances[word]), abs=1e-6)
            assert (distance != NOTHING) == (statement[:1] == ["GET"] and len(statement) == 2)
            statement.append(word)
            if word == "\n":
                replay(store, "".join(statement).split())
                statement = []


def test_words_are_drawn_with_the_chances_of_the_floor():
    rows = LOG.sample(2000, 128, seeded(3))
    statements = [line for tokens in rows.tokens for line in lines(tokens)[:-1]]
    keys = {key.strip(): chance for key, chance in KEY_CHANCE.items()}
    for words, chances in (
        ([s[0] for s in statements], CHANCE),
        ([s[1] for s in statements], keys),
        ([s[2] for s in statements if s[0] == "MOVE"], keys),
        ([s[2] for s in statements if s[0] == "SET"], {str(value): 1 / 8 for value in range(8)}),
    ):
        counts = [words.count(word) for word in chances]
        assert sum(counts) == len(words)
        assert chisquare(counts, [len(words) * chance for chance in chances.values()]).pvalue > 1e-3


def test_statements_by_hand():
    drawn = [
        ("GET", 0, 0, 0),
        ("INCR", 0, 0, 0),  # missing: 1
        ("GET", 0, 0, 0),
        ("SET", 1, 0, 7),
        ("INCR", 1, 0, 0),  # 8 is 0
        ("GET", 1, 0, 0),
        ("MOVE", 0, 0, 0),  # onto itself
        ("GET", 0, 0, 0),
        ("MOVE", 0, 1, 0),  # over another
        ("GET", 1, 0, 0),
        ("GET", 0, 0, 0),
        ("MOVE", 2, 1, 0),  # of nothing
        ("GET", 1, 0, 0),
        ("DEL", 1, 0, 0),
        ("GET", 1, 0, 0),
    ]
    with sqlite3.connect(":memory:") as store:
        store.execute(log.TABLE)
        words = write_row([Statement(*s) for s in drawn], 200, store)
    answers = [LOG.words[word.token] for word in words if word.asked != NOTHING]
    assert answers == [" NULL", " 1", " 0", " 1", " 1", " NULL", " 1", " NULL"]
    assert [word.asked for word in words if word.asked != NOTHING] == [0, 1, 1, 0, 1, 0, 1, 0]
    assert "".join(LOG.words[word.token] for word in words).startswith("GET a NULL\nINCR a\nGET a 1\nSET b 7\n")


def test_the_answers_are_sqlite_s(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(log.SQL, "GET", "SELECT 6 WHERE :key >= 0")
    rows = LOG.sample(20, 128, seeded())
    assert {LOG.words[token] for token in rows.tokens[rows.asked != NOTHING].tolist()} == {" 6"}


def test_rows_repeat_with_their_seed_and_no_two_are_equal():
    rows, again = LOG.sample(1500, 64, seeded(1)), LOG.sample(1500, 64, seeded(1))
    for name in ("tokens", "floor", "asked", "lengths"):
        assert torch.equal(getattr(rows, name), getattr(again, name))
    assert rows.tokens.shape == (1500, 64)
    assert (rows.lengths == 64).all()
    other = LOG.sample(1500, 64, seeded(2))
    assert len({tuple(row) for row in [*rows.tokens.tolist(), *other.tokens.tolist()]}) == 3000


def test_a_row_of_two_tokens_is_bos_and_an_operation():
    rows = LOG.sample(50, 2, seeded())
    assert {LOG.words[token] for token in rows.tokens[:, 1].tolist()} == set(CHANCE)


# --- with text -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("text")
    for n in range(30):
        lines = (f"def f{n}_{m}(x{m}): return x{m} + {n * m}  # größer\n" for m in range(40))
        (folder / f"{n}.txt").write_text("".join(lines), encoding="utf-8")
    return prepare(folder / "prepared", sorted(folder.glob("*.txt")), 300, progress=False, workers=0)


def text_rows(rows: Rows) -> torch.Tensor:
    """(B,) bool: which rows are text."""
    return rows.floor.isnan().any(1)


def arrays(train: list[list[int]], test: list[list[int]]) -> Prepared:
    """Prepared documents of these tokens."""
    tokenizer = Tokenizer.train(["abc"], 257)
    splits = {}
    for name, documents in (("train", train), ("val", [[9]]), ("test", test)):
        offsets = np.cumsum([0, *map(len, documents)])
        splits[name] = Documents(np.concatenate(documents).astype(np.uint16), offsets, tokenizer.bos)
    manifest = {"splits": {name: {"shards": []} for name in splits}}
    return Prepared(Path(), manifest, tokenizer, splits)


def test_half_of_the_rows_is_text_of_the_split(prepared: Prepared):
    for split in ("train", "test"):
        benchmark = half_and_half(prepared, split)
        documents = [prepared.tokenizer.decode(d.tolist()) for d in prepared.split(split)]
        rows = benchmark.sample(400, 32, seeded(1))
        text = text_rows(rows)
        assert 160 <= int(text.sum()) <= 240
        for tokens, length in zip(rows.tokens[text], rows.lengths[text], strict=True):
            assert (tokens[length:] == BOS).all()
            assert (tokens[1:length] >= len(LOG.words)).all()
            piece = prepared.tokenizer.decode((tokens[1:length] - len(LOG.words)).tolist())
            assert any(piece.strip("\ufffd") in document for document in documents)
        assert torch.equal(rows.floor[text].isnan(), rows.counted[text])
        assert (rows.floor[text][~rows.counted[text]] == 0).all()
        assert (rows.asked[text] == NOTHING).all()
        assert rows.lengths[text].min() < 32  # documents end


def test_the_other_half_is_the_log(prepared: Prepared):
    benchmark = half_and_half(prepared)
    rows = benchmark.sample(200, 64, seeded(2))
    logs = ~text_rows(rows)
    assert (rows.lengths[logs] == 64).all()
    assert rows.tokens[logs].max() < len(LOG.words)
    assert benchmark.words[: len(LOG.words)] == LOG.words
    assert len(benchmark.words) == len(LOG.words) + prepared.vocab_size
    for tokens in rows.tokens[logs]:
        store: dict[str, str] = {}
        for statement in lines(tokens):
            if statement[:1] == ["GET"] and len(statement) == 3:
                assert statement[2] == store.get(statement[1], "NULL")
            replay(store, statement)


def test_mixed_rows_repeat_and_single_rows_are_both_kinds(prepared: Prepared):
    benchmark = half_and_half(prepared, "test")
    rows, again = benchmark.sample(30, 32, seeded(5)), benchmark.sample(30, 32, seeded(5))
    assert torch.equal(rows.tokens, again.tokens)
    assert torch.equal(rows.asked, again.asked)
    assert {bool(text_rows(benchmark.sample(1, 16, seeded(n)))) for n in range(12)} == {False, True}
    text = rows.tokens[text_rows(rows)][0]
    assert benchmark.text(text)[:3] in "".join(prepared.tokenizer.decode(d.tolist()) for d in prepared.split("test"))


def test_pieces_of_the_training_text_are_left_out_of_the_test():
    own = [[1, 2, 3, 4, 5, 6, 7], [8, 8, 8]]
    benchmark = half_and_half(arrays(own, [[1, 2, 3, 50, 51, 52, 7], [8, 8, 8]]), "test")
    rows = benchmark.sample(400, 4, seeded())
    pieces = {tuple(row) for row in (rows.tokens[text_rows(rows)][:, 1:] - len(LOG.words)).tolist()}
    assert pieces == {(50, 51, 52)}


def test_train_and_test_share_no_row(prepared: Prepared):
    train, test = (
        half_and_half(prepared, split).sample(1500, 16, seeded(n)) for n, split in enumerate(("train", "test"))
    )
    assert not {tuple(row) for row in train.tokens.tolist()} & {tuple(row) for row in test.tokens.tolist()}


def test_wrong_splits_are_refused():
    with pytest.raises(ValueError, match="no split 'dev'; choose one of"):
        half_and_half(arrays([[1]], [[2]]), "dev")
    with pytest.raises(ValueError, match="test has no piece that the splits before it have not; prepare more text"):
        half_and_half(arrays([[1, 2]], [[1, 2]]), "test").sample(50, 8, seeded())
    with pytest.raises(ValueError, match="a row has BOS and a token at least"):
        LOG.sample(1, 1, seeded())
