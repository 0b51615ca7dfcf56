"""What a run ran on, and with: `environment.json`, of the process that trained last."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

import firesteel
from firesteel.sealed import read_json, replace_file

if TYPE_CHECKING:
    from firesteel.sdk.operations import ModelDescription

PACKAGES = ("torch", "transformers", "peft", "tokenizers", "numpy")


@dataclass(frozen=True)
class Environment:
    """Machine, versions, trainer and data."""

    recipe: str
    """Its verb on the command line."""
    total_steps: int
    started: str
    """When this process began the run or took it up, UTC."""
    working_folder: str
    """Where paths among the settings start."""
    versions: Mapping[str, str]
    machine: Mapping[str, str | int]
    trainer: Mapping[str, str | int]
    """Device, number format and attention of the policy, wherever it is."""
    data: Mapping[str, Any]
    """See `Identity.data`."""

    @classmethod
    def of_a_run(
        cls, recipe: str, total_steps: int, policy: ModelDescription, data: Mapping[str, Any]
    ) -> Environment:
        """As it is now."""
        from importlib.metadata import version

        import torch

        packages = {name: version(name) for name in PACKAGES}
        return cls(
            recipe=recipe,
            total_steps=total_steps,
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            working_folder=os.getcwd(),
            versions={
                "firesteel": firesteel.__version__,
                "python": platform.python_version(),
                **packages,
            },
            machine={
                "system": f"{platform.system()} {platform.release()}",
                "processor": platform.machine(),
                "processors": os.cpu_count() or 1,
                "torch threads": torch.get_num_threads(),
            },
            trainer={
                "device": policy.shape.device,
                "number format": policy.shape.dtype,
                "attention": policy.attention,
                "longest sequence": policy.max_context_length,
            },
            data=data,
        )

    @classmethod
    def read(cls, path: Path) -> Environment | None:
        """None where there is none, or not as it was written."""
        try:
            return cls(**read_json(path))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, path: Path) -> None:
        """Replace the file."""
        replace_file(path, orjson.dumps(asdict(self), option=orjson.OPT_INDENT_2) + b"\n")
