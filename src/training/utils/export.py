"""Weights of a run as folders that `peft`, `transformers` and vLLM load."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from firesteel.sdk import CheckpointError, ConfigError
from training.utils.run_weights import RunModel, weights_of
from training.utils.service import build_service_client

Form = Literal["peft", "merged"]


def export(run: Path, form: Form | None = None, step: int | None = None, target: Path | None = None) -> Path:
    """Write the weights after a step, or the run's last ones, to a new folder, and return that.

    `peft` is the adapter by itself, the default for a LoRA run; `merged` a whole model in Hugging Face's format. The
    default target is `<run>/exports/step-<n>-<form>`. Raises `CheckpointError` for a step that has no checkpoint.
    """
    model = RunModel.of(run)
    rank = model.lora_rank
    form = form or ("peft" if rank else "merged")
    if form == "peft" and not rank:
        raise ConfigError(f"{run} trained all weights, there is no adapter in it; export --format merged")
    weights = weights_of(run, step)
    if weights.form == "model":
        raise CheckpointError(f"{weights.path} is a whole model already; copy it where you want it")
    target = target or run / "exports" / f"{weights.name}-{form}"
    if target.exists():
        raise ConfigError(f"{target} exists already; name another folder with --to")
    with build_service_client(base_model=model.base_model, lora_rank=rank, trainer=model.trainer) as service:
        client = service.create_training_client(lora_config=model.lora, start=str(weights.path))
        client.save_weights(str(target), merged=bool(rank) and form == "merged").result()
    return target
