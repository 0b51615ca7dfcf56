"""Direct Preference Optimization from pairs of a chosen and a rejected response (arXiv 2305.18290).

    loss = -log σ(β m),   m = (log π(chosen) - log ref(chosen)) - (log π(rejected) - log ref(rejected))

averaged over the pairs of an optimizer step; log-probabilities are summed over the response's tokens. `loss` chooses
another member of the family (`losses.DpoObjective`), one of which, `simpo`, needs no reference. How a run goes, from
rows to export, is in `training_run`; here is what makes it DPO: the settings, and the loss that they mean.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

from pydantic import Field, field_validator, model_validator

from training.utils.doubts import Doubt
from training.utils.losses import DpoLoss, DpoObjective
from training.utils.preference_settings import PreferenceSettings
from training.utils.training_settings import ReferenceMode, ReferenceSettings

if TYPE_CHECKING:
    from training.utils.row_records import RowArray
    from training.utils.training_run import RunSummary

WITH_REFERENCE = tuple(loss for loss in get_args(DpoLoss) if DpoObjective(1.0, loss=loss).uses_reference)
OF_THE_OBJECTIVE = {
    "label_smoothing": ("sigmoid", "robust"),
    "simpo_gamma": ("simpo",),
    "ld_alpha": ("ld",),
    "ld_reference": ("ld",),
}
READ_BY = OF_THE_OBJECTIVE | {"reference": WITH_REFERENCE, "reference_pass": WITH_REFERENCE}
"""Settings that only some losses read. Given for another they would do nothing, and are refused."""


class Config(PreferenceSettings):
    """One DPO run."""

    recipe: ClassVar[str] = "dpo"

    loss: DpoLoss = "sigmoid"
    """sigmoid, robust, hinge, ipo_sum, ipo_mean, sigmoid_norm, simpo, ld or plackett_luce: see docs/losses.md."""
    beta: float = Field(default=0.1, gt=0)
    """How strongly the policy is held to the reference. Losses per token (…_mean, …_norm, simpo) want larger ones."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Probability that a label is the wrong way round: of sigmoid (conservative DPO) and robust."""
    simpo_gamma: float = Field(default=0.5, ge=0)
    """Of simpo: the margin to reach, absolute (not over beta)."""
    ld_alpha: float = Field(default=1.0, ge=0, le=1)
    """Of ld: what tokens beyond the shorter response's length count; 1 is sigmoid."""
    ld_reference: bool = True
    """Of ld: whether the reference's tokens are scaled, too."""
    sft_weight: float = Field(default=0.0, ge=0)
    """Times the chosen response's mean negative log-likelihood per token, added to any loss."""
    reference: Literal["initial", "base"] = "initial"
    """What the policy is held to: what training starts from, or the base model in any case."""
    reference_pass: ReferenceMode = "upfront"
    """When the reference is asked: for all pairs before training, or `lazy`, for each batch as it comes up."""

    @property
    def objective(self) -> DpoObjective:
        """The loss of training and evaluation."""
        read = {name: getattr(self, name) for name, losses in OF_THE_OBJECTIVE.items() if self.loss in losses}
        return DpoObjective(self.beta, loss=self.loss, sft_weight=self.sft_weight, **read)

    @property
    def reference_settings(self) -> ReferenceSettings | None:
        """How a reference is had, if the loss reads one."""
        return ReferenceSettings(self.reference, self.reference_pass) if self.loss in WITH_REFERENCE else None

    def unread(self) -> Collection[str]:
        """Settings that this run does not read."""
        return {*super().unread(), *(name for name, losses in READ_BY.items() if self.loss not in losses)}

    def doubts(self, rows: RowArray) -> Iterator[Doubt]:
        """See `TrainingSettings.doubts`."""
        if self.loss == "plackett_luce" and not (rows["pairs"] + rows["ties"] > 1).any():
            text = "no row has more than two answers; of two it is the same as sigmoid"
            yield Doubt("loss plackett_luce", "setting-without-effect", text)

    @field_validator("loss", mode="before")
    @classmethod
    def _convention_is_named(cls, value: object) -> object:
        if value == "ipo":
            raise ValueError(
                "ipo is two losses: ipo_sum on summed log-ratios, or ipo_mean on means per token"
            )
        return value

    @model_validator(mode="after")
    def _all_is_read(self) -> Config:
        for name, losses in READ_BY.items():
            if name in self.model_fields_set and self.loss not in losses:
                raise ValueError(f"{name} is not read by loss {self.loss}, only by {', '.join(losses)}")
        if self.loss == "ld" and "ld_alpha" not in self.model_fields_set:
            raise ValueError("loss ld needs its ld_alpha: what tokens beyond the shorter response count")
        if self.loss == "robust" and not self.label_smoothing:
            raise ValueError(
                "loss robust needs a label_smoothing above 0: how often labels are the wrong way round; without it "
                "that is loss sigmoid"
            )
        return self


def main(config: Config) -> RunSummary:
    """Train and export; see `run_to_its_end`."""
    from training.utils.training_run import (
        run_to_its_end,  # the settings alone, as for --help, are there at once
    )

    return run_to_its_end(config)
