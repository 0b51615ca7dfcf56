"""The settings that recipes on preference pairs have beside those of every recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from training.utils.losses import PairObjective
from training.utils.training_settings import TrainingSettings

if TYPE_CHECKING:
    from training.utils.pair_learner import PairLearner


class PreferenceSettings(TrainingSettings):
    """Base of the `Config` of a recipe that trains on pairs."""

    max_pairs: int | None = Field(default=None, ge=1)
    """Use only the first so many usable rows."""

    @property
    def objective(self) -> PairObjective:
        """The loss of training and evaluation."""
        raise NotImplementedError

    @property
    def learner(self) -> PairLearner:
        """See `TrainingSettings.learner`."""
        from training.utils.pair_learner import PairLearner

        return PairLearner(self.objective)

    @property
    def most_rows(self) -> int | None:
        """See `TrainingSettings.most_rows`."""
        return self.max_pairs
