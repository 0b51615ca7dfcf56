"""The route of our own client: operations as they are, arrays as bytes, the answer in the same exchange if it can be.

A request names itself (`Firesteel-Request`), so that a client whose connection broke can ask again and nothing runs
twice. What takes longer than a request is held is asked for again in the same way, without its body.
"""

from __future__ import annotations

from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Header, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, Response

from firesteel.sdk import wire
from firesteel.sdk.errors import FiresteelError, OperationError, OperationFailed, TrainerLost
from firesteel.sdk.operations import (
    CreateBaseReference,
    CreateModel,
    IdentifyModel,
    LoadState,
    ModelDescription,
    Operation,
    OrderedOperation,
    ReleaseForward,
    ResolveShape,
    Sample,
    SaveState,
    SaveWeights,
    UnloadModel,
)
from firesteel.sdk.shapes import TrainingShape
from firesteel.sdk.types import LoadStateResponse, SaveStateResponse, SaveWeightsResponse
from firesteel.service.access import Here, Served
from firesteel.service.answers import Asked
from firesteel.service.service import Service
from firesteel.service.sessions import ModelRequest, ServedModel, Session

router = APIRouter()
RequestId = Annotated[str, Header(alias="firesteel-request", pattern=r"^[0-9a-f]{32}$")]
SessionId = Annotated[str, Header(alias="firesteel-session", max_length=64)]


@router.post("/operations", responses={202: {"description": "not there yet; GET /operations"}})
async def run_operation(
    request: Request, request_id: RequestId, session_id: SessionId, place: Here, service: Served
) -> Response:
    """Run one operation and answer with its result, or with 202 if that takes longer than a request is held."""
    content = await request.body()
    session = service.sessions.find(session_id, place)
    # Beside the loop, which others wait for too; and no more data than are taken, whatever the body says.
    operation = await run_in_threadpool(wire.decode_operation, content, service.limits.datums)
    asked = Asked.of(place.account, "operation", (session_id, request_id), content)
    service.answers.once(asked, lambda: _start(service, session, operation))
    return await _answer(service, asked.key)


@router.get("/operations", responses={202: {"description": "not there yet; ask again"}})
async def await_operation(
    request_id: RequestId, session_id: SessionId, place: Here, service: Served
) -> Response:
    """The result of an operation that was sent before."""
    return await _answer(service, (place.account, "operation", session_id, request_id))


async def _answer(service: Service, key: tuple[object, ...]) -> Response:
    answer = service.answers.of_key(key)
    if answer is None:
        raise TrainerLost(f"there is no operation of request {key[-1]!r} here: the server was started anew")
    service.sessions.touch(answer.asked.session_id)
    if not await service.answers.wait(answer, service.limits.poll_seconds):
        return Response(status_code=202)
    error = answer.future.exception()
    if error is None:
        content = wire.encode_result(answer.future.result())
    elif isinstance(error, FiresteelError):
        content = wire.encode_error(error)
    else:
        content = wire.encode_error(OperationFailed(f"{type(error).__name__}: {error}"))
    return Response(content, media_type=wire.MEDIA_TYPE)


def _start(service: Service, session: Session, operation: Operation) -> Awaitable[Any]:
    """What runs an operation for a session; refusals at the door are raised at once, and use up their number."""
    if not isinstance(operation, OrderedOperation):
        return _start_unordered(service, session, operation)
    model = service.sessions.model(operation.model_id, session.place)
    try:
        if isinstance(operation, SaveState | SaveWeights):
            return _save(service, model, operation)
        if isinstance(operation, LoadState):
            return _load(service, model, operation)
        return service.submit(model, operation)
    except FiresteelError as error:
        service.refuse(model, operation.seq_id, error)
        raise


def _start_unordered(service: Service, session: Session, operation: Operation) -> Awaitable[Any]:
    match operation:
        case ResolveShape():
            return _resolve(service, session, operation)
        case CreateModel():
            request = ModelRequest(operation.base_model, operation.lora, operation.trainable, {})
            service.refuse_model(request, session.place.account)
            budget = operation.activation_token_budget
            if budget is not None and not 1 <= budget <= service.limits.activation_tokens:
                raise OperationError(
                    f"activation_token_budget: {budget}; 1 to {service.limits.activation_tokens} are possible here"
                )
            return _create(service, session, operation, request)
        case CreateBaseReference():
            policy = service.sessions.model(operation.policy_id, session.place)
            request = ModelRequest(policy.description.base_model, None, False, {})
            return _described(service.host(session, operation, request))
        case UnloadModel():
            return service.unload(service.sessions.model(operation.model_id, session.place))
        case IdentifyModel() | ReleaseForward() | Sample():
            return service.submit(service.sessions.model(operation.model_id, session.place), operation)
        case _:
            raise OperationError(f"{type(operation).__name__} is not an operation of clients")


async def _resolve(service: Service, session: Session, operation: ResolveShape) -> TrainingShape:
    source = service.models.source(operation.base_model, session.place.account)
    await service.models.fetch(source)
    shape: TrainingShape = await service.run(replace(operation, base_model=source), session.session_id)
    return shape


async def _described(making: Awaitable[ServedModel]) -> ModelDescription:
    return (await making).description


async def _create(
    service: Service, session: Session, operation: CreateModel, request: ModelRequest
) -> ModelDescription:
    account, start = session.place.account, operation.start
    source = service.models.source(operation.base_model, account)
    # A shape is what it is here, whatever a client says of it; its context may be asked for shorter.
    shape = await service.shape_for(session, request, operation.shape.name)
    longest = [n for n in (shape.max_context_length, operation.shape.max_context_length) if n is not None]
    operation = replace(operation, shape=replace(shape, max_context_length=min(longest, default=None)))
    if start is None:
        return (await service.host(session, replace(operation, base_model=source), request)).description
    if not start.startswith(wire.TRANSFER):
        start = service.checkpoints.resolve(start, session.place).folder
        begun = replace(operation, base_model=source, start=start)
        return (await service.host(session, begun, request)).description
    transfer_id = start.removeprefix(wire.TRANSFER)
    folder = service.transfers.place(account, transfer_id)
    with _named(folder, start):
        try:
            begun = replace(operation, base_model=source, start=str(folder))
            return (await service.host(session, begun, request)).description
        finally:
            await run_in_threadpool(service.transfers.end, account, transfer_id)


@contextmanager
def _named(folder: Path, name: str) -> Iterator[None]:
    """Errors about a folder of this server, by the name that its client knows."""
    try:
        yield
    except FiresteelError as error:
        raise type(error)(str(error).replace(str(folder), name)) from error


def _save(
    service: Service, model: ServedModel, operation: SaveState | SaveWeights
) -> Awaitable[SaveStateResponse | SaveWeightsResponse]:
    """The client fetches what is written, and puts it where it wanted it."""
    account = model.place.account
    transfer_id = service.transfers.new(account)
    path = str(service.transfers.place(account, transfer_id))
    saving = service.submit(model, replace(operation, path=path))

    async def saved() -> SaveStateResponse | SaveWeightsResponse:
        answer: SaveStateResponse | SaveWeightsResponse = await saving
        return replace(answer, path=f"{wire.TRANSFER}{transfer_id}")

    return saved()


def _load(service: Service, model: ServedModel, operation: LoadState) -> Awaitable[LoadStateResponse]:
    """From what the client has sent before."""
    account, transfer_id = model.place.account, operation.path.removeprefix(wire.TRANSFER)
    folder = service.transfers.place(account, transfer_id)
    loading = service.submit(model, replace(operation, path=str(folder)))

    async def loaded() -> LoadStateResponse:
        with _named(folder, operation.path):
            try:
                answer: LoadStateResponse = await loading
            finally:
                await run_in_threadpool(service.transfers.end, account, transfer_id)
        return replace(answer, path=operation.path)

    return loaded()


# Folders on their way


@router.post("/transfers")
async def new_transfer(place: Here, service: Served) -> dict[str, str]:
    """Room for a folder that a client sends."""
    return {"transfer_id": service.transfers.new(place.account)}


@router.put("/transfers/{transfer_id}/{name}")
async def send_file(
    transfer_id: str, name: str, request: Request, place: Here, service: Served
) -> dict[str, Any]:
    """One file of it."""
    return asdict(await service.transfers.receive(place.account, transfer_id, name, request.stream()))


@router.get("/transfers/{transfer_id}")
async def list_files(transfer_id: str, place: Here, service: Served) -> dict[str, Any]:
    """What there is to fetch, with the hashes to compare it by."""
    files = await run_in_threadpool(service.transfers.files, place.account, transfer_id)
    return {"files": [asdict(file) for file in files]}


@router.get("/transfers/{transfer_id}/{name}")
async def fetch_file(transfer_id: str, name: str, place: Here, service: Served) -> FileResponse:
    """One file."""
    return FileResponse(service.transfers.file(place.account, transfer_id, name))


@router.delete("/transfers/{transfer_id}")
async def end_transfer(transfer_id: str, place: Here, service: Served) -> dict[str, str]:
    """It has been fetched."""
    await run_in_threadpool(service.transfers.end, place.account, transfer_id)
    return {"status": "ok"}
