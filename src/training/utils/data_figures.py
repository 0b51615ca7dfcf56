"""Figures about the rows of a file: how long they are, and shares with how sure they are."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from firesteel.sdk.types import IntArray
from training.utils.intervals import wilson


@dataclass(frozen=True)
class Bin:
    """How many rows have a length up to this one, and above that of the bin before."""

    up_to: int
    rows: int


@dataclass(frozen=True)
class Lengths:
    """How long something is in the rows of a file. The bins end at powers of two."""

    minimum: int
    median: float
    mean: float
    p95: float
    maximum: int
    bins: tuple[Bin, ...]

    @classmethod
    def of(cls, lengths: IntArray) -> Lengths:
        """Of at least one row."""
        ends = 2 ** np.arange(max(int(lengths.max()) - 1, 0).bit_length() + 1)
        counts = np.bincount(np.searchsorted(ends, lengths), minlength=len(ends))
        first = int(np.flatnonzero(counts)[0])
        bins = tuple(
            Bin(int(end), int(count)) for end, count in zip(ends[first:], counts[first:], strict=True)
        )
        median, p95 = (float(value) for value in np.percentile(lengths, (50, 95)))
        return cls(int(lengths.min()), median, float(lengths.mean()), p95, int(lengths.max()), bins)


@dataclass(frozen=True)
class Share:
    """A count out of others, and between which shares the true one lies with 95 % certainty (Wilson's interval)."""

    count: float
    """Not a whole number where some of the others count in part."""
    out_of: int
    share: float
    low: float
    high: float

    @classmethod
    def of(cls, count: float, out_of: int) -> Share:
        """Of nothing, anything is possible."""
        if not out_of:
            return cls(0, 0, math.nan, 0.0, 1.0)
        interval = wilson(count / out_of, out_of)
        return cls(count, out_of, count / out_of, interval.low, interval.high)

    def __str__(self) -> str:
        return f"{self.share:.1%} (95 % sure: {self.low:.1%} to {self.high:.1%})"
