"""Supervised fine-tuning: make the answers of a data set likely.

    loss = Σ w (-log π(token)) / Σ w

over all learned tokens of an optimizer step, however many each row has: each token of the assistant's turns has the
weight 1, end of turn included, and all others 0 (see `sft_data` for rows, and for weights of messages and rows).
How a run goes, from rows to export, is in `training_run`. DPO may start from what comes out:
`--init-from-checkpoint` or `--warm-start-from-adapter`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from training.utils.training_settings import TrainingSettings

if TYPE_CHECKING:
    from training.utils.sft_learner import SftLearner
    from training.utils.training_run import RunSummary


class Config(TrainingSettings):
    """One SFT run."""

    recipe: ClassVar[str] = "sft"

    max_examples: int | None = Field(default=None, ge=1)
    """Use only the first so many usable rows."""

    @property
    def learner(self) -> SftLearner:
        """See `TrainingSettings.learner`."""
        from training.utils.sft_learner import SftLearner

        return SftLearner()

    @property
    def most_rows(self) -> int | None:
        """See `TrainingSettings.most_rows`."""
        return self.max_examples


def main(config: Config) -> RunSummary:
    """Train and export; see `run_to_its_end`."""
    from training.utils.training_run import (
        run_to_its_end,  # the settings alone, as for --help, are there at once
    )

    return run_to_its_end(config)
