"""What plain `tinker` clients list: training runs, which are models here, and their checkpoints."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query

from firesteel.sdk.errors import NotBuiltYetError
from firesteel.service.access import Here, Served
from firesteel.service.jobs import NotFound
from firesteel.service.records import Checkpoint, now
from firesteel.service.service import Service
from firesteel.service.sessions import Place, ServedModel

router = APIRouter()
Limit = Annotated[int, Query(ge=1, le=1000)]
Offset = Annotated[int, Query(ge=0, le=10**9)]
_SEGMENTS = {"training": "weights", "sampler": "sampler_weights"}


@router.get("/training_runs")
async def list_training_runs(
    place: Here, service: Served, limit: Limit = 20, offset: Offset = 0
) -> dict[str, Any]:
    """Models that are loaded, or have left a checkpoint."""
    runs = [_run(service, place, run_id) for run_id in _run_ids(service, place)]
    return {"training_runs": runs[offset : offset + limit], "cursor": _cursor(limit, offset, len(runs))}


@router.get("/training_runs/{run_id}")
async def get_training_run(run_id: str, place: Here, service: Served) -> dict[str, Any]:
    """One of them."""
    return _run(service, place, run_id)


@router.get("/training_runs/{run_id}/checkpoints")
async def list_run_checkpoints(run_id: str, place: Here, service: Served) -> dict[str, Any]:
    """What it has left."""
    rows = _rows(service, place, run_id)
    return {
        "checkpoints": [_checkpoint(row) for row in rows],
        "cursor": _cursor(len(rows) or 1, 0, len(rows)),
    }


@router.get("/checkpoints")
async def list_all_checkpoints(
    place: Here, service: Served, limit: Limit = 100, offset: Offset = 0
) -> dict[str, Any]:
    """What all of them have left."""
    rows = [row for run_id in _run_ids(service, place) for row in _rows(service, place, run_id)]
    page = [_checkpoint(row) for row in rows[offset : offset + limit]]
    return {"checkpoints": page, "cursor": _cursor(limit, offset, len(rows))}


@router.delete("/training_runs/{run_id}/checkpoints/{kind}/{name}")
async def delete_checkpoint(
    run_id: str, kind: str, name: str, place: Here, service: Served
) -> dict[str, str]:
    """Delete one for good."""
    for row in _rows(service, place, run_id):
        if (_SEGMENTS[row.kind], row.name) == (kind, name):
            service.checkpoints.remove(row)
            return {"status": "ok"}
    raise NotFound(f"training run {run_id!r} has no checkpoint '{kind}/{name}'")


@router.put("/training_runs/{run_id}/checkpoints/{kind}/{name}/ttl")
@router.post("/training_runs/{run_id}/checkpoints/{kind}/{name}/publish")
async def not_built(run_id: str, kind: str, name: str, place: Here) -> dict[str, str]:
    """Checkpoints stay until they are deleted, and are their account's alone."""
    raise NotBuiltYetError(
        "time limits and publishing of checkpoints are not built; delete them when they are done"
    )


@router.get("/sessions")
async def list_sessions(place: Here, service: Served) -> dict[str, Any]:
    """The sessions of this root that are alive."""
    return {"sessions": [session.session_id for session in service.sessions.of(place)]}


@router.get("/sessions/{session_id}")
async def get_session(session_id: str, place: Here, service: Served) -> dict[str, Any]:
    """What a session has made."""
    session = service.sessions.find(session_id, place)
    return {"training_run_ids": list(session.models), "sampler_ids": list(session.samplers)}


def _live(service: Service, place: Place) -> dict[str, ServedModel]:
    return {
        model.model_id: model
        for session in service.sessions.of(place)
        for model in session.models.values()
        if model.description.trainable
    }


def _run_ids(service: Service, place: Place) -> list[str]:
    left = (
        row.owner.removeprefix("models/")
        for row in service.checkpoints.of(place.account)
        if row.owner.startswith("models/") and place.job_id is None
    )
    return list(dict.fromkeys([*left, *_live(service, place)]))


def _rows(service: Service, place: Place, run_id: str) -> list[Checkpoint]:
    return service.checkpoints.of(place.account, place.owner_of(run_id))


def _run(service: Service, place: Place, run_id: str) -> dict[str, Any]:
    rows, live = _rows(service, place, run_id), _live(service, place).get(run_id)
    if live is not None:
        base_model, rank = live.description.base_model, live.description.lora_rank
    elif rows:
        base_model, rank = rows[-1].base_model, int((rows[-1].lora or {}).get("rank", 0))
    else:
        raise NotFound(f"there is no training run {run_id!r} here")
    run: dict[str, Any] = {
        "training_run_id": run_id,
        "base_model": base_model,
        "model_owner": place.account,
        "is_lora": rank > 0,
        "corrupted": False,
        "last_request_time": (now() if live is not None else rows[-1].created).isoformat(),
    }
    if rank:
        run["lora_rank"] = rank
    for kind, name in (("training", "last_checkpoint"), ("sampler", "last_sampler_checkpoint")):
        if found := [row for row in rows if row.kind == kind]:
            run[name] = _checkpoint(found[-1])
    return run


def _checkpoint(row: Checkpoint) -> dict[str, Any]:
    checkpoint_id = f"{_SEGMENTS[row.kind]}/{row.name}"
    return {
        "checkpoint_id": checkpoint_id,
        "checkpoint_type": row.kind,
        "time": row.created.isoformat(),
        "tinker_path": f"tinker://{row.owner.partition('/')[2]}/{checkpoint_id}",
        "size_bytes": row.size,
        "public": False,
    }


def _cursor(limit: int, offset: int, total: int) -> dict[str, int]:
    return {"offset": offset, "limit": limit, "total_count": total}
