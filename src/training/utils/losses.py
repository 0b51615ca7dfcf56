"""Losses, each once, as pure functions of per-token log-probabilities and weights.

Of preferences: π and r are log-probabilities summed over the n scored tokens under policy and reference, c and r (as
indices) the chosen and rejected response. Every loss scores each side by one number s, and looks at the margin::

    m = s_c - s_r         s = π - r                      sigmoid, robust, hinge, ipo_sum (and ld, with its tail scaled)
                          s = (π - r) / n                sigmoid_norm, ipo_mean
                          s = π / n                      simpo, without a reference

Sums run in float64: at Σ log p of minus some thousands, float32 has lost the digits that a margin needs.
torch is imported inside the functions, so that reading a recipe's `Config` (for `--help`) stays quick.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from firesteel.sdk.types import BoolArray, Datum, FloatArray

if TYPE_CHECKING:
    import torch

    from training.utils.pairs import PreferencePair


class PairObjective(Protocol):
    """A loss on pairs; one object for training and evaluation, so that the two cannot differ."""

    @property
    def loss_name(self) -> str:
        """The metric that is optimised."""

    @property
    def shown(self) -> tuple[str, ...]:
        """The metrics of a line for people."""

    @property
    def best_by(self) -> tuple[str, ...]:
        """The held-out metrics that a checkpoint may be kept for."""

    @property
    def reads_prompt(self) -> bool:
        """Whether tokens count that are not scored."""

    @property
    def margin_name(self) -> str:
        """What `margins` are called among the metrics."""

    def per_pair(self, scores: PairScores) -> torch.Tensor:
        """Loss of each pair, ``[N]``."""

    def margins(self, scores: PairScores) -> Margins:
        """What accuracy is counted by."""

    def metrics(self, scores: PairScores) -> dict[str, float]:
        """Over N pairs, the loss and its parts averaged by their weights."""


DpoLoss = Literal[
    "sigmoid", "robust", "hinge", "ipo_sum", "ipo_mean", "sigmoid_norm", "simpo", "ld", "plackett_luce"
]

PER_TOKEN: tuple[DpoLoss, ...] = ("ipo_mean", "sigmoid_norm", "simpo")
"""Losses whose margins are of means per token."""
# Margins this near 0 (in nats) are ties. Policy and reference are computed in batches of other composition,
# which moves a sum of some hundred float32 log-probabilities by about 1e-5: before training, a strict "> 0"
# would toss a coin.
TIE = 1e-3


@dataclass(frozen=True)
class PairLogprobs:
    """Reference log-probabilities of one pair's scored tokens, in order: those whose weight is not 0."""

    chosen: FloatArray
    rejected: FloatArray


@dataclass(frozen=True)
class SideScores:
    """Weighted sums over the scored tokens of one side of N pairs: float64 tensors of shape ``[N]``."""

    policy: torch.Tensor
    reference: torch.Tensor
    policy_tail: torch.Tensor
    """Of the tokens beyond as many as the pair's shorter side has: what LD-DPO scales."""
    reference_tail: torch.Tensor
    tokens: torch.Tensor
    """Number of scored tokens."""
    unscored: torch.Tensor
    """The policy's sum over all other tokens, the prompt's among them, where they were asked for; else 0."""
    unscored_tokens: torch.Tensor

    @classmethod
    def joined(cls, parts: Sequence[SideScores]) -> SideScores:
        """Those of all parts, in order."""
        import torch

        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    def only(self, which: torch.Tensor) -> SideScores:
        """Those of some pairs."""
        return SideScores(*(getattr(self, field.name)[which] for field in fields(self)))

    @property
    def delta(self) -> torch.Tensor:
        """π - r: how much likelier than under the reference the response has become."""
        return self.policy - self.reference

    @property
    def mean(self) -> torch.Tensor:
        """π / n: the mean log-probability of a token."""
        return self.policy / self.tokens


@dataclass(frozen=True)
class Stages:
    """Which of N pairs prefer one answer of a ranked list to the worse ones: together they are a stage of the list.

    A row of two answers is a stage by itself.
    """

    of: torch.Tensor
    """Number of each pair's stage, from 0, ``[N]``."""
    pairs: torch.Tensor
    """How many pairs the row of each pair makes, ``[N]``."""

    @classmethod
    def joined(cls, parts: Sequence[Stages]) -> Stages:
        """Those of all parts, in order; no stage goes on in the next part."""
        import torch

        numbered, count = [], 0
        for part in parts:
            numbered.append(part.of + count)
            count += int(part.of.max()) + 1
        return cls(torch.cat(numbered), torch.cat([part.pairs for part in parts]))

    @classmethod
    def of_pairs(cls, pairs: Sequence[PreferencePair]) -> Stages:
        """Those of some rows' pairs, all pairs of a row one after the other."""
        import torch

        places = [(pair.line, pair.ranked) for pair in pairs]
        starts = [
            place == 0 or pair.ranked.pairs == 1 or places[place] != places[place - 1]
            for place, pair in enumerate(pairs)
        ]
        counts = torch.tensor([pair.ranked.pairs for pair in pairs], dtype=torch.float64)
        return cls(torch.tensor(starts).long().cumsum(0) - 1, counts)


@dataclass(frozen=True)
class PairScores:
    """Both sides of N pairs."""

    chosen: SideScores
    rejected: SideScores
    weights: torch.Tensor
    """How much each pair counts, ``[N]``."""
    stages: Stages

    @classmethod
    def joined(cls, parts: Sequence[PairScores]) -> PairScores:
        """Those of all pairs of all parts, in order."""
        import torch

        chosen, rejected = ([getattr(part, side) for part in parts] for side in ("chosen", "rejected"))
        weights = torch.cat([part.weights for part in parts])
        stages = Stages.joined([part.stages for part in parts])
        return cls(SideScores.joined(chosen), SideScores.joined(rejected), weights, stages)

    def only(self, which: BoolArray) -> PairScores:
        """Those of some pairs; a stage of which some are left out has the others."""
        import torch

        kept = torch.from_numpy(which)
        left = torch.unique(self.stages.of[kept], return_inverse=True)[1]
        stages = Stages(left, self.stages.pairs[kept])
        return PairScores(self.chosen.only(kept), self.rejected.only(kept), self.weights[kept], stages)

    @property
    def tie_per_token(self) -> torch.Tensor:
        """`TIE` for margins of means, ``[N]``: their rounding is that of sums over so many tokens."""
        import torch

        return TIE / torch.minimum(self.chosen.tokens, self.rejected.tokens)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Of one value per pair: by the pairs' weights, which are all 1 where rows give none."""
        return (self.weights * values).sum() / self.weights.sum()


@dataclass(frozen=True)
class Margins:
    """By how much the chosen side of each of N pairs is ahead, as its loss counts it."""

    values: torch.Tensor
    """``[N]``"""
    tie: torch.Tensor | float
    """The largest that is a tie."""

    @property
    def right(self) -> torch.Tensor:
        """Whether it is ahead: a tie is not right."""
        return self.values > self.tie

    @property
    def tied(self) -> torch.Tensor:
        """Whether neither side is ahead."""
        return self.values.abs() <= self.tie


def score_pairs(
    pairs: Sequence[PreferencePair],
    logprobs: Sequence[torch.Tensor],
    references: Sequence[PairLogprobs],
) -> PairScores:
    """Sum per-token values of N pairs. `logprobs` are the policy's, of `DistinctDatums`: chosen, rejected, chosen, ….

    Raises ValueError if the counts of pairs, or of a side's scored tokens, do not match.
    """
    import torch

    from training.utils.pairs import DistinctDatums

    places = DistinctDatums.of(pairs).places
    if len(logprobs) not in (max(places) + 1, len(places)) or len(references) != len(pairs):
        raise ValueError(
            f"{len(pairs)} pairs, {len(logprobs)} log-probability rows, {len(references)} references"
        )
    if len(logprobs) < len(places):  # pairs of a ranked list share their answers
        logprobs = [logprobs[place] for place in places]
    # Both models are summed over the scored tokens alone, in the same order: equal values give equal sums.
    weights = [
        torch.as_tensor(d.loss_fn_inputs["weights"].to_numpy()).double() for p in pairs for d in p.datums
    ]
    scored = [weight != 0 for weight in weights]
    policy = [row.double()[mask] for row, mask in zip(logprobs, scored, strict=True)]
    frozen = [torch.as_tensor(side).double() for r in references for side in (r.chosen, r.rejected)]
    kept = [weight[mask] for weight, mask in zip(weights, scored, strict=True)]
    for weight, row in zip(kept, frozen, strict=True):
        if row.shape != weight.shape:  # a single value would be taken for every token
            raise ValueError(f"{len(weight)} scored tokens, {len(row)} reference log-probabilities")
    shorter = [min(map(len, kept[i : i + 2])) for i in range(0, len(kept), 2) for _ in range(2)]

    def sums(rows: Sequence[torch.Tensor], starts: Sequence[int]) -> torch.Tensor:
        parts = zip(rows, kept, starts, strict=True)
        return torch.stack([(row[start:] * weight[start:]).sum() for row, weight, start in parts])

    whole = [0] * len(kept)
    table = [sums(rows, starts) for starts in (whole, shorter) for rows in (policy, frozen)]
    table.append(torch.tensor([len(weight) for weight in kept], dtype=torch.float64))
    table.append(torch.stack([row.double()[~mask].sum() for row, mask in zip(logprobs, scored, strict=True)]))
    table.append(torch.tensor([int((~mask).sum()) for mask in scored], dtype=torch.float64))
    chosen, rejected = (SideScores(*(column[side::2] for column in table)) for side in (0, 1))
    counts = torch.tensor([pair.weight for pair in pairs], dtype=torch.float64)
    return PairScores(chosen, rejected, counts, Stages.of_pairs(pairs))


def sigmoid_dpo(margin: torch.Tensor, beta: float, label_smoothing: float = 0.0) -> torch.Tensor:
    """DPO, per pair ``[N]``: ``-(1 - ε) log σ(β m) - ε log σ(-β m)``.

    ε = 0 is DPO (arXiv 2305.18290); ε > 0 is conservative DPO for labels that are wrong with
    probability ε (ericmitchell.ai/cdpo.pdf, eq. 3).
    """
    import torch.nn.functional as F

    logits = beta * margin
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def robust_dpo(margin: torch.Tensor, beta: float, label_smoothing: float) -> torch.Tensor:
    """``(-(1 - ε) log σ(β m) + ε log σ(-β m)) / (1 - 2ε)``, ``[N]``.

    Unbiased where labels are the wrong way round with probability ε. It has no lower bound: that it becomes negative
    is right (arXiv 2403.00409).
    """
    import torch.nn.functional as F

    logits = beta * margin
    kept, flipped = F.logsigmoid(logits), F.logsigmoid(-logits)
    return (label_smoothing * flipped - (1 - label_smoothing) * kept) / (1 - 2 * label_smoothing)


def hinge(margin: torch.Tensor, beta: float) -> torch.Tensor:
    """``max(0, 1 - β m)``, ``[N]`` (arXiv 2305.10425, 2309.06657)."""
    return (1 - beta * margin).clamp(min=0)


def ipo(margin: torch.Tensor, beta: float) -> torch.Tensor:
    """``(m - 1 / (2β))²``, ``[N]`` (arXiv 2310.12036, eq. 17)."""
    return (margin - 1 / (2 * beta)).square()


def plackett_luce(margin: torch.Tensor, beta: float, stages: Stages) -> torch.Tensor:
    """The likelihood of a list's whole order under scores s, best first (arXiv 2305.18290, appendix A.3).

    ``-Σ_j log(exp(β s_j) / Σ_{i ≥ j} exp(β s_i))``, where stage j needs the margins to the worse answers only: it is
    ``log(1 + Σ_{i > j} exp(-β (s_j - s_i)))``. Returned per pair, ``[N]``, so that the mean over a list's pairs is the
    loss of the list. Of two answers it is `sigmoid_dpo`. Tied answers do not compete with each other.
    """
    import torch.nn.functional as F

    worse, stage = -beta * margin, stages.of
    count = stage.bincount()
    highest = (
        worse.detach()
        .new_zeros(len(count))
        .scatter_reduce(0, stage, worse.detach(), "amax", include_self=False)
    )
    summed = worse.new_zeros(len(count)).index_add(0, stage, (worse - highest[stage]).exp())
    of_stage = -F.logsigmoid(-(summed.log() + highest))
    return of_stage[stage] * stages.pairs / count[stage]


@dataclass(frozen=True)
class DpoObjective:
    """What DPO optimises.

    =============  ==============================================================================
    sigmoid        ``-log σ(β m)`` on summed log-ratios; `label_smoothing`: conservative DPO
    robust         the same, unbiased for a known rate of flipped labels (`label_smoothing`)
    hinge          ``max(0, 1 - β m)``
    ipo_sum        ``(m - 1/(2β))²`` on summed log-ratios
    ipo_mean       the same on means per token: another objective at the same β
    sigmoid_norm   ``-log σ(β m)`` on means per token (Tülu 3, arXiv 2411.15124)
    simpo          ``-log σ(β m - γ)`` on the policy's own means per token (arXiv 2405.14734); γ is absolute
    ld             sigmoid, where tokens beyond the shorter side's length count `ld_alpha` (arXiv 2409.06411), in the
                   reference too unless `ld_reference` is off
    plackett_luce  sigmoid, but of a ranked list the likelihood of its whole order; every other loss takes a list as all
                   its pairs, which share the weight of a row
    =============  ==============================================================================

    Any of them may have `sft_weight` times the chosen side's mean negative log-likelihood per token added to it
    (arXiv 2404.19733).
    """

    beta: float
    label_smoothing: float = 0.0
    loss: DpoLoss = "sigmoid"
    simpo_gamma: float = 0.0
    ld_alpha: float = 1.0
    ld_reference: bool = True
    sft_weight: float = 0.0

    loss_name = "dpo_loss"
    shown = ("dpo_loss", "margin", "accuracy")
    best_by = ("accuracy", "margin", "dpo_loss")
    reads_prompt = False
    margin_name = "margin"

    @property
    def uses_reference(self) -> bool:
        """Whether the loss reads the reference at all."""
        return self.loss != "simpo"

    def sides(self, scores: PairScores) -> tuple[torch.Tensor, torch.Tensor]:
        """What the loss makes of chosen and rejected, without β, ``[N]`` each."""
        return self._side(scores.chosen), self._side(scores.rejected)

    def _side(self, side: SideScores) -> torch.Tensor:
        match self.loss:
            case "ipo_mean" | "sigmoid_norm":
                return side.delta / side.tokens
            case "simpo":
                return side.mean
            case "ld":
                scaled = side.policy_tail - side.reference_tail if self.ld_reference else side.policy_tail
                return side.delta - (1 - self.ld_alpha) * scaled
            case _:
                return side.delta

    def margins(self, scores: PairScores) -> Margins:
        """Of the loss: per token where it is."""
        chosen, rejected = self.sides(scores)
        return Margins(chosen - rejected, scores.tie_per_token if self.loss in PER_TOKEN else TIE)

    def preference(self, margin: torch.Tensor, stages: Stages) -> torch.Tensor:
        """The loss of each pair but for the SFT term, ``[N]``."""
        match self.loss:
            case "plackett_luce":
                return plackett_luce(margin, self.beta, stages)
            case "robust":
                return robust_dpo(margin, self.beta, self.label_smoothing)
            case "hinge":
                return hinge(margin, self.beta)
            case "ipo_sum" | "ipo_mean":
                return ipo(margin, self.beta)
            case "simpo":
                return sigmoid_dpo(margin - self.simpo_gamma / self.beta, self.beta)
            case _:
                return sigmoid_dpo(margin, self.beta, self.label_smoothing)

    def per_pair(self, scores: PairScores) -> torch.Tensor:
        """Loss of each pair, ``[N]``."""
        loss = self.preference(self.margins(scores).values, scores.stages)
        return loss - self.sft_weight * scores.chosen.mean if self.sft_weight else loss

    def metrics(self, scores: PairScores) -> dict[str, float]:
        """See `preference_metrics`."""
        return preference_metrics(scores, self)


def preference_metrics(scores: PairScores, objective: DpoObjective) -> dict[str, float]:
    """Means over N pairs, by the guide's names and TRL's. A tie does not count as correct, see `TIE`.

    Margin and rewards are those of the loss: per token where it is. `policy_preference` is the share of pairs whose
    chosen response has the higher mean log-probability per token under the policy itself, without the reference.
    The loss and `sft_loss`, which is a part of it, are averaged by the pairs' weights, all else plainly.
    """
    chosen, rejected = objective.sides(scores)
    margins, beta = objective.margins(scores), objective.beta
    means = {
        "margin": margins.values,
        "accuracy": margins.right.double(),
        "tie_rate": margins.tied.double(),
        "rewards/chosen": beta * chosen,
        "rewards/rejected": beta * rejected,
        "rewards/margins": beta * margins.values,
        "rewards/accuracies": margins.right.double(),
        "logps/chosen": scores.chosen.policy,
        "logps/rejected": scores.rejected.policy,
        "policy_preference": (scores.chosen.mean > scores.rejected.mean).double(),
    }
    if objective.uses_reference:
        means |= {"delta_logp/chosen": scores.chosen.delta, "delta_logp/rejected": scores.rejected.delta}
    weighed = {"dpo_loss": objective.per_pair(scores)}
    if objective.sft_weight:
        weighed |= {"sft_loss": -scores.chosen.mean}
    told = {name: float(scores.mean(values.detach())) for name, values in weighed.items()}
    return told | {name: float(values.detach().mean()) for name, values in means.items()}


LossFn = Callable[[Sequence[Any], "list[torch.Tensor]"], "tuple[torch.Tensor, Mapping[str, float]]"]


def make_pair_loss(
    pairs: Sequence[PreferencePair], references: Sequence[PairLogprobs], objective: PairObjective
) -> LossFn:
    """The loss of one optimizer step for `forward_backward_custom`: the **mean** over its pairs, by their weights.

    Its data are the pairs' `DistinctDatums`: chosen, rejected, chosen, …, an answer of several pairs once.
    """

    def loss_fn(
        data: Sequence[Any], logprobs: list[torch.Tensor]
    ) -> tuple[torch.Tensor, Mapping[str, float]]:
        scores = score_pairs(pairs, logprobs, references)
        return scores.mean(objective.per_pair(scores)), objective.metrics(scores)

    return loss_fn


def weight_of(datum: Datum) -> float:
    """The sum of a datum's weights: what its tokens count."""
    return float(datum.loss_fn_inputs["weights"].to_numpy().sum(dtype=np.float64))


def summed_nll(data: Sequence[Datum], logprobs: Sequence[torch.Tensor]) -> torch.Tensor:
    """``Σ w (-log π)`` over all targets of some data, a float64 scalar."""
    import torch

    weights = [torch.as_tensor(datum.loss_fn_inputs["weights"].to_numpy()).double() for datum in data]
    return -torch.stack([(row.double() * w).sum() for row, w in zip(logprobs, weights, strict=True)]).sum()


def make_nll_loss(total_weight: float) -> LossFn:
    """Supervised learning's loss for `forward_backward_custom`: ``Σ w (-log π) / Σ w``.

    The divisor is that of the whole optimizer step, whatever part of it a call has: how many tokens a row has, and how
    rows are batched, changes nothing.
    """

    def loss_fn(
        data: Sequence[Any], logprobs: list[torch.Tensor]
    ) -> tuple[torch.Tensor, Mapping[str, float]]:
        loss = summed_nll(data, logprobs) / total_weight
        return loss, {"sft_loss": loss.item()}

    return loss_fn
