"""The way to a server: a `Transport` whose engine is behind HTTP.

Operations travel as they are (`wire`), so a loop gets what it would get from a trainer in its own process, to the bit.
Paths in operations are those of the loop's machine: what the trainer writes is fetched, what it reads is sent first.
"""

from __future__ import annotations

import logging
import secrets
import shutil
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2

from firesteel.sdk import wire
from firesteel.sdk.errors import ClosedError, FiresteelError, TrainerLost, TransportError
from firesteel.sdk.http_connection import HTTPConnection, Request
from firesteel.sdk.operations import (
    CreateBaseReference,
    CreateModel,
    LoadState,
    Operation,
    OrderedOperation,
    Refused,
    ResolveShape,
    SaveState,
    SaveWeights,
    operation_name,
)
from firesteel.sealed import storage_errors, sync

logger = logging.getLogger("firesteel")

PATIENCE = 300.0
HEARTBEAT_SECONDS = 10.0
_TRANSFER = "transfer:"
_IN_FLIGHT = 32


class HTTPTransport:
    """Thread-safe. Ordered operations are sent as they come, the server puts them in order.

    An operation without a number runs after all that was submitted before it for its model, as it would in an engine.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None,
        headers: Mapping[str, str] | None = None,
        patience: float = PATIENCE,
        http: httpx2.Client | None = None,
    ) -> None:
        """`patience`: how many seconds a server that does not answer is asked again, in all.

        `http` instead of a client of its own, for a server that is reached in another way than over a socket.
        """
        key = {"x-api-key": api_key} if api_key else {}
        self._connection = HTTPConnection(url.rstrip("/"), {**(headers or {}), **key}, patience, http)
        self._pool = ThreadPoolExecutor(_IN_FLIGHT, "firesteel-http")
        self._lock = threading.Lock()
        self._session_id: str | None = None
        self._waiting: dict[str, list[Future[Any]]] = {}
        self._barriers: dict[str, Future[Any]] = {}
        self._closed = threading.Event()
        self._heart: threading.Thread | None = None

    def submit(self, operation: Operation) -> Future[Any]:
        """Send an operation. The future gives its result or its error."""
        with self._lock:
            if self._closed.is_set():
                raise ClosedError(
                    f"{operation_name(operation)}: the connection to {self._connection.url} is closed"
                )
            model_id = _model_of(operation)
            earlier = [future for future in self._waiting.get(model_id, []) if not future.done()]
            first = earlier if not isinstance(operation, OrderedOperation) else []
            if model_id in self._barriers:
                first = [*first, self._barriers[model_id]]
            future = self._pool.submit(self._run, operation, first)
            if model_id:
                self._waiting[model_id] = [*earlier, future]
            if isinstance(operation, LoadState):
                # What it loads is sent first, and later numbers would wait at the server for longer than it holds them.
                self._barriers[model_id] = future
        return future

    def close(self) -> None:
        """End the session, which frees its models. What is under way is waited for while the server answers."""
        with self._lock:
            if self._closed.is_set():
                return
            self._closed.set()
            session_id, self._session_id = self._session_id, None
        self._pool.shutdown()
        if self._heart is not None:
            self._heart.join()
        if session_id is not None:
            try:
                self._connection.ask_once(Request("POST", f"/api/v1/sessions/{session_id}/finish"))
            except FiresteelError as error:
                logger.debug("session %s was not ended: %s", session_id, error)
        self._connection.close()

    def _run(self, operation: Operation, first: list[Future[Any]]) -> Any:
        wait(first)
        match operation:
            case SaveState() | SaveWeights():
                return self._save(operation)
            case LoadState():
                answer = self._with_sent(operation.path, lambda sent: replace(operation, path=sent))
                return replace(answer, path=operation.path)
            case CreateModel() if operation.start is not None and _is_path(operation.start):
                return self._with_sent(operation.start, lambda sent: replace(operation, start=sent))
            case _:
                return self._exchange(operation)

    def _exchange(self, operation: Operation) -> Any:
        """Send an operation and wait for its result."""
        try:
            return self._exchange_in(self._session(), operation)
        except TrainerLost:
            # A session without models is nothing to lose: a new one will do.
            if not isinstance(operation, ResolveShape | CreateModel):
                raise
            with self._lock:
                self._session_id = None
            return self._exchange_in(self._session(), operation)

    def _exchange_in(self, session_id: str, operation: Operation) -> Any:
        # Named once: however often it is sent, it runs once.
        headers = {"firesteel-request": secrets.token_hex(16), "firesteel-session": session_id}
        request = Request(
            "POST",
            "/api/v1/operations",
            wire.encode_operation(operation),
            {**headers, "content-type": wire.MEDIA_TYPE},
        )
        reply = self._connection.ask(request)
        while reply.status == 202:
            reply = self._connection.ask(Request("GET", "/api/v1/operations", headers=headers))
        return wire.decode_result(operation, reply.content)

    def _session(self) -> str:
        with self._lock:
            if self._session_id is None:
                reply = self._connection.ask(
                    Request("POST", "/api/v1/create_session", b"{}", {"content-type": "application/json"})
                )
                self._session_id = str(reply.json()["session_id"])
                if self._heart is None:
                    self._heart = threading.Thread(target=self._beat, name="firesteel-heartbeat", daemon=True)
                    self._heart.start()
            return self._session_id

    def _beat(self) -> None:
        """Tell the server that we are there, while the loop thinks."""
        while not self._closed.wait(HEARTBEAT_SECONDS):
            if (session_id := self._session_id) is None:
                continue
            content = b'{"session_id":"%s"}' % session_id.encode()
            headers = {"content-type": "application/json"}
            try:
                self._connection.ask_once(Request("POST", "/api/v1/session_heartbeat", content, headers))
            except TransportError:
                continue  # whoever needs the server will say so
            except FiresteelError:
                with self._lock:
                    if self._session_id == session_id:
                        self._session_id = None  # it is gone; the next model makes a new one

    def _save(self, operation: SaveState | SaveWeights) -> Any:
        target = Path(operation.path)
        if target.exists():
            name = operation_name(operation).partition(" ")[0]
            # Its number is used up all the same, as it would be by an engine.
            reason = f"{name}: {target} exists already; name a folder that does not"
            return self._exchange(Refused(operation.model_id, operation.seq_id, reason))
        answer = self._exchange(replace(operation, path=""))
        self._fetch_folder(answer.path.removeprefix(_TRANSFER), target)
        return replace(answer, path=str(target))

    def _with_sent(self, folder: str, build: Callable[[str], Operation]) -> Any:
        """Run an operation on a folder of ours; where it fails, the error names the folder as it is called here."""
        sent = self._send_folder(Path(folder))
        try:
            return self._exchange(build(sent))
        except FiresteelError as error:
            raise type(error)(str(error).replace(sent, folder)) from error

    def _send_folder(self, folder: Path) -> str:
        """Send all files of a folder; returns what it is called at the server. One that is missing arrives empty."""
        reply = self._connection.ask(Request("POST", "/api/v1/transfers"))
        transfer_id = str(reply.json()["transfer_id"])
        for path in sorted(folder.iterdir()) if folder.is_dir() else []:
            if path.is_file():
                self._connection.ask(Request("PUT", f"/api/v1/transfers/{transfer_id}/{path.name}", path))
        return f"{_TRANSFER}{transfer_id}"

    def _fetch_folder(self, transfer_id: str, target: Path) -> None:
        """Bring what the trainer has written to a new folder here: whole, hashed and on the disk, or not at all."""
        where = f"/api/v1/transfers/{transfer_id}"
        files = self._connection.ask(Request("GET", where)).json()["files"]
        partial = target.with_name(f".partial-{target.name}-{secrets.token_hex(4)}")
        with storage_errors(target, sum(file["size"] for file in files)):
            try:
                partial.mkdir(parents=True)
                for file in files:
                    reply = self._connection.ask(
                        Request("GET", f"{where}/{file['name']}", into=partial / file["name"])
                    )
                    if reply.sha256 != file["sha256"]:
                        raise TransportError(
                            f"{file['name']} of {target} arrived with other bytes than were sent"
                        )
                sync(partial)
                partial.rename(target)
                sync(target.parent)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        self._connection.ask(Request("DELETE", where))


def _model_of(operation: Operation) -> str:
    """The model whose earlier operations come first; "" where there is none."""
    match operation:
        case ResolveShape() | CreateModel():
            return ""
        case CreateBaseReference():
            return operation.policy_id
        case _:
            return operation.model_id


def _is_path(start: str) -> bool:
    """Whether a start is a folder here, instead of the name of a checkpoint at the server."""
    return Path(start).is_dir() or Path(start).is_absolute()
