"""SIGTERM and SIGINT: the step that runs is finished and saved, then the process ends with 143 or 130."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Whether a signal has asked this run to end."""

    def __init__(self) -> None:
        self.signal: int | None = None

    @property
    def asked(self) -> bool:
        """Whether one has come."""
        return self.signal is not None

    def exit_if_asked(self) -> None:
        """End the process the way a shell expects of this signal. To be called where nothing is left to save."""
        if self.signal is not None:
            raise SystemExit(128 + self.signal)

    def receive(self, number: int, frame: FrameType | None) -> None:
        """The handler. It may run anywhere: it takes no lock and prints through no library."""
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = number
        name = signal.Signals(number).name
        os.write(2, f"\n{name}: ending after this step; once more to end at once\n".encode())


@contextmanager
def stopping_on_signals() -> Iterator[StopRequest]:
    """Answer signals with a request while the block runs. Only the main thread can: elsewhere they stay as they are."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.receive) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
