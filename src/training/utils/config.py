"""Settings that recipes share. Unknown names are refused; every default is visible here."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from firesteel.sdk.errors import ConfigError


class Settings(BaseModel):
    """Base of every configuration: frozen data, nothing unknown, checked when it is built.

    Raises `ConfigError` naming each wrong field, its value and what was expected.
    """

    # Built when the first is made: `--help` needs the fields only, and need not wait for it.
    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True, defer_build=True
    )

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(_explain(type(self).__name__, error)) from None


def _explain(name: str, error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        field = ".".join(str(part) for part in problem["loc"]) or name
        if problem["type"] == "extra_forbidden":
            lines.append(f"{field}: {name} has no such setting")
        elif problem["type"] == "missing":
            lines.append(f"{field}: must be given")
        elif isinstance(inner := problem.get("ctx", {}).get("error"), ConfigError):
            # Settings inside settings have explained themselves already.
            lines += [f"{field}.{line}" for line in str(inner).splitlines()]
        else:
            # pydantic's own wording, without the prefix it puts before a validator's message.
            # Where settings contradict each other, what was given is all of them: too much to show.
            given = f" (got {problem['input']!r})" if problem["loc"] else ""
            lines.append(f"{field}: {problem['msg'].removeprefix('Value error, ')}{given}")
    return "\n".join(lines)


class TrainerConfig(Settings):
    """Where policy and reference run."""

    training_shape_id: str | None = None
    """Training shape of the policy by name; unset = the smallest validated shape that fits."""
    reference_training_shape_id: str | None = None
    """Shape of a separate reference. Unset = LoRA shares the policy's base, full-parameter selects one."""
    activation_token_budget: int | None = Field(default=None, ge=1)
    """Tokens, shared prefixes counted once, whose activations are kept between forward and backward. A longer batch
    runs its forward a second time; unset = what suits the device."""


class TrackioConfig(Settings):
    """trackio, used when `project` is set (extra `firesteel[trackio]`); on this machine, `trackio show` draws it."""

    project: str | None = Field(default=None, min_length=1)
    """trackio project to log to."""
    run_name: str | None = Field(default=None, min_length=1)
    """Name shown for this run; unset = that of its folder."""


class TensorBoardConfig(Settings):
    """TensorBoard (extra `firesteel[tensorboard]`): event files in `<log_path>/tensorboard`."""

    enabled: bool = False
    """Write event files for TensorBoard, in the run's folder."""


class WandBConfig(Settings):
    """Weights & Biases, used when `project` or `entity` is set (extra `firesteel[wandb]`); offline without a key."""

    entity: str | None = None
    """Team or user."""
    project: str | None = None
    """Project to log to."""
    run_name: str | None = None
    """Name shown for this run; unset = chosen by W&B."""
