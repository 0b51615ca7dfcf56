"""What a run shows while it works: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from io import TextIOWrapper
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

SECONDS_BETWEEN_READINGS = 10
BAR_CELLS = 24
GAP = "  "
"""Between the parts of a line, which are not broken where the screen is narrow."""


@dataclass(frozen=True)
class Stage:
    """A part of a run: its name, how much it has to do, and how often it prints a line where there is no terminal."""

    label: str
    total: int
    unit: str = "pairs"
    seconds_between_lines: float = 0.0


class Bar:
    """One stage of known length, counted in its unit. Where nobody watches, lines take the bar's place."""

    def __init__(self, stage: Stage, say: Callable[[str], None] | None) -> None:
        """`say` prints those lines; None where the bar is watched (see `Watched`)."""
        self.stage = stage
        self.note = ""
        self._say = say
        self._started = self._said = time.monotonic()
        self._tokens = 0
        self.count = 0

    def advance(self, count: int, tokens: int = 0, note: str = "") -> None:
        """Count work done; the rates and the time left follow from it. `note` says more, its parts a `GAP` apart."""
        self.count += count
        self._tokens += tokens
        self.note = note
        now = time.monotonic()
        if self._say is not None and now - self._said >= self.stage.seconds_between_lines:
            self._said = now
            done = note or f"{self.stage.label} {self.count}/{self.stage.total}"
            self._say(f"{done}{GAP}{self.rate()}{GAP}{self.time_left():.0f} s left")

    def rate(self) -> str:
        """`3.1 pairs/s · 402 tokens/s`, since the stage began."""
        elapsed = max(time.monotonic() - self._started, 1e-9)
        tokens = f" · {self._tokens / elapsed:,.0f} tokens/s" if self._tokens else ""
        return f"{self.count / elapsed:.1f} {self.stage.unit}/s{tokens}"

    def time_left(self) -> float:
        """Seconds, if it goes on like this."""
        elapsed = time.monotonic() - self._started
        return elapsed / max(self.count, 1) * (self.stage.total - self.count)


@dataclass(frozen=True)
class Watched:
    """A bar as a terminal shows it: as many lines as its parts need, none of them broken or left out."""

    bar: Bar

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The bar, and beside or below it what is told of the stage."""
        from rich.cells import cell_len
        from rich.progress_bar import ProgressBar
        from rich.segment import Segment

        width = options.max_width
        cells = min(BAR_CELLS, width)
        bar = ProgressBar(self.bar.stage.total, self.bar.count, cells)
        drawn = Segment.adjust_line_length(
            list(console.render(bar, options)), cells
        )  # it may leave out its rest
        label, *told = ([Segment(text)] for part in self.parts() for text in _chopped(part, width))
        used = 0
        for part in (label, drawn, *told):
            needed = sum(cell_len(segment.text) for segment in part)
            if used and used + len(GAP) + needed > width:
                yield Segment.line()
                used = 0
            if used:
                yield Segment(GAP)
                used += len(GAP)
            yield from part
            used += needed

    def parts(self) -> list[str]:
        """What is told beside the bar, its name first."""
        left = timedelta(seconds=round(self.bar.time_left()))
        return [
            self.bar.stage.label,
            f"{self.bar.count}/{self.bar.stage.total}",
            *(f"{left} left" for _ in range(self.bar.count > 0)),
            *filter(None, self.bar.note.split(GAP)),
            *self.bar.rate().split(" · "),
        ]


def _chopped(text: str, width: int) -> list[str]:
    from rich.cells import chop_cells

    return chop_cells(text, width)


class Display:
    """Prints for people. Everything a program should read is in the run folder."""

    def __init__(self, *, on_stderr: bool = False) -> None:
        """`on_stderr` leaves standard output to a program's answer."""
        from rich.console import Console

        if isinstance(sys.stdout, TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # no run ends because a terminal lacks a letter
        self._console = Console(highlight=False, soft_wrap=True, stderr=on_stderr)
        self._said: set[str] = set()

    @property
    def is_terminal(self) -> bool:
        """Whether somebody watches."""
        return self._console.is_terminal

    def say(self, line: str = "") -> None:
        """One line (above the bar, if there is one)."""
        self._console.print(line, markup=False)

    def say_once(self, line: str, about: str | None = None) -> None:
        """The same, unless this line was said so before, or another `about` the same."""
        key = about or line
        if key not in self._said:
            self._said.add(key)
            self.say(line)

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
            yield Bar(stage, self.say)
            return
        from rich.live import Live

        bar = Bar(stage, say=None)
        with Live(Watched(bar), console=self._console, transient=True):
            yield bar
