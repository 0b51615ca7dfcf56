"""Making models of exports, which later jobs name as their base."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from firesteel.sdk.operations import CreateModel, ResolveShape, SaveWeights, UnloadModel
from firesteel.sdk.service_client import policy_mode
from firesteel.sdk.types import LoraConfig
from firesteel.service.records import Checkpoint, PromotedModel

if TYPE_CHECKING:
    from firesteel.service.service import Service


async def promote(service: Service, checkpoint: Checkpoint, model_id: str) -> PromotedModel:
    """Make a model of an export. An adapter also becomes a whole model: only that can be trained on."""
    async with service.models.being_made(checkpoint.account, model_id):
        known = service.models.check(checkpoint, model_id)
        return known if known is not None else await _promote(service, checkpoint, model_id)


async def _promote(service: Service, checkpoint: Checkpoint, model_id: str) -> PromotedModel:
    if checkpoint.lora is None:
        return await asyncio.to_thread(service.models.promote, checkpoint, model_id, Path(checkpoint.folder))
    whole = service.models.scratch()
    try:
        await _merge(service, checkpoint, LoraConfig(**checkpoint.lora), whole)
        return await asyncio.to_thread(service.models.promote, checkpoint, model_id, whole)
    finally:
        await asyncio.to_thread(shutil.rmtree, whole, ignore_errors=True)


async def _merge(service: Service, checkpoint: Checkpoint, lora: LoraConfig, target: Path) -> None:
    lane = f"promote {checkpoint.name}"
    source = service.models.source(checkpoint.base_model, checkpoint.account)
    shape = await service.run(ResolveShape(source, (policy_mode(lora.rank),)), lane)
    made = await service.run(CreateModel(source, shape, lora, start=checkpoint.folder), lane)
    try:
        await service.run(SaveWeights(made.model_id, 1, str(target), merged=True), lane)
    finally:
        await service.run(UnloadModel(made.model_id), lane)
