"""Where the numbers of a run go: `metrics.jsonl` always, and the trackers that were asked for."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Protocol

import orjson

from firesteel.sealed import storage_errors


class Sink(Protocol):
    """Takes the records of a run; one step may have several."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one record."""

    def close(self) -> None:
        """Finish writing."""


class JsonlSink:
    """One JSON object a line, each written at once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with storage_errors(path, 0):
            self._file = path.open("ab", buffering=0)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line. A number that is not finite becomes null."""
        line = orjson.dumps({"train/step": step, **metrics}) + b"\n"
        with storage_errors(self._path, len(line)):
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def synced(self) -> int:
        """Bring the lines to the disk; the length of the file in bytes."""
        with storage_errors(self._path, 0):
            os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class MetricsLog:
    """All sinks of a run. Its own file must be written; a tracker that fails is told of, and left (ADR 12)."""

    def __init__(
        self, path: Path, trackers: Sequence[Sink] = (), warn: Callable[[str], None] = print
    ) -> None:
        """Open `path`; the trackers are open, and are closed with it. `warn` is told of one that fails."""
        self._trackers = list(trackers)
        self._warn = warn
        with ExitStack() as on_failure:
            on_failure.callback(close_trackers, self._trackers, warn)
            self._jsonl = JsonlSink(path)
            on_failure.pop_all()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send one record to every sink."""
        self._jsonl.log(step, metrics)
        for tracker in list(self._trackers):
            if not _worked(tracker, f"step {step}", lambda sink: sink.log(step, metrics), self._warn):
                self._trackers.remove(tracker)
                close_trackers([tracker], self._warn)

    def synced(self) -> int:
        """See `JsonlSink.synced`."""
        return self._jsonl.synced()

    def close(self) -> None:
        """Finish every sink, whatever becomes of the others."""
        close_trackers(self._trackers, self._warn)
        self._jsonl.close()


def close_trackers(trackers: Iterable[Sink], warn: Callable[[str], None]) -> None:
    """Finish them, whatever becomes of the others."""
    for tracker in trackers:
        _worked(tracker, "closing it", lambda sink: sink.close(), warn)


def _worked(tracker: Sink, what: str, action: Callable[[Sink], None], warn: Callable[[str], None]) -> bool:
    try:
        action(tracker)
    except Exception as error:  # noqa: BLE001  # whatever fails in somebody else's program
        warn(
            f"warning: {what}: tracker {type(tracker).__name__} failed: {type(error).__name__}: {error}; it is told "
            "nothing more of this run, metrics.jsonl has all numbers"
        )
        return False
    return True


def logged(path: Path) -> Iterator[dict[str, float]]:
    """The whole records of a `metrics.jsonl`, in order."""
    with path.open("rb") as file:
        for line in file:
            with suppress(orjson.JSONDecodeError):  # the last one of a process that was killed
                yield orjson.loads(line)
