"""What a model knows of the board: the nats of its moves, the probability that it leaves to legal ones, and the boards
themselves, for probes.

Shapes: B rows, T positions, V words, M whole moves. Logits (B, T, V) at position t predict token t + 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lrt.experiments.state_data.chess_games import (
    ENGINE,
    FIRST_PIECE,
    FIRST_SQUARE,
    RANDOM,
    SQUARES,
    TOKENS,
    WORDS,
    chess_library,
    split_move,
)
from lrt.experiments.state_data.rows import BOS, NOTHING, Rows

if TYPE_CHECKING:
    import chess

MOVES_AT = 2
"""The position of a row's first from-square: BOS and the kind of game stand before."""


@dataclass(frozen=True)
class Step:
    """A whole move of a row."""

    place: int
    """Position of its from-square."""
    words: int
    """2, or 3 for a promotion."""
    before: chess.Board
    after: chess.Board


def move_text(tokens: list[int], place: int) -> str:
    """The move whose from-square is at `place`, as UCI writes it; shorter where the row was cut."""
    ends = 3 if place + 2 < len(tokens) and tokens[place + 2] >= FIRST_PIECE else 2
    return "".join(WORDS[token].strip() for token in tokens[place : place + ends])


def is_cut(board: chess.Board, text: str, place: int, tokens: list[int]) -> bool:
    """Whether the row ends within this move: before its to-square, or before the piece of a promotion."""
    if place + 2 < len(tokens):
        return False
    return any(move.uci() != text and move.uci().startswith(text) for move in board.legal_moves)


def replay(tokens: list[int]) -> Iterator[Step]:
    """The whole moves of a row. ValueError for one that is not legal."""
    board, place = chess_library().Board(), MOVES_AT
    while place < len(tokens) and tokens[place] != BOS:
        text = move_text(tokens, place)
        if is_cut(board, text, place, tokens):
            return
        after = board.copy(stack=False)
        try:
            after.push_uci(text)
        except ValueError as error:
            raise ValueError(f"{text!r} at position {place} is no legal move; replay rows of legal games") from error
        words = len(split_move(text))
        yield Step(place, words, board, after)
        board, place = after, place + words


def piece_classes(board: chess.Board) -> list[int]:
    """The class of what stands on each square, a1 first."""
    classes = [0] * len(SQUARES)
    for square, piece in board.piece_map().items():
        classes[square] = piece.piece_type + (0 if piece.color else 6)
    return classes


def row_boards(tokens: list[int]) -> list[list[int]]:
    """The classes (T, 64) of one row without padding."""
    boards = [piece_classes(chess_library().Board())] * MOVES_AT
    for step in replay(tokens):
        boards += [boards[-1]] * (step.words - 1) + [piece_classes(step.after)]
    return boards + [boards[-1]] * (len(tokens) - len(boards))


def boards(rows: Rows) -> Tensor:
    """(B, T, 64) int64: the board at each position; NOTHING at padding.

    13 classes of a square: 0 empty, 1 … 6 white pawn, knight, bishop, rook, queen, king, 7 … 12 black.

    A move is done at its last word: up to then the board is that before it. At BOS and the kind of game it is the
    initial one. ValueError for rows with an illegal move.
    """
    classes = torch.full((*rows.tokens.shape, len(SQUARES)), NOTHING)
    for row, (tokens, length) in enumerate(zip(rows.tokens.tolist(), rows.lengths.tolist(), strict=True)):
        classes[row, :length] = torch.tensor(row_boards(tokens[:length]))
    return classes


@dataclass(frozen=True)
class LegalMoves:
    """The whole moves of rows, one row's after another's, and what was legal."""

    row: Tensor
    """(M,) int64."""
    place: Tensor
    """(M,) int64: position of the from-square."""
    words: Tensor
    """(M,) int64: 2, or 3 for a promotion."""
    legal_from: Tensor
    """(M, V) bool: squares from which there is a legal move."""
    legal_to: Tensor
    """(M, V) bool: squares to which there is one from the from-square of the game."""


def word_mask(squares: set[int]) -> list[bool]:
    """(V,): the words of these squares."""
    return [token - FIRST_SQUARE in squares for token in range(len(WORDS))]


def legal_moves(rows: Rows) -> LegalMoves:
    """What was legal at each whole move. ValueError for rows with an illegal move, and for rows without a whole one."""
    entries = []
    for row, (tokens, length) in enumerate(zip(rows.tokens.tolist(), rows.lengths.tolist(), strict=True)):
        for step in replay(tokens[:length]):
            legal = [(move.from_square, move.to_square) for move in step.before.legal_moves]
            origin = tokens[step.place] - FIRST_SQUARE
            origins, targets = {a for a, _ in legal}, {b for a, b in legal if a == origin}
            entries.append((row, step.place, step.words, word_mask(origins), word_mask(targets)))
    if not entries:
        raise ValueError(f"these rows of {rows.tokens.shape[1]} positions have no whole move; take rows of at least 4")
    return LegalMoves(*(torch.tensor(column) for column in zip(*entries, strict=True)))


@dataclass(frozen=True)
class MoveScores:
    """A model's whole moves, one entry each; (M,)."""

    ply: Tensor
    engine: Tensor
    """Bool: whether it is of an engine game; else of a random one."""
    nats: Tensor
    """Of all words of the move."""
    floor: Tensor
    """What they cost who knows the state."""
    legal_from: Tensor
    """Probability of squares from which there is a legal move."""
    legal_to: Tensor
    """Probability of squares to which there is one, given the from-square of the game."""
    greedy_from: Tensor
    """Bool: whether the likeliest word is a legal from-square."""
    greedy_to: Tensor
    """Bool: whether the likeliest word is a legal to-square, given the from-square of the game."""

    def select(self, mask: Tensor) -> MoveScores:
        """The moves where `mask` (M,) holds: `scores.select(scores.engine)`."""
        return MoveScores(**{name: column[mask] for name, column in vars(self).items()})


def word_costs(rows: Rows, logits: Tensor) -> Tensor:
    """(B, T) float32 on the CPU: what each token costs; 0 for the first, which nothing predicts."""
    targets = rows.tokens[:, 1:].to(logits.device)
    nats = -logits[:, :-1].float().log_softmax(-1).gather(2, targets.unsqueeze(2)).squeeze(2)
    return torch.nn.functional.pad(nats, (1, 0)).cpu()


def sum_words(values: Tensor, moves: LegalMoves) -> Tensor:
    """(M,): values (B, T) of tokens, summed over the words of each move."""
    last = values.shape[1] - 1
    third = values[moves.row, (moves.place + 2).clamp(max=last)]
    pair = values[moves.row, moves.place] + values[moves.row, moves.place + 1]
    return pair + torch.where(moves.words == 3, third, 0.0)


def score_moves(rows: Rows, logits: Tensor) -> MoveScores:
    """Every whole move of the rows; logits (B, T, V) of any model over `rows.tokens`, or log-probabilities.

    The model is asked along the game as it was played: its to-square is asked behind the game's from-square.
    ValueError for logits of another shape, and for rows with an illegal move.
    """
    if logits.shape != (*rows.tokens.shape, len(WORDS)):
        raise ValueError(
            f"logits are {tuple(logits.shape)}; they have to be {(*rows.tokens.shape, len(WORDS))}: a row of words "
            "for every token"
        )
    moves = legal_moves(rows)
    # The word before predicts the from-square, and the from-square the to-square.
    for_from, for_to = (logits[moves.row, moves.place + n].float().softmax(-1).cpu() for n in (-1, 0))
    return MoveScores(
        ply=rows.asked[moves.row, moves.place],
        engine=rows.tokens[moves.row, 1] == TOKENS[ENGINE],
        nats=sum_words(word_costs(rows, logits), moves),
        floor=sum_words(rows.floor, moves),
        legal_from=(for_from * moves.legal_from).sum(1),
        legal_to=(for_to * moves.legal_to).sum(1),
        greedy_from=moves.legal_from.gather(1, for_from.argmax(1, keepdim=True)).squeeze(1),
        greedy_to=moves.legal_to.gather(1, for_to.argmax(1, keepdim=True)).squeeze(1),
    )


@dataclass(frozen=True)
class PlyBin:
    """Means over the moves of some plies."""

    first: int
    last: int
    moves: int
    nats: float
    floor: float
    legal_from: float
    legal_to: float
    greedy_legal: float
    """Share of moves of which both greedy squares are legal."""

    @property
    def excess(self) -> float:
        """Nats of a move over the floor."""
        return self.nats - self.floor


def by_ply(scores: MoveScores, width: int = 10) -> list[PlyBin]:
    """Means by ply: 0 … width - 1, and so on; bins without a move are left out."""
    bins = scores.ply // width
    return [mean_scores(scores.select(bins == n), n * width, (n + 1) * width - 1) for n in bins.unique().tolist()]


def describe_moves(rows: Rows, logits: Tensor) -> dict[str, Any]:
    """The means by ply, as plain data, of engine games and of random ones; without those that there are none of."""
    scores = score_moves(rows, logits)
    kinds = {ENGINE: scores.select(scores.engine), RANDOM: scores.select(~scores.engine)}
    return {
        kind: {str(one.first): dataclasses.asdict(one) | {"excess": one.excess} for one in by_ply(of_kind)}
        for kind, of_kind in kinds.items()
        if len(of_kind.ply)
    }


def mean_scores(scores: MoveScores, first: int, last: int) -> PlyBin:
    columns = (scores.nats, scores.floor, scores.legal_from, scores.legal_to, scores.greedy_from & scores.greedy_to)
    return PlyBin(first, last, len(scores.ply), *(column.double().mean().item() for column in columns))
