"""Supervised learning: the likelihood of some tokens of each sequence, averaged over the step by their weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from firesteel.sdk import Datum, ForwardBackwardOutput, TensorData, Verification
from training.utils.client import ReconnectableClient
from training.utils.heldout_rows import HeldoutRow, HeldoutRows, row_of_nll
from training.utils.losses import make_nll_loss, weight_of
from training.utils.reference_pass import AnyReferences
from training.utils.row_sets import RowSet
from training.utils.sft_rows import SFT, LearnedSequence, SftRows

EVALUATED_AT_ONCE = 16


@dataclass(frozen=True)
class SftLearner:
    """See `learner.Learner`."""

    rows: SftRows = SFT

    loss_name = "sft_loss"
    shown = ("sft_loss", "perplexity")
    best_by = ("sft_loss",)

    def data(self, items: Sequence[LearnedSequence]) -> list[Datum]:
        """One datum for each row."""
        return [item.datum for item in items]

    def accumulate(
        self, policy: ReconnectableClient, items: Sequence[LearnedSequence], references: AnyReferences
    ) -> ForwardBackwardOutput:
        """`make_nll_loss`, by the trainer's own cross-entropy: it only sums, so the weights are divided here, once.

        A batch of any length is one forward and one backward then, whatever the budget for kept graphs.
        """
        data = self.data(items)
        total = sum(map(weight_of, data))
        result = policy.forward_backward([_scaled(datum, 1 / total) for datum in data], weighted_only=True)
        metrics = nll_metrics(result.metrics["loss:sum"])
        return replace(result, metrics={**result.metrics, **metrics, "learned_weight": total})

    def verify(
        self, policy: ReconnectableClient, items: Sequence[LearnedSequence], references: AnyReferences
    ) -> Verification:
        """By the same loss as a function of log-probabilities."""
        data = self.data(items)
        return policy.verify(data, make_nll_loss(data), weighted_only=True)

    def evaluate(
        self,
        policy: ReconnectableClient,
        rows: RowSet[LearnedSequence],
        references: AnyReferences,
        abandon: Callable[[], bool],
        keep: Callable[[HeldoutRows], None] = lambda rows: None,
    ) -> dict[str, float]:
        """Mean over all tokens of all held-out rows, by their weights."""
        loss, total, told = 0.0, 0.0, list[HeldoutRow]()
        for items in rows.blocks(EVALUATED_AT_ONCE):
            if abandon():
                return {}
            data = self.data(items)
            result = policy.forward(data, weighted_only=True)
            loss += result.metrics["loss:sum"]
            total += sum(map(weight_of, data))
            outputs = [output["logprobs"].to_numpy() for output in result.loss_fn_outputs]
            told += [row_of_nll(item.line, item.datum, row) for item, row in zip(items, outputs, strict=True)]
        keep(HeldoutRows(self.loss_name, told))
        return nll_metrics(loss / total)


def nll_metrics(loss: float) -> dict[str, float]:
    """By name; the perplexity of a model that knows nothing is finite too."""
    return {"sft_loss": loss, "perplexity": math.exp(min(loss, 700.0))}


def _scaled(datum: Datum, factor: float) -> Datum:
    weights = datum.loss_fn_inputs["weights"].to_numpy() * factor
    inputs = {**datum.loss_fn_inputs, "weights": TensorData(weights, "float32")}
    return Datum(datum.model_input, inputs)
