"""What the values of held-out rows are of, and which of them are ties."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.utils.heldout_rows import HeldoutRow, HeldoutRows
from training.utils.losses import PER_TOKEN, TIE, DpoObjective


@dataclass(frozen=True)
class Measure:
    """One that values can be compared by: two of one name are not always one, a margin may be per token."""

    name: str
    """Of the metric."""
    title: str
    """For people."""
    per_token: bool = False

    @classmethod
    def of(cls, name: str, config: Mapping[str, Any]) -> Measure:
        """By the metric's name, and the loss among a run's settings."""
        if name == "log_odds_ratio":
            return cls(name, "log odds ratio", per_token=True)
        if name != "margin":
            return cls(name, name)
        loss = config.get("loss", "sigmoid")
        per_token = loss in PER_TOKEN
        without = "" if DpoObjective(1.0, loss=loss).uses_reference else ", without a reference"
        return cls(name, f"margin{' per token' if per_token else ''}{without}", per_token)

    @property
    def form(self) -> str:
        """How its mean is written: of a token there is less to tell than of an answer."""
        return "+z.4f" if self.per_token else "+z.2f"

    def tie(self, row: HeldoutRow) -> float:
        """The largest value that is a tie, see `PairScores.tie_per_token`."""
        return TIE / max(min(row.tokens.values(), default=1), 1) if self.per_token else TIE

    def right(self, row: HeldoutRow) -> bool:
        """Whether chosen is preferred: not a tie, and not what is no number."""
        return row.value > self.tie(row)

    def all_tied(self, rows: HeldoutRows) -> bool:
        """Whether these are preferences, and no row prefers either side."""
        return self.name in MARGINS and all(abs(row.value) <= self.tie(row) for row in rows.finite)


MARGINS = ("margin", "log_odds_ratio")
"""The metrics that are above 0 where the chosen answer is preferred."""


def values_of(rows: HeldoutRows) -> NDArray[np.float64]:
    """Those that are finite."""
    return np.array([row.value for row in rows.finite])
