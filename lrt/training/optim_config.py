"""The rates of a run: OptimConfig. Plain data, which the command line reads without torch; `optim` trains by it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lrt.utils.short_repr import changed_fields
from lrt.utils.validation import Limits, check_numbers

LIMITS = {
    **dict.fromkeys(("matrix_lr", "embedding_lr", "head_lr", "scalar_lr", "weight_decay"), Limits(0, 1000)),
    "warmdown": Limits(0, 1),
    "momentum_steps": Limits(0, 10**12, whole=True),
    "reference_batch": Limits(1, 10**12, whole=True),
    "clip": Limits(0, 1e12, above=True, optional=True),
}
"""What the numbers of an OptimConfig may be."""
MOMENTUM = Limits(0, 1)


@dataclass(frozen=True)
class OptimConfig:
    """Rates at the reference batch and width (nanochat's); Optimiser scales them to the run's.

    All grow with the square root of the batch over `reference_batch`; those of embeddings and head fall with the
    square root of the width over 768.
    """

    matrix_lr: float = 0.02
    """Muon's rate, for matrices."""
    embedding_lr: float = 0.3
    """AdamW's rate for the token and value embeddings, at width 768."""
    head_lr: float = 0.004
    """AdamW's rate for the head, at width 768."""
    scalar_lr: float = 0.5
    """AdamW's rate for β, γ and source weights; α moves at a hundredth of it."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices, relative to their rate; falls linearly to zero."""
    warmdown: float = 0.5
    """The last fraction of training, over which all rates fall linearly to zero."""
    momentum: tuple[float, float] = (0.85, 0.95)
    """Muon's momentum at the start and after `momentum_steps`."""
    momentum_steps: int = 300
    """Steps over which Muon's momentum rises."""
    reference_batch: int = 524288
    """Tokens per step at which the rates hold; others scale them with the square root."""
    clip: float | None = None
    """Largest norm of the whole gradient; a larger one is scaled down to it. None: no limit."""

    def __repr__(self) -> str:
        return changed_fields(self)

    def times(self, factor: float) -> OptimConfig:
        """The same with all four rates times a factor."""
        return replace(
            self,
            matrix_lr=factor * self.matrix_lr,
            embedding_lr=factor * self.embedding_lr,
            head_lr=factor * self.head_lr,
            scalar_lr=factor * self.scalar_lr,
        )

    def __post_init__(self) -> None:
        check_numbers(self, LIMITS)
        pair = isinstance(self.momentum, tuple | list) and len(self.momentum) == 2
        if not pair or not all(MOMENTUM.allow(m) and m < 1 for m in self.momentum):
            raise ValueError(
                f"momentum is {self.momentum}; give two numbers from 0 to below 1: at the start, and after "
                "momentum_steps"
            )
        object.__setattr__(self, "momentum", tuple(self.momentum))  # JSON has no tuples
