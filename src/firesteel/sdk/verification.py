"""Whether the fast path gives the numbers of the plain one, on the caller's own data and loss.

Plain is transformers' own forward: no packing, no sharing, full logits. Two of its own attentions, eager and sdpa,
differ by rounding; so may the fast path, by at most twice that on the same rows. Where these two agree by chance
to more digits than that, the bound is `FLOOR`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from firesteel.sdk.errors import VerificationFailed
from firesteel.sdk.types import FloatArray, GradientSketch

# By dtype: per-token log-probability in nats, and the gradient's difference relative to its norm. The client sees
# float32 whatever the model computes in.
FLOOR = {"float64": 1e-6, "float32": 1e-5, "bfloat16": 0.05}

LARGEST_IN_FLOORS = 100


@dataclass(frozen=True)
class ExaminedPath:
    """One way to compute a call."""

    logprobs: tuple[FloatArray, ...]
    loss: float
    slopes: tuple[FloatArray, ...]
    """dLoss/dlogprob."""
    gradient: GradientSketch


@dataclass(frozen=True)
class Difference:
    """One number of the fast path against that of the plain one."""

    what: str
    found: float
    allowed: float

    @property
    def agrees(self) -> bool:
        """False for nan, too."""
        return self.found <= self.allowed


@dataclass(frozen=True)
class Verification:
    """What was compared."""

    differences: tuple[Difference, ...]

    @property
    def lines(self) -> list[str]:
        """A table for people."""
        return [
            f"verify  {d.what:<44} {d.found:9.2e}  allowed {d.allowed:9.2e}  {'ok' if d.agrees else 'DIFFERS'}"
            for d in self.differences
        ]

    def refuse_disagreement(self) -> None:
        """Raise VerificationFailed if anything differs by more than is allowed."""
        wrong = [d for d in self.differences if not d.agrees]
        if wrong:
            said = "; ".join(f"{d.what}: {d.found:.2e}, allowed {d.allowed:.2e}" for d in wrong)
            raise VerificationFailed(
                f"the fast path does not give the numbers of transformers' own forward: {said}. "
                "Do not train with it, and please report it with the model's name"
            )


def compare(paths: Mapping[str, ExaminedPath], dtype: str) -> Verification:
    """The paths `fast`, `eager` and `sdpa` of one call on a model of this dtype."""
    fast, eager, sdpa = paths["fast"], paths["eager"], paths["sdpa"]
    logprob = _allowed(dtype, _largest(eager.logprobs, sdpa.logprobs))
    # To first order a loss moves by its slopes times the moves of its log-probabilities.
    loss = logprob * sum(float(np.abs(slope).sum()) for slope in eager.slopes) + 1e-6 * abs(eager.loss)
    scale = max(eager.gradient.norm, np.finfo(np.float64).tiny)
    gradient = _allowed(dtype, eager.gradient.distance(sdpa.gradient) / scale)
    return Verification(
        (
            Difference("log-probability, largest, nats", _largest(fast.logprobs, eager.logprobs), logprob),
            Difference("loss", abs(fast.loss - eager.loss), loss),
            Difference(
                "gradient norm, relative", abs(fast.gradient.norm - eager.gradient.norm) / scale, gradient
            ),
            Difference(
                "gradient, random projection, relative",
                fast.gradient.distance(eager.gradient) / scale,
                gradient,
            ),
        )
    )


def _allowed(dtype: str, apart: float) -> float:
    """Where the two plain attentions are further apart than rounding can explain, they vouch for nothing."""
    floor = FLOOR[dtype]
    return max(floor, min(2 * apart, LARGEST_IN_FLOORS * floor))


def _largest(one: Sequence[FloatArray], other: Sequence[FloatArray]) -> float:
    # np.max and not max(): Python's loses a nan that is not the first.
    return float(np.max([np.abs(a - b).max() for a, b in zip(one, other, strict=True)]))
