"""Processes that check rows: rendering a large file is a matter of minutes, and one interpreter uses one core.

Each is this module run as a program, spoken to through its standard streams. (`multiprocessing` would run the
user's script once more in every worker, which a script without a main guard does not survive.)
"""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from queue import SimpleQueue
from typing import IO, Any

import numpy as np
import orjson

from firesteel.sdk.errors import ModelError, OperationFailed
from training.utils.jsonl import LocatedRow
from training.utils.rendering import Renderer
from training.utils.row_check import CheckedRows, RefusedRow, RowKind, check_rows
from training.utils.row_forms import FormatTally
from training.utils.row_kinds import KINDS
from training.utils.row_records import RANKED


class RowWorkers:
    """As many processes as asked for, each with the renderer's tokenizer loaded anew."""

    def __init__(self, renderer: Renderer, kind: RowKind[Any], count: int) -> None:
        assert renderer.source is not None
        self._threads = ThreadPoolExecutor(count, "row-workers")
        self._workers: list[_Worker] = []
        self._free: SimpleQueue[_Worker] = SimpleQueue()
        try:
            for _ in range(count):
                self._workers.append(_Worker(renderer, kind))
                self._free.put(self._workers[-1])
        except OSError as error:
            self.close()
            raise OperationFailed(f"no process that reads rows can be started: {error}") from error

    def check(self, chunks: Iterable[Sequence[LocatedRow]]) -> Iterator[CheckedRows]:
        """What became of each chunk, in order; a few chunks are on their way at any time."""
        pending: deque[Future[CheckedRows]] = deque()
        for chunk in chunks:
            pending.append(self._threads.submit(self._ask_one, chunk))
            if len(pending) > 2 * len(self._workers):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def close(self) -> None:
        """End the processes, whatever they are doing."""
        for worker in self._workers:
            worker.kill()
        self._threads.shutdown(cancel_futures=True)

    def _ask_one(self, chunk: Sequence[LocatedRow]) -> CheckedRows:
        worker = self._free.get()
        try:
            return worker.check(chunk)
        finally:
            self._free.put(worker)


class _Worker:
    def __init__(self, renderer: Renderer, kind: RowKind[Any]) -> None:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "TOKENIZERS_PARALLELISM": "false",  # the workers are the parallelism
            "OMP_NUM_THREADS": "1",
        }
        self._renderer = renderer
        self._kind = kind
        # -P: with -m alone the current folder would come first, and a module of the user's with one of our names.
        command = [sys.executable, "-P", "-m", __name__]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        self._greeted = False

    def check(self, chunk: Sequence[LocatedRow]) -> CheckedRows:
        """Raises the ModelError that the worker raised, and OperationFailed if it died."""
        if not self._greeted:
            self._greeted = True
            ours = self._renderer
            told = {"tokenizer": ours.source, "today": ours.today.isoformat(), "kind": self._kind.name}
            if self._ask(_Frame(told)).header["identity"] != ours.identity:
                raise OperationFailed(
                    f"{ours.source}: loaded again in a worker, the tokenizer is another one"
                )
        return _checked_of(self._ask(_rows_frame(chunk)), self._kind)

    def kill(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()

    def _ask(self, question: _Frame) -> _Frame:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            question.send(self._process.stdin)
            answer = _Frame.receive(self._process.stdout)
        except (BrokenPipeError, EOFError):
            raise OperationFailed(
                f"a process that reads rows ended with exit code {self._process.wait()}; "
                "what it said stands above, -9 without a word means that memory ran out"
            ) from None
        if "model_error" in answer.header:
            raise ModelError(answer.header["model_error"])
        return answer


@dataclass(frozen=True)
class _Frame:
    """One message: JSON, and bytes beside it."""

    header: dict[str, Any]
    body: bytes = b""

    def send(self, stream: IO[bytes]) -> None:
        header = orjson.dumps(self.header)
        stream.write(struct.pack("<QQ", len(header), len(self.body)) + header + self.body)
        stream.flush()

    @classmethod
    def receive(cls, stream: IO[bytes]) -> _Frame:
        """Raises EOFError at the end of the stream."""
        header, body = struct.unpack("<QQ", _exactly(stream, 16))
        return cls(orjson.loads(_exactly(stream, header)), _exactly(stream, body))


def _exactly(stream: IO[bytes], size: int) -> bytes:
    content = stream.read(size)
    if len(content) < size:
        raise EOFError
    return content


def _rows_frame(rows: Sequence[LocatedRow]) -> _Frame:
    places = [[row.line, row.offset, len(row.raw)] for row in rows]
    return _Frame({"rows": places}, b"".join(row.raw for row in rows))


def _rows_of(frame: _Frame) -> list[LocatedRow]:
    rows, start = [], 0
    for line, offset, length in frame.header["rows"]:
        rows.append(LocatedRow(line, offset, frame.body[start : start + length]))
        start += length
    return rows


def _checked_frame(checked: CheckedRows) -> _Frame:
    header = {"usable": len(checked.usable), "refused": checked.refused, "formats": checked.formats}
    return _Frame(header, checked.usable.tobytes() + checked.ranked.tobytes())


def _checked_of(frame: _Frame, kind: RowKind[Any]) -> CheckedRows:
    header, usable = frame.header, frame.header["usable"]
    refused = [RefusedRow(**row) for row in header["refused"]]
    records = np.frombuffer(frame.body, kind.record_type, usable)
    ranked = np.frombuffer(frame.body, RANKED, offset=records.nbytes)
    return CheckedRows(records, ranked, refused, FormatTally(**header["formats"]))


@dataclass(frozen=True)
class _Task:
    """What a worker was told when it was greeted."""

    renderer: Renderer
    kind: RowKind[Any]

    @classmethod
    def of(cls, greeting: _Frame) -> _Task:
        told = greeting.header
        renderer = Renderer.load(told["tokenizer"], date.fromisoformat(told["today"]))
        return cls(renderer, KINDS[told["kind"]])


def _answer(question: _Frame, task: _Task | None) -> tuple[_Frame, _Task]:
    if task is None:
        task = _Task.of(question)
        return _Frame({"identity": task.renderer.identity}), task
    return _checked_frame(check_rows(_rows_of(question), task.renderer, task.kind)), task


def _work() -> None:
    """The life of a worker: a tokenizer's name, then chunks until nobody asks any more."""
    incoming = os.fdopen(os.dup(0), "rb")
    outgoing = os.fdopen(os.dup(1), "wb")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # sent to the parent too, which ends its workers
    os.dup2(2, 1)  # whatever a library prints does not get between the answers
    task: _Task | None = None
    with incoming, outgoing:
        while True:
            try:
                question = _Frame.receive(incoming)
            except EOFError:
                return
            try:
                answer, task = _answer(question, task)
            except ModelError as error:
                answer = _Frame({"model_error": str(error)})
            answer.send(outgoing)


if __name__ == "__main__":
    _work()
