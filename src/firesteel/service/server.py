"""The process that serves: uvicorn around the app, logs as JSON lines, and an orderly end."""

from __future__ import annotations

import json
import logging
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from firesteel.sdk.errors import ConfigError
from firesteel.service.app import build_app
from firesteel.service.records import Records
from firesteel.service.service import Limits, Service

END_SECONDS = 30


@dataclass(frozen=True)
class Settings:
    """What a server is started with."""

    home: Path
    records: Records
    base_models: tuple[str, ...]
    limits: Limits
    no_auth: bool


class JSONLines(logging.Formatter):
    """Each record as one line of JSON: its fields, if its message is an object already, and a failure's traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        message = record.getMessage()
        try:
            fields = json.loads(message) if message.startswith("{") else {"message": message}
        except ValueError:
            fields = {"message": message}
        line = {"time": round(record.created, 3), "level": record.levelname.lower(), **fields}
        if record.exc_info:
            line["failed"] = self.formatException(record.exc_info)
        return json.dumps(line)


def listen(host: str, port: int) -> socket.socket:
    """A socket for `run_server`; port 0 picks one that is free. Raises `ConfigError` for one that cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio switches Nagle's algorithm off only where it can see that a connection is TCP; with it on, each answer
    # waits for the client's delayed acknowledgement: 40 ms.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen()  # whoever reads the address and calls at once waits, and is not refused
    except OSError as error:
        listening.close()
        raise ConfigError(f"--host {host} --port {port}: {error}; choose another, or --port 0") from error
    return listening


def run_server(settings: Settings, listening: socket.socket) -> None:
    """Serve on this socket until a signal; then the running operation ends, and what was promised to be saved is."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JSONLines())
    for name in ("firesteel", "uvicorn.error"):
        log = logging.getLogger(name)
        log.addHandler(handler)
        log.setLevel(logging.INFO if name == "firesteel" else logging.WARNING)
        log.propagate = False
    service = Service(settings.home, settings.records, settings.base_models, settings.limits)
    config = uvicorn.Config(
        build_app(service, settings.no_auth),
        log_config=None,
        access_log=False,
        lifespan="on",
        # Not whatever else is installed (`uvicorn[standard]` comes with other packages): a request that ends before its
        # body does, or goes on behind it, is answered by these as the tests have it.
        http="h11",
        loop="asyncio",
        timeout_keep_alive=75,
        timeout_graceful_shutdown=END_SECONDS,
    )
    sys.stdout.flush()
    uvicorn.Server(config).run(sockets=[listening])
