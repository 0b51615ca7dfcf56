"""Which weights a run has left, and of what they are: for whoever exports or tries them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import orjson

from firesteel.sdk import CheckpointError, LoraConfig
from firesteel.sealed import read_json
from training.utils.checkpoints import found_in
from training.utils.config import TrainerConfig

WeightsForm = Literal["state", "adapter", "model"]


@dataclass(frozen=True)
class RunWeights:
    """The weights after a step of a run, or its last ones."""

    name: str
    """`step-40`, or `final` where the run has no checkpoint of them."""
    path: Path
    form: WeightsForm
    """A checkpoint's state, an adapter in PEFT's format, or a whole model."""


@dataclass(frozen=True)
class RunModel:
    """The model that a run trains, by its `config.json`."""

    base_model: str
    tokenizer: str
    lora_rank: int
    lora_alpha: float | None
    """None where all weights are trained."""
    trainer: TrainerConfig

    @property
    def lora(self) -> LoraConfig | None:
        """The adapter's settings; None where all weights are trained."""
        if self.lora_alpha is None:
            return None
        return LoraConfig(rank=self.lora_rank, alpha=self.lora_alpha)

    @classmethod
    def of(cls, run: Path) -> RunModel:
        """Raises `CheckpointError` for a folder that is not one of a run."""
        try:
            config = orjson.loads((run / "config.json").read_bytes())
            base, rank = str(config["base_model"]), int(config["lora_rank"])
            alpha = float(config["lora_alpha"]) if rank else None
            return cls(
                base, config.get("tokenizer_model") or base, rank, alpha, TrainerConfig(**config["trainer"])
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise CheckpointError(f"{run} is not the folder of a run: it has no config.json of one") from None


def weights_of(run: Path, step: int | None = None) -> RunWeights:
    """Those after a step, or without one the run's newest. Raises `CheckpointError` where there are none."""
    found = found_in(run)
    newest = found[-1].step if found else -1
    if step is None and found and newest >= _finished_steps(run):
        return RunWeights(f"step-{newest}", run / found[-1].path, "state")
    for entry in found:
        if entry.step == step:
            return RunWeights(f"step-{step}", run / entry.path, "state")
    if step is not None:
        there = ", ".join(str(entry.step) for entry in found)
        raise CheckpointError(f"{run} has no checkpoint of step {step}; there is {there or 'none'}")
    if (run / "adapter").is_dir():
        return RunWeights("final", run / "adapter", "adapter")
    if (run / "model").is_dir():
        return RunWeights("final", run / "model", "model")
    raise CheckpointError(
        f"{run} has no weights yet: no checkpoints and nothing exported; let the run end, or save checkpoints on the "
        "way with --dcp-save-interval"
    )


def _finished_steps(run: Path) -> int:
    """The last step of a run that ended; its weights may be newer than its checkpoints."""
    try:
        return int(read_json(run / "summary.json")["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return -1
