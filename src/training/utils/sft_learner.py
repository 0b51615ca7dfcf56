"""Supervised learning: the likelihood of some tokens of each sequence, averaged over the step by their weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from firesteel.sdk import Datum, ForwardBackwardOutput, NonFiniteError, Verification
from training.utils.client import ReconnectableClient
from training.utils.heldout_rows import HeldoutRow, HeldoutRows, row_of_nll
from training.utils.losses import make_nll_loss, summed_nll, weight_of
from training.utils.reference_pass import AnyReferences
from training.utils.row_sets import RowSet
from training.utils.sft_rows import SFT, LearnedSequence, SftRows
from training.utils.sources import by_source, count_sources

EVALUATED_AT_ONCE = 16
_Floats = np.ndarray[tuple[int], np.dtype[np.float64]]


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
        parts = _parts(data, policy.description.activation_token_budget)
        try:
            results = [policy.forward_backward_custom(part, loss, weighted_only=True) for part in parts]
        except NonFiniteError:
            policy.drop_gradient()  # of the parts before it: half a step is no step
            raise
        metrics = _added(results)
        told = nll_metrics(metrics["sft_loss"]) | {"learned_weight": total, "truncated": cut_share(items)}
        return replace(results[0], metrics=metrics | told)

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
        """Mean over all tokens of all held-out rows, by their weights; the same of each source.

        Rows whose likelihood is not finite count in `nonfinite_rows` alone.
        """
        evaluated, told = list[LearnedSequence](), list[HeldoutRow]()
        sums = list[float]()
        for items in rows.blocks(EVALUATED_AT_ONCE):
            if abandon():
                return {}
            data = self.data(items)
            outputs = policy.forward(data, weighted_only=True).loss_fn_outputs
            logprobs = [output["logprobs"].to_torch() for output in outputs]
            sums += [float(summed_nll([datum], [row])) for datum, row in zip(data, logprobs, strict=True)]
            told += [row_of_nll(i.line, i.datum, row) for i, row in zip(items, logprobs, strict=True)]
            evaluated += items
        kept = HeldoutRows(self.loss_name, told)
        keep(kept)
        nll, weights = np.array(sums), np.array([weight_of(item.datum) for item in evaluated])
        if not (lost := kept.nonfinite_lines):
            return heldout_metrics(nll, weights, evaluated)
        finite = np.isfinite(nll)
        left = [row for row, right in zip(evaluated, finite, strict=True) if right]
        told_of = heldout_metrics(nll[finite], weights[finite], left) if left else {}
        return {**told_of, "nonfinite_rows": len(lost)}


def heldout_metrics(nll: _Floats, weights: _Floats, rows: Sequence[LearnedSequence]) -> dict[str, float]:
    """Of rows with these sums, over all of them together."""
    loss = nll_metrics(float(nll.sum() / weights.sum()))
    return {**loss, "truncated": cut_share(rows), **source_metrics(nll, weights, rows)}


def source_metrics(nll: _Floats, weights: _Floats, rows: Sequence[LearnedSequence]) -> dict[str, float]:
    """The loss and the count of each source, and how many sources there are; empty where no row names one."""
    sources = [row.source for row in rows]
    metrics = count_sources(sources)
    for name, members in by_source(sources):
        metrics |= {
            f"source/{name}/sft_loss": float(nll[members].sum() / weights[members].sum()),
            f"source/{name}/count": int(members.sum()),
        }
    return metrics


def cut_share(rows: Sequence[LearnedSequence]) -> float:
    """The share of rows that lost their end to the limit."""
    return float(np.mean([row.truncated for row in rows]))


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
