"""Weights of a run as folders that `peft`, `transformers` and vLLM load."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import orjson

from firesteel.sdk import CheckpointError, ConfigError, LoraConfig
from firesteel.sealed import read_json
from training.utils.checkpoints import found_in
from training.utils.config import TrainerConfig
from training.utils.service import build_service_client

Form = Literal["peft", "merged"]


def export(run: Path, form: Form | None = None, step: int | None = None, target: Path | None = None) -> Path:
    """Write the weights after a step, or the run's last ones, to a new folder, and return that.

    `peft` is the adapter by itself, the default for a LoRA run; `merged` a whole model in Hugging Face's format. The
    default target is `<run>/exports/step-<n>-<form>`. Raises `CheckpointError` for a step that has no checkpoint.
    """
    config = _config_of(run)
    rank = int(config["lora_rank"])
    form = form or ("peft" if rank else "merged")
    if form == "peft" and not rank:
        raise ConfigError(f"{run} trained all weights, there is no adapter in it; export --format merged")
    name, start = _weights(run, step, rank)
    target = target or run / "exports" / f"{name}-{form}"
    if target.exists():
        raise ConfigError(f"{target} exists already; name another folder with --to")
    shapes = TrainerConfig(**config["trainer"])
    lora = LoraConfig(rank=rank, alpha=config["lora_alpha"]) if rank else None
    with build_service_client(base_model=config["base_model"], lora_rank=rank, trainer=shapes) as service:
        client = service.create_training_client(lora_config=lora, start=str(start))
        client.save_weights(str(target), merged=bool(rank) and form == "merged").result()
    return target


def _weights(run: Path, step: int | None, rank: int) -> tuple[str, Path]:
    """What to call the weights, and where they are: a checkpoint, or the adapter of a run that has none."""
    found = found_in(run)
    newest = found[-1].step if found else -1
    if step is None and found and newest >= _finished_steps(run):
        return f"step-{newest}", run / found[-1].path
    for entry in found:
        if entry.step == step:
            return f"step-{step}", run / entry.path
    if step is not None:
        there = ", ".join(str(entry.step) for entry in found)
        raise CheckpointError(f"{run} has no checkpoint of step {step}; there is {there or 'none'}")
    if (run / "adapter").is_dir():
        return "final", run / "adapter"
    if (run / "model").is_dir():
        raise CheckpointError(f"{run / 'model'} is a whole model already; copy it where you want it")
    raise CheckpointError(f"{run} has no checkpoints and no exported weights")


def _finished_steps(run: Path) -> int:
    """The last step of a run that ended; its weights may be newer than its checkpoints."""
    try:
        return int(read_json(run / "summary.json")["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return -1


def _config_of(run: Path) -> dict[str, Any]:
    try:
        config = orjson.loads((run / "config.json").read_bytes())
        if isinstance(config, dict) and {"base_model", "lora_rank", "trainer"} <= config.keys():
            return config
    except (OSError, orjson.JSONDecodeError):
        pass
    raise CheckpointError(f"{run} is not the folder of a run: it has no config.json of one")
