"""What a run ran on, and with: `environment.json`, of the process that trained last."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

import firesteel
from firesteel.sealed import read_json, replace_file
from training.utils.doubts import Doubt

if TYPE_CHECKING:
    from firesteel.sdk.operations import ModelDescription
    from training.utils.run import Run

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
    doubts: Sequence[Doubt] | None = None
    """What may be wrong with the data, as it was said at the start; None where nobody has noted it."""

    @classmethod
    def of_a_run(cls, run: Run, policy: ModelDescription) -> Environment:
        """As it is now."""
        from importlib.metadata import version

        import torch

        packages = {name: version(name) for name in PACKAGES}
        return cls(
            recipe=run.config.recipe,
            total_steps=run.epochs.total_steps,
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
            data=run.identity.data,
            doubts=run.doubts,
        )

    @classmethod
    def read(cls, path: Path) -> Environment | None:
        """None where there is none, or not as it was written."""
        try:
            content = read_json(path)
            doubts = content.get("doubts")
            known = None if doubts is None else [Doubt(**doubt) for doubt in doubts]
            return cls(**{**content, "doubts": known})
        except (OSError, ValueError, TypeError):
            return None

    def write(self, path: Path) -> None:
        """Replace the file."""
        replace_file(path, orjson.dumps(asdict(self), option=orjson.OPT_INDENT_2) + b"\n")
