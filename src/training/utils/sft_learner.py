"""Supervised learning: the likelihood of some tokens of each sequence, averaged over the step by their weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from firesteel.sdk import Datum, ForwardBackwardOutput, NonFiniteError, OperationError, Verification
from training.utils.client import ReconnectableClient
from training.utils.heldout_rows import HeldoutRow, HeldoutRows, row_of_nll
from training.utils.losses import make_nll_loss, summed_nll, weight_of
from training.utils.reference_pass import AnyReferences
from training.utils.row_sets import RowSet
from training.utils.sft_rows import SFT, LearnedSequence, SftRows
from training.utils.sources import by_source, count_sources

if TYPE_CHECKING:
    import torch

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
        results = list[ForwardBackwardOutput]()
        try:
            for part in _parts(data, policy.description.activation_token_budget):
                results.append(policy.forward_backward_custom(part, loss, weighted_only=True))
        except NonFiniteError as error:
            if results:
                _drop_parts(policy, error)
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
        evaluated, told = list[EvaluatedSequence](), list[HeldoutRow]()
        for items in rows.blocks(EVALUATED_AT_ONCE):
            if abandon():
                return {}
            data = self.data(items)
            outputs = policy.forward(data, weighted_only=True).loss_fn_outputs
            logprobs = [output["logprobs"].to_torch() for output in outputs]
            now = [EvaluatedSequence.of(i, row) for i, row in zip(items, logprobs, strict=True)]
            told += [row_of_nll(i.line, i.datum, row.nll) for i, row in zip(items, now, strict=True)]
            evaluated += now
        kept = HeldoutRows(self.loss_name, told)
        keep(kept)
        finite = [row for row in evaluated if math.isfinite(row.nll)]
        lost = {"nonfinite_rows": len(evaluated) - len(finite)} if len(finite) < len(evaluated) else {}
        return (heldout_metrics(finite) if finite else {}) | lost


@dataclass(frozen=True)
class EvaluatedSequence:
    """What is kept of a held-out row, which may have many tokens."""

    nll: float
    """Σ w (-log π)."""
    weight: float
    """Σ w."""
    source: str | None
    truncated: bool

    @classmethod
    def of(cls, item: LearnedSequence, logprobs: torch.Tensor) -> EvaluatedSequence:
        """By the log-probabilities of its targets."""
        nll = float(summed_nll([item.datum], [logprobs]))
        return cls(nll, weight_of(item.datum), item.source, item.truncated)


def heldout_metrics(rows: Sequence[EvaluatedSequence]) -> dict[str, float]:
    """Over all of them together."""
    return {**nll_metrics(mean_nll(rows)), "truncated": cut_share(rows), **source_metrics(rows)}


def mean_nll(rows: Sequence[EvaluatedSequence]) -> float:
    """Σ w (-log π) / Σ w."""
    return float(np.sum([row.nll for row in rows]) / np.sum([row.weight for row in rows]))


def source_metrics(rows: Sequence[EvaluatedSequence]) -> dict[str, float]:
    """The loss and the count of each source, and how many sources there are; empty where no row names one."""
    sources = [row.source for row in rows]
    metrics = count_sources(sources)
    for name, members in by_source(sources):
        of_source = [row for row, member in zip(rows, members, strict=True) if member]
        metrics |= {f"source/{name}/sft_loss": mean_nll(of_source), f"source/{name}/count": len(of_source)}
    return metrics


def cut_share(rows: Sequence[LearnedSequence] | Sequence[EvaluatedSequence]) -> float:
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


def _drop_parts(policy: ReconnectableClient, error: NonFiniteError) -> None:
    """Half a step is no step. Where a server of an earlier version cannot drop it, the run ends."""
    try:
        policy.drop_gradient()
    except OperationError as refused:
        raise OperationError(
            f"{error}; and what the parts of the step before it have added cannot be dropped: {refused}; is the server "
            "of an earlier version?"
        ) from error


def _added(results: Sequence[ForwardBackwardOutput]) -> dict[str, float]:
    """The metrics of a step's parts: sums, but for those that are a maximum."""
    first, *others = (result.metrics for result in results)
    added = dict(first)
    for metrics in others:
        for name, value in metrics.items():
            added[name] = max(added[name], value) if name.endswith(":max") else added[name] + value
    return added
