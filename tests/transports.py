"""The three ways to a trainer, for tests that hold for each: in this process, behind HTTP without and with a socket."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from starlette.testclient import TestClient

from firesteel.engine.engine import Engine
from firesteel.sdk.http_transport import HTTPTransport
from firesteel.sdk.transport import Transport
from firesteel.service import keys
from firesteel.service.app import build_app
from firesteel.service.records import Records
from firesteel.service.server import listen
from firesteel.service.service import Limits, Service

EMBEDDED, IN_PROCESS, SOCKET = WAYS = ("embedded", "HTTP in process", "HTTP over a socket")


class RecordingEngine(Engine):
    """A real engine that also writes down what was submitted."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[object] = []

    def submit(self, operation, lane=""):
        self.log.append(operation)
        return super().submit(operation, lane)


@dataclass(frozen=True)
class Way:
    """A transport, and the engine at its end."""

    kind: str
    transport: Transport
    engine: RecordingEngine

    @property
    def closed(self) -> bool:
        """Whether the transport was closed."""
        if isinstance(self.transport, HTTPTransport):
            return self.transport._closed.is_set()
        return self.engine._closed


@dataclass(frozen=True)
class Server:
    """A server in a thread of this process."""

    url: str
    key: str
    service: Service
    app: FastAPI


@contextmanager
def way_to(kind: str, folder: Path, *base_models: str) -> Iterator[Way]:
    """One of `WAYS` to a new engine."""
    engine = RecordingEngine()
    with ExitStack() as ending:
        ending.callback(engine.close)
        if kind == EMBEDDED:
            yield Way(kind, engine, engine)
            return
        service = ending.enter_context(service_in(folder, *base_models, engine=engine))
        if kind == IN_PROCESS:
            key = keys.create(service.records, "test")[1]
            http = ending.enter_context(TestClient(build_app(service), "http://in-process"))
            transport = HTTPTransport("http://in-process", key, http=http)
        else:
            server = ending.enter_context(serving(service))
            transport = HTTPTransport(server.url, server.key)
        ending.callback(transport.close)
        yield Way(kind, transport, engine)


@contextmanager
def service_in(
    folder: Path, *base_models: str, engine: Engine | None = None, limits: Limits | None = None
) -> Iterator[Service]:
    """A service with records in a file of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    records = Records.open(f"sqlite:///{folder}/records.sqlite")
    yield Service(folder, records, base_models, limits, engine)


@contextmanager
def serving(service: Service) -> Iterator[Server]:
    """The service behind a socket of this machine."""
    listening = listen("127.0.0.1", 0)
    app = build_app(service)
    key = keys.create(service.records, "test")[1]
    server = uvicorn.Server(
        uvicorn.Config(
            app, log_config=None, access_log=False, timeout_graceful_shutdown=5, http="h11", loop="asyncio"
        )
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    try:
        yield Server(f"http://127.0.0.1:{listening.getsockname()[1]}", key, service, app)
    finally:
        server.should_exit = True
        thread.join()
