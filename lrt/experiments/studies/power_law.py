"""Power laws of a loss against compute, with their uncertainty, and what follows: multipliers and extrapolations.

    loss(C) = floor + scale · C^-exponent

Fitted by least squares in the logarithm (scipy). Uncertainty is a residual bootstrap: the fit's relative residuals are
drawn anew, and it is fitted again (contract, section 5: over at least 8 points).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

FEWEST = 8
"""Points of a bootstrap, at least."""
RESAMPLES, LEVEL = 1000, 0.95


@dataclass(frozen=True)
class PowerLaw:
    """floor + scale · (C / unit)^-exponent."""

    floor: float
    scale: float
    exponent: float
    unit: float
    """Compute at which the power is 1: the geometric mean of what was fitted."""

    def loss(self, compute: float) -> float:
        """The loss at so much compute."""
        return self.floor + self.scale * (compute / self.unit) ** -self.exponent

    def compute(self, loss: float) -> float:
        """The compute that gives this loss; infinite at or below the floor."""
        if loss <= self.floor:
            return math.inf
        return self.unit * ((loss - self.floor) / self.scale) ** (-1 / self.exponent)


def fit(compute: Sequence[float], loss: Sequence[float], near: PowerLaw | None = None) -> PowerLaw:
    """The law nearest to the points, by least squares of the logarithm of the loss. ValueError below 4 points.

    Begun from three shares of the floor, or at a law of the same compute that is `near` already.
    """
    from scipy.optimize import least_squares

    if not len(compute) == len(loss) >= 4:
        raise ValueError(f"{len(compute)} points; a power law with a floor needs at least 4, of 3 sizes")
    x, y = np.log(np.asarray(compute, dtype=float)), np.log(np.asarray(loss, dtype=float))
    middle = float(x.mean())  # counted from here, scale and exponent depend little on each other

    # p holds the logarithms of floor, scale and exponent, so that all three stay above 0.
    def terms(p: np.ndarray) -> tuple[float, np.ndarray, float]:
        floor, scale, exponent = np.exp(p)
        return floor, scale * np.exp(-exponent * (x - middle)), exponent

    def residuals(p: np.ndarray) -> np.ndarray:
        floor, power, _ = terms(p)
        return np.log(floor + power) - y

    def slopes(p: np.ndarray) -> np.ndarray:  # the Jacobian of the residuals
        floor, power, exponent = terms(p)
        columns = [np.full_like(x, floor), power, -exponent * (x - middle) * power]
        return np.stack(columns, 1) / (floor + power)[:, None]

    lowest = math.exp(float(y.min()))
    slope = max(1e-3, -float(np.polyfit(x, y, 1)[0]))
    bounds = ([-20.0, -20.0, math.log(1e-4)], [math.log(lowest), 10.0, math.log(3.0)])
    starts = [
        np.log([share * lowest, (1 - share) * lowest, min(2.0, slope / (1 - share))]) for share in (0.1, 0.5, 0.8)
    ]
    if near is not None:
        starts = [np.log([near.floor, near.scale, near.exponent])]
    inside = [np.clip(start, np.add(bounds[0], 1e-6), np.subtract(bounds[1], 1e-6)) for start in starts]
    fits = [
        least_squares(residuals, start, slopes, bounds=bounds)  # pyright: ignore[reportArgumentType]  # a name, it says
        for start in inside
    ]
    best = min(fits, key=lambda solution: solution.cost)
    floor, scale, exponent = (float(v) for v in np.exp(best.x))
    return PowerLaw(floor, scale, exponent, math.exp(middle))


def bootstrap(
    compute: Sequence[float], loss: Sequence[float], seed: int = 0, resamples: int = RESAMPLES
) -> list[PowerLaw]:
    """Laws fitted to the first fit's values with its residuals drawn anew. ValueError below 8 points."""
    if len(compute) < FEWEST:
        raise ValueError(
            f"{len(compute)} points; a bootstrap needs at least {FEWEST}: run more depths, horizons or seeds"
        )
    law = fit(compute, loss)
    expected = np.array([law.loss(c) for c in compute])
    residuals = np.log(np.asarray(loss)) - np.log(expected)
    residuals -= residuals.mean()
    residuals *= math.sqrt(len(residuals) / (len(residuals) - 3))  # three parameters were fitted to them
    generator = np.random.default_rng(seed)
    errors = [generator.choice(residuals, len(residuals)) for _ in range(resamples)]
    return [fit(compute, list(expected * np.exp(e)), law) for e in errors]


def fit_with_bootstrap(compute: Sequence[float], loss: Sequence[float]) -> tuple[PowerLaw, list[PowerLaw]]:
    """The law and its bootstrap."""
    return fit(compute, loss), bootstrap(compute, loss)


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


def make_estimate(value: float, resampled: Sequence[float]) -> Estimate:
    """A value with the interval that its bootstrap gives."""
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="nearest")
    return Estimate(value, float(low), float(high))


def estimate(law: PowerLaw, laws: Sequence[PowerLaw], quantity: Callable[[PowerLaw], float]) -> Estimate:
    """A quantity of the fitted law, with the bootstrap's interval: the only way an extrapolation is given."""
    return make_estimate(quantity(law), [quantity(resampled) for resampled in laws])


def multiplier(
    law: PowerLaw, laws: Sequence[PowerLaw], other: PowerLaw, others: Sequence[PowerLaw], compute: float, spent: float
) -> Estimate:
    """How many times `spent` the fitted family would need for the loss that another's law gives at its `compute`.

    The bootstraps are paired: drawn with one seed over the same sizes, they shift together, and a family against itself
    has a multiplier of exactly `compute / spent`.
    """
    values = [one.compute(another.loss(compute)) / spent for one, another in zip(laws, others, strict=True)]
    return make_estimate(law.compute(other.loss(compute)) / spent, values)
