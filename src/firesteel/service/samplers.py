"""Frozen models that sampling reads: of the weights at one moment, of a checkpoint, or of a base."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TYPE_CHECKING

from firesteel.sdk.errors import OperationError
from firesteel.sdk.operations import CreateModel, ResolveShape, SaveWeights
from firesteel.sdk.service_client import REFERENCE_MODES, policy_mode
from firesteel.sdk.types import LoraConfig, SaveWeightsResponse
from firesteel.service.sessions import ModelRequest, Place, ServedModel, Session

if TYPE_CHECKING:
    from firesteel.service.service import Service

KEPT = 8
"""Of one session. Clients make one for every look at their model and never say that they are done with it."""


class Samplers:
    """The sampling sessions of all sessions."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def find(self, sampler_id: str, place: Place) -> ServedModel:
        """The model that a sampler reads. Raises as `Sessions.find`."""
        session = self._service.sessions.find(sampler_id.partition(":")[0], place)
        if sampler_id not in session.samplers:
            raise OperationError(
                f"sampling_session_id: there is no sampler {sampler_id!r} (any more): a session keeps its newest {KEPT}"
            )
        return self._service.sessions.model(session.samplers[sampler_id], place)

    def snapshot(self, model: ServedModel, seq_id: int) -> Awaitable[str]:
        """A sampler of the weights as they are at this number. What is refused is refused now."""
        session = self._service.sessions.find(model.session_id, model.place)
        account = model.place.account
        transfer_id = self._service.transfers.new(account)
        folder = str(self._service.transfers.place(account, transfer_id))
        saving = self._service.submit(model, SaveWeights(model.model_id, seq_id, folder))
        return self._of_export(session, model, transfer_id, f"{model.model_id}-{seq_id}", saving)

    async def _of_export(
        self,
        session: Session,
        model: ServedModel,
        transfer_id: str,
        name: str,
        saving: Awaitable[SaveWeightsResponse],
    ) -> str:
        """Load what is being written, which is kept only until then."""
        account = model.place.account
        request = ModelRequest(model.description.base_model, model.lora, False, {})
        try:
            folder = (await saving).path
            source = (
                folder if model.lora is None else self._service.models.source(request.base_model, account)
            )
            start = None if model.lora is None else folder
            operation = CreateModel(source, model.description.shape, model.lora, trainable=False, start=start)
            await self._make_room(session)
            made = await self._service.host(session, operation, request)
        finally:
            await asyncio.to_thread(self._service.transfers.end, account, transfer_id)
        sampler_id = f"{session.session_id}:sample:{name.replace(':', '-')}"
        session.samplers[sampler_id] = made.model_id
        return sampler_id

    async def create(
        self, session: Session, sampler_id: str, checkpoint_path: str | None, base_model: str | None
    ) -> str:
        """A sampler of a checkpoint, or of a base."""
        if checkpoint_path is None and base_model is None:
            raise OperationError("create_sampling_session: model_path or base_model must be given")
        await self._make_room(session)
        if checkpoint_path is not None:
            made = await self._of_checkpoint(session, checkpoint_path)
        else:
            made = await self._service.create_model(session, ModelRequest(str(base_model), None, False, {}))
        session.samplers[sampler_id] = made.model_id
        return sampler_id

    async def _of_checkpoint(self, session: Session, path: str) -> ServedModel:
        account = session.place.account
        checkpoint = self._service.checkpoints.resolve(path, session.place)
        lora = LoraConfig(**checkpoint.lora) if checkpoint.lora is not None else None
        modes = (policy_mode(lora.rank),) if lora else REFERENCE_MODES
        whole = lora is None and checkpoint.kind == "sampler"
        source = checkpoint.folder if whole else self._service.models.source(checkpoint.base_model, account)
        shape = await self._service.run(ResolveShape(source, modes), session.session_id)
        start = None if whole else checkpoint.folder
        operation = CreateModel(source, shape, lora, trainable=False, start=start)
        return await self._service.host(
            session, operation, ModelRequest(checkpoint.base_model, lora, False, {})
        )

    async def _make_room(self, session: Session) -> None:
        for old in list(session.samplers)[: -(KEPT - 1)]:
            forgotten = session.models.get(session.samplers.pop(old))
            if forgotten is not None:
                await self._service.unload(forgotten)
