"""What a run shows while it works: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class Bar:
    """One stage of known length, counted in pairs."""

    def __init__(self, label: str, total: int, terminal: Progress | None) -> None:
        self._label = label
        self._total = total
        self._terminal = terminal
        self._task: TaskID | None = terminal.add_task(label, total=total, rate="") if terminal else None
        self._started = self._said = time.monotonic()
        self.pairs = 0
        self._tokens = 0

    def advance(self, pairs: int, tokens: int = 0) -> None:
        """Count work done; the rates and the time left follow from it."""
        self.pairs += pairs
        self._tokens += tokens
        if self._terminal is not None and self._task is not None:
            self._terminal.update(self._task, completed=self.pairs, rate=self.rate())

    def rate(self) -> str:
        """`3.1 pairs/s · 402 tokens/s`, since the stage began."""
        elapsed = max(time.monotonic() - self._started, 1e-9)
        tokens = f" · {self._tokens / elapsed:,.0f} tokens/s" if self._tokens else ""
        return f"{self.pairs / elapsed:.1f} pairs/s{tokens}"

    def time_left(self) -> float:
        """Seconds, if it goes on like this."""
        elapsed = time.monotonic() - self._started
        return elapsed / max(self.pairs, 1) * (self._total - self.pairs)

    def due(self, seconds: float) -> bool:
        """Whether nothing was printed for so long, where there is no terminal; true at the end."""
        now = time.monotonic()
        if self._terminal is not None or (now - self._said < seconds and self.pairs < self._total):
            return False
        self._said = now
        return True


class Display:
    """Prints for people. Everything a program should read is in the run folder."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(highlight=False, soft_wrap=True)

    @property
    def is_terminal(self) -> bool:
        """Whether somebody watches."""
        return self._console.is_terminal

    def say(self, line: str = "") -> None:
        """One line (above the bar, if there is one)."""
        self._console.print(line, markup=False)

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Bar]:
        """A stage; on a terminal its bar disappears when the stage ends."""
        if not self.is_terminal:
            yield Bar(label, total, None)
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._console, transient=True) as terminal:
            yield Bar(label, total, terminal)
