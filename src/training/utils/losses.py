"""Preference losses, each once, as pure functions of per-token log-probabilities and weights.

Notation: π and r are log-probabilities summed over the scored tokens under policy and reference, c and r
(as indices) the chosen and rejected response, m the margin::

    m = (π_c - r_c) - (π_r - r_r)

Sums run in float64: at Σ log p of minus some thousands, float32 has lost the digits that a margin needs.
torch is imported inside the functions, so that reading a recipe's `Config` (for `--help`) stays quick.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from firesteel.sdk.types import FloatArray

if TYPE_CHECKING:
    import torch

    from training.utils.pairs import PreferencePair


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
class PairScores:
    """Weighted sums of N pairs: float64 tensors of shape ``[N]``."""

    policy_chosen: torch.Tensor
    policy_rejected: torch.Tensor
    reference_chosen: torch.Tensor
    reference_rejected: torch.Tensor
    chosen_tokens: torch.Tensor
    """Number of scored tokens."""
    rejected_tokens: torch.Tensor

    @classmethod
    def joined(cls, parts: Sequence[PairScores]) -> PairScores:
        """Those of all pairs of all parts, in order."""
        import torch

        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    @property
    def delta_chosen(self) -> torch.Tensor:
        """π_c - r_c: how much likelier than under the reference the chosen response has become."""
        return self.policy_chosen - self.reference_chosen

    @property
    def delta_rejected(self) -> torch.Tensor:
        """π_r - r_r."""
        return self.policy_rejected - self.reference_rejected

    @property
    def margin(self) -> torch.Tensor:
        """m, without β."""
        return self.delta_chosen - self.delta_rejected


def score_pairs(
    pairs: Sequence[PreferencePair],
    logprobs: Sequence[torch.Tensor],
    references: Sequence[PairLogprobs],
) -> PairScores:
    """Sum per-token values of N pairs. `logprobs` are the policy's, interleaved: chosen, rejected, chosen, ….

    Raises ValueError if the counts of pairs, or of a side's scored tokens, do not match.
    """
    import torch

    if len(logprobs) != 2 * len(pairs) or len(references) != len(pairs):
        raise ValueError(
            f"{len(pairs)} pairs, {len(logprobs)} log-probability rows, {len(references)} references"
        )
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
    policy_sums = torch.stack([(row * weight).sum() for row, weight in zip(policy, kept, strict=True)])
    frozen_sums = torch.stack([(row * weight).sum() for row, weight in zip(frozen, kept, strict=True)])
    counts = torch.tensor([len(weight) for weight in kept], dtype=torch.float64)
    return PairScores(
        policy_sums[0::2],
        policy_sums[1::2],
        frozen_sums[0::2],
        frozen_sums[1::2],
        counts[0::2],
        counts[1::2],
    )


def sigmoid_dpo(scores: PairScores, beta: float, label_smoothing: float = 0.0) -> torch.Tensor:
    """DPO, per pair ``[N]``: ``-(1 - ε) log σ(β m) - ε log σ(-β m)``.

    ε = 0 is DPO (arXiv 2305.18290); ε > 0 is conservative DPO for labels that are wrong with
    probability ε (ericmitchell.ai/cdpo.pdf, eq. 3).
    """
    import torch.nn.functional as F

    logits = beta * scores.margin
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


@dataclass(frozen=True)
class DpoObjective:
    """What is optimised; one object for training and evaluation, so that the two cannot differ."""

    beta: float
    label_smoothing: float = 0.0

    def per_pair(self, scores: PairScores) -> torch.Tensor:
        """Loss of each pair, ``[N]``."""
        return sigmoid_dpo(scores, self.beta, self.label_smoothing)


def preference_metrics(scores: PairScores, objective: DpoObjective) -> dict[str, float]:
    """Means over N pairs, by the guide's names and TRL's. A tie does not count as correct, see `TIE`.

    `policy_preference` is the share of pairs whose chosen response has the higher mean log-probability per
    token under the policy itself, without the reference.
    """
    margin, beta = scores.margin, objective.beta
    per_token = scores.policy_chosen / scores.chosen_tokens - scores.policy_rejected / scores.rejected_tokens
    means = {
        "dpo_loss": objective.per_pair(scores),
        "margin": margin,
        "accuracy": (margin > TIE).double(),
        "tie_rate": (margin.abs() <= TIE).double(),
        "rewards/chosen": beta * scores.delta_chosen,
        "rewards/rejected": beta * scores.delta_rejected,
        "rewards/margins": beta * margin,
        "rewards/accuracies": (margin > TIE).double(),
        "logps/chosen": scores.policy_chosen,
        "logps/rejected": scores.policy_rejected,
        "delta_logp/chosen": scores.delta_chosen,
        "delta_logp/rejected": scores.delta_rejected,
        "policy_preference": (per_token > 0).double(),
    }
    return {name: float(values.detach().mean()) for name, values in means.items()}


LossFn = Callable[[Sequence[Any], "list[torch.Tensor]"], "tuple[torch.Tensor, Mapping[str, float]]"]


def make_dpo_loss(
    pairs: Sequence[PreferencePair], references: Sequence[PairLogprobs], objective: DpoObjective
) -> LossFn:
    """The loss of one optimizer step for `forward_backward_custom`: the **mean** over its pairs.

    Its data are the pairs' datums, interleaved: chosen, rejected, chosen, ….
    """

    def loss_fn(
        data: Sequence[Any], logprobs: list[torch.Tensor]
    ) -> tuple[torch.Tensor, Mapping[str, float]]:
        scores = score_pairs(pairs, logprobs, references)
        return objective.per_pair(scores).mean(), preference_metrics(scores, objective)

    return loss_fn
