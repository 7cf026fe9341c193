"""How a model is best prefilled on a device: stride of the sweeps, how many they take, what a call costs.

Measured by `calibrate`, kept in calibration.json beside a checkpoint (which does not need it and is not checked by
it), one entry per device. Without one, `fallback` serves: the same everywhere, and never wrong, only slower.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Plan:
    """How one mode is swept."""

    groups: int
    """Stride g of the Gauss-Seidel sweeps."""
    sweeps: int
    """How many a typical prompt takes."""


@dataclass(frozen=True)
class Calibration:
    """What decides between sweeps and token by token. A call that computes n positions takes time ∝ overhead + n."""

    overhead: float
    """A call's fixed cost, counted in positions."""
    plans: dict[str, Plan] = field(default_factory=dict)
    """By mode."""
    device: str = "none"
    """Where it was measured."""
    model: str = ""
    """Fingerprint of the model that it was measured with."""

    def exact(self, length: int, rows: int) -> float:
        """The cost of `length` positions of `rows` rows token by token, in positions."""
        return length * (self.overhead + rows)

    def sweep(self, length: int, rows: int, groups: int) -> float:
        """The cost of one sweep over them."""
        return min(groups, length) * self.overhead + length * rows

    def plan(self, mode: str) -> Plan:
        """The plan of a mode; one sweep has the stride of `converged`."""
        return Plan(self.plans["converged"].groups, 1) if mode == "one_sweep" else self.plans[mode]

    def break_even(self, plan: Plan, rows: int) -> float:
        """The length up to which token by token costs no more than the sweeps; infinite for many rows on a CPU."""
        saved = self.overhead + rows - plan.sweeps * rows
        return plan.sweeps * plan.groups * self.overhead / saved if saved > 0 else float("inf")


def fallback(device: torch.device) -> Calibration:
    """The calibration of an unmeasured model: WhiteMatter's g = 16 (2608.18486), a device's usual overhead."""
    overhead = 1000.0 if device.type == "cuda" else 16.0  # launches of a d6 on a GPU; reading its weights on a CPU
    return Calibration(overhead, {"converged": Plan(16, 8), "fast": Plan(16, 5)})
