"""What may be wrong with the data of a run: said when it starts, and kept with it."""

from __future__ import annotations

from dataclasses import dataclass

LEAKED_ROWS = "held-out-rows"
"""Name of the finding that held-out rows are among the training rows."""


@dataclass(frozen=True)
class Doubt:
    """A warning about a run's data, or about what a setting makes of them."""

    about: str
    """The file, or the setting that names it."""
    name: str
    """Of the finding."""
    text: str
    rows: int = 0
    """How many it is about; 0 where it is about all."""

    def __str__(self) -> str:
        return f"{self.about}: {self.text}"
