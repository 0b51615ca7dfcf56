"""Likelihood displacement: the margin grows while the chosen answers become less likely.

A preference loss sees only the difference of both sides, and it often falls by making both less likely, the rejected
one faster. Where that goes far, the probability goes to answers that nobody has looked at (arXiv 2410.08847). It is a
property of the loss on these data and no fault of the program; whoever reads the curves should be able to tell.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from training.utils.intervals import Z_95
from training.utils.losses import TIE

LAST_STEPS = 20
"""Steps that are looked at where no pairs are held out."""
FEWEST_STEPS = 8
_OF_A_STEP = ("train/margin", "delta_logp/chosen", "delta_logp/rejected")
_ADVICE = "try sft_weight, a larger beta or a lower learning_rate, and look at what the policy answers; docs/losses.md"


@dataclass(frozen=True)
class Reading:
    """What some pairs say of the policy at one moment."""

    margin: float
    chosen: float
    """Mean Δlogp of the chosen side: how much likelier than under the reference."""
    rejected: float
    noise: float
    """Standard error of `chosen`."""

    @classmethod
    def of_heldout(cls, metrics: Mapping[str, float]) -> Reading | None:
        """None where a loss reads no reference, or a number is missing."""
        names = ("margin", "delta_logp/chosen", "delta_logp/rejected", "delta_logp/chosen_stderr")
        values = [metrics.get(name, math.nan) for name in names]
        return cls(*values) if all(map(math.isfinite, values)) else None

    @classmethod
    def of_steps(cls, steps: Iterable[Mapping[str, float]]) -> Reading | None:
        """Over the batches of some training steps; None where too few of them have numbers."""
        rows = [[step[name] for name in _OF_A_STEP] for step in steps]
        table = np.array(rows, dtype=np.float64)
        if len(rows) < FEWEST_STEPS or not np.isfinite(table).all():
            return None
        margin, chosen, rejected = table.mean(axis=0).tolist()
        return cls(margin, chosen, rejected, standard_error(table[:, 1], len(table)))

    def displaced(self, before: Reading) -> str | None:
        """What to say if the margin has grown since and the chosen side has become less likely, beyond noise.

        That is: the mean's 95 % interval lies below 0, and the mean below that of `before`.
        """
        fell = self.chosen + Z_95 * self.noise < -TIE and self.chosen < before.chosen - TIE
        if not (fell and self.margin > before.margin + TIE):
            return None
        return (
            f"likelihood displacement: the margin has grown from {before.margin:+.3f} to {self.margin:+.3f}, but the "
            f"chosen answers have become less likely too (Δlogp chosen {self.chosen:+.2f} ± {Z_95 * self.noise:.2f}, "
            f"rejected {self.rejected:+.2f}): {_ADVICE}"
        )


def standard_error(values: np.ndarray[tuple[int], np.dtype[np.float64]], count: float) -> float:
    """Of the mean of these, of which so many are independent; not a number for fewer than two."""
    return float(values.std(ddof=1) / math.sqrt(count)) if len(values) > 1 else math.nan


class DisplacementWatch:
    """Warns once. It looks at held-out pairs, or at the last training steps where there are none."""

    def __init__(self, steps: Iterable[Mapping[str, float]] = ()) -> None:
        """`steps` are the metrics of those that the run has made before."""
        self._first: Mapping[str, float] | None = None
        self._last: deque[Mapping[str, float]] = deque(maxlen=LAST_STEPS)
        self._warned = False
        for metrics in steps:
            self.step(metrics)

    def step(self, metrics: Mapping[str, float]) -> None:
        """One more training step; one that was skipped, or has no reference, says nothing."""
        if all(metrics.get(name) is not None for name in _OF_A_STEP):
            self._first = self._first or metrics
            self._last.append(metrics)

    def warnings(self, before: Mapping[str, float], heldout: Mapping[str, float] | None) -> Iterator[str]:
        """At most one in all. `heldout` are the held-out metrics of now, None where no pairs are held out."""
        found = [] if self._warned else self.verdict(before, heldout)
        self._warned = self._warned or bool(found)
        yield from found

    def verdict(self, before: Mapping[str, float], heldout: Mapping[str, float] | None) -> list[str]:
        """The same, whether or not it was said before. `before` are held-out metrics of the start."""
        if heldout is None:
            now, start = Reading.of_steps(self._last), self._start
        else:
            now, start = Reading.of_heldout(heldout), Reading.of_heldout(before)
        found = now.displaced(start) if now and start else None
        return [found] if found else []

    @property
    def _start(self) -> Reading | None:
        if self._first is None:
            return None
        margin, chosen, rejected = (self._first[name] for name in _OF_A_STEP)
        return Reading(margin, chosen, rejected, noise=0.0)
