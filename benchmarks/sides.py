"""What `compare.py` and the two sides tell each other."""

from __future__ import annotations

import json
import resource
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

STEPS = 8
"""Of a run: enough for the losses to move, so few that the whole table takes about an hour."""
WARM_UP = {"cpu": 0, "cuda": 3}
"""Steps of a run that are not timed: on a GPU the first ones compile kernels."""
RATE = {0: 2e-5, 16: 5e-4}
"""Learning rate by LoRA rank: both move the loss by more than 0.05 in 8 steps."""


@dataclass(frozen=True)
class Task:
    """One run of one side, handed over as a file."""

    folder: Path
    """The run's own, empty."""
    model: Path
    rows: Path
    adapter: Path
    """Where a LoRA run starts; unused at rank 0."""
    rank: int
    batch: int
    """Pairs per step."""
    device: Literal["cpu", "cuda"] = "cpu"
    warm: bool = False
    """TRL's: the reference is computed before what is timed."""
    checkpointing: bool = False
    """TRL's gradient checkpointing, for memory quoted against both."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights: bfloat16 under an adapter on a GPU, as both sides choose for it by themselves."""
        return torch.bfloat16 if self.device == "cuda" and self.rank else torch.float32

    @property
    def answer(self) -> Path:
        """Where the side writes what it measured."""
        return self.folder / "measured.json"

    def write(self) -> str:
        """The path of a file that `read` understands."""
        path = self.folder / "task.json"
        path.write_text(json.dumps(asdict(self), default=str))
        return str(path)

    @classmethod
    def read(cls, path: str) -> Task:
        """The task in a file."""
        given = json.loads(Path(path).read_text())
        return cls(**given | {name: Path(given[name]) for name in ("folder", "model", "rows", "adapter")})


@dataclass(frozen=True)
class Measured:
    """What a run took. Model load, imports and TRL's tokenisation are not in `seconds`."""

    side: str
    seconds: float
    pairs: int
    tokens: int
    """Of both whole sequences of each pair."""
    losses: list[float]
    """Of each step."""
    peak_gib: float
    """Resident memory of the whole process, imports and load included; on a GPU what was allocated of its own."""
    threads: int
    step_seconds: list[float]
    """Of each step, the wait for its rows left out."""
    reference_seconds: float = 0.0
    """Ours: of `seconds`, those of the reference pass."""
    useful_share: float | None = None
    """Matrix-multiply work that the steps cannot do without, over their time and `linear_gflops`."""
    linear_gflops: float | None = None
    wait_share: float | None = None
    """Of the training's time: spent waiting for rows to be rendered."""

    def step_time(self, device: str) -> float:
        """Median of the steps after the warm-up."""
        return statistics.median(self.step_seconds[WARM_UP[device] :])


def peak_gib(device: str) -> float:
    """Of this process so far."""
    if device == "cuda":
        return float(torch.cuda.max_memory_allocated()) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
