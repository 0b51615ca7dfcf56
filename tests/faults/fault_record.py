"""How often each fault is tried, and what came of it: `FIRESTEEL_FAULT_TRIES` (3), `make faults` (20 or more)."""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass, field

TRIES = int(os.environ.get("FIRESTEEL_FAULT_TRIES", "3"))


@dataclass
class Tally:
    """One fault: how often it struck, how often all was as promised, and steps that had to be made again."""

    tries: int = 0
    survived: int = 0
    repeated_steps: list[int] = field(default_factory=list)


_tallies: dict[str, Tally] = defaultdict(Tally)


class Record:
    """A row of the table; `tried` before a fault is judged, `survived` after."""

    def __init__(self, fault: str) -> None:
        self._tally = _tallies[fault]

    def tried(self) -> None:
        """The fault has struck."""
        self._tally.tries += 1

    def survived(self, repeated_steps: int | None = None) -> None:
        """All was as promised."""
        self._tally.survived += 1
        if repeated_steps is not None:
            self._tally.repeated_steps.append(repeated_steps)


def table() -> str:
    """All rows so far, as Markdown; empty without any."""
    if not _tallies:
        return ""
    lines = ["| fault | tries | survived | steps made again, most |", "|---|---|---|---|"]
    for fault, tally in sorted(_tallies.items()):
        most = str(max(tally.repeated_steps)) if tally.repeated_steps else "-"
        lines.append(f"| {fault} | {tally.tries} | {tally.survived} | {most} |")
    return "\n".join(lines) + "\n"
