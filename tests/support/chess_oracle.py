"""Models of chess games that know the state, and an engine that the tests invent: both from `chess_rules` alone.

Shapes: B rows, T positions, V words.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

from lrt.experiments.state_data.chess_games import ENGINE, RANDOM, TOKENS, WORDS
from lrt.experiments.state_data.chess_pool import PoolSettings
from lrt.experiments.state_data.rows import Rows
from support import chess_rules as rules


def invented_scores(moves: list[str], multipv: int) -> dict[str, int]:
    """Some legal moves behind these, scored by a hash; pawns like to run, so that there are promotions."""
    position = rules.positions(moves)[-1]
    scores = {}
    for move in sorted(rules.legal(position)):
        digest = hashlib.sha256(f"{moves} {move}".encode()).digest()
        scores[move] = digest[0] + 100 * (position.board[move[:2]] in "Pp") + 200 * len(move[4:])
    return dict(sorted(scores.items(), key=lambda item: -item[1])[:multipv])


class InventedEngine:
    """Plays by `invented_scores`; it knows the moves so far, and nothing of the library's board."""

    name = "Invented 1.0"

    def scores(self, board, nodes: int, multipv: int) -> dict[str, int]:
        return invented_scores([move.uci() for move in board.move_stack], multipv)


def invented_policy(settings: PoolSettings, moves: list[str]) -> dict[str, float]:
    scores = invented_scores(moves, settings.multipv)
    total = sum(math.exp(s / settings.temperature) for s in scores.values())
    return {move: math.exp(s / settings.temperature) / total for move, s in scores.items()}


def uniform_policy(moves: list[str]) -> dict[str, float]:
    legal = rules.legal(rules.positions(moves)[-1])
    return {move: 1 / len(legal) for move in legal}


def words_of(move: str) -> list[str]:
    return [move[0:2], move[2:4], move[4:5]][: 2 + (len(move) == 5)]


def read_moves(words: list[str]) -> list[str]:
    """The moves of a row's words, BOS and kind left out."""
    moves: list[str] = []
    origin = ""
    for word in words:
        if word in {"n", "b", "r", "q"}:
            moves[-1] += word
        elif origin:
            moves.append(origin + word)
            origin = ""
        else:
            origin = word
    return moves


def spelled(rows: Rows, row: int) -> list[str]:
    """The words of a row behind BOS."""
    return [WORDS[t].strip() for t in rows.tokens[row, 1 : rows.lengths[row]].tolist()]


def word_probabilities(policy: dict[str, float], before: list[str]) -> dict[str, float]:
    """Of the next word of a move, behind these words of it."""
    counted: dict[str, float] = {}
    for move, p in policy.items():
        words = words_of(move)
        if words[: len(before)] == before and len(words) > len(before):
            counted[words[len(before)]] = counted.get(words[len(before)], 0.0) + p
    total = sum(counted.values())
    return {word: p / total for word, p in counted.items()}


def exact_logits(rows: Rows, policies: dict[str, Callable[[list[str]], dict[str, float]]]) -> Tensor:
    """Log-probabilities (B, T, V) of the model that knows the state: position t predicts token t + 1."""
    logits = torch.full((*rows.tokens.shape, len(WORDS)), -math.inf)
    logits[:, 0, TOKENS[ENGINE]], logits[:, 0, TOKENS[RANDOM]] = math.log(0.8), math.log(0.2)
    for row in range(len(rows.tokens)):
        kind, *words = spelled(rows, row)
        place, moves = 1, read_moves(words)
        for n, move in enumerate(moves):
            policy = policies[kind](moves[:n])
            for k in range(len(words_of(move))):
                for word, p in word_probabilities(policy, words_of(move)[:k]).items():
                    logits[row, place, TOKENS[word]] = math.log(p)
                place += 1
        logits[row, place:] = 0.0
    return logits
