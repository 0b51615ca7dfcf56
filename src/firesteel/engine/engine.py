"""The queue in front of the trainers of this process: one thread, per-model order, each operation once."""

from __future__ import annotations

import logging
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

from firesteel.engine.host import Host
from firesteel.engine.memory import keep_freed_memory
from firesteel.engine.ordering import ModelOrder, Submitted, new_future
from firesteel.engine.turns import Turns
from firesteel.sdk.errors import ClosedError, FiresteelError, OperationError, OperationFailed
from firesteel.sdk.operations import (
    CreateBaseReference,
    CreateModel,
    Operation,
    OrderedOperation,
    UnloadModel,
    operation_name,
)

logger = logging.getLogger("firesteel")


class Engine:
    """Runs operations for the models it holds; the in-process `Transport`.

    An operation that fails fails its own future, with the category of its error, and nothing else.
    """

    def __init__(self) -> None:
        keep_freed_memory()  # before the thread below makes its first allocation
        self._host = Host()
        self._orders: dict[str, ModelOrder] = {}
        self._queue: Turns[tuple[Operation, Future[Any]]] = Turns()
        self._wake = threading.Condition()
        self._closed = False
        # A daemon, so that a script that forgets to close still exits; the ledgers of `sdk.futures` let
        # queued work finish first.
        self._thread = threading.Thread(target=self._work, name="firesteel-engine", daemon=True)
        self._thread.start()

    def submit(self, operation: Operation, lane: str = "") -> Future[Any]:
        """Queue an operation. An operation with a `seq_id` waits for those before it, of whatever lane.

        What waits in several lanes (of several users) runs in turn, one operation of each.
        """
        with self._wake:
            if self._closed:
                raise ClosedError(f"{operation_name(operation)}: the engine is closed")
            if isinstance(operation, OrderedOperation):
                if operation.model_id not in self._orders:
                    raise OperationError(
                        f"{operation_name(operation)}: {self._host.no_model(operation.model_id)}"
                    )
                future, ready = self._orders[operation.model_id].accept(operation, lane)
                self._queue_in_lanes(ready)
            else:
                future = new_future()
                self._queue.put(lane, (operation, future))
            self._wake.notify()
        return future

    def give_up_gaps(self, patience: float) -> None:
        """Fail operations that have waited for an earlier number of their model for more than `patience` seconds."""
        with self._wake:
            for order in self._orders.values():
                self._queue_in_lanes(order.give_up_gaps(patience))
            self._wake.notify()

    def _queue_in_lanes(self, ready: list[Submitted]) -> None:
        for submitted in ready:
            self._queue.put(submitted.lane, (submitted.operation, submitted.future))

    def waiting(self) -> dict[str, int]:
        """How many operations wait in each lane that has any."""
        with self._wake:
            return self._queue.lengths()

    def close(self) -> None:
        """Let the running operation end, fail what waits with `ClosedError` by name, and free all models."""
        with self._wake:
            if self._closed:
                return
            self._closed = True
            waiting = self._queue.take_all()
            for order in self._orders.values():
                order.fail_held()
            self._wake.notify()
        for operation, future in waiting:
            future.set_exception(
                ClosedError(f"{operation_name(operation)}: the engine was closed before it ran")
            )
        self._thread.join()
        self._host.close()

    def _work(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._queue or self._closed)
                if not self._queue:
                    return
                operation, future = self._queue.take()
            self._answer(operation, future, partial(self._host.run, operation))
            # Nothing of the last operation may stay alive while the thread waits for the next.
            del operation, future

    def _answer(self, operation: Operation, future: Future[Any], compute: Callable[[], Any]) -> None:
        try:
            result = compute()
            if isinstance(result, Future):  # the rest of its work runs beside the queue
                result.add_done_callback(lambda done: self._answer(operation, future, done.result))
                return
            self._follow(operation, result)
            future.set_result(result)
        except FiresteelError as error:
            _forget_frames(error)
            future.set_exception(error)
        except BaseException as error:
            # The border: any failure becomes its operation's result. Libraries written in Rust panic with a
            # BaseException; letting it pass would end this thread and leave every waiting future hanging.
            logger.debug("%s failed", operation_name(operation), exc_info=True)
            failure = OperationFailed(f"{operation_name(operation)}: {type(error).__name__}: {error}")
            failure.__cause__ = error
            _forget_frames(error)
            future.set_exception(failure)

    def _follow(self, operation: Operation, result: Any) -> None:
        """A model's order begins with its creation and ends with its unloading."""
        with self._wake:
            match operation:
                case CreateModel() | CreateBaseReference():
                    self._orders[result.model_id] = ModelOrder()
                case UnloadModel():
                    self._orders.pop(operation.model_id).fail_held()
                case _:
                    pass


def _forget_frames(error: BaseException) -> None:
    """Free what the failed calls held (a pass's tensors); their error is kept for retries, with its traceback."""
    cause: BaseException | None = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__cause__ or cause.__context__
