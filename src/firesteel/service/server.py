"""The process that serves: uvicorn around the app, logs as JSON lines, and an orderly end."""

from __future__ import annotations

import logging
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

import uvicorn

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


def run_server(settings: Settings, listening: socket.socket) -> None:
    """Serve on this socket until a signal; then the running operation ends, and what was promised to be saved is."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    service_log = logging.getLogger("firesteel.service")
    service_log.addHandler(handler)
    service_log.setLevel(logging.INFO)
    service_log.propagate = False
    service = Service(settings.home, settings.records, settings.base_models, settings.limits)
    config = uvicorn.Config(
        build_app(service, settings.no_auth),
        log_config=None,
        access_log=False,
        lifespan="on",
        timeout_keep_alive=75,
        timeout_graceful_shutdown=END_SECONDS,
    )
    sys.stdout.flush()
    uvicorn.Server(config).run(sockets=[listening])
