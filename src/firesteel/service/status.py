"""How the server is doing: for Prometheus, and for `firesteel ps`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from firesteel.service.access import Account, Served
from firesteel.service.metrics import resident_bytes

router = APIRouter()


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """Whether the server answers; needs no key."""
    return {"status": "ok"}


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(service: Served) -> Response:
    """Counters and times for Prometheus; needs no key, and names nobody."""
    return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


@router.get("/status")
async def status(account: Account, service: Served) -> dict[str, Any]:
    """The jobs, sessions, models and queues of the account."""
    waiting = service.engine.waiting()
    sessions = [session for session in service.sessions.all() if session.place.account == account]
    return {
        "account": account,
        "resident_bytes": int(resident_bytes()),
        "waiting": sum(waiting.values()),
        "jobs": [
            {
                "job": job.job_id,
                "state": job.state.value,
                "base_model": job.base_model,
                "lora_rank": job.lora_rank,
            }
            for job in service.jobs.all_of(account)
        ],
        "sessions": [
            {
                "session": session.session_id,
                "job": session.place.job_id,
                "waiting": waiting.get(session.session_id, 0),
                "models": [
                    {
                        "model": model.model_id,
                        "base_model": model.description.base_model,
                        "lora_rank": model.description.lora_rank,
                        "trainable": model.description.trainable,
                    }
                    for model in session.models.values()
                ],
            }
            for session in sessions
        ],
    }
