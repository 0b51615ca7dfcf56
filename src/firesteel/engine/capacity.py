"""Whether a model fits into the memory of its device, asked before it is loaded.

A system that runs out of memory ends the process, and with it everybody's models. What is counted is what stays:
weights, and where they are trained their gradient and AdamW's two moments. Activations come and go within
`activation_token_budget`.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from firesteel.sdk.errors import ModelError
from firesteel.sdk.shapes import TrainingShape

TRAINED_COPIES = 4
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup/memory.max")
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
        parameters = sum(map(_parameters_in, folder.glob("*.safetensors")))
        return cls(name, parameters, shape.dtype, TRAINED_COPIES if trained else 1)

    @property
    def bytes(self) -> int:
        """In all."""
        return self.parameters * self.copies * int(getattr(torch, self.dtype).itemsize)

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
    if not _MEMINFO.exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    lines = _MEMINFO.read_text().splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    limit = _CGROUP.read_text().strip() if _CGROUP.exists() else "max"
    return available if limit == "max" else min(available, int(limit))


def _parameters_in(path: Path) -> int:
    with path.open("rb") as file:
        head = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(prod(entry["shape"]) for name, entry in head.items() if name != "__metadata__")
