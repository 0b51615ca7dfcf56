"""A run's numbers: their names, how they read, and where they go (`metrics.jsonl`, Weights & Biases)."""

from __future__ import annotations

import errno
import importlib.util
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import orjson

from firesteel.sealed import storage_errors
from training.utils.config import WandBConfig

logger = logging.getLogger("firesteel")


@dataclass(frozen=True)
class StepWork:
    """What one optimizer step computed."""

    tokens: int
    """Of all its sequences."""
    seconds: float
    with_reference: bool
    """Whether the reference read these rows too: it does so once, in the first epoch."""
    computed: Mapping[str, float]
    """The trainer's own figures, by the names of `Forward`'s result."""

    @property
    def metrics(self) -> dict[str, float]:
        """By the cookbook's names."""
        ref_tokens = self.tokens if self.with_reference else 0
        return {
            "step_tokens": self.tokens,
            "ref_tokens": ref_tokens,
            "total_tokens": self.tokens + ref_tokens,
            "step_time_sec": self.seconds,
            "tokens_per_sec": self.tokens / self.seconds,
            "computed_tokens": self.computed["computed_tokens:sum"],
            "scored_tokens": self.computed["scored_tokens:sum"],
            "micro_batches": self.computed["micro_batches:sum"],
            "activation_gib": self.computed["activation_bytes:max"] / 2**30,
        }


def step_line(step: int, total_steps: int, metrics: Mapping[str, float], names: Sequence[str]) -> str:
    """What is shown of a step where there is no bar."""
    if f"train/{names[0]}" not in metrics:
        return f"step {step}/{total_steps}  skipped"
    return f"step {step}/{total_steps}  " + "  ".join(_told(name, metrics[f"train/{name}"]) for name in names)


def heldout_line(step: int, metrics: Mapping[str, float], names: Sequence[str]) -> str:
    """What is shown of an evaluation."""
    told = [_told(name, metrics[name]) for name in names]
    if "policy_preference" in metrics:  # of pairs
        told.append(f"own preference {metrics['policy_preference']:.3f}")
    if "delta_logp/chosen" in metrics:  # there is a reference
        chosen, rejected = metrics["delta_logp/chosen"], metrics["delta_logp/rejected"]
        told.append(f"Δlogp chosen {chosen:+.2f} rejected {rejected:+.2f}")
    return f"held out after step {step}: " + "  ".join(told)


_FORMS = {"margin": "+.3f", "log_odds_ratio": "+.3f", "accuracy": ".3f"}


def _told(name: str, value: float) -> str:
    return f"{name} {value:{_FORMS.get(name, '.4f')}}"


def symptoms(step: int, metrics: Mapping[str, float]) -> Iterator[str]:
    """What is wrong with a run that learns nothing, with its likely cause."""
    if metrics.get("train/grad_norm") == 0:
        yield (
            "the gradient is exactly 0: chosen and rejected of these rows read the same to the trained weights, or no "
            "trained weight is on the way to them"
        )
    # Policy and reference may have taken other paths: a policy that stands still has margins of rounding, ties.
    if step == 3 and metrics.get("train/tie_rate") == 1:
        yield (
            "after 3 steps all margins are still 0 (within 0.001 nats): the policy does not move; unless it is warming "
            "up, learning_rate is too small, or lost in the rounding of the weights"
        )


class Sink(Protocol):
    """Takes one record per step."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one record."""

    def close(self) -> None:
        """Finish writing."""


class JsonlSink:
    """One JSON object a line, each written at once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with storage_errors(path, 0):
            self._file = path.open("ab", buffering=0)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line. A number that is not finite becomes null."""
        line = orjson.dumps({"train/step": step, **metrics}) + b"\n"
        with storage_errors(self._path, len(line)):
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def synced(self) -> int:
        """Bring the lines to the disk; the length of the file in bytes."""
        with storage_errors(self._path, 0):
            os.fsync(self._file.fileno())
        return self._file.tell()

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
        self._jsonl = JsonlSink(path)
        self._sinks: list[Sink] = [self._jsonl]
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

    def synced(self) -> int:
        """See `JsonlSink.synced`."""
        return self._jsonl.synced()

    def close(self) -> None:
        """Finish every sink."""
        for sink in self._sinks:
            sink.close()
