"""What a run shows while it works: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import TextIOWrapper
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

SECONDS_BETWEEN_READINGS = 10


@dataclass(frozen=True)
class Stage:
    """A part of a run: its name, how much it has to do, and how often it prints a line where there is no terminal."""

    label: str
    total: int
    unit: str = "pairs"
    seconds_between_lines: float = 0.0


class Bar:
    """One stage of known length, counted in its unit. Where nobody watches, lines take the bar's place."""

    def __init__(self, stage: Stage, terminal: Progress | None, say: Callable[[str], None]) -> None:
        self._stage = stage
        self._terminal = terminal
        self._say = say
        self._task: TaskID | None = None
        if terminal:
            self._task = terminal.add_task(stage.label, total=stage.total, rate="")
        self._started = self._said = time.monotonic()
        self._tokens = 0
        self.count = 0

    def advance(self, count: int, tokens: int = 0, note: str = "") -> None:
        """Count work done; the rates and the time left follow from it. `note` says more, where lines are shown."""
        self.count += count
        self._tokens += tokens
        now = time.monotonic()
        if self._terminal is not None and self._task is not None:
            self._terminal.update(self._task, completed=self.count, rate=self.rate())
        elif now - self._said >= self._stage.seconds_between_lines:
            self._said = now
            done = note or f"{self._stage.label} {self.count}/{self._stage.total}"
            self._say(f"{done}  {self.rate()}  {self._time_left():.0f} s left")

    def rate(self) -> str:
        """`3.1 pairs/s · 402 tokens/s`, since the stage began."""
        elapsed = max(time.monotonic() - self._started, 1e-9)
        tokens = f" · {self._tokens / elapsed:,.0f} tokens/s" if self._tokens else ""
        return f"{self.count / elapsed:.1f} {self._stage.unit}/s{tokens}"

    def _time_left(self) -> float:
        """Seconds, if it goes on like this."""
        elapsed = time.monotonic() - self._started
        return elapsed / max(self.count, 1) * (self._stage.total - self.count)


class Display:
    """Prints for people. Everything a program should read is in the run folder."""

    def __init__(self) -> None:
        from rich.console import Console

        if isinstance(sys.stdout, TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # no run ends because a terminal lacks a letter
        self._console = Console(highlight=False, soft_wrap=True)

    @property
    def is_terminal(self) -> bool:
        """Whether somebody watches."""
        return self._console.is_terminal

    def say(self, line: str = "") -> None:
        """One line (above the bar, if there is one)."""
        self._console.print(line, markup=False)

    def reading(self, path: str) -> Callable[[int, int], None]:
        """Say now and then how far the reading of a file is, told its rows and bytes so far."""
        said = time.monotonic()

        def progress(rows: int, offset: int) -> None:
            nonlocal said
            if time.monotonic() - said >= SECONDS_BETWEEN_READINGS:
                said = time.monotonic()
                self.say(f"reading {path}: {rows:,} rows, {offset / 1e6:,.0f} MB")

        return progress

    @contextmanager
    def bar(self, stage: Stage) -> Iterator[Bar]:
        """A stage; on a terminal its bar disappears when the stage ends."""
        if not self.is_terminal:
            yield Bar(stage, None, self.say)
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
            yield Bar(stage, terminal, self.say)
