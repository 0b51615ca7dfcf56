"""The settings that every recipe has for its run: where it is, where it starts from, how it goes on, what it keeps."""

from __future__ import annotations

import os
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from training.utils.checkpoints import newest_checkpoint
from training.utils.config import Settings


class RunSettings(Settings):
    """Base of a recipe's `Config`."""

    log_path: str
    """Folder of the run. What becomes of an earlier run in it, `resume` says."""
    resume: str = Field(default="auto", pattern=r"^(auto|never|step-\d+)$")
    """`auto`: go on from the newest checkpoint in log_path, if there is any. `never` (--fresh): start anew; what is
    there moves to `previous-<n>/`. `step-40` (--resume-from step-40): go on from that one."""
    takeover: bool = False
    """Take log_path from another process that writes to it; that one ends at its next write."""
    dcp_save_interval: int = Field(default=0, ge=0)
    """Steps between checkpoints; there is one after the last step too. 0 = none."""
    keep_last: int | None = Field(default=None, ge=1)
    """Keep only the newest so many checkpoints; unset = all."""
    keep_every: int = Field(default=0, ge=0)
    """With keep_last: keep also those whose step is a multiple of this."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite ends the run, or its step changes nothing and is counted."""
    init_from_checkpoint: str | None = None
    """Checkpoint, or run folder (its newest), whose weights training starts from, at step 0."""
    init_optimizer: bool = False
    """With init_from_checkpoint: take its optimizer's state too."""
    warm_start_from_adapter: str | None = None
    """Adapter in PEFT's format that training starts from; lora_rank and lora_alpha must be its own."""
    report: bool = True
    """Write report.html when the run has ended; `firesteel report RUN` does so at any time."""

    def resolved(self) -> dict[str, Any]:
        """Every setting of this run, as JSON: a `Config` of these makes or continues it.

        How it was started is left out: to start it anew once more is for whoever asks.
        """
        return self.model_dump(mode="json", exclude={"resume", "takeover"})

    @property
    def start(self) -> str | None:
        """Folder of the weights that training starts from; None = the base model."""
        if self.init_from_checkpoint is not None:
            return str(newest_checkpoint(self.init_from_checkpoint))
        return self.warm_start_from_adapter

    @field_validator("log_path", "init_from_checkpoint", "warm_start_from_adapter")
    @classmethod
    def _run_at_home(cls, path: str | None) -> str | None:
        return at_home(path)

    @model_validator(mode="after")
    def _run_possible(self) -> RunSettings:
        if self.init_from_checkpoint and self.warm_start_from_adapter:
            raise ValueError("give init_from_checkpoint or warm_start_from_adapter, not both")
        if self.init_optimizer and not self.init_from_checkpoint:
            raise ValueError("init_optimizer is not read without init_from_checkpoint")
        if self.keep_every and self.keep_last is None:
            raise ValueError("keep_every says what stays beside keep_last; give that too")
        if self.keep_last and not self.dcp_save_interval:
            raise ValueError("keep_last: there are no checkpoints without dcp_save_interval")
        return self


RUN_SETTINGS_THAT_MAY_CHANGE = frozenset(
    {
        "log_path",
        "resume",
        "takeover",
        "dcp_save_interval",
        "keep_last",
        "keep_every",
        "on_nonfinite",
        "report",
    }
)
"""Of these settings: those with which a run may go on though they are others than before."""


def at_home(path: str | None) -> str | None:
    """A path with `~` replaced: a shell does this for flags, nobody for YAML."""
    return path and os.path.expanduser(path)
