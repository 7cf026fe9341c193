"""What a prefill vouches for: how each row was computed, and how far the last sweep still moved it.

Contract, section 4: a row has converged when ‖h_n − h_{n−1}‖ / ‖h_n‖ <= tolerance, over its positions, for the final
hidden state and for every remembered source >= 1.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

Path = Literal["exact", "sweeps", "single", "fallback"]
"""`exact`: token by token, or one forward where nothing recurs. `sweeps`: until converged. `single`: one sweep, not
looked at. `fallback`: swept, did not contract, then computed exactly from the start."""


@dataclass(frozen=True)
class Certificate:
    """One row of a prefill."""

    path: Path
    reason: str
    """Why this path, in words."""
    sweeps: int = 0
    """Times that every position not yet known to be exact was computed; 0 on the exact path."""
    residual: float | None = 0.0
    """‖h_n − h_{n−1}‖ / ‖h_n‖ of the last two values, the largest of the sources; 0 where exact, None if not measured."""
    worst: float | None = 0.0
    """The same of the single position that moved most …"""
    worst_position: int | None = None
    """… and which one that is."""
    contraction: float | None = None
    """Ratio of the last two residuals, an estimate of the rate; None with fewer than two."""
    forwards: float = 1.0
    """Positions computed over positions given: the cost in plain forwards of the same model."""

    @property
    def distance(self) -> float | None:
        """Estimate of ‖h_n − h‖ / ‖h‖ from the exact state: residual · ρ / (1 − ρ); infinite where ρ >= 1."""
        if self.residual is None or self.residual == 0:
            return self.residual
        if self.contraction is None:
            return None
        return self.residual * self.contraction / (1 - self.contraction) if self.contraction < 1 else float("inf")

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Report:
    """How a prefill went."""

    mode: str
    groups: int
    """Stride of the sweeps."""
    tolerance: float | None
    rows: tuple[Certificate, ...]

    @property
    def forwards(self) -> float:
        """The mean over the rows."""
        return sum(row.forwards for row in self.rows) / len(self.rows)

    @property
    def converged(self) -> bool:
        """Whether every row is exact or within the tolerance."""
        return all(
            row.path in ("exact", "fallback")
            or (row.residual is not None and self.tolerance is not None and row.residual <= self.tolerance)
            for row in self.rows
        )
