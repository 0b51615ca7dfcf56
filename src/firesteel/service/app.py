"""The server: routes under their roots, who may call, how much a body may hold, and errors as answers."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import orjson
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

import firesteel
from firesteel.sdk.errors import (
    AuthError,
    ClosedError,
    FiresteelError,
    OperationError,
    OperationFailed,
    TrainerLost,
    UserError,
)
from firesteel.service import control_plane, data_plane, operation_plane, status, training_runs
from firesteel.service import requests as bodies
from firesteel.service.access import ACCOUNT, NO_AUTH_ACCOUNT, Unauthenticated, authenticate, is_open
from firesteel.service.jobs import JobExists, NotFound
from firesteel.service.records import DatabaseAway
from firesteel.service.service import Busy, Service
from firesteel.service.sessions import Place

logger = logging.getLogger("firesteel.service")

ROOTS = ("/api/v1", "/training/v1/rlorTrainerJobs/{account}/{job}/api/v1")
TEND_SECONDS = 1.0
NO_AUTH_HOSTS = ("localhost", "127.0.0.1", "::1")
_RPC_STATUS = {400: "INVALID_ARGUMENT", 401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED", 404: "NOT_FOUND"}
_RPC_STATUS |= {409: "ALREADY_EXISTS", 410: "NOT_FOUND", 413: "INVALID_ARGUMENT", 503: "UNAVAILABLE"}


class ErrorBody(BaseModel):
    """Why a request was refused."""

    code: str
    message: str
    status: str


class ErrorAnswer(BaseModel):
    """Every answer of 400 and above."""

    error: ErrorBody


Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


def build_app(service: Service, no_auth: bool = False) -> FastAPI:
    """The application around a service, which it closes when it ends."""
    app = FastAPI(
        title="Firesteel",
        version=firesteel.__version__,
        description="Trainers behind HTTP: Tinker's data plane, Fireworks' control plane, and Firesteel's own client.",
        lifespan=_lifespan,
        responses={"4XX": {"model": ErrorAnswer, "description": "Refused, and why"}},
    )
    app.state.service = service
    for root in ROOTS:
        app.include_router(data_plane.router, prefix=root, tags=["data plane"])
        app.include_router(training_runs.router, prefix=root, tags=["training runs"])
        app.include_router(operation_plane.router, prefix=root, tags=["operations"])
    app.include_router(control_plane.router, tags=["control plane"])
    app.include_router(status.router, tags=["status"])
    app.add_exception_handler(FiresteelError, _answer_error)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_middleware(_Door, service=service, no_auth=no_auth)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    service: Service = app.state.service
    tending = asyncio.create_task(_tend(service))
    try:
        yield
    finally:
        tending.cancel()
        await service.close()


async def _tend(service: Service) -> None:
    while True:
        await asyncio.sleep(TEND_SECONDS)
        try:
            await service.tend()
        except FiresteelError as error:
            logger.warning("%s", error)
        except Exception:
            # The border: what goes wrong once must not end the tending for good.
            logger.exception("tending failed")


class _Door:
    """The first to see a request: its key, its size, its id, its line in the log. Reads no body itself."""

    def __init__(self, app: Any, service: Service, no_auth: bool) -> None:
        self._app = app
        self._service = service
        self._no_auth = no_auth

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = secrets.token_hex(8)
        started = time.monotonic()
        status = taken = 0
        most = self._most_bytes(scope)
        refused: FiresteelError | None = None

        async def bounded() -> Message:
            # Counted as it comes: a length that lies, or none at all, does not fill the memory.
            nonlocal taken, refused
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > most:
                refused = _TooLarge(
                    f"the body has more than the {most:,} bytes that this server takes; send less at a time"
                )
                raise refused
            return message

        async def unless_refused(message: Message) -> None:
            # Whatever is made, inside, of a body that broke off: the answer is the reason for it.
            if refused is None:
                await noted(message)

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self._admit(scope, most)
            await self._app(scope, bounded, unless_refused)
        except FiresteelError as error:
            refused = error
        except ClientDisconnect:
            pass
        except Exception as error:
            # The border: a bug of ours is one request's failure, said once, and nothing that a client repeats for
            # minutes.
            logger.error(json.dumps({"request": request_id}), exc_info=error)
            refused = OperationFailed(f"{type(error).__name__}: {error}")
        try:
            if refused is not None and not status:
                await _error_response(refused)(scope, receive, noted)
        finally:
            self._service.metrics.count_request(scope["method"], status)
            line = {"request": request_id, "method": scope["method"], "path": scope["path"], "status": status}
            line["ms"] = round((time.monotonic() - started) * 1e3, 1)
            logger.info(json.dumps(line))

    async def _admit(self, scope: Message, most: int) -> None:
        """Note whose request this is. Raises for what is refused whatever the body says."""
        headers = Headers(scope=scope)
        if self._no_auth:
            # A page in a browser reaches loopback too, under a name of its own that it lets point there.
            if _host_of(headers) not in NO_AUTH_HOSTS:
                raise AuthError("without keys this server answers to localhost, 127.0.0.1 and ::1 only")
            scope[ACCOUNT] = NO_AUTH_ACCOUNT
        elif not is_open(scope["path"]):
            scope[ACCOUNT] = await run_in_threadpool(authenticate, headers, self._service)
        if headers.get("content-encoding", "identity") != "identity":
            raise _Encoded("content-encoding: bodies are taken as they are, not compressed")
        declared = headers.get("content-length", "0")
        if declared.isdigit() and int(declared) > most:
            raise _TooLarge(
                f"the body has {int(declared):,} bytes; this server takes {most:,}, send less at a time"
            )

    def _most_bytes(self, scope: Message) -> int:
        limits = self._service.limits
        # By the method, too: a job may be called transfers.
        is_file = scope["method"] == "PUT" and "/api/v1/transfers/" in scope["path"]
        return limits.transfer_bytes if is_file else limits.body_bytes


def _host_of(headers: Headers) -> str | None:
    try:
        return urlsplit(f"//{headers.get('host', '')}").hostname
    except ValueError:
        return None


class _TooLarge(OperationError):
    code = "too_large"


class _Encoded(OperationError):
    code = "encoding"


_STATUS: dict[type[FiresteelError], int] = {
    Unauthenticated: 401,
    AuthError: 403,
    NotFound: 404,
    JobExists: 409,
    TrainerLost: 410,
    _TooLarge: 413,
    _Encoded: 415,
    Busy: 429,
    DatabaseAway: 503,
    ClosedError: 503,  # about to end: the one that a client may try again
    UserError: 400,
    # A failure of ours that a repetition would not mend: clients repeat 5xx for minutes.
    FiresteelError: 400,
}


def _error_response(error: FiresteelError) -> Response:
    status = next(status for kind, status in _STATUS.items() if isinstance(error, kind))
    return _response(status, error.code, str(error))


def _response(status: int, code: str, text: str, headers: Mapping[str, str] | None = None) -> Response:
    retry = {"retry-after": "2"} if status in (429, 503) else {"x-should-retry": "false"}
    content = {
        "error": {"code": code, "message": text, "status": _RPC_STATUS.get(status, "INVALID_ARGUMENT")}
    }
    return Response(
        orjson.dumps(content), status, {**(headers or {}), **retry}, media_type="application/json"
    )


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, FiresteelError)
    return _error_response(error)


async def _answer_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    if isinstance(error.body, bytes):
        return _response(400, "operation", "the body: expected JSON, with Content-Type: application/json")
    text = "; ".join(
        f"{'.'.join(map(str, found['loc'][1:])) or 'the body'}: {found['msg']}"
        for found in error.errors()[:5]
    )
    _use_up_number(request, error.body, text)
    return _response(400, "operation", text)


def _use_up_number(request: Request, body: Any, reason: str) -> None:
    """A client counts on from a request that was refused."""
    if not isinstance(body, dict) or not isinstance(body.get("seq_id"), int):
        return
    if body["seq_id"] >= bodies.MOST_SEQ_ID:
        return  # it would count on from there
    service: Service = request.app.state.service
    try:
        place = Place(request.scope[ACCOUNT], request.path_params.get("job"))
        model = service.sessions.model(str(body.get("model_id")), place)
    except FiresteelError:
        return
    service.refuse(model, body["seq_id"], OperationError(reason))


async def _answer_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _response(error.status_code, "http", str(error.detail), error.headers)
