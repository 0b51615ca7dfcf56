"""The one seam: a client talks to anything that has `submit` and `close`."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any, Protocol

from firesteel.sdk.operations import Operation


class Transport(Protocol):
    """Carries operations to where they run. The engine in this process is one; an HTTP connection is another."""

    def submit(self, operation: Operation) -> Future[Any]:
        """Queue an operation. The future gives its result (named in the operation's docstring) or its error."""

    def close(self) -> None:
        """Stop. What is still waiting fails with `ClosedError`, by name. May be called twice."""
