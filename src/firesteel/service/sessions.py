"""Who is connected, and which models in the engine are whose. In memory: with the process, all of it ends.

Everything here runs in the server's event loop, so nothing needs a lock.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from firesteel.sdk.errors import AuthError, TrainerLost
from firesteel.sdk.operations import Backward, Forward, LoadState, ModelDescription, Operation, OptimStep
from firesteel.sdk.types import LoraConfig


@dataclass(frozen=True)
class Place:
    """Where a request goes: an account, and the trainer job whose root it used, if it used one."""

    account: str
    job_id: str | None = None

    def owner_of(self, model_id: str) -> str:
        """Whose checkpoints a model's are: its job's, or its own where there is no job."""
        return f"jobs/{self.job_id}" if self.job_id is not None else f"models/{model_id}"


@dataclass(frozen=True)
class ModelRequest:
    """A model that a session asks for."""

    base_model: str
    lora: LoraConfig | None
    trainable: bool
    metadata: Mapping[str, Any]


@dataclass
class ServedModel:
    """A model of a session."""

    description: ModelDescription
    place: Place
    session_id: str
    lora: LoraConfig | None
    retained: dict[int, float] = field(default_factory=dict)
    """Since when each forward waits for its backward, by `seq_id`."""
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def model_id(self) -> str:
        """Its name, here and in the engine."""
        return self.description.model_id

    def note(self, operation: Operation) -> None:
        """An operation has run: keep account of the forwards that wait for a backward."""
        match operation:
            case Forward() if self.description.trainable and (operation.retain or operation.offer):
                self.retained[operation.seq_id] = time.monotonic()  # its answer is there: the wait begins
            case Backward():
                self.retained.pop(operation.of, None)
            case OptimStep() | LoadState():
                self.retained.clear()
            case _:
                pass

    def overdue(self, seconds: float) -> list[int]:
        """Take the forwards that have waited for their backward for longer."""
        limit = time.monotonic() - seconds
        overdue = [seq_id for seq_id, since in self.retained.items() if since < limit]
        for seq_id in overdue:
            del self.retained[seq_id]
        return overdue

    @property
    def owner(self) -> str:
        """Whose checkpoints its are."""
        return self.place.owner_of(self.model_id)


@dataclass
class Session:
    """One client, alive as long as it calls or sends heartbeats."""

    session_id: str
    place: Place
    models: dict[str, ServedModel] = field(default_factory=dict)
    samplers: dict[str, str] = field(default_factory=dict)
    """The model that each sampling session reads."""
    seen: float = field(default_factory=time.monotonic)
    ended: bool = False
    numbers: int = 0
    """How many models it has made."""


class Sessions:
    """All sessions of this process."""

    def __init__(self) -> None:
        self._sessions: dict[str, Session] = {}

    def create(self, place: Place) -> Session:
        """A new session. Names never begin with `ts-` or `run-`: Fireworks clients read more into those."""
        session = Session(f"session-{secrets.token_hex(8)}", place)
        self._sessions[session.session_id] = session
        return session

    def find(self, session_id: str, place: Place) -> Session:
        """A session of this place, kept alive by that. Raises `TrainerLost`, or `AuthError` for another's."""
        session = self._sessions.get(session_id)
        if session is None:
            raise TrainerLost(
                f"there is no session {session_id!r} here: it expired, or the server was started anew"
            )
        _refuse_other(session.place, place, f"session {session_id!r}")
        session.seen = time.monotonic()
        return session

    def model(self, model_id: str, place: Place) -> ServedModel:
        """A model of this place; errors as of `find`."""
        session = self._sessions.get(model_id.partition(":")[0])
        if session is None or model_id not in session.models:
            raise TrainerLost(
                f"there is no model {model_id!r} here: it was unloaded, its session expired, or the server was started "
                "anew; create it again and load a checkpoint"
            )
        model = session.models[model_id]
        _refuse_other(model.place, place, f"model {model_id!r}")
        session.seen = time.monotonic()
        return model

    def holds(self, model: ServedModel) -> bool:
        """Whether a model is still a session's."""
        session = self._sessions.get(model.session_id)
        return session is not None and model.model_id in session.models

    def is_at(self, model_id: str, place: Place) -> bool:
        """Whether a model of this id is there, and is of this place."""
        session = self._sessions.get(model_id.partition(":")[0])
        return session is not None and model_id in session.models and session.place == place

    def touch(self, session_id: str) -> None:
        """A client of it has asked for something: it is alive."""
        if session_id in self._sessions:
            self._sessions[session_id].seen = time.monotonic()

    def all(self) -> list[Session]:
        """Every session, oldest first."""
        return list(self._sessions.values())

    def of(self, place: Place) -> list[Session]:
        """The sessions of one place."""
        return [session for session in self._sessions.values() if session.place == place]

    def silent(self, seconds: float) -> list[Session]:
        """Those that have not been heard of for longer."""
        limit = time.monotonic() - seconds
        return [session for session in self._sessions.values() if session.seen < limit]

    def end(self, session: Session) -> None:
        """Forget a session; its models are the caller's to unload."""
        session.ended = True
        self._sessions.pop(session.session_id, None)


def _refuse_other(owner: Place, asking: Place, what: str) -> None:
    if owner.account != asking.account:
        raise AuthError(f"{what} belongs to another account")
    if owner != asking:
        at = f"trainer job {owner.job_id!r}" if owner.job_id else "the plain root"
        raise AuthError(f"{what} belongs to {at}, and was asked for elsewhere")
