"""What Prometheus sees at `/metrics`: queues, operations and their times, tokens, memory, models."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from firesteel.sdk.errors import FiresteelError
from firesteel.sdk.operations import Forward, ForwardBackward, Operation

if TYPE_CHECKING:
    from firesteel.service.service import Service

_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


class Metrics:
    """The numbers of one server, in a registry of their own."""

    def __init__(self, service: Service) -> None:
        self._registry = CollectorRegistry()
        self._seconds = Histogram(
            "firesteel_operation_seconds",
            "From an operation's arrival to its result.",
            ["operation"],
            buckets=(0.005, 0.02, 0.1, 0.5, 2, 10, 60, 300),
            registry=self._registry,
        )
        self._failed = Counter(
            "firesteel_operations_failed",
            "Operations that failed.",
            ["operation", "category"],
            registry=self._registry,
        )
        self._tokens = Counter(
            "firesteel_tokens",
            "Tokens that were read, before sharing.",
            ["operation"],
            registry=self._registry,
        )
        self._requests = Counter(
            "firesteel_requests", "HTTP requests by status.", ["method", "status"], registry=self._registry
        )
        self._gauge(
            "firesteel_queue_depth", "Operations that wait.", lambda: sum(service.engine.waiting().values())
        )
        self._gauge("firesteel_sessions", "Clients that are connected.", lambda: len(service.sessions.all()))
        self._gauge(
            "firesteel_models",
            "Models that are loaded.",
            lambda: sum(len(s.models) for s in service.sessions.all()),
        )
        self._gauge(
            "firesteel_answers", "Results that are kept for their clients.", lambda: len(service.answers)
        )
        self._gauge("firesteel_resident_bytes", "Memory of the process.", resident_bytes)

    def count_request(self, method: str, status: int) -> None:
        """Count one HTTP request; 0 is one that its client did not wait for."""
        # A method may be any word, and each that is new would be kept for good.
        self._requests.labels(method if method in _METHODS else "other", str(status)).inc()

    def _gauge(self, name: str, meaning: str, read: object) -> None:
        Gauge(name, meaning, registry=self._registry).set_function(read)  # type: ignore[arg-type]

    @contextmanager
    def operation(self, operation: Operation) -> Iterator[None]:
        """Count one operation, and how long it took with its waiting."""
        name = type(operation).__name__
        start = time.monotonic()
        try:
            yield
        except FiresteelError as error:
            self._failed.labels(name, error.category).inc()
            raise
        finally:
            self._seconds.labels(name).observe(time.monotonic() - start)
        if isinstance(operation, Forward | ForwardBackward):
            self._tokens.labels(name).inc(sum(datum.model_input.length for datum in operation.data))

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)


def resident_bytes() -> float:
    """Memory of this process now."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return float(file.read().split()[1]) * resource.getpagesize()
