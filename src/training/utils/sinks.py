"""Where the numbers of a run go: `metrics.jsonl` always, and the trackers that were asked for."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping, Sequence
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
    """All sinks of a run."""

    def __init__(self, path: Path, trackers: Sequence[Sink] = ()) -> None:
        """Open `path`; the trackers are open, and are closed with it."""
        self._trackers = trackers
        self._jsonl = JsonlSink(path)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send one record to every sink."""
        for sink in (self._jsonl, *self._trackers):
            sink.log(step, metrics)

    def synced(self) -> int:
        """See `JsonlSink.synced`."""
        return self._jsonl.synced()

    def close(self) -> None:
        """Finish every sink, whatever becomes of the others."""
        with ExitStack() as stack:
            for sink in (*self._trackers, self._jsonl):
                stack.callback(sink.close)


def logged(path: Path) -> Iterator[dict[str, float]]:
    """The whole records of a `metrics.jsonl`, in order."""
    with path.open("rb") as file:
        for line in file:
            with suppress(orjson.JSONDecodeError):  # the last one of a process that was killed
                yield orjson.loads(line)
