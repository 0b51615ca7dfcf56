"""Between what the true share lies, where some rows were counted."""

from __future__ import annotations

import math
from dataclasses import dataclass

Z_95 = 1.959963984540054
"""The normal distribution has 95 % within so many standard deviations."""


@dataclass(frozen=True)
class Interval:
    """Where the true share lies with 95 % confidence."""

    low: float
    high: float


def wilson(share: float, count: float) -> Interval:
    """The score interval of a share of `count` rows (Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953).

    All p that are not further from the observed share than 1.96 times their own standard error √(p (1 - p) / n): it
    stays within 0 and 1, and says something even where all pairs are right.
    """
    z2 = Z_95**2 / count
    center = (share + z2 / 2) / (1 + z2)
    half = math.sqrt(share * (1 - share) * z2 + z2**2 / 4) / (1 + z2)
    return Interval(max(center - half, 0.0), min(center + half, 1.0))
