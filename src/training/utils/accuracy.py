"""How far an accuracy can be trusted: how sure it is, what length alone would give, and where the pairs are from.

A tie is not right, here as in `accuracy` itself. Every pair counts once, whatever its weight in the loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from firesteel.sdk.types import BoolArray, Datum
from training.utils.intervals import wilson
from training.utils.losses import Margins
from training.utils.pairs import PreferencePair
from training.utils.sources import by_source, count_sources

_Floats = np.ndarray[tuple[int], np.dtype[np.float64]]


@dataclass(frozen=True)
class Traits:
    """What is known of a pair before any model has read it."""

    longer: int
    """Scored tokens that the chosen side has more than the rejected one, after truncation."""
    truncated: bool = False
    source: str | None = None
    row_pairs: int = 1
    """How many pairs its row makes."""
    line: int = 0
    """Of its row."""

    @classmethod
    def of(cls, pair: PreferencePair) -> Traits:
        """Those of a pair."""
        longer = _scored(pair.chosen) - _scored(pair.rejected)
        return cls(longer, pair.truncated, pair.source, pair.ranked.pairs, pair.line)


def length_controlled(right: BoolArray, traits: Sequence[Traits]) -> float | None:
    """Balanced accuracy: the mean of the accuracies where chosen is the longer side, and where it is the shorter.

    Both count the same, however many pairs they have; pairs of equal length are left out. So whoever goes by length
    alone, either way, has 0.5 (balanced accuracy, https://doi.org/10.1109/ICPR.2010.764, of which side is longer).
    None where one of the two has no pair: these pairs cannot tell preference from length.
    """
    longer = np.array([pair.longer for pair in traits])
    kinds = [right[longer > 0], right[longer < 0]]
    return float(np.mean([kind.mean() for kind in kinds])) if all(map(len, kinds)) else None


def pair_shares(traits: Sequence[Traits]) -> dict[str, float]:
    """Shares of pairs that say what an accuracy is of: those with the longer side chosen, and those cut."""
    return {
        "chosen_longer": float(np.mean([pair.longer > 0 for pair in traits])),
        "truncated": float(np.mean([pair.truncated for pair in traits])),
    }


def rows_of(traits: Sequence[Traits]) -> float:
    """How many rows these pairs are of: those of one ranked list are no independent observations."""
    return math.fsum(1 / pair.row_pairs for pair in traits)


def accuracy_metrics(margins: Margins, traits: Sequence[Traits]) -> dict[str, float]:
    """What stands beside the accuracy of these pairs, in the order of `margins`."""
    right, values = margins.right.detach().numpy(), margins.values.detach().numpy()
    interval = wilson(float(right.mean()), rows_of(traits))
    controlled = length_controlled(right, traits)
    return {
        "accuracy_low": interval.low,
        "accuracy_high": interval.high,
        **({} if controlled is None else {"accuracy_length_controlled": controlled}),
        **pair_shares(traits),
        **source_metrics(right, values, traits),
    }


def source_metrics(right: BoolArray, margins: _Floats, traits: Sequence[Traits]) -> dict[str, float]:
    """Accuracy, mean margin and count of each source, and how many there are; empty where no row names one."""
    sources = [pair.source for pair in traits]
    metrics = count_sources(sources)
    for name, members in by_source(sources):
        metrics |= {
            f"source/{name}/accuracy": float(right[members].mean()),
            f"source/{name}/margin": float(margins[members].mean()),
            f"source/{name}/count": int(members.sum()),
        }
    return metrics


def _scored(datum: Datum) -> int:
    return int(np.count_nonzero(datum.loss_fn_inputs["weights"].to_numpy()))
