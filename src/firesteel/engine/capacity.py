"""Whether a model fits into the memory of its device, asked before it is loaded.

A system that runs out of memory ends the process, and with it everybody's models. What is counted is what stays:
weights, and where they are trained their gradient and AdamW's two moments. Activations come and go within
`activation_token_budget`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from firesteel import machine
from firesteel.model_size import ITEM_BYTES, TRAINED_COPIES, parameters_of
from firesteel.sdk.errors import ModelError
from firesteel.sdk.shapes import TrainingShape

_GIB = 2**30


@dataclass(frozen=True)
class Need:
    """What a model takes of its device."""

    name: str
    parameters: int
    dtype: str
    copies: int
    """1 frozen, `TRAINED_COPIES` where all weights are trained."""

    @classmethod
    def of(cls, name: str, folder: Path, shape: TrainingShape, trained: bool) -> Need:
        """Of a folder in Hugging Face's format, by the heads of its files."""
        return cls(name, parameters_of(folder), shape.dtype, TRAINED_COPIES if trained else 1)

    @property
    def bytes(self) -> int:
        """In all."""
        return self.parameters * self.copies * ITEM_BYTES[self.dtype]

    def refuse_if_more(self, capacity: int, held: int) -> None:
        """Raise `ModelError` with the numbers unless it fits beside what is held."""
        if self.bytes + held <= capacity:
            return
        copies = "" if self.copies == 1 else f" × {self.copies} (weights, gradient, AdamW's two moments)"
        raise ModelError(
            f"{self.name} needs {self.bytes / _GIB:.2f} GiB: {self.parameters:,} parameters in {self.dtype}{copies}. "
            f"Of the {capacity / _GIB:.2f} GiB here {held / _GIB:.2f} are taken by models that are loaded; unload "
            "some, train an adapter (lora_rank) instead of all weights, or use a larger machine"
        )


def capacity_of(device: str) -> int:
    """Bytes that models may take on this kind of device: all of a GPU, what is available now of main memory."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[1])
    return machine.memory().free
