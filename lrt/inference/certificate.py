"""What a prefill vouches for: how each row was computed, and how far its last sweep still moved it.

A row has converged when its last sweep moved it by at most the tolerance, and what is to come, estimated from how much
less it moved than in the sweep before, is within the tolerance too: over the whole row, and at its worst position
(docs/contract.md, section 4). All of it for the final hidden state and for every remembered source >= 1.

That is a measured estimate, and no proof. It sees how the moves of every beginning of the row have shrunk so far. It
does not see a position further on that would magnify a move more than any did yet.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Certificate:
    """One row of a prefill."""

    path: Literal["exact", "sweeps", "single", "fallback"]
    """`exact`: token by token, or one forward where nothing recurs. `sweeps`: until converged. `single`: one sweep, not
    looked at. `fallback`: swept, would not converge in time, then computed exactly from the start."""
    reason: str
    """Why that path, or why it ended, in words."""
    tokens: int
    """Positions of the row."""
    groups: int | None = None
    """Stride of the sweeps."""
    sweeps: int = 0
    """How many there were."""
    residual: float | None = 0.0
    """‖h_n − h_{n−1}‖ / ‖h_n‖ of the last two values, the largest over the sources; 0 where exact, None where not
    measured."""
    worst: float | None = 0.0
    """The same of the single position that moved most …"""
    worst_position: int | None = None
    """… and which one that is."""
    contraction: float | None = None
    """c: how much of a move the next sweep makes. Of every beginning of the row, the position that moved most in the
    last sweep over the same in the sweep before; the largest of these, in the last two sweeps that can be compared.
    Below 1 moves shrink everywhere. 0 where nothing moved by more than rounding; None with fewer than three sweeps. Of
    what every sweep computes; of a final hidden state above that too, once three in a row are known."""
    forwards: float = 1.0
    """Positions computed times the share of the blocks that ran, over positions given: the cost in plain forwards."""

    @property
    def distance(self) -> float | None:
        """Estimate of ‖h_n − h‖ / ‖h‖ from the exact h: residual · c / (1 − c), infinite where c >= 1; None unknown.

        The sum of all moves to come, if each is at most the one before times the contraction c.
        """
        return moves_to_come(self.residual, self.contraction)

    @property
    def worst_distance(self) -> float | None:
        """The same at any single position: worst · c / (1 − c)."""
        return moves_to_come(self.worst, self.contraction)

    @property
    def bound(self) -> float:
        """The smallest tolerance that the row is within: 0 where exact, infinite where nothing is known.

        The largest of the last sweep's move and of what is to come, over the row and at its worst position. The last
        holds for any beginning of the row too, which may have the worst position and little else.
        """
        return largest_estimate(self.residual, self.worst, self.contraction)

    def within(self, tolerance: float) -> bool:
        """Whether the row is exact, or has converged: the last sweep and what is to come are within the tolerance."""
        return self.bound <= tolerance

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)


def largest_estimate(residual: float | None, worst: float | None, contraction: float | None) -> float:
    """The largest of a row's last move and of what is to come, over the row and at its worst position; infinite where
    one of them is unknown."""
    estimates = residual, moves_to_come(residual, contraction), moves_to_come(worst, contraction)
    return max(math.inf if x is None or math.isnan(x) else x for x in estimates)


def moves_to_come(move: float | None, contraction: float | None) -> float | None:
    """The sum of the moves after `move`, each so much smaller than the one before; None unknown."""
    if move is None or move == 0 or contraction is None:
        return move if move == 0 else None
    return move * contraction / (1 - contraction) if contraction < 1 else math.inf


@dataclass(frozen=True)
class PrefillReport:
    """How a prefill went."""

    mode: str
    """As asked for."""
    tolerance: float | None
    """What a converged row is within; None where none is asked for."""
    rows: tuple[Certificate, ...]

    @property
    def forwards(self) -> float:
        """The cost in plain forwards, the mean over the rows' tokens."""
        return sum(row.forwards * row.tokens for row in self.rows) / sum(row.tokens for row in self.rows)

    @property
    def converged(self) -> bool:
        """Whether every row is exact or within the tolerance, as far as measured."""
        return all(row.within(self.tolerance or 0.0) for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)


def merge_certificates(parts: list[Certificate]) -> Certificate:
    """One certificate for the chunks of a long prompt: what the least exact of them vouches for, at the cost of all."""
    if len(parts) == 1:
        return parts[0]
    least = max(parts, key=lambda part: part.bound)
    tokens = sum(part.tokens for part in parts)
    return dataclasses.replace(
        least,
        reason=f"{least.reason} (the least exact of {len(parts)} chunks)",
        tokens=tokens,
        sweeps=sum(part.sweeps for part in parts),
        forwards=sum(part.forwards * part.tokens for part in parts) / tokens,
    )
