"""Chess without a board: games against the rules written once more, floors against exact models, measures, boards."""

from __future__ import annotations

import dataclasses
import functools
import math
import random
import subprocess
import sys

import chess
import pytest
import torch
from support import chess_rules as rules
from support.chess_oracle import (
    InventedEngine,
    exact_logits,
    invented_policy,
    read_moves,
    spelled,
    uniform_policy,
    words_of,
)
from torch import Tensor

from lrt.experiments.state_data.chess_games import (
    ENGINE,
    RANDOM,
    RANDOM_CHESS,
    TOKENS,
    WORDS,
    Game,
    ending,
    fit,
    play,
    to_rows,
    uniform,
    word_nats,
)
from lrt.experiments.state_data.chess_measures import MoveScores, boards, by_ply, legal_moves, score_moves
from lrt.experiments.state_data.chess_pool import TRAIN, PoolSettings, pool_game
from lrt.experiments.state_data.rows import BOS, NOTHING, Rows
from lrt.utils.imports import MissingExtraError

SHARES = {ENGINE: 0.8, RANDOM: 0.2}
MIXED = PoolSettings(seed=3, multipv=4, temperature=40, plies=40, engine_share=0.6)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@functools.cache
def mixed_games() -> tuple[Game, ...]:
    return tuple(pool_game(MIXED, TRAIN, number, InventedEngine()) for number in range(8))


@functools.cache
def mixed_rows() -> Rows:
    return to_rows(mixed_games(), SHARES)


@functools.cache
def mixed_logits() -> Tensor:
    return exact_logits(
        mixed_rows(), {ENGINE: functools.partial(invented_policy, MIXED), RANDOM: uniform_policy}
    ).double()


def scripted(text: str, plies: int = 80) -> Game:
    """A game of these moves."""
    moves = text.split()
    return play(RANDOM, lambda board: {moves[board.ply()]: 1.0}, random.Random(0), plies)


# --- games ---------------------------------------------------------------------------------------------------------


def test_the_rules_of_this_test_are_those_of_chess():
    """Known numbers of lines (perft): castling, en passant, promotions, pins."""
    lines = {
        ("rnbqkbnr/pppppppp/8/8/8/8/PPPPPPPP/RNBQKBNR w KQkq -", 2): 400,
        ("r3k2r/p1ppqpb1/bn2pnp1/3PN3/1p2P3/2N2Q1p/PPPBBPPP/R3K2R w KQkq -", 2): 2039,
        ("8/2p5/3p4/KP5r/1R3p1k/8/4P1P1/8 w - -", 3): 2812,
        ("r3k2r/Pppp1ppp/1b3nbN/nP6/BBP1P3/q4N2/Pp1P2PP/R2Q1RK1 w kq -", 2): 264,
        ("rnbq1k1r/pp1Pbppp/2p5/8/2B5/8/PPP1NnPP/RNBQK2R w KQ -", 2): 1486,
    }
    for (fen, depth), known in lines.items():
        assert rules.count(rules.parse(fen), depth) == known


def test_random_games_are_legal_and_cost_what_the_legal_moves_say():
    rows = RANDOM_CHESS.sample(6, 166, seeded())
    for row in range(6):
        kind, *words = spelled(rows, row)
        moves = read_moves(words)
        assert kind == "random"
        floor = [0.0, 0.0]
        asked = [NOTHING, NOTHING]
        for ply, (move, position) in enumerate(zip(moves, rules.positions(moves)[:-1], strict=True)):
            legal = rules.legal(position)
            assert move in legal
            same_from = [m for m in legal if m[:2] == move[:2]]
            same_squares = [m for m in legal if m[:4] == move[:4]]
            floor += [math.log(len(legal) / len(same_from)), math.log(len(same_from) / len(same_squares))]
            floor += [math.log(4)] * (len(move) == 5)
            asked += [ply, ply] + [NOTHING] * (len(move) == 5)
        assert rows.lengths[row] == len(floor)
        torch.testing.assert_close(rows.floor[row, : len(floor)], torch.tensor(floor))
        assert rows.asked[row, : len(asked)].tolist() == asked
        assert (rows.tokens[row, len(floor) :] == BOS).all()
        assert (rows.floor[row, len(floor) :] == 0).all()
        assert (rows.asked[row, len(asked) :] == NOTHING).all()


def test_the_probability_of_words_by_hand():
    weights = {"a7a8q": 4.0, "a7a8n": 1.0, "a7b8q": 1.0, "e1e2": 2.0}
    assert word_nats(weights, "a7a8n") == pytest.approx([math.log(8 / 6), math.log(6 / 5), math.log(5)])
    assert word_nats(weights, "e1e2") == pytest.approx([math.log(4), 0])


@pytest.mark.parametrize(
    ("end", "text"),
    [
        ("checkmate", "f2f3 e7e5 g2g4 d8h4"),
        (
            "stalemate",  # Sam Loyd's, in ten moves
            "e2e3 a7a5 d1h5 a8a6 h5a5 h7h5 h2h4 a6h6 a5c7 f7f6 c7d7 e8f7 d7b7 d8d3 b7b8 d3h7 b8c8 f7g6 c8e6",
        ),
        ("repetition", "g1f3 g8f6 f3g1 f6g8 g1f3 g8f6 f3g1 f6g8"),
    ],
)
def test_games_end_where_they_are_over(end: str, text: str):
    game = scripted(text)
    assert (game.end, list(game.moves)) == (end, text.split())
    assert game.nats == (0.0,) * 2 * len(game.moves)
    assert scripted(text, plies=3).end == "plies"


def test_boards_on_which_a_game_is_drawn():
    assert ending(chess.Board("8/8/4k3/8/8/3KB3/8/8 w - - 0 1")) == "material"
    assert ending(chess.Board("8/8/4k3/8/8/3KR3/8/8 w - - 100 90")) == "fifty moves"
    assert ending(chess.Board("8/8/4k3/8/8/3KR3/8/8 w - - 99 90")) == ""


def test_random_games_end_only_when_they_are_over():
    games = [play(RANDOM, uniform, random.Random(seed)) for seed in range(30)]
    for game in games:
        assert len(game.moves) <= 80
        assert (game.end == "plies") == (len(game.moves) == 80)
        last = rules.positions(list(game.moves))[-1]
        stuck = {True: "checkmate", False: "stalemate"}[rules.in_check(last, last.white)]
        assert (game.end == stuck) == (not rules.legal(last))
    assert len({game.end for game in games}) > 1


def test_the_moves_of_random_games_are_equally_likely():
    drawn = [play(RANDOM, uniform, random.Random(seed), plies=1).moves[0] for seed in range(2000)]
    counts = [drawn.count(move) for move in rules.legal(rules.START)]
    assert sum(counts) == 2000
    assert sum((n - 100) ** 2 / 100 for n in counts) < 43.8  # χ² of 19 degrees of freedom, 1 in 1,000


def test_random_rows_follow_the_generator_and_are_cut_not_changed():
    whole = RANDOM_CHESS.sample(3, 170, seeded(5))
    assert torch.equal(whole.tokens, RANDOM_CHESS.sample(3, 170, seeded(5)).tokens)
    assert not torch.equal(whole.tokens, RANDOM_CHESS.sample(3, 170, seeded(6)).tokens)
    for length in (2, 3, 4, 17, 60):
        short = RANDOM_CHESS.sample(3, length, seeded(5))
        for name in ("tokens", "floor", "asked"):
            assert torch.equal(getattr(short, name), getattr(whole, name)[:, :length])
        assert torch.equal(short.lengths, whole.lengths.clamp(max=length))


def test_a_row_is_written_as_its_words():
    rows = to_rows([scripted("e2e4 e7e5", plies=2)], {RANDOM: 0.2})
    assert RANDOM_CHESS.text(rows.tokens[0]) == "random e2 e4 e7 e5 "
    assert rows.floor[0, 1].item() == pytest.approx(-math.log(0.2))


def test_squares_are_asked_by_ply_and_promotion_pieces_are_not():
    rows = mixed_rows()
    for row, game in enumerate(mixed_games()):
        asked = [NOTHING, NOTHING]
        for ply, move in enumerate(game.moves):
            asked += [ply, ply] + [NOTHING] * (len(move) == 5)
        assert rows.asked[row].tolist() == asked + [NOTHING] * (rows.tokens.shape[1] - len(asked))


# --- an exact model pays the floor ----------------------------------------------------------------------------------


def test_a_model_that_knows_the_state_pays_the_floor():
    rows, logits = mixed_rows(), mixed_logits()
    assert {game.kind for game in mixed_games()} == {ENGINE, RANDOM}
    assert any(len(move) == 5 for game in mixed_games() for move in game.moves)
    nats = -logits[:, :-1].gather(2, rows.tokens[:, 1:].unsqueeze(2)).squeeze(2)
    counted = rows.counted
    torch.testing.assert_close(nats[counted[:, 1:]].float(), rows.floor[counted], atol=1e-5, rtol=0)


def test_scores_of_a_model_that_knows_the_state():
    scores = score_moves(mixed_rows(), mixed_logits())
    assert len(scores.ply) == sum(len(game.moves) for game in mixed_games())
    torch.testing.assert_close(scores.nats, scores.floor, atol=1e-4, rtol=0)
    assert scores.legal_from.min() > 1 - 1e-5
    assert scores.legal_to.min() > 1 - 1e-5
    assert scores.greedy_from.all()
    assert scores.greedy_to.all()
    assert scores.engine.sum() == sum(len(game.moves) for game in mixed_games() if game.kind == ENGINE)
    for part in by_ply(scores, 7):
        assert part.excess == pytest.approx(0, abs=1e-4)
        assert (part.legal_from, part.greedy_legal) == (pytest.approx(1), 1)


def test_scores_of_a_model_that_knows_nothing():
    rows = mixed_rows()
    scores = score_moves(rows, torch.zeros(*rows.tokens.shape, len(WORDS)))
    origins, targets, words = [], [], []
    for game in mixed_games():
        for move, position in zip(game.moves, rules.positions(list(game.moves))[:-1], strict=True):
            legal = rules.legal(position)
            origins.append(len({m[:2] for m in legal}))
            targets.append(len({m[2:4] for m in legal if m[:2] == move[:2]}))
            words.append(len(words_of(move)))
    torch.testing.assert_close(scores.legal_from, torch.tensor(origins) / len(WORDS))
    torch.testing.assert_close(scores.legal_to, torch.tensor(targets) / len(WORDS))
    torch.testing.assert_close(scores.nats, torch.tensor(words) * math.log(len(WORDS)))
    assert not scores.greedy_from.any()  # BOS is as likely as any word, and comes first


def test_greedy_words_by_hand():
    rows = to_rows([scripted("e2e4 e7e5 g1f3", plies=3)], SHARES)
    logits = torch.zeros(*rows.tokens.shape, len(WORDS))
    for place, word in enumerate(("b1", "e5", "e7", "e6", "g8", "e2"), start=1):  # each predicts the next token
        logits[0, place, TOKENS[word]] = 9.0
    scores = score_moves(rows, logits)
    assert scores.greedy_from.tolist() == [True, True, False]  # black stands on g8
    assert scores.greedy_to.tolist() == [False, True, True]  # a pawn on e2 cannot go to e5; a knight on g1 can to e2
    assert [part.greedy_legal for part in by_ply(scores, 2)] == [0.5, 0.0]


def test_bins_of_plies_by_hand():
    column = torch.tensor([1.0, 2.0, 4.0])
    right = torch.tensor([True, False, True])
    scores = MoveScores(torch.tensor([0, 3, 25]), right, column, column / 2, column / 8, column / 4, right, ~right)
    first, last = by_ply(scores)
    assert (first.first, first.last, first.moves, first.nats, first.floor) == (0, 9, 2, 1.5, 0.75)
    assert (last.first, last.last, last.moves, last.excess, last.legal_from) == (20, 29, 1, 2.0, 0.5)
    assert last.legal_to == 1.0
    assert last.greedy_legal == 0.0


def test_scores_refuse_what_they_cannot_read():
    rows = mixed_rows()
    with pytest.raises(ValueError, match="logits are"):
        score_moves(rows, torch.zeros(len(rows.tokens), rows.tokens.shape[1] - 1, len(WORDS)))
    with pytest.raises(ValueError, match="no whole move"):
        legal_moves(fit(rows, 3))


# --- boards --------------------------------------------------------------------------------------------------------

SPECIAL = [
    "e2e4 e7e5 g1f3 g8f6 f1c4 f8c5 e1g1 e8g8",  # castling, both sides short
    "d2d4 d7d5 b1c3 b8c6 c1f4 c8f5 d1d2 d8d7 e1c1 e8c8",  # and long
    "e2e4 a7a6 e4e5 d7d5 e5d6 a6a5 d6c7 a5a4 b2b4 a4b3 c7b8r b3a2 b8a8 a2b1q",  # en passant twice, promotions twice
]
LETTERS = "PNBRQKpnbrqk"


def board_classes(position: rules.Position) -> list[int]:
    squares = [file + rank for rank in rules.RANKS for file in rules.FILES]
    return [1 + LETTERS.index(position.board[s]) if s in position.board else 0 for s in squares]


def expected_boards(moves: list[str], kept: int) -> list[list[int]]:
    """The first so many positions of a row: a board is new at a move's last word."""
    line = [board_classes(position) for position in rules.positions(moves)]
    expected = [line[0], line[0]]
    for n, move in enumerate(moves):
        expected += [line[n]] * (len(move) // 2 + len(move) % 2 - 1) + [line[n + 1]]
    return expected[:kept]


def test_boards_are_those_of_an_independent_replay():
    games = [*mixed_games(), *(scripted(text, plies=len(text.split())) for text in SPECIAL)]
    rows = to_rows(games, SHARES)
    classes = boards(rows)
    assert classes.shape == (*rows.tokens.shape, 64)
    for row, game in enumerate(games):
        length = int(rows.lengths[row])
        assert classes[row, :length].tolist() == expected_boards(list(game.moves), length)
        assert (classes[row, length:] == NOTHING).all()


def test_rows_may_be_cut_anywhere():
    game = scripted(SPECIAL[2], plies=14)
    rows = to_rows([game], SHARES)
    for length in range(2, rows.tokens.shape[1] + 3):
        short = fit(rows, length)
        assert boards(short)[0, : short.lengths[0]].tolist() == expected_boards(list(game.moves), length)
        if length >= 4:
            words = torch.tensor([len(words_of(move)) for move in game.moves]).cumsum(0) + 2
            assert len(legal_moves(short).place) == (words <= length).sum()


def test_illegal_moves_are_refused():
    rows = to_rows([scripted("e2e4 e7e5 g1f3", plies=3)], SHARES)
    for place, word in ((3, "e5"), (4, "b2"), (5, "a1"), (6, "engine")):
        tokens = rows.tokens.clone()
        tokens[0, place] = TOKENS[word]
        with pytest.raises(ValueError, match="no legal move"):
            boards(dataclasses.replace(rows, tokens=tokens))


# --- the library ---------------------------------------------------------------------------------------------------


def test_the_library_is_imported_when_it_is_used():
    modules = "lrt.experiments.state_data.chess_pool, lrt.experiments.state_data.chess_measures"
    code = f"import sys, lrt, {modules}; print('chess' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "chess", None)
    with pytest.raises(MissingExtraError, match=r"latent-recurrent-transformer\[state-data\]"):
        RANDOM_CHESS.sample(1, 10, seeded())
