"""Odds Ratio Preference Optimization: learn the chosen answers and prefer them, in one stage (arXiv 2403.07691).

    loss = NLL(chosen) - λ log σ(log odds(chosen) - log odds(rejected))

averaged over the pairs of an optimizer step (the Fireworks cookbook sums them: divide its learning rate by its batch
size). One trainer and no reference: nothing is asked before training. The odds are those of the mean log-probability
per token. How a run goes, from rows to export, is in `training_run`; the loss is in `odds_ratio`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from training.utils.odds_ratio import NllSpan, OrpoObjective
from training.utils.preference_settings import PreferenceSettings

if TYPE_CHECKING:
    from training.utils.training_run import RunSummary


class Config(PreferenceSettings):
    """One ORPO run."""

    recipe: ClassVar[str] = "orpo"

    orpo_lambda: float = Field(default=1.0, ge=0)
    """Weight of the odds ratio beside the likelihood (TRL calls it beta, its default there is 0.1)."""
    nll_span: NllSpan = "response"
    """Tokens that the likelihood counts: those of the chosen response, or `all`, the prompt's too; a mean per pair."""

    @property
    def objective(self) -> OrpoObjective:
        """The loss of training and evaluation."""
        return OrpoObjective(self.orpo_lambda, self.nll_span)


def main(config: Config) -> RunSummary:
    """Train and export; see `run_to_its_end`."""
    from training.utils.training_run import (
        run_to_its_end,  # the settings alone, as for --help, are there at once
    )

    return run_to_its_end(config)
