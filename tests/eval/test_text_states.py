"""One promise: the state that is read off a text is the one that the program which wrote the text had."""

from __future__ import annotations

import random

import pytest
import torch

from lrt.eval.text_states import PIECES, SQUARES, STATE_KINDS
from lrt.experiments.state_data import log, repl
from lrt.experiments.state_data.chess_games import RANDOM_CHESS
from lrt.experiments.state_data.chess_measures import boards


def test_programs_are_followed_as_cpython_ran_them():
    kind = STATE_KINDS["repl"]
    for seed in range(20):
        session = repl.Session(repl.Repl(), random.Random(seed))
        for _ in range(60):
            session.statement()
            text = "".join(repl.WORDS[token] for token in session.tokens)
            space = session.space
            held = [space[name] for name in "abcde"] + [space["m"][key] for key in range(4)]
            assert kind.after(text, [len(text)]) == [tuple(value % 7 for value in held)]


def test_a_log_is_followed_as_sqlite_answered_it():
    rows = log.LOG.sample(8, 400, torch.Generator().manual_seed(0))
    answers = 0
    for row in rows.tokens:
        words = [log.WORDS[token] for token in row]
        ends = torch.tensor([len(word) for word in words]).cumsum(0).tolist()
        states = STATE_KINDS["log"].after("".join(words), ends)
        for t, word in enumerate(words[:-2]):
            if word == "GET":
                state = states[t]
                assert state is not None
                value = STATE_KINDS["log"].values[state["abcdefghijklmnop".index(words[t + 1].strip())]]
                assert value == words[t + 2].strip()
                answers += 1
    assert answers > 200


def test_games_are_followed_as_they_were_played():
    kind = STATE_KINDS["chess"]
    rows = RANDOM_CHESS.sample(6, 128, torch.Generator().manual_seed(0))
    order = ["", *"PNBRQKpnbrqk"]
    for row, length, truth in zip(rows.tokens, rows.lengths.tolist(), boards(rows), strict=True):
        words = [RANDOM_CHESS.words[token] for token in row[:length]]
        ends = torch.tensor([len(word) for word in words]).cumsum(0).tolist()
        for t, state in enumerate(kind.after("".join(words), ends)):
            assert state is not None
            assert [kind.values[value] for value in state] == [order[value] for value in truth[t].tolist()]
    assert kind.names[:9] == (*(f"{file}1" for file in "abcdefgh"), "a2")
    assert len(SQUARES) == 64
    assert len(PIECES) == 12


@pytest.mark.parametrize(
    ("kind", "before", "breaks"),
    [
        ("repl", "a = 3\n", "__import__('os').system('true')\n"),
        ("repl", "a = 3\n", "a = s.pop()\n"),  # of an empty list
        ("repl", "", "a = ?\n"),
        ("log", "SET a 3\n", "SET a 9\n"),
        ("chess", "engine e2 e4 ", "e7 e3 "),
        ("chess", "", "hello there "),
    ],
)
def test_what_breaks_the_rules_has_no_state_from_there_on(kind: str, before: str, breaks: str):
    text = before + breaks + before
    first, last = STATE_KINDS[kind].after(text, [len(before), len(text)])
    assert first is not None
    assert last is None


def test_a_change_counts_from_the_end_of_its_line_or_move():
    start, cut, done = STATE_KINDS["repl"].after("a = 5\n", [0, 5, 6])
    assert start == cut
    assert done == (5, *start[1:])  # pyright: ignore[reportOptionalSubscript]
    halfway, moved = STATE_KINDS["chess"].after("engine e2 e4", [9, 12])
    assert halfway != moved
