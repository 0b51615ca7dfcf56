"""The order of one model's operations: by `seq_id`, without gaps, each once, retries answered again."""

from __future__ import annotations

import time
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from firesteel.sdk.errors import ClosedError, OperationError
from firesteel.sdk.operations import OrderedOperation, fingerprint, operation_name
from firesteel.sdk.types import ForwardBackwardOutput

# How many answers of one model are kept for retries, and how many bytes of them: a client retries what it
# sent last, and a run of any length must not grow.
KEPT_ANSWERS = 64
KEPT_BYTES = 64 * 2**20


def new_future() -> Future[Any]:
    """A future that cannot be cancelled: what was submitted runs, or fails by name."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()
    return future


@dataclass(frozen=True)
class Submitted:
    """An operation, its content's hash, and the future that answers it (to every retry alike)."""

    operation: OrderedOperation
    digest: bytes
    future: Future[Any] = field(default_factory=new_future)
    arrived: float = field(default_factory=time.monotonic)
    lane: str = ""
    """Where it waits when its turn has come."""


@dataclass(frozen=True)
class Answered:
    """What stays of an operation that has run: enough to answer a retry, without its data."""

    digest: bytes
    future: Future[Any]


class ModelOrder:
    """Not thread-safe: the engine calls it under its lock."""

    def __init__(self) -> None:
        self._next = 1
        self._held: dict[int, Submitted] = {}
        self._known: OrderedDict[int, Answered] = OrderedDict()

    def accept(self, operation: OrderedOperation, lane: str = "") -> tuple[Future[Any], list[Submitted]]:
        """The future that answers this operation, and what may run now, in order."""
        digest = fingerprint(operation)
        seq = operation.seq_id
        if seq in self._known:
            if self._known[seq].digest != digest:
                raise OperationError(
                    f"{operation_name(operation)}: this seq_id was already used for an operation with other content"
                )
            return self._known[seq].future, []
        if seq < self._next:
            raise OperationError(
                f"{operation_name(operation)}: the next seq_id is {self._next}; "
                f"the answer to {seq} is no longer kept (at most the last {KEPT_ANSWERS} are)"
            )
        submitted = Submitted(operation, digest, lane=lane)
        self._held[seq] = submitted
        self._remember(seq, submitted)
        return submitted.future, self._release()

    def fail_held(self) -> None:
        """Fail what waits for a number that never came."""
        for submitted in self._held.values():
            name = operation_name(submitted.operation)
            submitted.future.set_exception(
                ClosedError(f"{name}: closed while waiting for seq_id {self._next}")
            )
        self._held.clear()

    def give_up_gaps(self, patience: float) -> list[Submitted]:
        """Fail what has waited for a missing number for more than `patience` seconds; gives what may run behind it."""
        overdue = [seq for seq, held in self._held.items() if time.monotonic() - held.arrived > patience]
        if not overdue:
            return []
        missing = self._next
        for seq in sorted(seq for seq in self._held if seq <= max(overdue)):
            submitted = self._held.pop(seq)
            submitted.future.set_exception(
                OperationError(
                    f"{operation_name(submitted.operation)}: seq_id {missing} has not come within {patience:g} s; "
                    "nothing was done. Send it again with a new number"
                )
            )
        self._next = max(overdue) + 1
        return self._release()

    def _release(self) -> list[Submitted]:
        ready = []
        while self._next in self._held:
            ready.append(self._held.pop(self._next))
            self._next += 1
        return ready

    def _remember(self, seq: int, submitted: Submitted) -> None:
        self._known[seq] = Answered(submitted.digest, submitted.future)
        kept_bytes = 0
        answered = reversed([s for s, known in self._known.items() if known.future.done()])
        for kept, old in enumerate(answered, start=1):
            kept_bytes += _answer_bytes(self._known[old].future)
            if kept > KEPT_ANSWERS or kept_bytes > KEPT_BYTES:
                del self._known[old]


def _answer_bytes(future: Future[Any]) -> int:
    if future.exception() is not None or not isinstance(future.result(), ForwardBackwardOutput):
        return 0
    return sum(t.to_numpy().nbytes for output in future.result().loss_fn_outputs for t in output.values())
