"""The folder of one run: what is in it, who writes to it, and what becomes of an earlier run there.

config.json         the resolved settings          samples.jsonl       answers before and after
metrics.jsonl       a line per step                adapter/ or model/  the final weights
bad_rows.jsonl      rows lost, and why             summary.json        written last: the run is finished
checkpoints/        step-<n>/, each whole          checkpoints.jsonl   a line for each of them
heldout/            step-<n>.jsonl: each held-out row before training, and after the newest evaluation
environment.json    versions, machine, data and    report.html         the run, for people
                    what looks wrong with it
run.lock            who writes                     previous-<n>/       earlier runs; nothing is ever deleted
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

from firesteel.sdk.errors import ConfigError, StorageError
from firesteel.sealed import replace_file, storage_errors, sweep, sync

CHECKPOINTS, LISTING = "checkpoints", "checkpoints.jsonl"
SUMMARY = "summary.json"
HELDOUT, ENVIRONMENT, REPORT = "heldout", "environment.json", "report.html"
RESULTS = ("samples.jsonl", "adapter", "model", SUMMARY, REPORT)
"""What a finished run leaves beside its record; a run that goes on makes them anew."""
# What a run writes. Only these are moved out of the way; other files in the folder are the user's.
# In the order in which they are moved: half moved, there are no checkpoints to go on from, and it is still a run.
RUN_FILES = (
    *(LISTING, CHECKPOINTS, *RESULTS),
    *(
        "metrics.jsonl",
        "bad_rows.jsonl",
        "wandb",
        "tensorboard",
        "reference",
        "exports",
        HELDOUT,
        ENVIRONMENT,
        "config.json",
    ),
)
# By these settings a run's `config.json` is told from that of a model, which has the same name.
_SETTINGS_OF_A_RUN = {"log_path", "base_model", "dataset"}
_LOCK = "run.lock"
LOOK_SECONDS = 0.3
"""For how long `firesteel runs list` may be looking whether somebody writes here."""
TAKEOVER_SECONDS = 60.0
"""How long a takeover waits for the old writer to notice, which is before its next write."""


@dataclass(frozen=True)
class Holder:
    """Who writes to a folder, as `run.lock` says."""

    pid: int
    host: str
    token: str
    """Drawn anew by each writer: who reads another one than its own has lost the folder."""

    @classmethod
    def this_process(cls) -> Holder:
        """With a token of its own."""
        return cls(os.getpid(), socket.gethostname(), secrets.token_hex(16))

    @classmethod
    def of(cls, folder: Path) -> Holder | None:
        """None where nobody has said."""
        try:
            return cls(**orjson.loads((folder / _LOCK).read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class Lock:
    """A lock on a folder itself, gone with the process that holds it."""

    def __init__(self, folder: Path) -> None:
        self._descriptor = os.open(folder, os.O_RDONLY)
        self._held = False

    def take(self, seconds: float = 0.0) -> bool:
        """Whether it is held now, after waiting for at most so long."""
        give_up = time.monotonic() + seconds
        while not self._held:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._held = True
            except BlockingIOError:
                if time.monotonic() >= give_up:
                    return False
                time.sleep(0.05)
        return True

    def close(self) -> None:
        """Let it go."""
        os.close(self._descriptor)


class RunFolder:
    """`<log_path>` of a recipe, written to by one run at a time."""

    def __init__(self, path: Path, lock: Lock) -> None:
        self.path = path
        self.config = path / "config.json"
        self.metrics = path / "metrics.jsonl"
        self.bad_rows = path / "bad_rows.jsonl"
        self.samples = path / "samples.jsonl"
        self.listing = path / LISTING
        self.summary = path / SUMMARY
        self.reference = path / "reference"
        self.environment = path / ENVIRONMENT
        self._lock = lock
        self._holder = Holder.this_process()
        replace_file(path / _LOCK, orjson.dumps(asdict(self._holder)))

    @classmethod
    def open(cls, log_path: str, takeover: bool = False) -> RunFolder:
        """Make the folder if need be and become its one writer; what killed runs left half written is removed.

        Raises `ConfigError` for a folder that cannot be written to, that another run is writing to (with `takeover`
        that one is stopped at its next write), or that holds files of a run's names which are not a run's.
        """
        path = Path(log_path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            with ExitStack() as on_failure:
                lock = _locked(path, takeover)
                on_failure.callback(lock.close)
                _refuse_foreign(path)
                folder = cls(path, lock)
                for parent in (path, path / CHECKPOINTS, path / HELDOUT, path / "exports"):
                    sweep(parent)
                sync(path.absolute().parent)
                on_failure.pop_all()
        except OSError as error:
            if isinstance(error, StorageError):
                raise
            raise ConfigError(
                f"log_path: {log_path}: {error}; name a folder that can be written to"
            ) from error
        return folder

    def close(self) -> None:
        """Let another run have the folder."""
        if Holder.of(self.path) == self._holder:
            with suppress(OSError):  # the lock is the folder's own; the file only says whose it is
                (self.path / _LOCK).unlink()
        self._lock.close()

    def refuse_if_taken_over(self) -> None:
        """Raise `ConfigError` if another process has taken the folder: what this one knows is no longer the run.

        To be called before anything is written. After a takeover the lock may come free only later: it is taken then.
        """
        self._lock.take()
        holder = Holder.of(self.path)
        if holder != self._holder:
            by = f"by {holder}" if holder else f"({_LOCK} is gone)"
            raise ConfigError(
                f"log_path: {self.path} was taken over {by}; this run stops and writes nothing more"
            )

    def there_are(self, names: Iterable[str]) -> list[str]:
        """Those of these files and folders that exist."""
        return [name for name in names if (self.path / name).exists()]

    def set_aside(self, names: Iterable[str] = RUN_FILES) -> Path | None:
        """Move what there is of these to a new `previous-<n>/`, and return that; None where there is nothing."""
        present = self.there_are(names)
        if not present:
            return None
        previous = self.new_previous()
        self.move(present, previous)
        return previous

    def put_back(self, previous: Path | None) -> None:
        """Undo `set_aside` for a run that could not begin; what that has written meanwhile is removed."""
        if Holder.of(self.path) != self._holder:  # taken over: what stands here now is another's
            return
        with storage_errors(self.path, 0):
            for name in self.there_are(RUN_FILES):
                path = self.path / name
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            if previous is None:
                return
            for name in reversed(RUN_FILES):  # first what says that it is a run, last where it would go on
                if (previous / name).exists():
                    (previous / name).rename(self.path / name)
            previous.rmdir()
            sync(self.path)

    def new_previous(self, copied: Iterable[str] = ()) -> Path:
        """A new `previous-<n>/` with copies of these files, as far as they exist."""
        taken = [p.name.removeprefix("previous-") for p in self.path.glob("previous-*")]
        number = max((int(n) for n in taken if n.isdigit()), default=0) + 1
        previous = self.path / f"previous-{number}"
        with storage_errors(previous, 0):
            previous.mkdir()
            for name in self.there_are(copied):
                replace_file(previous / name, (self.path / name).read_bytes())
        return previous

    def move(self, names: Iterable[str], previous: Path) -> None:
        """Move files and folders to the same places below `previous`, in this order."""
        touched = {self.path, previous}
        with storage_errors(previous, 0):
            for name in names:
                (previous / name).parent.mkdir(parents=True, exist_ok=True)
                (self.path / name).rename(previous / name)
                touched |= {(self.path / name).parent, (previous / name).parent}
            for folder in touched:
                sync(folder)

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Replace `config.json`."""
        self.refuse_if_taken_over()
        replace_file(self.config, orjson.dumps(config, option=orjson.OPT_INDENT_2) + b"\n")

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write `summary.json`: from now on the run is finished."""
        self.refuse_if_taken_over()
        replace_file(self.summary, orjson.dumps(summary, option=orjson.OPT_INDENT_2) + b"\n")

    def read_summary(self) -> dict[str, Any] | None:
        """What the finished run in this folder came to; None where it is not finished."""
        try:
            content = orjson.loads(self.summary.read_bytes())
        except (OSError, orjson.JSONDecodeError):
            return None
        return content if isinstance(content, dict) else None

    def export_path(self, adapter: bool) -> Path:
        """Where the final weights go."""
        return self.path / ("adapter" if adapter else "model")


def _locked(path: Path, takeover: bool) -> Lock:
    lock = Lock(path)
    if lock.take(LOOK_SECONDS):
        return lock
    if takeover:
        # Fence the old writer: it checks the token before it writes. It may hang, and never let go of its lock.
        replace_file(path / _LOCK, orjson.dumps(asdict(Holder.this_process())))
        lock.take(TAKEOVER_SECONDS)
        return lock
    lock.close()
    holder = Holder.of(path)
    raise ConfigError(
        f"log_path: another run ({holder or 'it has not said which'}) is writing to {path}; wait for it, name another "
        "folder, or stop it with --takeover"
    )


def _refuse_foreign(path: Path) -> None:
    mine = {REPORT, "tensorboard"}  # a run replaces neither: they may be of somebody else's making
    present = [name for name in RUN_FILES if name not in mine and (path / name).exists()]
    if present and not is_a_run(path / "config.json"):
        raise ConfigError(
            f"log_path: {path} holds {', '.join(present)}, but is not the folder of a run; name another folder"
        )


def is_a_run(config: Path) -> bool:
    """Whether a `config.json` is that of a run."""
    try:
        content = orjson.loads(config.read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return False
    return isinstance(content, dict) and content.keys() >= _SETTINGS_OF_A_RUN
