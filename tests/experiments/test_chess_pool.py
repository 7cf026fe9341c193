"""Pools of chess games: resumed, split, read, and played by the real engine."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import chess
import pytest
import torch
from support import chess_rules as rules
from support.chess_oracle import InventedEngine, exact_logits

from lrt.data.prepared import SPLITS
from lrt.experiments.state_data import chess_pool
from lrt.experiments.state_data.chess_games import ENGINE, RANDOM, TOKENS, to_rows
from lrt.experiments.state_data.chess_measures import score_moves
from lrt.experiments.state_data.chess_pool import (
    TEST,
    TRAIN,
    MissingEngineError,
    PoolSettings,
    chess_benchmark,
    engine_path,
    make_pool,
    open_engine,
    pool_game,
    read_pool,
)

needs_stockfish = pytest.mark.skipif(engine_path() is None, reason="no stockfish: apt-get install stockfish")
QUICK = PoolSettings(train=10, val=3, test=5, seed=3, nodes=50, multipv=4, temperature=40, plies=6, engine_share=0.6)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- pools ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chess_pool, "PART", 4)


def files_of(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


class Stop(Exception):
    pass


def stop_after(calls: int) -> Callable[[float, str], None]:
    left = iter(range(calls))

    def advance(amount: float, text: str) -> None:
        if next(left, None) is None:
            raise Stop

    return advance


@pytest.mark.usefixtures("small_parts")
def test_a_stopped_pool_goes_on(tmp_path: Path):
    amounts = []
    whole = make_pool(tmp_path / "whole", QUICK, InventedEngine(), lambda amount, _: amounts.append(amount))
    assert amounts == [4, 4, 2, 3, 4, 1]
    with pytest.raises(Stop):
        make_pool(tmp_path / "stopped", QUICK, InventedEngine(), stop_after(2))
    assert len(list((tmp_path / "stopped").glob("*.jsonl"))) == 3
    with pytest.raises(ValueError, match="unfinished"):
        read_pool(tmp_path / "stopped")
    before = (tmp_path / "stopped" / "train-00000.jsonl").stat().st_mtime_ns
    make_pool(tmp_path / "stopped", QUICK, InventedEngine())
    assert files_of(tmp_path / "stopped") == files_of(tmp_path / "whole")
    assert (tmp_path / "stopped" / "train-00000.jsonl").stat().st_mtime_ns == before  # not made again
    assert torch.equal(read_pool(tmp_path / "whole").splits[TRAIN].tokens, whole.splits[TRAIN].tokens)


@pytest.mark.usefixtures("small_parts")
def test_every_line_is_a_game_of_the_seed_and_names_the_engine(tmp_path: Path):
    pool = make_pool(tmp_path, QUICK, InventedEngine())
    lines = [json.loads(line) for part in sorted(tmp_path.glob("train*")) for line in part.read_text().splitlines()]
    assert [line["game"] for line in lines] == list(range(10))
    assert {line["engine"] for line in lines} == {"Invented 1.0"} == {pool.engine}
    games = [pool_game(QUICK, TRAIN, number, InventedEngine()) for number in reversed(range(10))]
    assert [line["moves"] for line in lines] == [list(game.moves) for game in reversed(games)]
    torch.testing.assert_close(pool.splits[TRAIN].floor, to_rows(games[::-1], {ENGINE: 0.6, RANDOM: 0.4}).floor)
    other = dataclasses.replace(QUICK, seed=4)
    assert pool_game(other, TRAIN, 0, InventedEngine()).moves != games[-1].moves
    assert pool_game(QUICK, TEST, 0, InventedEngine()).moves != games[-1].moves
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert sum(manifest["kinds"]["train"].values()) == 10
    assert manifest["ends"]["test"] == {"plies": 5}


@pytest.mark.usefixtures("small_parts")
def test_a_folder_holds_one_pool(tmp_path: Path):
    make_pool(tmp_path, QUICK, InventedEngine())
    with pytest.raises(ValueError, match="seed 3"):
        make_pool(tmp_path, dataclasses.replace(QUICK, seed=4), InventedEngine())
    with pytest.raises(ValueError, match="engine Invented"):
        make_pool(tmp_path, QUICK, None)
    part = tmp_path / "test-00001.jsonl"
    part.write_text(part.read_text().replace("random", "engine"))
    part.write_text(part.read_text() + part.read_text())
    with pytest.raises(ValueError, match="not those of its manifest"):
        read_pool(tmp_path)


def test_splits_share_no_row(tmp_path: Path):
    """Games of two plies: many later games are in train too."""
    settings = dataclasses.replace(QUICK, train=200, val=60, test=60, plies=2, engine_share=0.3)
    pool = make_pool(tmp_path, settings, InventedEngine())
    games = {split: {tuple(row[2:]) for row in pool.splits[split].tokens.tolist()} for split in SPLITS}
    for one, other in itertools.combinations(SPLITS, 2):
        assert games[other]
        assert not games[one] & games[other]
    wanted = {"train": 200, "val": 60, "test": 60}
    assert pool.dropped == {split: n - len(pool.splits[split].tokens) for split, n in wanted.items()}
    assert (pool.dropped["train"], pool.dropped["val"] > 0, pool.dropped["test"] > 0) == (0, True, True)
    assert json.loads((tmp_path / "manifest.json").read_text())["dropped"] == pool.dropped
    with pytest.raises(ValueError, match="before val have all its games"):
        make_pool(tmp_path / "hopeless", dataclasses.replace(settings, train=500, plies=1), None)


def test_the_share_of_engine_games():
    settings = dataclasses.replace(QUICK, plies=1, engine_share=0.8, multipv=1)
    games = [pool_game(settings, TRAIN, number, InventedEngine()) for number in range(400)]
    assert abs(sum(game.kind == ENGINE for game in games) - 320) < 30  # 3.7 standard deviations


def test_without_an_engine_all_games_are_random(tmp_path: Path):
    pool = make_pool(tmp_path, QUICK, None)
    rows = chess_benchmark(pool, TRAIN).sample(10, 14, seeded())
    assert pool.engine is None
    assert (rows.tokens[:, 1] == TOKENS[RANDOM]).all()
    assert (rows.floor[:, 1] == 0).all()
    assert chess_benchmark(pool, TRAIN).name == "chess-random"
    assert all(json.loads(line)["engine"] is None for line in (tmp_path / "test-00000.jsonl").open())


def test_a_benchmark_draws_no_game_twice_before_all(tmp_path: Path):
    pool = make_pool(tmp_path, QUICK, InventedEngine())
    benchmark = chess_benchmark(pool, TRAIN)
    games = sorted(pool.splits[TRAIN].tokens.tolist())
    drawn = benchmark.sample(20, 14, seeded()).tokens[:, : len(games[0])].tolist()
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == games
    assert drawn[:10] != drawn[10:]
    assert drawn == benchmark.sample(20, 14, seeded()).tokens[:, : len(games[0])].tolist()
    assert benchmark.sample(3, 5, seeded()).lengths.tolist() == [5, 5, 5]
    with pytest.raises(ValueError, match="no split 'dev'"):
        chess_benchmark(pool, "dev")


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="temperature is 0"):
        PoolSettings(temperature=0)
    with pytest.raises(ValueError, match="engine_share is 1"):
        PoolSettings(engine_share=1.5)


# --- what may be missing -------------------------------------------------------------------------------------------


def test_a_missing_engine_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chess_pool, "engine_path", lambda: None)
    with pytest.raises(MissingEngineError, match="apt-get install stockfish"), open_engine():
        pass


# --- the real engine -----------------------------------------------------------------------------------------------

REAL = PoolSettings(train=3, test=1, nodes=300, plies=24, engine_share=1.0)


@needs_stockfish
def test_stockfish_plays_a_game_the_same_whatever_it_played_before():
    with open_engine() as engine:
        games = [pool_game(REAL, TRAIN, number, engine) for number in range(4)]
    with open_engine() as engine:
        assert pool_game(REAL, TRAIN, 3, engine) == games[3]
    assert engine.name.startswith("Stockfish ")
    assert len({game.moves for game in games}) == 4


@needs_stockfish
def test_a_model_that_asks_stockfish_pays_the_floor():
    """Asked anew, about each position alone, it says the distribution that the move was drawn from."""
    with open_engine() as engine:
        rows = to_rows([pool_game(REAL, TRAIN, number, engine) for number in range(2)], {ENGINE: 1.0})

        def policy(moves: list[str]) -> dict[str, float]:
            board = chess.Board()
            for move in moves:
                board.push_uci(move)
            scores = engine.scores(board, REAL.nodes, REAL.multipv)
            assert 1 <= len(scores) <= REAL.multipv
            assert scores.keys() <= rules.legal(rules.positions(moves)[-1])
            total = sum(math.exp(s / REAL.temperature) for s in scores.values())
            return {move: math.exp(s / REAL.temperature) / total for move, s in scores.items()}

        scores = score_moves(rows, exact_logits(rows, {ENGINE: policy}))
    torch.testing.assert_close(scores.nats, scores.floor, atol=1e-4, rtol=0)
    assert 0.3 < scores.floor.mean() < math.log(REAL.multipv)
    assert scores.greedy_from.all()
    assert scores.greedy_to.all()


@needs_stockfish
def test_scores_are_those_of_the_side_to_move():
    """Black can mate."""
    board = chess.Board()
    for move in ("f2f3", "e7e5", "g2g4"):
        board.push_uci(move)
    with open_engine() as engine:
        scores = engine.scores(board, 2000, 3)
    assert max(scores, key=lambda move: scores[move]) == "d8h4"
    assert scores["d8h4"] == chess_pool.MATE - 1
    assert max(s for move, s in scores.items() if move != "d8h4") < 2000
