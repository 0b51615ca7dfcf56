"""What is shown while a model is fetched or loaded: a bar on a terminal, lines elsewhere, on standard error."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """Told what is happening: `done` of `total` bytes, `total` None where it is not known."""

    def __call__(self, message: str, done: int, total: int | None) -> None:
        """Take one report; called often, from the fetching thread or those that download for it."""


@contextmanager
def shown_on_stderr(model: str) -> Iterator[Progress]:
    """A progress for `store.fetch`. Nothing is shown where nothing has to be done; standard output stays clean."""
    if not sys.stderr.isatty():
        yield _LinePerStep(model)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    bar = Bar(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task("", total=None)

    def show(message: str, done: int, total: int | None) -> None:
        bar.start()
        bar.update(task, description=f"{model}: {message}", completed=done, total=total)

    try:
        yield show
    finally:
        if bar.live.is_started:  # to stop one that was not started prints an empty line where TERM is dumb
            bar.stop()


class _LinePerStep:
    """Prints a message when it differs from the last one."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._last = ""

    def __call__(self, message: str, done: int, total: int | None) -> None:
        if message != self._last:
            sys.stderr.write(f"{self._model}: {message}\n")
            sys.stderr.flush()
            self._last = message


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """While this lasts, no progress bars of transformers' own: they would fight with ours for the line."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
