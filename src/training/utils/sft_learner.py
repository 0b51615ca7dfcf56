"""Supervised learning: the likelihood of some tokens of each sequence, averaged over the step by their weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from firesteel.sdk import Datum, ForwardBackwardOutput, Verification
from training.utils.client import ReconnectableClient
from training.utils.heldout_rows import HeldoutRow, HeldoutRows, row_of_nll
from training.utils.losses import make_nll_loss, summed_nll, weight_of
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
        """In parts whose graphs can be kept: a loss that is a sum needs no second forward, whatever the batch."""
        data = self.data(items)
        total = sum(map(weight_of, data))
        loss = make_nll_loss(total)
        results = [
            policy.forward_backward_custom(part, loss, weighted_only=True)
            for part in _parts(data, policy.description.activation_token_budget)
        ]
        metrics = _added(results)
        told = nll_metrics(metrics["sft_loss"])
        return replace(results[0], metrics={**metrics, **told, "learned_weight": total})

    def verify(
        self, policy: ReconnectableClient, items: Sequence[LearnedSequence], references: AnyReferences
    ) -> Verification:
        """See `learner.Learner`."""
        data = self.data(items)
        return policy.verify(data, make_nll_loss(sum(map(weight_of, data))), weighted_only=True)

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
            outputs = policy.forward(data, weighted_only=True).loss_fn_outputs
            logprobs = [output["logprobs"].to_torch() for output in outputs]
            loss += float(summed_nll(data, logprobs))
            total += sum(map(weight_of, data))
            told += [row_of_nll(i.line, i.datum, row) for i, row in zip(items, logprobs, strict=True)]
        keep(HeldoutRows(self.loss_name, told))
        return nll_metrics(loss / total)


def nll_metrics(loss: float) -> dict[str, float]:
    """By name; the perplexity of a model that knows nothing is finite too."""
    return {"sft_loss": loss, "perplexity": math.exp(min(loss, 700.0))}


def _parts(data: Sequence[Datum], token_budget: int) -> Iterator[list[Datum]]:
    """In order, so many as have no more tokens than this together; one that has more stands alone."""
    part: list[Datum] = []
    tokens = 0
    for datum in data:
        if part and tokens + datum.model_input.length > token_budget:
            yield part
            part, tokens = [], 0
        part.append(datum)
        tokens += datum.model_input.length
    yield part


def _added(results: Sequence[ForwardBackwardOutput]) -> dict[str, float]:
    """The metrics of a step's parts: sums, but for those that are a maximum."""
    first, *others = (result.metrics for result in results)
    added = dict(first)
    for metrics in others:
        for name, value in metrics.items():
            added[name] = max(added[name], value) if name.endswith(":max") else added[name] + value
    return added
