"""Learning rates and row orders, as functions of the step and of the epoch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from firesteel.sdk.types import IntArray
from training.utils.config import Settings


class Schedule(Settings):
    """How the learning rate moves over a run of S steps, the first of which is step 1."""

    type: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    """Shape of the decay. `wsd` (warm-up, stable, decay) stays constant until its last part."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the rate rises from 0, linearly."""
    warmup_ratio: float = Field(default=0.0, ge=0, le=1)
    """The same as a share of S; give one of the two."""
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    """The rate at the last step, as a share of the base rate."""
    decay_ratio: float | None = Field(default=None, gt=0, le=1)
    """Share of S, at its end, over which the rate decays. None = all after the warm-up (`wsd`: 0.1)."""
    decay_type: Literal["linear", "cosine", "sqrt"] | None = None
    """`wsd` only: shape of its decay. None = linear."""

    @model_validator(mode="after")
    def _nothing_contradicts(self) -> Schedule:
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError("give warmup_steps or warmup_ratio, not both")
        if self.decay_type is not None and self.type != "wsd":
            raise ValueError(f"decay_type applies to wsd, not to {self.type}")
        if self.type == "constant" and (self.min_lr_ratio or self.decay_ratio):
            raise ValueError("a constant schedule reads neither min_lr_ratio nor decay_ratio")
        return self

    def learning_rate(self, base: float, step: int, total_steps: int) -> float:
        """The rate of step `step`, 1 ≤ step ≤ total_steps."""
        warmup = self.warmup_steps or math.ceil(self.warmup_ratio * total_steps)
        if step <= warmup:
            return base * step / warmup
        if self.type == "constant":
            return base
        share = self.decay_ratio or (0.1 if self.type == "wsd" else None)
        start = warmup if share is None else max(warmup, total_steps - math.ceil(share * total_steps))
        if step <= start:
            return base
        if step == total_steps:
            return base * self.min_lr_ratio  # exactly; rounding in the formulas below would miss it
        progress = (step - start) / (total_steps - start)
        return base * self._decayed(progress)

    def _decayed(self, progress: float) -> float:
        lowest = self.min_lr_ratio
        match self.decay_type or ("linear" if self.type == "wsd" else self.type):
            case "cosine":
                return lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * progress))
            case "sqrt":
                return max(lowest, 1 - math.sqrt(progress) * (1 - lowest))
            case _:
                return 1 - progress * (1 - lowest)


def epoch_order(count: int, seed: int, epoch: int, shuffle: bool) -> IntArray:
    """The order in which epoch `epoch` (from 0) visits `count` rows: a pure function of these numbers."""
    if not shuffle:
        return np.arange(count, dtype=np.int64)
    return np.random.default_rng([seed, epoch]).permutation(count).astype(np.int64)


@dataclass(frozen=True)
class Batch:
    """The rows of one optimizer step, by their places in the training set; steps and epochs count from 1."""

    step: int
    epoch: int
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Epochs:
    """Every batch of a run, as a pure function of these numbers."""

    count: int
    batch_size: int
    epochs: int
    seed: int
    shuffle: bool

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run; a last, smaller batch of an epoch is one."""
        return self.epochs * math.ceil(self.count / self.batch_size)

    def batches(self, after: int = 0) -> Iterator[Batch]:
        """The batches of all steps after step `after`, in order."""
        steps = math.ceil(self.count / self.batch_size)
        for epoch in range(after // steps, self.epochs):
            order = epoch_order(self.count, self.seed, epoch, self.shuffle)
            for number, start in enumerate(range(0, self.count, self.batch_size), start=1):
                step = epoch * steps + number
                if step <= after:
                    continue
                yield Batch(step, epoch + 1, tuple(order[start : start + self.batch_size].tolist()))
