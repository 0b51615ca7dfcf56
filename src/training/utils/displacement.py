"""Likelihood displacement: the margin grows while the chosen answers become less likely.

A preference loss sees only the difference of both sides, and it often falls by making both less likely, the rejected
one faster. Where that goes far, the probability goes to answers that nobody has looked at (arXiv 2410.08847). It is a
property of the loss on these data and no fault of the program; whoever reads the curves should be able to tell.

Less likely than under the reference, where the loss reads one; else than before training, pair by pair.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from training.utils.heldout_rows import HeldoutRows
from training.utils.intervals import Z_95
from training.utils.losses import TIE

_Floats = np.ndarray[tuple[int], np.dtype[np.float64]]
LAST_STEPS = 20
"""Steps that are looked at where no pairs are held out."""
FEWEST_STEPS = 8
_OF_A_STEP = ("train/margin", "delta_logp/chosen", "delta_logp/rejected")
Compared = Literal["delta_logp", "since_start"]
"""With what log-probabilities are compared: the reference, or the policy before training."""
_WORDS: dict[Compared, str] = {"delta_logp": "Δlogp", "since_start": "change of logp since the start,"}
_LOOK = "and look at what the policy answers; docs/losses.md"
# By the name of the margin: what the loss has to hold the chosen side up with.
_ADVICE = {
    "margin": f"try sft_weight, a larger beta or a lower learning_rate, {_LOOK}",
    "log_odds_ratio": f"try a smaller orpo_lambda or a lower learning_rate, {_LOOK}",
}


@dataclass(frozen=True)
class Reading:
    """What some pairs say of the policy at one moment."""

    margin: float
    chosen: float
    """Mean log-probability of the chosen side, less that of what it is compared with."""
    rejected: float
    noise: float
    """Standard error of `chosen`."""
    compared: Compared = "delta_logp"
    margin_name: str = "margin"

    @classmethod
    def of_heldout(cls, metrics: Mapping[str, float]) -> Reading | None:
        """None where a number is missing."""
        named = _named_margin(metrics)
        compared: Compared = "delta_logp" if "delta_logp/chosen" in metrics else "since_start"
        names = (f"{compared}/chosen", f"{compared}/rejected", f"{compared}/chosen_stderr")
        margin, chosen, rejected, noise = (metrics.get(name, math.nan) for name in (named, *names))
        known = all(map(math.isfinite, (margin, chosen, rejected, noise)))
        return cls(margin, chosen, rejected, noise, compared, named) if known else None

    @classmethod
    def of_start(cls, metrics: Mapping[str, float]) -> Reading | None:
        """Before training. What is compared with that is 0 then."""
        named = _named_margin(metrics)
        if "delta_logp/chosen" in metrics or named not in metrics:
            return cls.of_heldout(metrics)
        return cls(metrics[named], 0.0, 0.0, 0.0, "since_start", named)

    @classmethod
    def of_steps(cls, steps: Iterable[Mapping[str, float]]) -> Reading | None:
        """Over the batches of some training steps; None where too few of them have numbers."""
        rows = [[step[name] for name in _OF_A_STEP] for step in steps]
        table = np.array(rows, dtype=np.float64)
        if len(rows) < FEWEST_STEPS or not np.isfinite(table).all():
            return None
        margin, chosen, rejected = table.mean(axis=0).tolist()
        return cls(margin, chosen, rejected, standard_error(table[:, 1]))

    def displaced(self, before: Reading) -> str | None:
        """What to say if the margin has grown since and the chosen side has become less likely, beyond noise.

        That is: the mean's 95 % interval lies below 0, and the mean below that of `before`.
        """
        fell = self.chosen + Z_95 * self.noise < -TIE and self.chosen < before.chosen - TIE
        if not (fell and self.margin > before.margin + TIE):
            return None
        return (
            f"likelihood displacement: the {self.margin_name.replace('_', ' ')} has grown from {before.margin:+.3f} "
            f"to {self.margin:+.3f}, but the chosen answers have become less likely too ({_WORDS[self.compared]} "
            f"chosen {self.chosen:+.2f} ± {Z_95 * self.noise:.2f}, rejected {self.rejected:+.2f}): "
            f"{_ADVICE[self.margin_name]}"
        )


def _named_margin(metrics: Mapping[str, float]) -> str:
    return "log_odds_ratio" if "log_odds_ratio" in metrics else "margin"


def standard_error(values: _Floats, rows: Sequence[int] | None = None) -> float:
    """Of the mean of these; not a number for those of fewer than two rows.

    `rows` says of which row each is: those of one hang together, and are one observation (cluster-robust, Liang and
    Zeger 1986, https://doi.org/10.1093/biomet/73.1.13). Without it each is a row.
    """
    row_of = np.arange(len(values)) if rows is None else np.unique(rows, return_inverse=True)[1]
    apart = np.bincount(row_of, values - values.mean())
    count = len(apart)
    if count < 2:
        return math.nan
    return math.sqrt(float(np.square(apart).sum()) * count / (count - 1)) / len(values)


def since_start(start: HeldoutRows | None, now: HeldoutRows) -> dict[str, float]:
    """How much likelier both sides of held-out pairs have become in the mean, and the standard error of the chosen one.

    For a loss without a reference. Pairs that are not finite now are left out, as of every metric; empty where it is
    not known of another what it was at the start.
    """
    before = {(row.line, row.pair): row.logps for row in start.rows} if start else {}
    rows = now.finite
    logps = [before.get((row.line, row.pair), {}) for row in rows]
    known = all(_has_both_sides(values) for values in (*logps, *(row.logps for row in rows)))
    if not rows or not known:
        return {}
    changes = {
        side: np.array([row.logps[side] - then[side] for row, then in zip(rows, logps, strict=True)])
        for side in ("chosen", "rejected")
    }
    return {f"since_start/{side}": float(change.mean()) for side, change in changes.items()} | {
        "since_start/chosen_stderr": standard_error(changes["chosen"], [row.line for row in rows])
    }


def _has_both_sides(logps: Mapping[str, float]) -> bool:
    return all(math.isfinite(logps.get(side, math.nan)) for side in ("chosen", "rejected"))


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
            now, start = Reading.of_heldout(heldout), Reading.of_start(before)
        found = now.displaced(start) if now and start else None
        return [found] if found else []

    @property
    def _start(self) -> Reading | None:
        if self._first is None:
            return None
        margin, chosen, rejected = (self._first[name] for name in _OF_A_STEP)
        return Reading(margin, chosen, rejected, noise=0.0)
