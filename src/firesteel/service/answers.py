"""What requests have been promised: results by request id, until they have been fetched and some time has passed."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any

from firesteel.sdk.errors import AuthError, OperationError, TrainerLost
from firesteel.sdk.types import Examined, ForwardBackwardOutput

# A delivered answer stays for a client whose connection broke in the middle of it; one that nobody fetches goes too.
DELIVERED_SECONDS = 300.0
FORGOTTEN_SECONDS = 3600.0
RETRIED_SECONDS = 30.0  # a client that did not get it has asked again by then
DELIVERED_BYTES = 256 * 2**20
KEPT_BYTES = 2**30
DELIVERED_OF_A_SESSION = 128  # more than a client has under way at a time


@dataclass(frozen=True)
class Asked:
    """One request: by whom, the numbers that a retry of it repeats, and what it holds."""

    account: str
    what: str
    numbers: tuple[str | int, ...]
    """The first is a session, or something of one: its name begins with the session's."""
    sha256: bytes

    @classmethod
    def of(cls, account: str, what: str, numbers: tuple[str | int, ...], content: bytes) -> Asked:
        """A request of this content."""
        return cls(account, what, numbers, hashlib.sha256(content).digest())

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for a retry."""
        return self.account, self.what, *self.numbers

    @property
    def session_id(self) -> str:
        """Whose answer it is."""
        return str(self.numbers[0]).partition(":")[0]

    def __str__(self) -> str:
        return " ".join(map(str, (self.what, *self.numbers)))


@dataclass
class Answer:
    """The future of one request."""

    request_id: str
    asked: Asked
    future: asyncio.Future[Any]
    finished: float | None = None
    delivered: float | None = None
    bytes: int = 0
    """Of the arrays that it keeps, once it is there."""

    def finish(self, done: asyncio.Future[Any]) -> None:
        """Note the time at which it is there, and its size."""
        self.finished = time.monotonic()
        # Its error is looked at here, so that nothing complains about one that its client never asks for.
        if not done.cancelled() and done.exception() is None:
            self.bytes = _bytes_of(done.result())


def _bytes_of(result: Any) -> int:
    match result:
        case ForwardBackwardOutput():
            return sum(t.to_numpy().nbytes for values in result.loss_fn_outputs for t in values.values())
        case Examined():
            return sum(values.nbytes for values in result.logprobs)
        case _:
            return 0


class Answers:
    """All answers of this process. Runs in the event loop."""

    def __init__(self) -> None:
        self._answers: OrderedDict[str, Answer] = OrderedDict()
        self._keys: dict[tuple[object, ...], str] = {}

    def __len__(self) -> int:
        return len(self._answers)

    def once(self, asked: Asked, start: Callable[[], Awaitable[Any]]) -> Answer:
        """The promise of a request: a retry gets that of the first, and starts nothing.

        `start` checks and begins; what it raises is raised here and nothing is promised. Raises `OperationError` for
        another request under the same key.
        """
        known = self.of_key(asked.key)
        if known is not None:
            if known.asked.sha256 != asked.sha256:
                raise OperationError(
                    f"{asked}: this number was already used for a request with other content"
                )
            return known
        future = asyncio.ensure_future(start())
        answer = Answer(f"request-{secrets.token_hex(8)}", asked, future)
        future.add_done_callback(answer.finish)
        self._answers[answer.request_id] = answer
        self._keys[asked.key] = answer.request_id
        return answer

    def of_key(self, key: tuple[object, ...]) -> Answer | None:
        """The promise of an earlier request, by what a retry of it repeats."""
        return self._answers.get(self._keys.get(key, ""))

    def find(self, request_id: str, account: str) -> Answer:
        """An answer of this account. Raises `TrainerLost` for one that is not there (any more)."""
        if request_id not in self._answers:
            raise TrainerLost(
                f"there is no request {request_id!r} here: its answer was delivered some time ago, or the server was "
                "started anew since"
            )
        answer = self._answers[request_id]
        if answer.asked.account != account:
            raise AuthError(f"request {request_id!r} belongs to another account")
        return answer

    async def wait(self, answer: Answer, seconds: float) -> bool:
        """Whether it is there within `seconds`; it counts as delivered from then on."""
        if not answer.future.done():
            await asyncio.wait([answer.future], timeout=seconds)
        if answer.future.done():
            answer.delivered = time.monotonic()
        return answer.future.done()

    async def settle(self) -> None:
        """Wait for what is left of all that is under way."""
        await asyncio.gather(*(answer.future for answer in self._answers.values()), return_exceptions=True)

    def forget(self, session_id: str) -> None:
        """Drop what is there for a session that has ended; what is still under way will be swept."""
        of_it = [a for a in self._answers.values() if a.asked.session_id == session_id and a.finished]
        self._drop(of_it)

    def _drop(self, answers: Iterable[Answer]) -> None:
        for answer in answers:
            del self._answers[answer.request_id], self._keys[answer.asked.key]

    def sweep(self) -> None:
        """Forget what has been delivered for a while, or is more than is kept, and what nobody came for."""
        now, kept_bytes = time.monotonic(), 0
        delivered: Counter[str] = Counter()
        gone = []
        for answer in reversed(self._answers.values()):
            if answer.finished is None:
                continue
            kept_bytes += answer.bytes
            if answer.delivered is None:
                expired = now - answer.finished > FORGOTTEN_SECONDS or kept_bytes > KEPT_BYTES
            else:
                delivered[answer.asked.session_id] += 1
                more_than_is_kept = (
                    kept_bytes > DELIVERED_BYTES
                    or delivered[answer.asked.session_id] > DELIVERED_OF_A_SESSION
                )
                age = now - answer.delivered
                expired = age > DELIVERED_SECONDS or (more_than_is_kept and age > RETRIED_SECONDS)
            if expired:
                gone.append(answer)
        self._drop(gone)
