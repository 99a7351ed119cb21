"""Confidence intervals of rates."""

from __future__ import annotations

import math
from dataclasses import dataclass

# The 97.5 % point of the normal distribution: two-sided 95 % intervals.
Z_95 = 1.959963984540054


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A 95 % confidence interval, both ends within [0, 1]."""

    low: float
    high: float


def wilson(successes: int, trials: int, z: float = Z_95) -> Interval:
    """Wilson's score interval of a rate (Wilson 1927, JASA 22:209): sane at 0 and 1 and for few trials.

    No trials say nothing: the interval is then [0, 1]. Raises ValueError on impossible counts.
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes of {trials} trials is impossible")
    if trials == 0:
        return Interval(low=0.0, high=1.0)
    rate = successes / trials
    scale = 1 + z * z / trials
    centre = (rate + z * z / (2 * trials)) / scale
    half = z / scale * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    # At the ends the sum is exact on paper only; 1e-17 below nought is rounding.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == trials else centre + half
    return Interval(low=low, high=high)
