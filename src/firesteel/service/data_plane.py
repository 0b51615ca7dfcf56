"""The data plane of Tinker 0.23 and Fireworks clients: JSON in, a promise out, the result by `retrieve_future`.

One set of handlers under two roots: `/api/v1` for plain `tinker`, and below a trainer job's for Fireworks clients.
Status codes follow what the clients make of them: 4xx for what will never work, 408 for "ask again", 410 for what is
gone, and never 5xx, which they repeat for minutes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from fastapi import APIRouter
from fastapi.responses import Response
from numpy.typing import ArrayLike

from firesteel.catalog import load_catalog
from firesteel.sdk.errors import FiresteelError, NonFiniteError, NotBuiltYetError, OperationError, TrainerLost
from firesteel.sdk.operations import Forward, ForwardBackward, OptimStep, Sample
from firesteel.sdk.types import (
    ForwardBackwardOutput,
    OptimStepResponse,
    SampledSequence,
    SampleResponse,
    TensorData,
)
from firesteel.service import requests as bodies
from firesteel.service.access import Here, Served
from firesteel.service.answers import Asked
from firesteel.service.checkpoints import described
from firesteel.service.service import Service
from firesteel.service.sessions import ModelRequest, Place, ServedModel

router = APIRouter()


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """Whether the server answers."""
    return {"status": "ok"}


@router.post("/client/config")
async def client_config(place: Here) -> dict[str, Any]:
    """Settings of the client: its own defaults, all of them."""
    return {}


@router.post("/client/dynamic_config")
async def client_dynamic_config(place: Here) -> dict[str, Any]:
    """The same, asked for again from time to time."""
    return {}


@router.post("/telemetry")
async def telemetry(place: Here) -> dict[str, str]:
    """Accepted and thrown away."""
    return {"status": "accepted"}


@router.get("/get_server_capabilities")
async def capabilities(place: Here, service: Served) -> dict[str, Any]:
    """The models that are offered by name."""
    names = service.models.offered or tuple(load_catalog().models)
    return {"supported_models": [{"model_name": name} for name in names]}


# Sessions and models


@router.post("/create_session")
async def create_session(body: bodies.CreateSessionBody, place: Here, service: Served) -> dict[str, str]:
    """A session on this root."""
    return {"type": "create_session", "session_id": service.sessions.create(place).session_id}


@router.post("/session_heartbeat")
async def session_heartbeat(body: bodies.SessionBody, place: Here, service: Served) -> dict[str, str]:
    """Keep a session alive."""
    service.sessions.find(body.session_id, place)
    return {"type": "session_heartbeat"}


@router.post("/sessions/{session_id}/finish")
async def finish_session(session_id: str, place: Here, service: Served) -> dict[str, str]:
    """End a session and free its models."""
    with suppress(TrainerLost):  # it has ended: that is what was asked for
        await service.end_session(service.sessions.find(session_id, place))
    return {"status": "ok"}


@router.post("/create_model")
async def create_model(body: bodies.CreateModelBody, place: Here, service: Served) -> dict[str, Any]:
    """Promise of a model: `{"model_id"}`."""
    session = service.sessions.find(body.session_id, place)
    if body.base_only and body.lora_config is not None:
        raise OperationError("create_model: base_only is a frozen base, which has no lora_config")
    # A forward-only job makes frozen models, whether its client says so once more or not.
    frozen = body.base_only or (place.job_id is not None and service.jobs.find(place).forward_only)
    lora = body.lora_config.to_lora() if body.lora_config and not frozen else None
    request = ModelRequest(body.base_model, lora, not frozen, body.user_metadata or {})

    async def make() -> dict[str, Any]:
        model = await service.create_model(session, request)
        return {"type": "create_model", "model_id": model.model_id}

    def start() -> Awaitable[Any]:
        service.refuse_model(request, place.account)  # at once, not by the promise
        return make()

    return _promise(service, place, "create_model", (session.session_id, body.model_seq_id), body, start)


@router.post("/get_info")
async def get_info(body: bodies.ModelBody, place: Here, service: Served) -> dict[str, Any]:
    """What a model is."""
    model = service.sessions.model(body.model_id, place).description
    return {
        "type": "get_info",
        "model_id": body.model_id,
        "model_data": {"model_name": model.base_model, "tokenizer_id": model.base_model},
        "model_name": model.base_model,
        "is_lora": model.lora_rank > 0,
        "lora_rank": model.lora_rank,
    }


@router.post("/unload_model")
async def unload_model(body: bodies.ModelBody, place: Here, service: Served) -> dict[str, Any]:
    """Promise of a model's end."""
    answer = {"type": "unload_model", "model_id": body.model_id}

    def start() -> Awaitable[Any]:
        return _then(service.unload(service.sessions.model(body.model_id, place)), answer)

    return _promise(service, place, "unload_model", (body.model_id,), body, start)


# Training


@dataclass(frozen=True)
class _Turn:
    """A numbered request of a model. Its number is used up even where it is refused."""

    service: Service
    model: ServedModel
    seq_id: int
    body: bodies.Body

    @classmethod
    def of(cls, service: Service, place: Place, body: Any) -> _Turn:
        return cls(service, service.sessions.model(body.model_id, place), body.seq_id, body)

    def promise(self, start: Callable[[], Awaitable[Any]]) -> dict[str, Any]:
        numbers = (self.model.model_id, self.seq_id)
        try:
            promised = _promise(self.service, self.model.place, "turn", numbers, self.body, start)
        except FiresteelError as error:
            self.service.refuse(self.model, self.seq_id, error)
            raise
        return {**promised, "model_id": self.model.model_id}


def _promise(
    service: Service,
    place: Place,
    what: str,
    numbers: tuple[str | int, ...],
    body: bodies.Body,
    start: Callable[[], Awaitable[Any]],
) -> dict[str, Any]:
    answer = service.answers.once(_asked(place, what, numbers, body), start)
    return {"request_id": answer.request_id}


def _asked(place: Place, what: str, numbers: tuple[str | int, ...], body: bodies.Body) -> Asked:
    try:
        content = type(body).__name__.encode() + body.model_dump_json().encode()
    except ValueError as error:  # what a client keeps in its metadata may be too deep, or no text
        raise OperationError(f"{what}: {error}") from None
    return Asked.of(place.account, what, numbers, content)


@router.post("/forward")
async def forward(body: bodies.ForwardBody, place: Here, service: Served) -> dict[str, Any]:
    """Promise of log-probabilities and a loss.

    Offered to a `forward_backward` of the same tokens: so clients send a custom loss.
    """
    turn, given = _Turn.of(service, place, body), body.forward_input

    def start() -> Awaitable[Any]:
        service.check_count(len(given.data))
        data = given.to_data()
        return service.submit(
            turn.model,
            Forward(body.model_id, body.seq_id, data, given.loss_fn, given.loss_fn_config, offer=True),
        )

    return turn.promise(start)


@router.post("/forward_backward")
async def forward_backward(body: bodies.ForwardBackwardBody, place: Here, service: Served) -> dict[str, Any]:
    """Promise of the same, the gradient added."""
    turn, given = _Turn.of(service, place, body), body.forward_backward_input

    def start() -> Awaitable[Any]:
        service.check_count(len(given.data))
        data = given.to_data()
        return service.submit(
            turn.model, ForwardBackward(body.model_id, body.seq_id, data, given.loss_fn, given.loss_fn_config)
        )

    return turn.promise(start)


@router.post("/optim_step")
async def optim_step(body: bodies.OptimStepBody, place: Here, service: Served) -> dict[str, Any]:
    """Promise of a step's metrics."""
    turn = _Turn.of(service, place, body)
    return turn.promise(
        lambda: service.submit(turn.model, OptimStep(body.model_id, body.seq_id, body.to_params()))
    )


@router.post("/save_weights")
async def save_weights(body: bodies.SaveWeightsBody, place: Here, service: Served) -> dict[str, Any]:
    """Promise of a checkpoint to go on from: `{"path"}`."""
    turn = _Turn.of(service, place, body)

    def start() -> Awaitable[Any]:
        if body.overwrite:
            raise NotBuiltYetError("save_weights: overwrite is not built; a checkpoint's name is used once")
        return _typed("save_weights", "path", service.save_state(turn.model, body.seq_id, body.path, {}))

    return turn.promise(start)


@router.post("/load_weights")
async def load_weights(body: bodies.LoadWeightsBody, place: Here, service: Served) -> dict[str, Any]:
    """Promise of going on from a checkpoint; without `optimizer` its weights only."""
    turn = _Turn.of(service, place, body)
    answer = {"type": "load_weights", "path": body.path}
    return turn.promise(
        lambda: _then(service.load_state(turn.model, body.seq_id, body.path, body.optimizer), answer)
    )


@router.post("/load_adapter")
async def load_adapter(body: bodies.LoadAdapterBody, place: Here, service: Served) -> dict[str, Any]:
    """Promise of an adapter's weights from a checkpoint; the optimizer starts anew."""
    turn = _Turn.of(service, place, body)
    answer = {"type": "load_adapter", "model_id": body.model_id}
    return turn.promise(
        lambda: _then(service.load_state(turn.model, body.seq_id, body.adapter_path, optimizer=False), answer)
    )


@router.post("/save_weights_for_sampler")
async def save_weights_for_sampler(
    body: bodies.SaveForSamplerBody, place: Here, service: Served
) -> dict[str, Any]:
    """Promise of an export: named `{"path"}`, or for one sampling session `{"sampling_session_id"}`."""
    turn = _Turn.of(service, place, body)
    kind = "save_weights_for_sampler"

    def start() -> Awaitable[Any]:
        if (body.path is None) == (body.sampling_session_seq_id is None):
            raise OperationError("save_weights_for_sampler: give path, or sampling_session_seq_id")
        if body.checkpoint_type == "delta":
            raise NotBuiltYetError("checkpoint_type: delta exports are not built; ask for base")
        if body.path is None:
            return _typed(kind, "sampling_session_id", service.samplers.snapshot(turn.model, body.seq_id))
        merged = body.checkpoint_type == "merged_base" and turn.model.lora is not None
        return _typed(kind, "path", service.save_for_sampler(turn.model, body.seq_id, body.path, merged))

    return turn.promise(start)


async def _then(work: Awaitable[Any], answer: dict[str, Any]) -> dict[str, Any]:
    await work
    return answer


async def _typed(kind: str, field: str, work: Awaitable[str]) -> dict[str, Any]:
    return {"type": kind, field: await work}


# Checkpoints


@router.get("/list_checkpoints")
async def list_checkpoints(place: Here, service: Served) -> dict[str, Any]:
    """The names that training can go on from."""
    owner = f"jobs/{place.job_id}" if place.job_id else None
    rows = service.checkpoints.of(place.account, owner)
    return {"checkpoints": [row.name for row in rows if row.kind == "training"]}


@router.post("/weights_info")
async def weights_info(body: bodies.WeightsInfoBody, place: Here, service: Served) -> dict[str, Any]:
    """What a checkpoint is of."""
    return described(service.checkpoints.resolve(body.tinker_path, place))


# Sampling


@router.post("/create_sampling_session")
async def create_sampling_session(
    body: bodies.SamplingSessionBody, place: Here, service: Served
) -> dict[str, Any]:
    """A sampler of a checkpoint or a base."""
    session = service.sessions.find(body.session_id, place)
    sampler_id = f"{session.session_id}:sample:{body.sampling_session_seq_id}"

    def make() -> Awaitable[str]:
        return service.samplers.create(session, sampler_id, body.model_path, body.base_model)

    numbers = (session.session_id, body.sampling_session_seq_id)
    made = service.answers.once(_asked(place, "create_sampling_session", numbers, body), make)
    await asyncio.shield(made.future)
    return {"type": "create_sampling_session", "sampling_session_id": sampler_id}


@router.get("/samplers/{sampler_id}")
async def get_sampler(sampler_id: str, place: Here, service: Served) -> dict[str, Any]:
    """What a sampler reads."""
    model = service.samplers.find(sampler_id, place)
    return {"sampler_id": sampler_id, "base_model": model.description.base_model}


@router.post("/asample")
async def asample(body: bodies.SampleBody, place: Here, service: Served) -> dict[str, Any]:
    """Promise of continuations of one prompt."""
    model = service.samplers.find(body.sampling_session_id, place)
    if body.topk_prompt_logprobs:
        raise NotBuiltYetError("topk_prompt_logprobs: not built yet; ask for prompt_logprobs")

    def start() -> Awaitable[Any]:
        prompt, params = body.prompt.to_model_input(), body.sampling_params.to_params(body.num_samples)
        operation = Sample(model.model_id, prompt, params, body.num_samples, bool(body.prompt_logprobs))
        return service.submit(model, operation)

    numbers = (body.sampling_session_id, body.seq_id)
    promised = _promise(service, place, "asample", numbers, body, start)
    ids = [f"{promised['request_id']}:{number}" for number in range(body.num_samples)]
    return {**promised, "sample_sequence_ids": ids}


# Results


@router.post("/retrieve_future", responses={408: {"description": "not there yet; ask again"}})
async def retrieve_future(body: bodies.RetrieveBody, place: Here, service: Served) -> Response:
    """The result of a promise, or 408 after some seconds: ask again."""
    answer = service.answers.find(body.request_id, place.account)
    service.sessions.touch(answer.asked.session_id)
    if not await service.answers.wait(answer, service.limits.poll_seconds):
        content = {"type": "try_again", "request_id": body.request_id, "queue_state": "active"}
        return _json(content, status=408)
    error = answer.future.exception()
    if error is None:
        try:
            return _json(_as_json(answer.future.result()))
        except NonFiniteError as found:
            error = found
    category = error.category if isinstance(error, FiresteelError) else "server"
    return _json({"error": str(error) or type(error).__name__, "category": category})


def _json(content: dict[str, Any], status: int = 200) -> Response:
    return Response(orjson.dumps(content), status, media_type="application/json")


def _as_json(result: Any) -> dict[str, Any]:
    """A result as stock clients read it. Raises `NonFiniteError`: JSON has no NaN, and null is no number to them."""
    match result:
        case ForwardBackwardOutput():
            outputs = [
                {name: _tensor(tensor) for name, tensor in output.items()}
                for output in result.loss_fn_outputs
            ]
            kind = result.loss_fn_output_type
            _refuse_nan("metrics", list(result.metrics.values()))
            return {"loss_fn_output_type": kind, "loss_fn_outputs": outputs, "metrics": result.metrics}
        case OptimStepResponse():
            _refuse_nan("metrics", list(result.metrics.values()))
            return {"type": "optim_step", "metrics": result.metrics}
        case SampleResponse():
            sequences = [_sequence(sequence) for sequence in result.sequences]
            answer: dict[str, Any] = {"type": "sample", "sequences": sequences}
            if result.prompt_logprobs is not None:
                _refuse_nan("prompt_logprobs", [n for n in result.prompt_logprobs if n is not None])
                answer["prompt_logprobs"] = result.prompt_logprobs
            return answer
        case dict():
            return result
        case _:
            raise TypeError(f"no JSON is agreed on for {type(result).__name__}")


def _refuse_nan(what: str, numbers: ArrayLike) -> None:
    if not np.isfinite(numbers).all():
        raise NonFiniteError(
            f"{what}: not finite; the weights have diverged, so load a checkpoint and lower the learning rate"
        )


def _tensor(tensor: TensorData) -> dict[str, Any]:
    _refuse_nan("logprobs", tensor.to_numpy())
    return {"data": tensor.data, "dtype": tensor.dtype, "shape": tensor.shape}


def _sequence(sequence: SampledSequence) -> dict[str, Any]:
    _refuse_nan("logprobs", sequence.logprobs)
    return {
        "stop_reason": sequence.stop_reason,
        "tokens": sequence.tokens,
        "logprobs": sequence.logprobs,
    }
