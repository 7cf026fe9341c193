"""Power laws: a known one is found again, intervals cover it as often as they say, few points give none."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lrt.experiments.studies import power_law
from lrt.experiments.studies.power_law import PowerLaw

LAW = PowerLaw(floor=0.7, scale=0.4, exponent=0.25, unit=1e15)
COMPUTE = list(np.geomspace(1e13, 1e17, 12))


def noisy(seed: int, size: float) -> list[float]:
    noise = np.random.default_rng(seed).normal(0, size, len(COMPUTE))
    return [LAW.loss(c) * math.exp(e) for c, e in zip(COMPUTE, noise, strict=True)]


def test_a_law_is_found_again():
    law = power_law.fit(COMPUTE, [LAW.loss(c) for c in COMPUTE])
    assert (law.floor, law.exponent) == (pytest.approx(0.7, rel=1e-4), pytest.approx(0.25, rel=1e-4))
    for compute in (1e12, 1e18):
        assert law.loss(compute) == pytest.approx(LAW.loss(compute), rel=1e-4)


def test_compute_is_the_inverse_of_loss():
    assert LAW.compute(LAW.loss(3e16)) == pytest.approx(3e16)
    assert LAW.compute(0.7) == LAW.compute(0.5) == math.inf


def test_intervals_cover_the_truth():
    """Of twenty experiments most intervals hold the true value; with a tenth of the noise they are narrower."""
    covered = 0
    for seed in range(20):
        losses = noisy(seed, 0.005)
        laws = power_law.bootstrap(COMPUTE, losses, seed, resamples=60)
        estimate = power_law.estimate(power_law.fit(COMPUTE, losses), laws, lambda law: law.loss(1e18))
        assert estimate.low <= estimate.high
        covered += estimate.low <= LAW.loss(1e18) <= estimate.high
    assert covered >= 15
    widths = []
    for size in (0.005, 0.0005):
        laws = power_law.bootstrap(COMPUTE, noisy(0, size), resamples=60)
        estimate = power_law.estimate(laws[0], laws, lambda law: law.loss(1e18))
        widths.append(estimate.high - estimate.low)
    assert widths[1] < widths[0] / 3


def test_a_multiplier_is_how_much_more_compute_the_other_needs():
    """A family that reaches with C what the law reaches with 2 C has a multiplier of 2, and against itself of 1."""
    better = PowerLaw(LAW.floor, LAW.scale, LAW.exponent, LAW.unit / 2)
    noise = noisy(1, 0.0002)
    loss = [better.loss(c) / LAW.loss(c) * n for c, n in zip(COMPUTE, noise, strict=True)]
    base, other = power_law.fit_with_bootstrap(COMPUTE, noise), power_law.fit_with_bootstrap(COMPUTE, loss)
    gain = power_law.multiplier(*base, *other, 1e16, 1e16)
    assert gain.value == pytest.approx(2, rel=0.02)
    assert gain.low <= 2.02
    assert gain.high >= 1.98
    assert gain.high - gain.low < 0.3
    itself = power_law.multiplier(*base, *base, 1e16, 1e16)
    assert (itself.low, itself.value, itself.high) == pytest.approx((1, 1, 1))
    assert str(power_law.Estimate(1.234567, 1, 2)) == "1.23 [1, 2]"


def test_too_few_points():
    with pytest.raises(ValueError, match="7 points; a bootstrap needs at least 8"):
        power_law.bootstrap(COMPUTE[:7], noisy(0, 0.01)[:7])
    with pytest.raises(ValueError, match="3 points; a power law with a floor needs at least 4"):
        power_law.fit(COMPUTE[:3], noisy(0, 0.01)[:3])
