"""What a server does for its clients, whichever wire they speak: sessions and models over one engine.

Runs in one event loop; the engine has its own thread. Operations of a model go through `Service.submit`, others through
`Service.run`, in the lane of their session: the engine takes turns between these.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from firesteel.catalog import load_catalog
from firesteel.engine.engine import Engine
from firesteel.sdk.errors import ClosedError, FiresteelError, OperationError, TrainerLost
from firesteel.sdk.operations import (
    CreateBaseReference,
    CreateModel,
    Examine,
    Forward,
    ForwardBackward,
    LoadState,
    ModelDescription,
    Operation,
    OptimStep,
    Refused,
    ReleaseForward,
    ResolveShape,
    Sample,
    SaveState,
    SaveWeights,
    UnloadModel,
    operation_name,
)
from firesteel.sdk.service_client import REFERENCE_MODES, policy_mode
from firesteel.sdk.shapes import TrainingShape
from firesteel.sdk.types import Datum
from firesteel.sdk.validation import check_adam_params, check_data, check_lora, check_sampling
from firesteel.service.answers import Answers
from firesteel.service.checkpoints import Checkpoints, Kind, tinker_path
from firesteel.service.jobs import Jobs
from firesteel.service.metrics import Metrics
from firesteel.service.models import Models
from firesteel.service.promotions import Promotions
from firesteel.service.records import DatabaseAway, Records
from firesteel.service.samplers import Samplers
from firesteel.service.sessions import ModelRequest, ServedModel, Session, Sessions
from firesteel.service.transfers import Transfers

logger = logging.getLogger("firesteel.service")

DataOperation = Forward | ForwardBackward | Examine


@dataclass(frozen=True)
class Limits:
    """What a server takes from its clients; seconds and bytes."""

    body_bytes: int = 64 * 2**20
    transfer_bytes: int = 64 * 2**30
    """Of one file of a state or an adapter that is sent to be loaded."""
    datums: int = 4096
    models: int = 64
    samples: int = 128
    """Of one prompt in one request."""
    waiting: int = 1000
    """Operations of one session that wait for their turn."""
    sampled_tokens: int = 2**17
    """Of all samples of one request."""
    activation_tokens: int = 2**16
    """Most tokens whose graph a model may ask to have kept."""
    gap_seconds: float = 330.0
    """How long an operation waits for an earlier number of its model: longer than a client of ours asks again."""
    session_seconds: float = 300.0
    """How long a session lives without a call or a heartbeat."""
    retained_seconds: float = 600.0
    """How long a forward that has run waits for its backward."""
    poll_seconds: float = 20.0
    """How long a request for an answer is held; clients give up after 45 s."""


class Busy(OperationError):
    """Too much is under way; the same request may pass in a moment."""

    code = "busy"


class Service:
    """One engine, and all who use it."""

    def __init__(
        self,
        home: Path,
        records: Records,
        base_models: Sequence[str] = (),
        limits: Limits | None = None,
        engine: Engine | None = None,
    ) -> None:
        """With `base_models`, models are made of those (and of promoted ones) only. Without an engine it makes one."""
        self.limits = limits or Limits()
        self.records = records
        self.engine = engine or Engine()
        self.sessions = Sessions()
        self.answers = Answers()
        self.metrics = Metrics(self)
        self.checkpoints = Checkpoints(home, records, self.sessions.is_at)
        self.transfers = Transfers(home / "transfers", self.limits.transfer_bytes)
        self.jobs = Jobs(records, self)
        self.models = Models(home / "models", records, base_models)
        self.samplers = Samplers(self)
        self.promotions = Promotions(self)
        self._being_made = 0
        self._beside: set[asyncio.Task[None]] = set()

    async def run(self, operation: Operation, lane: str) -> Any:
        """The result of one operation; raises its error. Refusals at the door are raised before anything waits."""
        return await self._timed(operation, self.engine.submit(operation, lane))

    def submit(self, model: ServedModel, operation: Operation) -> Awaitable[Any]:
        """Queue an operation of a model; what cannot run is refused here, at once."""
        self.check(model, operation)
        if self.engine.waiting().get(model.session_id, 0) >= self.limits.waiting:
            raise Busy(
                f"{self.limits.waiting} operations of this session wait already; send more when some are done"
            )
        return self._noted(model, operation, self.engine.submit(operation, model.session_id))

    async def _noted(self, model: ServedModel, operation: Operation, future: Future[Any]) -> Any:
        """The result, once the account of what waits for a backward is right: only what has run changes it."""
        try:
            result = await self._timed(operation, future)
        except OperationError as error:
            if not self.sessions.holds(model):
                raise TrainerLost(
                    f"{model.model_id}: it was unloaded, or its session ended, before {operation_name(operation)} ran"
                ) from error
            raise
        model.note(operation)
        return result

    async def _timed(self, operation: Operation, future: Future[Any]) -> Any:
        with self.metrics.operation(operation):
            return await asyncio.wrap_future(future)

    def check(self, model: ServedModel, operation: Operation) -> None:
        """Refuse what can be seen to be wrong before it waits for its turn."""
        if isinstance(operation, OptimStep):
            check_adam_params(operation.adam_params)
        if isinstance(operation, Sample):
            if operation.num_samples > self.limits.samples:
                raise OperationError(
                    f"num_samples: {operation.num_samples}; this server draws {self.limits.samples} in one request"
                )
            check_sampling(operation.sampling_params, operation.num_samples)
            tokens = operation.num_samples * operation.sampling_params.max_tokens
            if tokens > self.limits.sampled_tokens:
                raise OperationError(
                    f"num_samples × max_tokens: {tokens}; this server draws {self.limits.sampled_tokens} tokens in one "
                    "request, send several"
                )
        if not isinstance(operation, DataOperation):
            return
        loss_fn = "cross_entropy" if isinstance(operation, Examine) else operation.loss_fn
        settings = None if isinstance(operation, Examine) else operation.loss_fn_config
        self.check_count(len(operation.data))
        check_data(operation.data, loss_fn, settings, operation.weighted_only)
        if not model.description.trainable and not isinstance(operation, Forward):
            raise OperationError(
                f"{operation_name(operation)}: this model is a frozen reference; it only runs forward"
            )
        _check_lengths(operation.data, model.description)

    def check_count(self, datums: int) -> None:
        """Refuse a call of too many data."""
        if datums > self.limits.datums:
            raise OperationError(
                f"data: {datums} in one request; this server takes {self.limits.datums}, send several"
            )

    async def create_model(self, session: Session, request: ModelRequest) -> ServedModel:
        """Load a model for a session."""
        shape = await self.shape_for(session, request)
        source = self.models.source(request.base_model, session.place.account)
        operation = CreateModel(source, shape, request.lora, request.trainable)
        return await self.host(session, operation, request)

    async def host(
        self, session: Session, operation: CreateModel | CreateBaseReference, request: ModelRequest
    ) -> ServedModel:
        """Have the engine make a model, and give it to the session."""
        self._refuse_too_many()
        model_id = f"{session.session_id}:train:{session.numbers}"
        session.numbers += 1
        self._being_made += 1
        try:
            description = await self.run(replace(operation, model_id=model_id), session.session_id)
        finally:
            self._being_made -= 1
        if session.ended:
            await self._free(model_id, session)
            raise TrainerLost(f"{model_id}: its session ended while it was being made")
        described = replace(description, base_model=request.base_model)
        model = ServedModel(
            described, session.place, session.session_id, request.lora, metadata=request.metadata
        )
        session.models[model_id] = model
        return model

    def _refuse_too_many(self) -> None:
        held = self._being_made + sum(len(session.models) for session in self.sessions.all())
        if held >= self.limits.models:
            raise OperationError(
                f"create_model: this server holds {held} models and is set to hold {self.limits.models}; unload "
                "some, or start it with a larger --max-models"
            )

    async def shape_for(
        self, session: Session, request: ModelRequest, name: str | None = None
    ) -> TrainingShape:
        """The shape of this name, or one that fits; on a job, the job's. Fetches the model."""
        job = self.jobs.find(session.place) if session.place.job_id else None
        rank = request.lora.rank if request.lora else 0
        if job is not None:
            self.jobs.refuse_other_model(job, request.base_model, rank, request.trainable)
        modes = (policy_mode(rank),) if request.trainable else REFERENCE_MODES
        # A frozen base on a job for adapters runs where the adapters run, on the same weights.
        named = job.shape if job is not None and (request.trainable or job.forward_only) else name
        source = self.models.source(request.base_model, session.place.account)
        context = job.max_context_length if job is not None else None
        await self.models.fetch(source)
        shape: TrainingShape = await self.run(ResolveShape(source, modes, named, None), session.session_id)
        return shape if context is None else replace(shape, max_context_length=context)

    def refuse_model(self, request: ModelRequest, account: str) -> None:
        """Raise, before anything is loaded, for a model or an adapter that cannot be made."""
        load_catalog().resolve_model(self.models.source(request.base_model, account))
        if request.lora is not None:
            check_lora(request.lora)
        self._refuse_too_many()

    async def unload(self, model: ServedModel) -> None:
        """Free a model."""
        session = self.sessions.find(model.session_id, model.place)
        session.models.pop(model.model_id, None)
        await self.run(UnloadModel(model.model_id), model.session_id)

    async def end_session(self, session: Session) -> None:
        """Forget a session, and free its models: before what still waits for them, which then fails."""
        self.sessions.end(session)
        for model_id in list(session.models):
            await self._free(model_id, session)
        self.answers.forget(session.session_id)

    async def _free(self, model_id: str, session: Session) -> None:
        try:
            await self.run(UnloadModel(model_id), f"{session.session_id} ends")
        except FiresteelError as error:
            logger.warning("%s could not be unloaded: %s", model_id, error)

    def beside(self, work: Coroutine[Any, Any, None]) -> None:
        """Have something done that nobody waits for."""
        task = asyncio.get_running_loop().create_task(work)
        self._beside.add(task)
        task.add_done_callback(self._beside.discard)

    def refuse(self, model: ServedModel, seq_id: int, error: FiresteelError) -> None:
        """Use up the number of a request that was refused: its client counts on from it.

        Unless it was told to come back: then the same number comes again.
        """
        if isinstance(error, Busy | DatabaseAway | ClosedError):
            return
        with suppress(OperationError):  # the number may be that of a request that was accepted
            self.engine.submit(Refused(model.model_id, seq_id, str(error)), model.session_id)

    def save_state(
        self, model: ServedModel, seq_id: int, name: str, notes: Mapping[str, Any]
    ) -> Awaitable[str]:
        """Write a named checkpoint to go on from; gives how its client names it."""
        folder = self.checkpoints.new_folder(model, name, "training")
        saved = self._saved(model, SaveState(model.model_id, seq_id, str(folder), notes))
        return self._listed(saved, model, "training", folder)

    def save_for_sampler(
        self, model: ServedModel, seq_id: int, name: str, merged: bool = False
    ) -> Awaitable[str]:
        """Write a named export; gives how its client names it."""
        folder = self.checkpoints.new_folder(model, name, "sampler")
        saved = self._saved(model, SaveWeights(model.model_id, seq_id, str(folder), merged))
        return self._listed(saved, replace(model, lora=None) if merged else model, "sampler", folder)

    def _saved(self, model: ServedModel, operation: SaveState | SaveWeights) -> Awaitable[Any]:
        """Queue it; refused, the name of its folder is free again."""
        try:
            return self.submit(model, operation)
        except BaseException:
            self.checkpoints.give_up(Path(operation.path))
            raise

    async def _listed(self, saved: Awaitable[Any], model: ServedModel, kind: Kind, folder: Path) -> str:
        """What is listed is whole: after its folder is there."""
        name = folder.parent.name
        try:
            await saved
            self.checkpoints.add(model, name, kind, folder)
        except BaseException:
            self.checkpoints.give_up(folder)
            raise
        return name if model.place.job_id is not None else tinker_path(model, kind, name)

    def load_state(self, model: ServedModel, seq_id: int, path: str, optimizer: bool) -> Awaitable[Any]:
        """Go on from a named checkpoint; of an adapter's export, or a promoted adapter, the weights only."""
        folder = self.models.adapter(path, model.place.account)
        weights_only = folder is not None
        if folder is None:
            checkpoint = self.checkpoints.resolve(path, model.place, model.model_id)
            folder, weights_only = Path(checkpoint.folder), checkpoint.kind == "sampler"
            if weights_only and checkpoint.lora is None:
                raise OperationError(
                    f"path: {path!r} is an export of a whole model; load a checkpoint of save_weights (save_state)"
                )
        if weights_only and optimizer:
            raise OperationError(f"path: {path!r} is an adapter without an optimizer; load its weights only")
        return self.submit(model, LoadState(model.model_id, seq_id, str(folder), optimizer))

    async def tend(self) -> None:
        """What has to happen from time to time: once a second."""
        self.engine.give_up_gaps(self.limits.gap_seconds)
        self.answers.sweep()
        for session in self.sessions.silent(self.limits.session_seconds):
            logger.info("session %s has not been heard of and is ended", session.session_id)
            self.sessions.end(session)
            self.beside(self.end_session(session))
        for session in self.sessions.all():
            for model in session.models.values():
                for seq_id in model.overdue(self.limits.retained_seconds):
                    self.beside(self._release(model, seq_id))
        await self.jobs.tend()
        await asyncio.to_thread(self.transfers.sweep)

    async def _release(self, model: ServedModel, seq_id: int) -> None:
        with suppress(FiresteelError):  # it may have been unloaded meanwhile
            await self.run(ReleaseForward(model.model_id, seq_id), model.session_id)

    async def close(self) -> None:
        """Let the running operation end, finish writing, and free everything."""
        await asyncio.to_thread(self.engine.close)
        await self.answers.settle()  # a checkpoint that has just become whole is still to be listed
        self.records.close()
        logger.info("ended: what was running is done, what was being saved is saved")


def model_name(account: str, model_id: str) -> str:
    """A promoted model as a resource."""
    return f"accounts/{account}/models/{model_id}"


def _check_lengths(data: Sequence[Datum], description: ModelDescription) -> None:
    for index, datum in enumerate(data):
        if datum.model_input.length + 1 > description.max_context_length:
            raise OperationError(
                f"data[{index}]: {datum.model_input.length} input tokens and their last target exceed the "
                f"{description.max_context_length} tokens of {description.base_model} on this shape"
            )
