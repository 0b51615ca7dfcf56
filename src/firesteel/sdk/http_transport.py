"""The way to a server: a `Transport` whose engine is behind HTTP.

Operations travel as they are (`wire`), so a loop gets what it would get from a trainer in its own process, to the bit.
Paths in operations are those of the loop's machine: what the trainer writes is fetched, what it reads is sent first.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import shutil
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2

from firesteel.sdk import wire
from firesteel.sdk.errors import (
    AuthError,
    ClosedError,
    FiresteelError,
    OperationError,
    TrainerLost,
    TransportError,
)
from firesteel.sdk.http_connection import HTTPConnection, Request
from firesteel.sdk.operations import (
    CreateBaseReference,
    CreateModel,
    IdentifyModel,
    LoadState,
    Operation,
    OrderedOperation,
    Refused,
    ResolveShape,
    Sample,
    SaveState,
    SaveWeights,
    operation_name,
)
from firesteel.sealed import storage_errors, sync

logger = logging.getLogger("firesteel")

PATIENCE = 300.0
HEARTBEAT_SECONDS = 10.0
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
        self._under_way: dict[str, list[Future[Any]]] = {}
        """What was submitted for each model and is not answered yet."""
        self._barriers: dict[str, list[Future[Any]]] = {}
        """What everything that is submitted later for a model waits for."""
        self._saves: dict[str, Future[Any]] = {}
        """What is being written to which path."""
        self._session_lock = threading.Lock()
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
            earlier = [future for future in self._under_way.get(model_id, []) if not future.done()]
            first = [*self._what_comes_first(operation, earlier), *self._barriers.get(model_id, [])]
            future = self._pool.submit(self._run, operation, first)
            if model_id:
                self._under_way[model_id] = [*earlier, future]
            if isinstance(operation, LoadState | Sample | IdentifyModel):
                # The first takes long to send, and later numbers would wait for longer than the server holds them;
                # the others have no number, and see the weights of now.
                self._barriers[model_id] = [future]
            if isinstance(operation, SaveState | SaveWeights):
                self._saves[operation.path] = future
        return future

    def _what_comes_first(self, operation: Operation, earlier: list[Future[Any]]) -> list[Future[Any]]:
        """What has to have been answered before this is sent."""
        first = [] if isinstance(operation, OrderedOperation) else earlier
        self._saves = {path: future for path, future in self._saves.items() if not future.done()}
        read = operation.path if isinstance(operation, LoadState) else None
        read = operation.start if isinstance(operation, CreateModel) else read
        return [*first, self._saves[read]] if read is not None and read in self._saves else first

    def close(self) -> None:
        """End the session, which frees its models. What is under way is waited for while the server answers."""
        with self._lock:
            if self._closed.is_set():
                return
            self._closed.set()
        self._connection.hurry()
        self._pool.shutdown()
        session_id = self._session_id
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
        try:
            sent = self._prepare(operation)
            content = wire.encode_operation(sent)
        except (FiresteelError, OSError, TypeError, ValueError) as error:
            self._use_up(operation, error)
            if isinstance(error, FiresteelError):
                raise
            raise OperationError(f"{operation_name(operation)}: {error}") from error
        return self._conclude(operation, sent, content)

    def _use_up(self, operation: Operation, error: Exception) -> None:
        """The number of an operation that did not run is used up all the same, as it would be by an engine."""
        if isinstance(operation, OrderedOperation) and not isinstance(operation, Refused):
            refused = Refused(operation.model_id, operation.seq_id, str(error))
            with suppress(FiresteelError):  # it may have been used up there
                self._connection.ask(_posted(self._session(), wire.encode_operation(refused)))

    def _prepare(self, operation: Operation) -> Operation:
        """The operation as the server can run it: what it reads is sent, what it writes is written there."""
        match operation:
            case SaveState() | SaveWeights():
                if Path(operation.path).exists():
                    name = operation_name(operation).partition(" ")[0]
                    raise OperationError(
                        f"{name}: {operation.path} exists already; name a folder that does not"
                    )
                return replace(operation, path="")
            case LoadState():
                return replace(operation, path=self._send_folder(Path(operation.path)))
            case CreateModel() if operation.start is not None and _is_path(operation.start):
                return replace(operation, start=self._send_folder(Path(operation.start)))
            case _:
                return operation

    def _conclude(self, operation: Operation, sent: Operation, content: bytes) -> Any:
        """The result, by the names that folders have here."""
        match operation, sent:
            case ((SaveState() | SaveWeights()), _):
                answer = self._exchange(sent, content)
                self._fetch_folder(answer.path.removeprefix(wire.TRANSFER), Path(operation.path))
                return replace(answer, path=operation.path)
            case LoadState(), LoadState():
                with _called(sent.path, operation.path):
                    return replace(self._exchange(sent, content), path=operation.path)
            case CreateModel(start=str(here)), CreateModel(start=str(there)):
                with _called(there, here):
                    return self._exchange(sent, content)
            case _:
                return self._exchange(sent, content)

    def _exchange(self, operation: Operation, content: bytes) -> Any:
        """Send an operation and wait for its result."""
        session_id = self._session()
        try:
            return self._exchange_in(session_id, operation, content)
        except TrainerLost:
            # It may be one model that is gone, and others of this session live by its heartbeat.
            if not isinstance(operation, ResolveShape | CreateModel):
                raise
            self._forget_session(session_id)
            return self._exchange_in(self._session(), operation, content)

    def _exchange_in(self, session_id: str, operation: Operation, content: bytes) -> Any:
        request = _posted(session_id, content)
        try:
            reply = self._connection.ask(request)
        except (TransportError, TrainerLost, AuthError, ClosedError):
            raise
        except FiresteelError as error:  # refused at the door, perhaps before its number was read
            self._use_up(operation, error)
            raise
        while reply.status == 202:
            reply = self._connection.ask(Request("GET", request.path, headers=request.headers))
        return wire.decode_result(operation, reply.content)

    def _session(self) -> str:
        with self._session_lock:
            if self._session_id is None:
                content, headers = b"{}", {"content-type": "application/json"}
                reply = self._connection.ask(Request("POST", "/api/v1/create_session", content, headers))
                self._session_id = str(reply.json()["session_id"])
                if self._heart is None:
                    self._heart = threading.Thread(target=self._beat, name="firesteel-heartbeat", daemon=True)
                    self._heart.start()
            return self._session_id

    def _forget_session(self, session_id: str) -> None:
        """It is gone; the next model makes a new one."""
        with self._session_lock:
            if self._session_id == session_id:
                self._session_id = None

    def _beat(self) -> None:
        """Tell the server that we are there, while the loop thinks."""
        while not self._closed.wait(HEARTBEAT_SECONDS):
            if (session_id := self._session_id) is None:
                continue
            content = b'{"session_id":"%s"}' % session_id.encode()
            headers = {"content-type": "application/json"}
            try:
                self._connection.ask_once(Request("POST", "/api/v1/session_heartbeat", content, headers))
            except TrainerLost:
                self._forget_session(session_id)
            except FiresteelError:
                continue  # whoever needs the server will say so

    def _send_folder(self, folder: Path) -> str:
        """Send all files of a folder; returns what it is called at the server. One that is missing arrives empty."""
        reply = self._connection.ask(Request("POST", "/api/v1/transfers"))
        transfer_id = str(reply.json()["transfer_id"])
        for path in sorted(folder.iterdir()) if folder.is_dir() else []:
            if not path.is_file() or not wire.FILE_NAME.fullmatch(path.name):  # `.gitattributes` and the like
                continue
            with path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            where = f"/api/v1/transfers/{transfer_id}/{path.name}"
            if self._connection.ask(Request("PUT", where, path)).json()["sha256"] != sha256:
                raise TransportError(f"{path} arrived with other bytes than were sent")
        return f"{wire.TRANSFER}{transfer_id}"

    def _fetch_folder(self, transfer_id: str, target: Path) -> None:
        """Bring what the trainer has written to a new folder here: whole, hashed and on the disk, or not at all."""
        where = f"/api/v1/transfers/{transfer_id}"
        files = self._connection.ask(Request("GET", where)).json()["files"]
        if strange := [file["name"] for file in files if not wire.FILE_NAME.fullmatch(file["name"])]:
            raise TransportError(
                f"{target}: the server has sent {strange[0]!r}, which is not the name of a file"
            )
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
        with suppress(FiresteelError):  # it is whole here; what is left there is swept
            self._connection.ask_once(Request("DELETE", where))


@contextmanager
def _called(there: str, here: str) -> Iterator[None]:
    """Errors about a folder that was sent, by its name on this side."""
    try:
        yield
    except FiresteelError as error:
        raise type(error)(str(error).replace(there, here)) from error


def _posted(session_id: str, content: bytes) -> Request:
    """An operation to be sent. Named once: however often it is, it runs once."""
    headers = {"firesteel-request": secrets.token_hex(16), "firesteel-session": session_id}
    return Request("POST", "/api/v1/operations", content, {**headers, "content-type": wire.MEDIA_TYPE})


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
