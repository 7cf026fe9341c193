"""Chess without a board: a row is the moves of one game, as from- and to-squares.

    BOS engine e2 e4 e7 e5 …          BOS random a7 a8 q …

The word behind BOS says who moves. In an *engine* game it is a UCI engine (Debian's Stockfish): one thread, few nodes,
its memory cleared before every move. It scores its best moves, and our seed draws one from softmax(score /
temperature). In a *random* game every legal move is equally likely. So the probability of each token is known, and the
floor is its -log: of a from-square that of all moves from there, of a to-square that of the moves that then go there.
A promotion has a third word, the piece.

A game ends with mate, stalemate, too little material, the third time of a position, 100 halfmoves without capture or
pawn move, or after a number of plies. Nobody has to claim a draw. No word says that a game is over: the row ends.

`asked` is the ply, from 0, at both squares of a move; NOTHING at the kind of game and at promotion pieces, of which
four are always legal. Board games as text: Toshniwal et al. 2021 (arXiv 2102.13249); boards that a model knows after
every move: Chess-World-Model (arXiv 2605.30100).

Needs the extra `state-data` (the library `chess`). Games of an engine are made once: `lrt.experiments.state_data.
chess_pool`; scores and boards are in `chess_measures`.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from lrt.experiments.state_data.rows import BOS, NOTHING, Benchmark, Rows
from lrt.utils.imports import optional_module

if TYPE_CHECKING:
    import chess

ENGINE, RANDOM = KINDS = ("engine", "random")
SQUARES = tuple(file + rank for rank in "12345678" for file in "abcdefgh")
"""In the order of the library `chess`: a1 is 0, h8 is 63."""
PIECES = ("n", "b", "r", "q")
"""What a pawn can become."""
WORDS = ("", *(f"{word} " for word in (*KINDS, *SQUARES, *PIECES)))
TOKENS = {word.strip(): token for token, word in enumerate(WORDS)}
FIRST_SQUARE, FIRST_PIECE = TOKENS["a1"], TOKENS["n"]
PLIES = 80
"""The longest game."""

Policy = Callable[["chess.Board"], Mapping[str, float]]
"""Board -> moves (UCI: e2e4, a7a8q) and their weights, which need not sum to 1."""


def chess_library() -> Any:
    """The module `chess`; MissingExtraError where it is not installed."""
    return optional_module("chess", "state-data", "the benchmark of chess")


@dataclass(frozen=True)
class Game:
    """A game and what its moves cost."""

    kind: str
    """ENGINE or RANDOM."""
    moves: tuple[str, ...]
    """UCI."""
    nats: tuple[float, ...]
    """Of each word of the moves, one after another: the -log of its probability."""
    end: str
    """Why it ended: one of `ending`'s, or "plies"."""


def split_move(move: str) -> list[str]:
    """The words of a move: from, to, and the piece of a promotion."""
    return [word for word in (move[:2], move[2:4], move[4:]) if word]


def word_nats(weights: Mapping[str, float], move: str) -> list[float]:
    """-log of the probability of each word of a move, given the ones before."""
    # A word of a move is a prefix of UCI's: the weight of "e2" is that of all moves from there.
    prefixes = itertools.accumulate(split_move(move), initial="")
    totals = [sum(w for other, w in weights.items() if other.startswith(prefix)) for prefix in prefixes]
    return [math.log(before / after) for before, after in itertools.pairwise(totals)]


def ending(board: chess.Board) -> str:
    """Why a game is over; "" while it is not."""
    reasons = (
        ("checkmate", board.is_checkmate),
        ("stalemate", board.is_stalemate),
        ("material", board.is_insufficient_material),
        ("repetition", board.is_repetition),
        ("fifty moves", board.is_fifty_moves),
    )
    return next((reason for reason, holds in reasons if holds()), "")


def uniform(board: chess.Board) -> dict[str, float]:
    """The policy of random games: all legal moves alike."""
    return {move.uci(): 1.0 for move in board.legal_moves}


def draw_move(weights: Mapping[str, float], rng: random.Random) -> str:
    """A move with a probability in proportion to its weight. In which order the moves come makes no difference."""
    moves = sorted(weights)
    return rng.choices(moves, [weights[move] for move in moves])[0]


def play(kind: str, policy: Policy, rng: random.Random, plies: int = PLIES) -> Game:
    """A game of at most so many plies, both sides by one policy."""
    board = chess_library().Board()
    moves: list[str] = []
    nats: list[float] = []
    while not (end := ending(board)) and len(moves) < plies:
        weights = policy(board)
        moves.append(draw_move(weights, rng))
        nats += word_nats(weights, moves[-1])
        board.push_uci(moves[-1])
    return Game(kind, tuple(moves), tuple(nats), end or "plies")


Columns = tuple[list[int], list[float], list[int]]
"""Tokens, floor and asked of one row."""


def to_columns(game: Game, share: float) -> Columns:
    """A game as a row; `share` is the probability of its kind."""
    words = [
        (TOKENS[word], NOTHING if word in PIECES else ply)
        for ply, move in enumerate(game.moves)
        for word in split_move(move)
    ]
    tokens = [BOS, TOKENS[game.kind], *(token for token, _ in words)]
    asked = [NOTHING, NOTHING, *(ply for _, ply in words)]
    return tokens, [0.0, -math.log(share), *game.nats], asked


def stack(lists: Iterable[Sequence[float]], padding: float, dtype: torch.dtype) -> Tensor:
    """(B, T): lists of unequal length, padded behind their ends."""
    return pad_sequence([torch.tensor(x, dtype=dtype) for x in lists], batch_first=True, padding_value=padding)


def to_rows(games: Sequence[Game], shares: Mapping[str, float]) -> Rows:
    """Games as rows, as long as the longest; `shares` are the probabilities of the kinds."""
    tokens, floor, asked = zip(*(to_columns(game, shares[game.kind]) for game in games), strict=True)
    return Rows(
        stack(tokens, BOS, torch.int64),
        stack(floor, 0.0, torch.float32),
        stack(asked, NOTHING, torch.int64),
        torch.tensor([len(row) for row in tokens]),
    )


def fit(rows: Rows, length: int) -> Rows:
    """Rows of `length` positions: longer games are cut, shorter ones padded."""
    missing = (0, length - rows.tokens.shape[1])  # what is below 0 cuts
    return Rows(
        pad(rows.tokens, missing, value=BOS),
        pad(rows.floor, missing, value=0.0),
        pad(rows.asked, missing, value=NOTHING),
        rows.lengths.clamp(max=length),
    )


def random_rows(rows: int, length: int, generator: torch.Generator) -> Rows:
    """Random games of at most PLIES plies, drawn while you wait."""
    seeds = torch.randint(2**62, (rows,), generator=generator).tolist()
    plies = min(PLIES, length // 2)  # what does not fit is not played
    games = [play(RANDOM, uniform, random.Random(seed), plies) for seed in seeds]
    return fit(to_rows(games, {RANDOM: 1.0}), length)


def chess_words(name: str, sampler: Callable[[int, int, torch.Generator], Rows]) -> Benchmark:
    """A benchmark of chess games; who knows the grammar alone has no one chance: squares are not equally likely."""
    plies = tuple(range(0, PLIES, 10))
    return Benchmark(name, WORDS, "plies since the start of the game", math.nan, sampler, plies, far=None)


RANDOM_CHESS = chess_words("chess-random", random_rows)
"""Random legal games alone: no engine, no files. The kind costs nothing, since there is only one."""
