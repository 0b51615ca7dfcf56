"""Where a run's numbers go: `metrics.jsonl` always, Weights & Biases when configured."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import orjson

from training.utils.config import WandBConfig

logger = logging.getLogger("firesteel")


class Sink(Protocol):
    """Takes one record per step."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one record."""

    def close(self) -> None:
        """Finish writing."""


class JsonlSink:
    """One JSON object a line, each written at once."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line. A number that is not finite becomes null."""
        self._file.write(orjson.dumps({"train/step": step, **metrics}) + b"\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class WandBSink:
    """A Weights & Biases run; offline when no key is configured."""

    def __init__(self, folder: Path, settings: WandBConfig, config: Mapping[str, Any]) -> None:
        import wandb

        told = os.environ.get("WANDB_MODE") or os.environ.get("WANDB_API_KEY") or wandb.api.api_key
        mode: Literal["offline"] | None = None if told else "offline"
        self._run = wandb.init(
            entity=settings.entity,
            project=settings.project,
            name=settings.run_name,
            dir=str(folder),
            config=dict(config),
            mode=mode,
        )
        self._run.define_metric("*", step_metric="train/step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send one record."""
        self._run.log({"train/step": step, **metrics})

    def close(self) -> None:
        """Finish the W&B run."""
        self._run.finish()


class MetricsLog:
    """All sinks of a run."""

    def __init__(self, path: Path, wandb: WandBConfig, config: Mapping[str, Any]) -> None:
        """Open `path`, and a W&B run beside it if `wandb` names a project or an entity."""
        self._sinks: list[Sink] = [JsonlSink(path)]
        if wandb.project or wandb.entity:
            if importlib.util.find_spec("wandb") is None:
                logger.warning(
                    "wandb is configured but not installed (pip install 'firesteel[wandb]'); going on without"
                )
            else:
                self._sinks.append(WandBSink(path.parent, wandb, config))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send one record to every sink."""
        for sink in self._sinks:
            sink.log(step, metrics)

    def close(self) -> None:
        """Finish every sink."""
        for sink in self._sinks:
            sink.close()
