"""A loss that the recipes do not have, in a recipe: everything else of a run stays (data, cache, checkpoints).

    python examples/custom_loss.py

The loss is that of Cal-DPO (arXiv 2412.14516): DPO's, and beside it each side's log-ratio is drawn to a value of its
own, +1/(2β) for the chosen and -1/(2β) for the rejected response, so that the chosen one does not become less likely
while the margin grows.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import Field

from training.utils.losses import DpoObjective, Margins, PairScores
from training.utils.preference_settings import PreferenceSettings
from training.utils.training_run import RunSummary, run_to_its_end
from training.utils.training_settings import ReferenceSettings

HERE = Path(__file__).parent


@dataclass(frozen=True)
class CalibratedDpo:
    """``-log σ(β m) + α [(a_c - 1/(2β))² + (a_r + 1/(2β))²]`` with a = log π - log ref, per pair."""

    beta: float
    alpha: float

    loss_name = "dpo_loss"
    shown = ("dpo_loss", "margin", "accuracy")
    best_by = ("accuracy", "margin", "dpo_loss")
    margin_name = "margin"
    reads_prompt = False

    @property
    def plain(self) -> DpoObjective:
        """The loss without its calibration; its metrics are ours but for the loss itself."""
        return DpoObjective(self.beta)

    def margins(self, scores: PairScores) -> Margins:
        """What accuracy is counted by: DPO's."""
        return self.plain.margins(scores)

    def per_pair(self, scores: PairScores) -> torch.Tensor:
        """Loss of each pair, ``[N]``."""
        goal = 1 / (2 * self.beta)
        off = (scores.chosen.delta - goal).square() + (scores.rejected.delta + goal).square()
        return self.plain.per_pair(scores) + self.alpha * off

    def metrics(self, scores: PairScores) -> dict[str, float]:
        """DPO's, with this loss."""
        loss = float(scores.mean(self.per_pair(scores).detach()))
        return {**self.plain.metrics(scores), self.loss_name: loss}


class Config(PreferenceSettings):
    """One run of Cal-DPO."""

    recipe: ClassVar[str] = "cal-dpo"

    beta: float = Field(default=0.1, gt=0)
    """As in DPO."""
    alpha: float = Field(default=1e-3, ge=0)
    """Weight of the calibration."""

    @property
    def objective(self) -> CalibratedDpo:
        """The loss of training and evaluation."""
        return CalibratedDpo(self.beta, self.alpha)

    @property
    def reference_settings(self) -> ReferenceSettings:
        """The loss reads a reference: what training starts from, asked before training."""
        return ReferenceSettings("initial", "upfront")


def main(config: Config) -> RunSummary:
    """Train and export."""
    return run_to_its_end(config)


def example(log_path: str) -> Config:
    """Sixteen pairs of the demo's on the toy model."""
    data = str(HERE / "preferences/train.jsonl")
    return Config(
        log_path=log_path, base_model="tiny-llama", dataset=data, max_pairs=16, eval_fraction=0.2,
        lora_rank=8, learning_rate=1e-3, epochs=3,
    )  # fmt: skip


if __name__ == "__main__":
    summary = main(example("runs/cal-dpo"))
    print(f"held-out margin {summary.before['margin']:+.2f} → {summary.after['margin']:+.2f}")
