"""What a prefill vouches for: how each row was computed, and how far its last sweep still moved it.

A row has converged when ‖h_n − h_{n−1}‖ / ‖h_n‖ <= tolerance, over its positions, for the final hidden state and for
every remembered source >= 1 (docs/contract.md, section 4). That difference is the error of h_{n−1}. So a converged
state is nearer to the exact one than the tolerance, by the factor of contraction.
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
    """The last residual over the one before: the estimated rate. None with fewer than two."""
    forwards: float = 1.0
    """Positions computed over positions given: the cost in plain forwards of the same model."""

    @property
    def distance(self) -> float | None:
        """Estimate of ‖h_n − h‖ / ‖h‖ from the exact h: residual · ρ / (1 − ρ), infinite where ρ >= 1; None unknown.

        The sum of all moves to come, if each is the one before times the contraction ρ.
        """
        if self.residual is None or self.residual == 0 or self.contraction is None:
            return self.residual if self.residual == 0 else None
        return self.residual * self.contraction / (1 - self.contraction) if self.contraction < 1 else math.inf

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class PrefillReport:
    """How a prefill went."""

    mode: str
    """As asked for."""
    tolerance: float | None
    """The residual below which a row has converged; None where none is asked for."""
    rows: tuple[Certificate, ...]

    @property
    def forwards(self) -> float:
        """The cost in plain forwards, the mean over the rows' tokens."""
        return sum(row.forwards * row.tokens for row in self.rows) / sum(row.tokens for row in self.rows)

    @property
    def converged(self) -> bool:
        """Whether every row is exact or within the tolerance."""
        limit = 0.0 if self.tolerance is None else self.tolerance
        return all(row.residual is not None and row.residual <= limit for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)


def merge_certificates(parts: list[Certificate]) -> Certificate:
    """One certificate for the chunks of a long prompt: what the least exact of them vouches for, at the cost of all."""
    if len(parts) == 1:
        return parts[0]
    least = max(parts, key=lambda part: math.inf if part.residual is None else part.residual)
    tokens = sum(part.tokens for part in parts)
    return dataclasses.replace(
        least,
        reason=f"{least.reason} (the least exact of {len(parts)} chunks)",
        tokens=tokens,
        sweeps=sum(part.sweeps for part in parts),
        forwards=sum(part.forwards * part.tokens for part in parts) / tokens,
    )
