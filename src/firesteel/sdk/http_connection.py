"""One server behind a URL: requests that are repeated until it answers, or until that has taken too long."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from firesteel.sdk import wire
from firesteel.sdk.errors import ClosedError, ConfigError, FiresteelError, OperationError, TransportError

logger = logging.getLogger("firesteel")

# The server holds a request for some 20 s where its result is not there yet.
READ_SECONDS = 60.0
CONNECT_SECONDS = 5.0
FIRST_WAIT, LONGEST_WAIT = 0.25, 10.0
HURRIED_SECONDS = 5.0
SILENT_SECONDS = 2.0  # before people are told: a connection that breaks once is nobody's business
RETRIED = (408, 429, 500, 502, 503, 504)
_CHUNK = 2**20


@dataclass(frozen=True)
class Request:
    """What is asked of the server. A path among the contents is sent, or written, a piece at a time."""

    method: str
    path: str
    content: bytes | Path | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    into: Path | None = None
    """Where the body of the answer goes, instead of into memory."""


@dataclass(frozen=True)
class Reply:
    """What the server said, its errors raised already."""

    status: int
    content: bytes
    sha256: str | None = None
    """Of what was written to a file."""

    def json(self) -> dict[str, Any]:
        """The content as a JSON object. Raises `ConfigError` for a server of another kind."""
        import orjson

        try:
            content = orjson.loads(self.content)
            if isinstance(content, dict):
                return content
        except orjson.JSONDecodeError:
            pass
        raise ConfigError(
            f"the server answered {self.content[:80]!r}, which is not JSON; is it `firesteel serve`?"
        )


class HTTPConnection:
    """Thread-safe. A server that cannot be reached for `patience` seconds is a `TransportError`."""

    def __init__(
        self, url: str, headers: Mapping[str, str], patience: float, http: httpx2.Client | None = None
    ) -> None:
        self.url = url
        self._headers = dict(headers)
        self._patience = self._usual_patience = patience
        self._closing = threading.Event()
        self._told = threading.Event()
        self._http = http or httpx2.Client(
            base_url=url,
            timeout=httpx2.Timeout(READ_SECONDS, connect=CONNECT_SECONDS),
            limits=httpx2.Limits(max_connections=64, max_keepalive_connections=32),
        )

    def ask(self, request: Request) -> Reply:
        """Send until there is an answer. Raises what the server raised, `TransportError`, or `ClosedError`."""
        silent_since, wait = None, FIRST_WAIT
        while True:
            if self._closing.is_set():
                raise ClosedError(f"{request.method} {request.path}: the connection was closed")
            problem, advised = self._try(request)
            if isinstance(problem, Reply):
                self._answers()
                return problem
            # From here on, not from when it was sent: what takes long to send may break after long.
            silent_since = silent_since or time.monotonic()
            silent = time.monotonic() - silent_since
            if silent + wait > self._patience:
                # Whoever asks next asks once: it would wait for the same thing.
                self._patience = 0.0
                raise TransportError(
                    f"{self.url} has not answered for {silent:.0f} s ({problem}); is `firesteel serve` running "
                    "there, and the address right?"
                )
            if silent > SILENT_SECONDS:
                self._tell_trouble(problem)
            self._closing.wait(advised if advised is not None else wait)
            wait = min(2 * wait, LONGEST_WAIT)

    def _answers(self) -> None:
        self._patience = self._usual_patience
        if self._told.is_set():
            self._told.clear()
            logger.warning("%s answers again", self.url)

    def hurry(self) -> None:
        """From now on wait only a little for a server that does not answer."""
        self._usual_patience = self._patience = min(self._patience, HURRIED_SECONDS)

    def _tell_trouble(self, problem: str) -> None:
        if not self._told.is_set():
            self._told.set()
            logger.warning(
                "%s does not answer (%s); asking again for %g s", self.url, problem, self._patience
            )

    def _try(self, request: Request) -> tuple[Reply | str, float | None]:
        """The reply, or why there is none yet and how long the server wants to be left alone."""
        try:
            reply, retry_after = self._send(request)
        except httpx2.TransportError as error:
            return f"{type(error).__name__}: {error}", None
        if reply.status in RETRIED:
            return f"HTTP {reply.status}", retry_after
        if reply.status >= 400:
            raise _error_of(self.url, request, reply)
        return reply, None

    def _send(self, request: Request) -> tuple[Reply, float | None]:
        content = _pieces(request.content) if isinstance(request.content, Path) else request.content
        headers = {**self._headers, **request.headers}
        if isinstance(request.content, Path):
            headers["content-length"] = str(request.content.stat().st_size)
        with self._http.stream(request.method, request.path, content=content, headers=headers) as answer:
            advised = answer.headers.get("retry-after", "")
            retry_after = min(float(advised), 60.0) if advised.isdigit() else None
            if request.into is None or answer.status_code != 200:
                return Reply(answer.status_code, answer.read()), retry_after
            digest = hashlib.sha256()
            with request.into.open("wb") as file:
                for piece in answer.iter_bytes(_CHUNK):
                    file.write(piece)
                    digest.update(piece)
                file.flush()
                os.fsync(file.fileno())
            return Reply(answer.status_code, b"", digest.hexdigest()), retry_after

    def ask_once(self, request: Request) -> Reply:
        """Send once. Raises what the server raised, or `TransportError`."""
        problem, _ = self._try(request)
        if isinstance(problem, Reply):
            return problem
        raise TransportError(f"{self.url}: {problem}")

    def stop_trying(self) -> None:
        """Let every request that is being repeated fail with `ClosedError`."""
        self._closing.set()

    def close(self) -> None:
        """End it."""
        self.stop_trying()
        self._http.close()


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(_CHUNK):
            yield piece


def _error_of(url: str, request: Request, reply: Reply) -> FiresteelError:
    try:
        error = reply.json()["error"]
        return wire.error_of(str(error["code"]), str(error["message"]), OperationError)
    except (ConfigError, KeyError, TypeError):
        return ConfigError(
            f"base_url: {url} answered {request.method} {request.path} with HTTP {reply.status}: "
            f"{reply.content[:80]!r}; is it `firesteel serve`?"
        )
