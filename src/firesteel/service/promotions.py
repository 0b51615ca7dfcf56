"""Making models of exports, which later jobs name as their base."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from firesteel.sdk.errors import OperationError
from firesteel.sdk.operations import CreateModel, ResolveShape, SaveWeights, UnloadModel
from firesteel.sdk.service_client import policy_mode
from firesteel.sdk.types import LoraConfig
from firesteel.service.records import Checkpoint, PromotedModel

if TYPE_CHECKING:
    from firesteel.service.service import Service

WAIT_SECONDS = 20.0
"""How long a request is held before it is answered with an operation to ask for: clients give up after 300 s."""


class Promotions:
    """What is becoming a model. Two requests for one model are one promotion."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._tasks: dict[tuple[str, str], asyncio.Task[PromotedModel]] = {}
        self._checkpoints: dict[tuple[str, str], Checkpoint] = {}

    def begin(self, checkpoint: Checkpoint, model_id: str) -> asyncio.Task[PromotedModel]:
        """The promotion of this checkpoint, under way already or from now on. Raises for what cannot be promoted so."""
        key = checkpoint.account, model_id
        known = self._service.models.check(checkpoint, model_id)
        if known is None and key in self._tasks and not self._tasks[key].done():
            if self._checkpoints[key] != checkpoint:
                raise OperationError(f"output_model: {model_id!r} is being made of another checkpoint")
            return self._tasks[key]
        self._checkpoints[key] = checkpoint
        self._tasks[key] = asyncio.get_running_loop().create_task(self._promote(checkpoint, model_id, known))
        # Looked at here: whoever asked may be gone when it fails.
        self._tasks[key].add_done_callback(lambda done: done.cancelled() or done.exception())
        return self._tasks[key]

    def find(self, account: str, model_id: str) -> asyncio.Task[PromotedModel] | None:
        """A promotion of this process."""
        return self._tasks.get((account, model_id))

    async def _promote(
        self, checkpoint: Checkpoint, model_id: str, known: PromotedModel | None
    ) -> PromotedModel:
        """An adapter also becomes a whole model: only that can be trained on."""
        if known is not None:
            return known
        models = self._service.models
        if checkpoint.lora is None:
            return await asyncio.to_thread(models.promote, checkpoint, model_id, Path(checkpoint.folder))
        whole = models.scratch()
        try:
            await self._merge(checkpoint, LoraConfig(**checkpoint.lora), whole)
            return await asyncio.to_thread(models.promote, checkpoint, model_id, whole)
        finally:
            await asyncio.to_thread(shutil.rmtree, whole, ignore_errors=True)

    async def _merge(self, checkpoint: Checkpoint, lora: LoraConfig, target: Path) -> None:
        run, lane = self._service.run, f"promote {checkpoint.name}"
        source = self._service.models.source(checkpoint.base_model, checkpoint.account)
        shape = await run(ResolveShape(source, (policy_mode(lora.rank),)), lane)
        made = await run(CreateModel(source, shape, lora, start=checkpoint.folder), lane)
        try:
            await run(SaveWeights(made.model_id, 1, str(target), merged=True), lane)
        finally:
            await run(UnloadModel(made.model_id), lane)
