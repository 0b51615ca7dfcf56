"""ORPO's loss: likelihood of the chosen response, and the odds ratio of both, without a reference (arXiv 2403.07691).

With x the mean log-probability of a response's scored tokens, p = eˣ and odds o(x) = x - log(1 - p), per pair::

    NLL(chosen) - λ log σ(z),    z = o(x_c) - o(x_r)
    -log σ(z) = log D - x_c - log(1 - p_r),    D = p_c (1 - p_r) + p_r (1 - p_c)

    ∂/∂x_c = -p_r / D            ∂/∂x_r = p_r (1 - p_c) / ((1 - p_r) D)

All terms of D are positive, and the derivatives are finite up to p_c = 1. Left to autograd they are not: an infinite
derivative of log(1 - eˣ) meets a zero. The only true singularity is p_r = 1, see `SUREST`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from training.utils.losses import Margins, PairScores

if TYPE_CHECKING:
    import torch

NllSpan = Literal["response", "all"]

SUREST = -1e-6
"""Mean log-probabilities of a rejected response above this are taken as this: its odds are infinite at 0."""


def log1mexp(x: torch.Tensor) -> torch.Tensor:
    """``log(1 - eˣ)`` for x ≤ 0, to all digits: one formula alone loses them near 0, the other far from it."""
    import torch

    return torch.where(x > -math.log(2), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def odds_ratio_loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """``-log σ(o(x_c) - o(x_r))`` of mean log-probabilities, ``[N]``."""
    import torch

    with torch.no_grad():
        x_c, x_r = chosen.clamp(max=0.0), rejected.clamp(max=SUREST)  # rounding may say more than certain
        not_c, not_r = log1mexp(x_c), log1mexp(x_r)
        log_d = torch.logaddexp(x_c + not_r, x_r + not_c)
        value = log_d - x_c - not_r
        slope_c = -torch.exp(x_r - log_d)
        slope_r = torch.exp(x_r + not_c - not_r - log_d)
    # The value with the derivatives of above: the terms in brackets are 0.
    return value + slope_c * (chosen - chosen.detach()) + slope_r * (rejected - rejected.detach())


def log_odds_ratio(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """``o(x_c) - o(x_r)``, ``[N]``, without a gradient; both sides kept from certainty."""
    odds = [x - log1mexp(x) for x in (side.detach().clamp(max=SUREST) for side in (chosen, rejected))]
    return odds[0] - odds[1]


@dataclass(frozen=True)
class OrpoObjective:
    """What ORPO optimises.

    The likelihood is the mean over the scored tokens of the chosen response, or with the span `all` over the prompt's
    tokens too. TRL counts the same tokens, but pools them over a batch, where long prompts weigh more.
    """

    orpo_lambda: float
    nll_span: NllSpan = "response"

    loss_name = "orpo_loss"
    shown = ("orpo_loss", "log_odds_ratio", "accuracy")
    best_by = ("accuracy", "log_odds_ratio", "orpo_loss")
    margin_name = "log_odds_ratio"

    @property
    def reads_prompt(self) -> bool:
        """Whether the likelihood counts tokens that are not scored."""
        return self.nll_span == "all"

    def nll(self, scores: PairScores) -> torch.Tensor:
        """Mean negative log-likelihood of each chosen side's span, ``[N]``."""
        side = scores.chosen
        if self.nll_span == "response":
            return -side.mean
        return -(side.policy + side.unscored) / (side.tokens + side.unscored_tokens)

    def per_pair(self, scores: PairScores) -> torch.Tensor:
        """Loss of each pair, ``[N]``."""
        return self.nll(scores) + self.orpo_lambda * odds_ratio_loss(scores.chosen.mean, scores.rejected.mean)

    def margins(self, scores: PairScores) -> Margins:
        """The log odds ratios."""
        return Margins(log_odds_ratio(scores.chosen.mean, scores.rejected.mean), scores.tie_per_token)

    def metrics(self, scores: PairScores) -> dict[str, float]:
        """Means over N pairs, by the cookbook's names. Accuracy and ties are those of the log odds ratio.

        The loss and its two parts are averaged by the pairs' weights, all else plainly.
        """
        chosen, rejected, margins = scores.chosen.mean, scores.rejected.mean, self.margins(scores)
        weighed = {
            self.loss_name: self.per_pair(scores),
            "sft_loss": self.nll(scores),
            "or_loss": odds_ratio_loss(chosen, rejected),
        }
        means = {
            "log_odds_ratio": margins.values,
            "accuracy": margins.right.double(),
            "tie_rate": margins.tied.double(),
            "chosen_avg_lp": chosen,
            "rejected_avg_lp": rejected,
            "logps/chosen": scores.chosen.policy,
            "logps/rejected": scores.rejected.policy,
            "policy_preference": (chosen > rejected).double(),
        }
        return {
            **{name: float(scores.mean(values.detach())) for name, values in weighed.items()},
            **{name: float(values.detach().mean()) for name, values in means.items()},
            "orpo_lambda": self.orpo_lambda,
            "batch_pairs": len(scores.weights),
        }
