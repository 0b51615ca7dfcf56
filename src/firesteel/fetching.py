"""What is shown on standard error while a model is fetched: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from firesteel.store import Progress


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
