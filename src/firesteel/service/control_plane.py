"""The control plane of Fireworks clients: accounts, training shapes, trainer jobs, checkpoints, promoted models.

Synchronous JSON under `/v1`. These clients repeat 408, 429 and 5xx for five minutes: what will not work is 4xx.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from firesteel.catalog import load_catalog
from firesteel.sdk.errors import ConfigError, ModelError, OperationError
from firesteel.sdk.shapes import TrainingShape
from firesteel.service import promotions
from firesteel.service.access import Account, Served, refuse_other_account
from firesteel.service.jobs import IDLE_SECONDS, LONGEST_IDLE_SECONDS, JobRequest, NotFound
from firesteel.service.records import Checkpoint, Job, PromotedModel
from firesteel.service.service import model_name
from firesteel.service.sessions import Place

router = APIRouter(prefix="/v1")
_SECONDS = re.compile(r"(\d{1,9})s")
_RPC_CODES = {"JOB_STATE_FAILED": 9}
PAGE = 200


class TrainingConfigBody(BaseModel):
    """What a job trains."""

    model_config = ConfigDict(alias_generator=to_camel)

    base_model: Annotated[str, Field(min_length=1, max_length=512)]
    lora_rank: Annotated[int, Field(ge=0, lt=2**31)] = 0
    max_context_length: Annotated[int, Field(ge=1, lt=2**31)] | None = None


class JobBody(BaseModel):
    """A trainer job; of what clients send, what decides something here."""

    model_config = ConfigDict(alias_generator=to_camel)

    training_config: TrainingConfigBody
    forward_only: bool = False
    display_name: Annotated[str, Field(max_length=64)] = ""
    inactivity_timeout: str | None = None
    disable_inactivity_cleanup: bool = False


class PromoteBody(BaseModel):
    """What a checkpoint becomes."""

    output_model: str
    trainer_job_id: str | None = None
    base_model: str | None = None


@router.get("/accounts")
async def list_accounts(account: Account) -> dict[str, Any]:
    """The account of the key."""
    return {"accounts": [{"name": f"accounts/{account}"}]}


# Shapes


@router.get("/accounts/{owner}/trainingShapes/{shape}/versions")
async def list_shape_versions(owner: str, shape: str, account: Account) -> dict[str, Any]:
    """The one version of a shape that is offered."""
    return {"trainingShapeVersions": [_version(_shape(owner, shape))]}


@router.get("/accounts/{owner}/trainingShapes/{shape}/versions/{version}")
async def get_shape_version(owner: str, shape: str, version: str, account: Account) -> dict[str, Any]:
    """That version by name."""
    return _version(_shape(owner, f"{shape}/versions/{version}"))


def _shape(owner: str, shape: str) -> TrainingShape:
    return load_catalog().shape(f"accounts/{owner}/trainingShapes/{shape}")


def _version(shape: TrainingShape) -> dict[str, Any]:
    snapshot: dict[str, Any] = {
        "trainerMode": shape.mode.value,
        "nodeCount": 1,
        "acceleratorCount": 1 if shape.device == "cuda" else 0,
        "baseModelWeightPrecision": shape.dtype,
    }
    if shape.max_context_length is not None:
        snapshot["maxSupportedContextLength"] = shape.max_context_length
    return {"name": f"{shape.name}/versions/{shape.version}", "snapshot": snapshot}


# Jobs

JOBS = "/accounts/{owner}/rlorTrainerJobs"
JOB = JOBS + "/{job}"


@router.post(JOBS)
async def create_job(
    owner: str,
    body: JobBody,
    request: Request,
    account: Account,
    service: Served,
    job_id: Annotated[str, Query(alias="rlorTrainerJobId")],
    shape: Annotated[str | None, Query(alias="trainingShape")] = None,
) -> dict[str, Any]:
    """Provision a trainer; the same request again gives the same job."""
    refuse_other_account(owner, account)
    content = await request.body() + (shape or "").encode()
    wanted = JobRequest(
        job_id=job_id,
        base_model=body.training_config.base_model,
        lora_rank=body.training_config.lora_rank,
        forward_only=body.forward_only,
        shape=shape,
        max_context_length=body.training_config.max_context_length,
        display_name=body.display_name,
        inactivity_timeout_s=_idle_seconds(body),
        sha256=hashlib.sha256(content).hexdigest(),
    )
    return _job(await service.jobs.create(account, wanted))


def _idle_seconds(body: JobBody) -> int | None:
    if body.disable_inactivity_cleanup:
        return None
    if body.inactivity_timeout is None:
        return IDLE_SECONDS
    match = _SECONDS.fullmatch(body.inactivity_timeout)
    if match is None or not 0 < int(match[1]) <= LONGEST_IDLE_SECONDS:
        raise ConfigError(
            f"inactivityTimeout: {body.inactivity_timeout!r}; expected seconds as '7200s', "
            f"up to {LONGEST_IDLE_SECONDS}s"
        )
    return int(match[1])


@router.get(JOBS)
async def list_jobs(owner: str, account: Account, service: Served) -> dict[str, Any]:
    """The jobs of the account."""
    refuse_other_account(owner, account)
    return {"rlorTrainerJobs": [_job(job) for job in service.jobs.all_of(account)]}


@router.get(JOB)
async def get_job(owner: str, job: str, account: Account, service: Served) -> dict[str, Any]:
    """One job as it stands."""
    refuse_other_account(owner, account)
    return _job(service.jobs.find(Place(account, job)))


@router.delete(JOB)
async def delete_job(owner: str, job: str, account: Account, service: Served) -> dict[str, Any]:
    """End it; its checkpoints stay."""
    refuse_other_account(owner, account)
    await service.jobs.delete(Place(account, job))
    return {}


@router.post(JOB + ":resume")
async def resume_job(owner: str, job: str, account: Account, service: Served) -> dict[str, Any]:
    """Bring a stopped one back."""
    refuse_other_account(owner, account)
    return _job(await service.jobs.resume(Place(account, job)))


def _job(job: Job) -> dict[str, Any]:
    config: dict[str, Any] = {"baseModel": job.base_model, "loraRank": job.lora_rank}
    if job.max_context_length:
        config["maxContextLength"] = job.max_context_length
    return {
        "name": f"accounts/{job.account}/rlorTrainerJobs/{job.job_id}",
        "displayName": job.display_name,
        "state": job.state.value,
        "status": {"code": _RPC_CODES.get(job.state.value, 0), "message": job.message},
        "trainingConfig": config,
        "forwardOnly": job.forward_only,
        "trainingShape": job.shape,
        "createTime": _time(job.created),
        "updateTime": _time(job.updated),
    }


# Checkpoints and what they become


@router.get(JOB + "/checkpoints")
async def list_job_checkpoints(
    owner: str,
    job: str,
    account: Account,
    service: Served,
    size: Annotated[int, Query(alias="pageSize", ge=1, le=1000)] = PAGE,
    token: Annotated[str, Query(alias="pageToken", pattern=r"^\d{0,9}$")] = "",
) -> dict[str, Any]:
    """The checkpoints of a job, oldest first; also of one that was deleted."""
    refuse_other_account(owner, account)
    service.jobs.find_any(Place(account, job))
    rows = service.checkpoints.of(account, f"jobs/{job}")
    start = int(token or 0)
    page: dict[str, Any] = {"checkpoints": [_checkpoint(row, job) for row in rows[start : start + size]]}
    if start + size < len(rows):
        page["nextPageToken"] = str(start + size)
    return page


def _checkpoint(row: Checkpoint, job: str) -> dict[str, Any]:
    adapter = row.lora is not None
    if row.kind == "training":
        kind = "CHECKPOINT_TYPE_TRAINING_LORA" if adapter else "CHECKPOINT_TYPE_TRAINING"
    else:
        kind = "CHECKPOINT_TYPE_INFERENCE_LORA" if adapter else "CHECKPOINT_TYPE_INFERENCE_BASE"
    return {
        "name": f"accounts/{row.account}/rlorTrainerJobs/{job}/checkpoints/{checkpoint_id(row.name)}",
        "createTime": _time(row.created),
        "updateTime": _time(row.created),
        "checkpointType": kind,
        "promotable": row.kind == "sampler",
    }


def checkpoint_id(name: str) -> str:
    """A checkpoint's name as the DNS label that these clients expect."""
    label = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if label == name and len(label) <= 63:
        return label
    return f"{label[:50].strip('-')}-c{hashlib.sha256(name.encode()).hexdigest()[:10]}"


@router.post("/accounts/{owner}/checkpoints/{checkpoint}:promote")
async def promote_checkpoint(
    owner: str, checkpoint: str, body: PromoteBody, account: Account, service: Served
) -> dict[str, Any]:
    """Make a model of an export, which later jobs can name as their base."""
    refuse_other_account(owner, account)
    of_account, _, job = (body.trainer_job_id or "").rpartition("/")
    if of_account:
        refuse_other_account(of_account.removesuffix("/rlorTrainerJobs").removeprefix("accounts/"), account)
    rows = [
        row
        for row in service.checkpoints.of(account, f"jobs/{job}" if job else None)
        if checkpoint_id(row.name) == checkpoint
    ]
    if not rows:
        raise NotFound(
            f"there is no checkpoint {checkpoint!r} of {f'trainer job {job!r}' if job else 'this account'}"
        )
    exports = [row for row in rows if row.kind == "sampler"]
    if not exports:
        raise OperationError(
            f"checkpoint {checkpoint!r} is one to resume from and cannot be promoted; promote an export "
            "(save_weights_for_sampler)"
        )
    prefix = f"accounts/{account}/models/"
    if not body.output_model.startswith(prefix):
        raise OperationError(f"output_model: {body.output_model!r}; expected {prefix}<id>")
    model_id = body.output_model.removeprefix(prefix)
    promotion = service.promotions.begin(exports[-1], model_id)
    await asyncio.wait([promotion], timeout=promotions.WAIT_SECONDS)
    if promotion.done():
        return {"model": _model(promotion.result())}
    return {"operation": _operation(account, model_id, promotion)}


@router.get("/accounts/{owner}/operations/{operation}")
async def get_operation(owner: str, operation: str, account: Account, service: Served) -> dict[str, Any]:
    """A promotion that takes longer than its request was held."""
    refuse_other_account(owner, account)
    promotion = service.promotions.find(account, operation)
    if promotion is not None:
        return _operation(account, operation, promotion)
    made = service.models.find(account, operation)
    if made is None:
        raise NotFound(f"there is no operation {operation!r} here; ask for the promotion again")
    # Of a server that has ended since.
    return {"name": f"accounts/{account}/operations/{operation}", "done": True, "response": _model(made)}


def _operation(account: str, model_id: str, promotion: asyncio.Task[PromotedModel]) -> dict[str, Any]:
    told: dict[str, Any] = {"name": f"accounts/{account}/operations/{model_id}", "done": promotion.done()}
    if not promotion.done():
        return told
    failed = promotion.exception()
    if failed is not None:
        return told | {"error": {"code": 9, "message": str(failed)}}
    return told | {"response": _model(promotion.result())}


@router.get("/accounts/{owner}/models/{model}")
async def get_model(owner: str, model: str, account: Account, service: Served) -> dict[str, Any]:
    """A model by its resource name: promoted here, or of the catalogue."""
    promoted = service.models.find(account, model) if owner == account else None
    if promoted is not None:
        return _model(promoted)
    name = f"accounts/{owner}/models/{model}"
    try:
        load_catalog().resolve_model(service.models.source(name, account))
    except ModelError as error:
        raise NotFound(str(error)) from error
    return {"name": name, "state": "READY", "kind": "HF_BASE_MODEL", "baseModelDetails": {"moe": False}}


def _model(model: PromotedModel) -> dict[str, Any]:
    described: dict[str, Any] = {
        "name": model_name(model.account, model.model_id),
        "state": "READY",
        "kind": model.kind,
        "createTime": _time(model.created),
        "baseModelDetails": {"moe": False},
    }
    if model.kind == "HF_PEFT_ADDON":
        described["peftDetails"] = {"baseModel": model.base_model, "r": model.lora_rank, "targetModules": []}
    return described


def _time(moment: datetime) -> str:
    """With microseconds and `Z`: clients compare these texts with ones of their own clock."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
