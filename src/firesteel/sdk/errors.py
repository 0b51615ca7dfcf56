"""Every error a caller can meet.

::

    FiresteelError
    ├── UserError                the caller can mend it; category "user"
    │   ├── ConfigError          a setting: unknown, missing, out of range, contradictory
    │   ├── DataError            the training data
    │   │   └── RowError         one row of a file: `file:line: field: reason`
    │   ├── ModelError           a model, tokenizer or shape name; a model that cannot do what is asked
    │   ├── OperationError       an operation that cannot run as sent (lengths, order, unknown model)
    │   │   └── NonFiniteError   a loss or gradient that is infinite or not a number; no weight was changed
    │   ├── CheckpointError      a checkpoint that is damaged, or of another model, objective or data
    │   ├── StorageError         a disk that is full or a folder that cannot be written to
    │   ├── AuthError            a key that is missing, unknown or of another account
    │   └── NotBuiltYetError     planned, documented, not there yet
    ├── VerificationFailed       the fast path and the plain path differ by more than rounding
    ├── OperationFailed          an operation failed for a reason that is not the caller's; category "server"
    ├── TransportError           a server that cannot be reached, or does not answer in time
    ├── TrainerLost              a session or model that the server no longer has
    ├── TrainerRewound           such a model was made again, and is where its newest checkpoint left it
    └── ClosedError              the client, trainer or engine was closed while the operation waited

Each also inherits the standard class it specialises. `code` is stable and printed by the command line;
the text is for people. All of them pickle (they will cross processes and HTTP).
"""

from __future__ import annotations

from typing import ClassVar, Literal

Category = Literal["user", "server"]


class FiresteelError(Exception):
    """Root of all errors raised on purpose."""

    code: ClassVar[str] = "error"
    category: ClassVar[Category] = "server"


class UserError(FiresteelError):
    """The caller can mend this; the text says how."""

    code = "user"
    category = "user"


class ConfigError(UserError, ValueError):
    """A setting is unknown, missing, out of range or contradicts another."""

    code = "config"


class DataError(UserError, ValueError):
    """The training data cannot be used as it is."""

    code = "data"


class RowError(DataError):
    """One row of a data file is unusable. Reads `file:line: field: reason`."""

    code = "data.row"

    def __init__(self, path: str, line: int, field: str, reason: str) -> None:
        super().__init__(path, line, field, reason)
        self.path = path
        self.line = line
        self.field = field
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.field}: {self.reason}"


class ModelError(UserError, LookupError):
    """A model, tokenizer or training shape cannot be found or cannot do what is asked of it."""

    code = "model"


class OperationError(UserError, ValueError):
    """An operation cannot run as sent: wrong lengths, wrong order, unknown model."""

    code = "operation"


class NonFiniteError(OperationError):
    """A loss, a log-probability or a gradient is infinite or not a number; no weight was changed."""

    code = "operation.nonfinite"


class CheckpointError(UserError, ValueError):
    """A checkpoint is damaged, missing, or of another model, objective or data than what it should continue."""

    code = "checkpoint"


class StorageError(UserError, OSError):
    """Something cannot be written: the disk is full or the folder is not ours."""

    code = "storage"


class NotBuiltYetError(UserError, NotImplementedError):
    """Part of the design, not of this version."""

    code = "not_built_yet"


class AuthError(UserError, PermissionError):
    """A key is missing, unknown, revoked, or belongs to another account."""

    code = "auth"


class OperationFailed(FiresteelError, RuntimeError):
    """An operation failed for a reason that is not the caller's: a bug, or a resource that ran out."""

    code = "operation.failed"


class VerificationFailed(FiresteelError, ArithmeticError):
    """The fast path does not give the numbers of the plain one."""

    code = "verification"


class ClosedError(FiresteelError, RuntimeError):
    """The client, trainer or engine was closed before the operation ran."""

    code = "closed"


class TransportError(FiresteelError, ConnectionError):
    """The server could not be reached, or did not answer, within the time that was allowed."""

    code = "transport"


class TrainerLost(FiresteelError, RuntimeError):
    """The server no longer has this session or model: it was started anew, or the session expired."""

    code = "trainer.lost"


class TrainerRewound(FiresteelError, RuntimeError):
    """A trainer that lost its state is back at an earlier step: what was done since has to be done again.

    Whoever catches it goes back to where the loop was after `step`, the number of steps in that checkpoint.
    """

    code = "trainer.rewound"

    def __init__(self, step: int, checkpoint: str) -> None:
        super().__init__(step, checkpoint)
        self.step = step
        self.checkpoint = checkpoint

    def __str__(self) -> str:
        return (
            f"the trainer had lost its state and is back where it was after step {self.step} ({self.checkpoint}); "
            "go on from there"
        )
