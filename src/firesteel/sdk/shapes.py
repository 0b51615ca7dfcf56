"""Training shapes: what a trainer runs on. Names for them live in the catalogue."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar, Literal


class Mode(StrEnum):
    """What a trainer of a shape may do: train all weights, train an adapter, or only run forward."""

    POLICY_TRAINER = "POLICY_TRAINER"
    LORA_TRAINER = "LORA_TRAINER"
    FORWARD_ONLY = "FORWARD_ONLY"


@dataclass(frozen=True)
class TrainingShape:
    """Which models, in which mode, on which device, in which number format.

    `max_context_length` is in tokens; None is the model's own. Raises ValueError for numbers below 1.
    """

    # For the catalogue's reader; a plain dict, so that pydantic need not be imported here.
    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    name: str
    base_model: str
    """A model's name, or `"*"` for any."""
    device: Literal["cpu", "cuda"]
    dtype: Literal["float32", "float64", "bfloat16"]
    mode: Mode
    max_context_length: int | None = None
    version: int = 1
    validated: bool = True

    def __post_init__(self) -> None:
        if self.max_context_length is not None and self.max_context_length < 1:
            raise ValueError(
                f"max_context_length {self.max_context_length} is not a number of tokens above 0"
            )
        if self.version < 1:
            raise ValueError(f"version {self.version} is not a number above 0")
