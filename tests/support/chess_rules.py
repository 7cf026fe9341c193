"""The rules of chess once more, from the laws alone: no library, and no code of lrt. Slow and plain.

A board is a dict from squares ("e2") to letters ("P" white, "p" black).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

FILES, RANKS = "abcdefgh", "12345678"
ROOK = ((1, 0), (-1, 0), (0, 1), (0, -1))
BISHOP = ((1, 1), (1, -1), (-1, 1), (-1, -1))
KNIGHT = ((1, 2), (2, 1), (2, -1), (1, -2), (-1, -2), (-2, -1), (-2, 1), (-1, 2))
LINES = {"R": ROOK, "B": BISHOP, "Q": ROOK + BISHOP}
JUMPS = {"N": KNIGHT, "K": ROOK + BISHOP}
CASTLING = {"e1g1": ("K", "h1", "f1"), "e1c1": ("Q", "a1", "d1"), "e8g8": ("k", "h8", "f8"), "e8c8": ("q", "a8", "d8")}
"""King's move -> right, the rook's square, where it goes."""
HOME = {"a1": "Q", "e1": "KQ", "h1": "K", "a8": "q", "e8": "kq", "h8": "k"}
"""A move from or to here ends these rights."""


@dataclass(frozen=True)
class Position:
    board: dict[str, str]
    white: bool = True
    """Whether it is white's turn."""
    rights: str = "KQkq"
    passant: str = ""
    """The square that a pawn has just jumped over."""


def parse(fen: str) -> Position:
    places, turn, rights, passant = fen.split()[:4]
    board = {}
    for rank, row in zip("87654321", places.split("/"), strict=True):
        spelled = "".join(" " * int(c) if c.isdigit() else c for c in row)
        board |= {file + rank: c for file, c in zip(FILES, spelled, strict=True) if c != " "}
    return Position(board, turn == "w", rights.strip("-"), passant.strip("-"))


START = parse("rnbqkbnr/pppppppp/8/8/8/8/PPPPPPPP/RNBQKBNR w KQkq -")


def shift(square: str, files: int, ranks: int) -> str:
    """The square so far away; "" off the board."""
    file, rank = FILES.index(square[0]) + files, RANKS.index(square[1]) + ranks
    return FILES[file] + RANKS[rank] if 0 <= file < 8 and 0 <= rank < 8 else ""


def reach(board: dict[str, str], square: str) -> Iterator[str]:
    """Where the piece (no pawn) on a square can go or capture, its own side's pieces included."""
    kind = board[square].upper()
    for step in JUMPS.get(kind, ()):
        yield shift(square, *step)
    for step in LINES.get(kind, ()):
        target = shift(square, *step)
        while target:
            yield target
            target = "" if target in board else shift(target, *step)


def attacked(board: dict[str, str], square: str, white: bool) -> bool:
    """Whether a side attacks a square."""
    for origin, piece in board.items():
        if piece.isupper() != white:
            continue
        forward = 1 if white else -1
        pawn = piece in "Pp" and square in (shift(origin, 1, forward), shift(origin, -1, forward))
        if pawn or square in reach(board, origin):
            return True
    return False


def pawn_moves(p: Position, origin: str) -> Iterator[str]:
    forward, first, last = (1, "2", "8") if p.white else (-1, "7", "1")
    targets = [shift(origin, 0, forward)] if shift(origin, 0, forward) not in p.board else []
    if targets and origin[1] == first and shift(origin, 0, 2 * forward) not in p.board:
        targets.append(shift(origin, 0, 2 * forward))
    for side in (-1, 1):
        target = shift(origin, side, forward)
        if target and (target in p.board or target == p.passant):
            targets.append(target)
    for target in targets:
        yield from (target + piece for piece in "qrbn") if target[1] == last else (target,)


def castlings(p: Position) -> Iterator[str]:
    for move, (right, rook, between) in CASTLING.items():
        way = [between, move[2:]]
        empty = [*way, "b" + move[1]] if move[2] == "c" else way
        if right in p.rights and right.isupper() == p.white and not any(square in p.board for square in empty):
            assert p.board[rook] in "Rr"
            if not any(attacked(p.board, square, not p.white) for square in (move[:2], *way)):
                yield move


def legal(p: Position) -> set[str]:
    """All legal moves, as UCI writes them."""
    moves = set(castlings(p))
    for origin, piece in p.board.items():
        if piece.isupper() == p.white:
            targets = pawn_moves(p, origin) if piece in "Pp" else reach(p.board, origin)
            moves |= {origin + target for target in targets if target and not is_own(p, target[:2])}
    return {move for move in moves if not in_check(after(p, move), p.white)}


def is_own(p: Position, square: str) -> bool:
    return square in p.board and p.board[square].isupper() == p.white


def in_check(p: Position, white: bool) -> bool:
    king = next(square for square, piece in p.board.items() if piece == ("K" if white else "k"))
    return attacked(p.board, king, not white)


def after(p: Position, move: str) -> Position:
    """The position after a move that is taken to be legal."""
    board = dict(p.board)
    origin, target, piece = move[:2], move[2:4], board.pop(move[:2])
    if piece in "Pp" and target == p.passant:
        del board[target[0] + origin[1]]  # en passant: the captured pawn stands beside
    if piece in "Kk" and move in CASTLING:
        _, rook, between = CASTLING[move]
        board[between] = board.pop(rook)
    board[target] = (move[4].upper() if p.white else move[4]) if move[4:] else piece
    lost = HOME.get(origin, "") + HOME.get(target, "")
    jumped = piece in "Pp" and abs(int(origin[1]) - int(target[1])) == 2
    passant = origin[0] + str((int(origin[1]) + int(target[1])) // 2) if jumped else ""
    return Position(board, not p.white, "".join(r for r in p.rights if r not in lost), passant)


def positions(moves: list[str]) -> list[Position]:
    """From the start, before each move and after the last."""
    line = [START]
    for move in moves:
        line.append(after(line[-1], move))
    return line


def count(p: Position, depth: int) -> int:
    """Lines of so many moves ("perft")."""
    return sum(count(after(p, move), depth - 1) for move in legal(p)) if depth else 1
