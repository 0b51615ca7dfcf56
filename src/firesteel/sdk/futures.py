"""Results that are not there yet, and the failures that nobody looked at."""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import sys
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from firesteel.sdk.errors import FiresteelError

T = TypeVar("T")


class APIFuture(Generic[T]):
    """The answer to one operation: `.result()`, `await`, or simply read like the result itself.

    ``client.forward(data).loss_fn_outputs`` waits and reads, so loops written for either style run. Asking
    for the result (or its error) counts as reading; an error that nobody reads is raised by the next call
    on its client, see `Ledger`.
    """

    def __init__(self, future: Future[Any], name: str, convert: Callable[[Any], T] | None = None) -> None:
        self._future = future
        self._name = name
        self._convert = convert
        self._read = False
        self.thread = threading.get_ident()
        """The thread that asked for the operation."""

    def result(self, timeout: float | None = None) -> T:
        """Wait up to `timeout` seconds (None = for ever) for the result; raises the operation's error.

        `TimeoutError` leaves the operation running and its outcome unread.
        """
        error = self.exception(timeout)
        if error is not None:
            raise error
        value = self._future.result()
        return self._convert(value) if self._convert else value

    def done(self) -> bool:
        """Whether the operation has ended, well or not."""
        return self._future.done()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """The operation's error or None, waiting for it."""
        # Read from the moment somebody waits: another thread's next call must not raise it as well.
        self._read = True
        try:
            return self._future.exception(timeout)
        except BaseException:
            self._read = False
            raise

    async def result_async(self, timeout: float | None = None) -> T:
        """`result`, for use in a coroutine."""
        return await asyncio.wait_for(_completion(self), timeout)

    def __await__(self) -> Generator[Any, None, T]:
        return _completion(self).__await__()

    def __getattr__(self, name: str) -> Any:
        # Only reached for names that are not the future's own. Private and dunder look-ups (copy, pickle,
        # inspection) must not block on a result.
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.result(), name)

    def __repr__(self) -> str:
        return f"<APIFuture of {self._name}: {'done' if self.done() else 'pending'}>"

    def unread_failure(self) -> BaseException | None:
        """The error of an operation that failed while nobody looked, without counting as a read."""
        if self._read or not self._future.done() or self._future.cancelled():
            return None
        return self._future.exception()


async def _completion(future: APIFuture[T]) -> T:
    ended = asyncio.wrap_future(future._future)
    await asyncio.wait([ended])
    ended.exception()  # seen here, raised below; asyncio complains about errors that nobody looks at
    return future.result()


class Ledger:
    """The futures that one client has given out, until they are read or known to be well.

    A loop may never look at the result of `optim_step`; its failure must not pass unseen. It is raised by
    the next call on the client by the thread that sent it, or by `close()`; at interpreter exit it is printed
    and the exit status is 1. Other threads do not get it: its own may be just about to look.
    """

    def __init__(self) -> None:
        self._futures: list[APIFuture[Any]] = []
        self._lock = threading.Lock()
        _open_ledgers.add(self)

    def track(self, future: APIFuture[T]) -> APIFuture[T]:
        """Remember a future, and forget those that need no more attention."""
        with self._lock:
            self._futures = [f for f in self._futures if not f.done() or f.unread_failure() is not None]
            self._futures.append(future)
        return future

    def raise_unread(self, of_all_threads: bool = False) -> None:
        """Raise the first failure that nobody read (once); the others are told in its notes."""
        here = threading.get_ident()
        with self._lock:
            unread = [future for future in self._futures if future.unread_failure() is not None]
            failed = [future for future in unread if of_all_threads or future.thread == here]
            kept = [future for future in unread if future not in failed]
            self._futures = [future for future in self._futures if not future.done() or future in kept]
        if not failed:
            return
        first = failed[0].exception()
        assert first is not None
        first.add_note(f"(raised now because nobody read the result of {failed[0]._name})")
        for future in failed[1:]:
            first.add_note(f"(also unread: {future._name}: {future.exception()})")
        raise first

    def wait(self) -> None:
        """Wait until every operation given out has ended."""
        with self._lock:
            waiting = list(self._futures)
        for future in waiting:
            future._future.exception()

    def close(self) -> None:
        """Wait for everything, stop watching, and raise what nobody read."""
        self.wait()
        _open_ledgers.discard(self)
        self.raise_unread(of_all_threads=True)


_open_ledgers: set[Ledger] = set()


def _report_unread_failures() -> None:
    """At interpreter exit: let queued work finish, print what failed unseen, and make the exit status say so."""
    failures = 0
    for ledger in list(_open_ledgers):
        ledger.wait()
        for future in ledger._futures:
            if (error := future.unread_failure()) is not None:
                failures += 1
                code = error.code if isinstance(error, FiresteelError) else type(error).__name__
                sys.stderr.write(
                    f"error[{code}]: {future._name} failed and nobody read its result: {error}\n"
                )
    if failures:
        # An exit handler cannot change the exit status in any other way; so first do what would follow.
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


atexit.register(_report_unread_failures)
