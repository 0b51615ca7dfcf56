"""Trainer jobs: what Fireworks clients provision before they train. A job is a shape, a model and a root to talk to.

The models of a job are made in sessions on its root; all jobs share one engine. A job survives a restart of the server,
as do its checkpoints; its models do not.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from firesteel.catalog import load_catalog
from firesteel.engine.devices import devices_found
from firesteel.sdk.errors import ClosedError, ConfigError, FiresteelError, OperationError
from firesteel.sdk.operations import ResolveShape
from firesteel.sdk.service_client import REFERENCE_MODES, policy_mode
from firesteel.sdk.shapes import Mode, TrainingShape
from firesteel.service.records import Job, JobState, Records, now
from firesteel.service.sessions import Place

if TYPE_CHECKING:
    from firesteel.service.service import Service

logger = logging.getLogger("firesteel.service")

_JOB_ID = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
RESUMABLE = (JobState.FAILED, JobState.CANCELLED, JobState.PAUSED, JobState.COMPLETED)
TENDED = (JobState.PENDING, JobState.CREATING, JobState.RUNNING)
START_SECONDS = 2.0
IDLE_SECONDS = 3600
LONGEST_IDLE_SECONDS = 3 * 3600


@dataclass(frozen=True)
class JobRequest:
    """A job as its client asks for it."""

    job_id: str
    base_model: str
    lora_rank: int
    forward_only: bool
    shape: str | None
    max_context_length: int | None
    display_name: str
    inactivity_timeout_s: int | None
    """None is never."""
    sha256: str
    """Of the request."""

    @property
    def modes(self) -> tuple[Mode, ...]:
        """The kinds of shape that serve, the best first."""
        return REFERENCE_MODES if self.forward_only else (policy_mode(self.lora_rank),)


class NotFound(OperationError):
    """What an address names is not there."""

    code = "not_found"


class JobExists(OperationError):
    """There is a job of this id, made by another request."""


class Jobs:
    """The trainer jobs of all accounts."""

    def __init__(self, records: Records, service: Service) -> None:
        self._records = records
        self._service = service
        self._used: dict[tuple[str, str], float] = {}
        self._starting: dict[tuple[str, str], asyncio.Task[None]] = {}

    def find(self, place: Place) -> Job:
        """The job of a place. Raises `NotFound` if there is none."""
        job = self.find_any(place)
        if job.state is JobState.DELETED:
            raise NotFound(f"there is no trainer job {place.job_id!r} in account {place.account!r}")
        return job

    def find_any(self, place: Place) -> Job:
        """The same, also one that was deleted: its checkpoints are still there."""
        job = self._records.job(place.account, place.job_id or "")
        if job is None:
            raise NotFound(f"there is no trainer job {place.job_id!r} in account {place.account!r}")
        return job

    def use(self, place: Place) -> None:
        """A request to the data plane of a job: it is not idle, and it must be running."""
        job = self.find(place)
        if job.state is not JobState.RUNNING:
            raise OperationError(
                f"trainer job {job.job_id!r} is {job.state}, not running: {job.message or 'resume it'}"
            )
        self._used[place.account, job.job_id] = time.monotonic()

    def all_of(self, account: str) -> list[Job]:
        """The jobs of an account that were not deleted, oldest first."""
        return [job for job in self._records.jobs(account) if job.state is not JobState.DELETED]

    async def create(self, account: str, request: JobRequest) -> Job:
        """A new job; the same request again gives the same job. Raises `JobExists` where another has its id."""
        if not _JOB_ID.fullmatch(request.job_id):
            raise ConfigError(
                f"rlorTrainerJobId: {request.job_id!r}; 1 to 63 lower-case letters, digits and '-' make an id"
            )
        existing = self._records.job(account, request.job_id)
        if existing is not None and existing.state is not JobState.DELETED:
            return await self._again(existing, request)
        shape = self._shape(account, request)
        moment = now()
        job = Job(
            account=account,
            job_id=request.job_id,
            base_model=request.base_model,
            lora_rank=request.lora_rank,
            shape=shape.name,
            forward_only=request.forward_only,
            max_context_length=request.max_context_length or 0,
            state=JobState.CREATING,
            message="",
            request_sha256=request.sha256,
            display_name=request.display_name,
            inactivity_timeout_s=request.inactivity_timeout_s,
            created=moment,
            updated=moment,
        )
        # An id whose job was deleted may be used again, whatever the job was.
        kept = self._records.add_job(job) if existing is None else self._records.renew_job(job)
        if not kept:
            raise JobExists(f"rlorTrainerJobId: there is a job {request.job_id!r} already")
        return await self._start(job)

    async def _again(self, existing: Job, request: JobRequest) -> Job:
        if existing.request_sha256 != request.sha256:
            raise JobExists(
                f"rlorTrainerJobId: there is a job {request.job_id!r} with other settings; choose another id"
            )
        return existing

    async def resume(self, place: Place) -> Job:
        """Bring a stopped job back; one that runs is left alone."""
        job = self.find(place)
        return await self._start(job) if job.state in RESUMABLE else job

    async def delete(self, place: Place) -> None:
        """End a job and free its models. Its checkpoints stay, and can be listed and promoted."""
        job = self.find(place)
        self._set(job, JobState.DELETED)
        await self._end_sessions(place)

    def refuse_other_model(self, job: Job, base_model: str, rank: int, trainable: bool) -> None:
        """A model of a job is on its base, trains no more than the job was made for, and has no larger rank."""
        if base_model != job.base_model:
            raise OperationError(
                f"base_model: {base_model!r}; trainer job {job.job_id!r} is for {job.base_model!r}"
            )
        if not trainable:
            return
        if job.forward_only:
            raise OperationError(f"trainer job {job.job_id!r} is forward-only; ask for base_only")
        if rank > job.lora_rank or (rank == 0) != (job.lora_rank == 0):
            raise OperationError(
                f"lora_config.rank: {rank}; trainer job {job.job_id!r} was made for rank {job.lora_rank}"
                + ("" if job.lora_rank else " (all weights)")
            )

    async def tend(self) -> None:
        """Stop what has been idle for longer than its client allowed, and bring up what an ended server did not."""
        for job in await asyncio.to_thread(self._records.jobs, None, TENDED):
            place = Place(job.account, job.job_id)
            if job.state in (JobState.PENDING, JobState.CREATING):
                self._bringing_up(job)
            if job.state is not JobState.RUNNING or job.inactivity_timeout_s is None:
                continue
            used = self._used.setdefault((job.account, job.job_id), time.monotonic())
            if time.monotonic() - used > job.inactivity_timeout_s:
                idle = f"idle for more than {job.inactivity_timeout_s} s; resume it to go on"
                if not self._set(job, JobState.PAUSED, idle, was=JobState.RUNNING):
                    continue  # deleted meanwhile
                self._service.beside(self._end_sessions(place))

    def _shape(self, account: str, request: JobRequest) -> TrainingShape:
        """Refuse an unknown shape or model at once, before anything is fetched."""
        catalog = load_catalog()
        source = self._service.models.source(request.base_model, account)
        catalog.resolve_model(source)
        return catalog.resolve_shape(
            request.shape, source, request.modes, request.max_context_length, devices_found()
        )

    async def _start(self, job: Job) -> Job:
        """Bring it up, and give it as it stands after a moment: clients look again only after 5 s."""
        self._set(job, JobState.CREATING)
        await asyncio.wait([self._bringing_up(job)], timeout=START_SECONDS)
        return self.find(Place(job.account, job.job_id))

    def _bringing_up(self, job: Job) -> asyncio.Task[None]:
        """What brings it up; one at a time for a job."""
        key = (job.account, job.job_id)
        if key not in self._starting:
            task = asyncio.get_running_loop().create_task(self._bring_up(job))
            self._starting[key] = task
            task.add_done_callback(lambda _: self._starting.pop(key))
        return self._starting[key]

    async def _bring_up(self, job: Job) -> None:
        """Fetch the model and find out how long its sequences may be."""
        modes = REFERENCE_MODES if job.forward_only else (policy_mode(job.lora_rank),)
        try:
            source = self._service.models.source(job.base_model, job.account)
            await self._service.models.fetch(source)
            shape = await self._service.run(ResolveShape(source, modes, job.shape), f"job {job.job_id}")
            context = min(job.max_context_length or shape.max_context_length, shape.max_context_length)
            self._records.update_job_context(job.account, job.job_id, context)
            self._used[job.account, job.job_id] = time.monotonic()
            self._came(job, JobState.RUNNING)
        except ClosedError:
            pass  # the server ends; the next one brings it up
        except FiresteelError as error:
            self._came(job, JobState.FAILED, str(error))

    def _came(self, job: Job, state: JobState, message: str = "") -> None:
        """How its start ended, unless it was deleted meanwhile."""
        now_there = self._records.job(job.account, job.job_id)
        if now_there is not None and now_there.state is JobState.CREATING:
            self._set(job, state, message)

    def _set(self, job: Job, state: JobState, message: str = "", was: JobState | None = None) -> bool:
        return self._records.update_job(job.account, job.job_id, state, message, now(), was)

    async def _end_sessions(self, place: Place) -> None:
        for session in self._service.sessions.of(place):
            await self._service.end_session(session)
