"""What is under FIRESTEEL_HOME beside models: what each cache holds, and clearing it while runs may be using it.

references    log-probabilities of reference models, in one file for all runs
rows          where each usable row of a data file stands, a folder for each file and tokenizer
tokenizers    of models whose weights were not fetched
leftovers     what killed processes have left half made

A cache is made again by whoever needs it, with the same content. What is in use stays: the reference cache while any
process has it open, a folder while any process reads in it. Whatever else is there (models, a server's records) is
listed and never cleared.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Collection, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from firesteel import removal
from firesteel.sdk import ConfigError, DataError
from firesteel.sealed import is_used, remove_unless_used
from firesteel.store import home, size_below, stored_tokenizers
from training.utils.reference_cache import cache_file
from training.utils.row_index import indexes_folder, read_header

CacheKind = Literal["references", "rows", "tokenizers", "leftovers"]
KINDS: tuple[CacheKind, ...] = get_args(CacheKind)
NOT_CACHES = {
    "models": "models: `firesteel models list`, `firesteel models rm`",
    "service": "records and checkpoints of `firesteel serve`; these exist once",
}
_DAY = 24 * 3600
_WAIT_SECONDS = 0.2


@dataclass(frozen=True)
class CacheEntry:
    """One part of a cache that is cleared as a whole."""

    kind: CacheKind
    path: str
    bytes: int
    age_days: float
    """Since it was written last."""
    holds: str
    """For people: `495 rows, 3 refused, of the file with SHA-256 1a2b…`."""
    in_use: bool
    data_sha256: str | None = None
    """Of the data file, of an index of rows."""
    count: int | None = None
    """Log-probability lists, or usable rows."""


@dataclass(frozen=True)
class Kept:
    """Something under FIRESTEEL_HOME that is no cache."""

    path: str
    bytes: int
    what: str


@dataclass(frozen=True)
class Cleared:
    """What became of an entry."""

    entry: CacheEntry
    freed: int
    stays_because: str | None
    """None where it is gone."""


def list_caches() -> list[CacheEntry]:
    """All there is, by kind."""
    return [*_references(), *_row_indexes(), *_tokenizers(), *_leftovers()]


def list_kept() -> list[Kept]:
    """What else is under FIRESTEEL_HOME."""
    ours = {cache_file().name, indexes_folder().name, "tokenizers"}
    found = sorted(home().iterdir()) if home().is_dir() else []
    return [
        Kept(str(path), size_below(path) if path.is_dir() else path.stat().st_size, _what(path))
        for path in found
        if path.name.removesuffix("-wal").removesuffix("-shm") not in ours
    ]


def _what(path: Path) -> str:
    return NOT_CACHES.get(path.name, "not known to this program; left alone")


def clear(entries: Collection[CacheEntry]) -> Iterator[Cleared]:
    """Clear these, one by one; what is in use stays. Raises `DataError` for a reference cache that is damaged."""
    for entry in entries:
        stays = _clear_references(Path(entry.path)) if entry.kind == "references" else _clear_folder(entry)
        freed = 0 if stays else entry.bytes - _bytes_of(entry)
        yield Cleared(entry, freed, stays)


def _clear_folder(entry: CacheEntry) -> str | None:
    """Why it stays, or None."""
    path = Path(entry.path)
    in_store = path.parent != indexes_folder()
    try:
        if not in_store:
            return None if remove_unless_used(path) else "a run reads it, or is making it"
        if entry.kind == "leftovers":
            for leftover in removal.leftovers():
                if leftover.path == path:
                    removal.remove_leftover(leftover)
            return "it is being fetched" if path.exists() else None
        return None if removal.remove_unless_fetched(path) else "it is being fetched"
    except FileNotFoundError:
        return None  # somebody else was quicker


def _bytes_of(entry: CacheEntry) -> int:
    path = Path(entry.path)
    return _database_bytes(path) if entry.kind == "references" else size_below(path)


# The reference cache


def _references() -> Iterator[CacheEntry]:
    path = cache_file()
    if not path.exists():
        return
    count, holds, in_use = None, "", False
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
            count = int(database.execute("SELECT count(*) FROM logprobs").fetchone()[0])
        holds, in_use = f"{count:,} answers' log-probabilities", _open_elsewhere(path)
    except sqlite3.Error as error:
        holds = f"cannot be read: {error}"
    age = _age_days(path, path.with_name(f"{path.name}-wal"))
    yield CacheEntry("references", str(path), _database_bytes(path), age, holds, in_use, count=count)


def _open_elsewhere(path: Path) -> bool:
    with closing(_alone(path, seconds=0)) as database:
        try:
            database.execute("BEGIN EXCLUSIVE")
            database.execute("ROLLBACK")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY:
                raise
            return True
    return False


def _clear_references(path: Path) -> str | None:
    """Why it stays, or None. The file itself stays: a run that is about to open it waits meanwhile."""
    try:
        with closing(_alone(path, _WAIT_SECONDS)) as database:
            database.execute("BEGIN EXCLUSIVE")
            database.execute("DELETE FROM logprobs")
            database.execute("COMMIT")
            database.execute("VACUUM")
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode == sqlite3.SQLITE_BUSY:
            return "a run has it open, and reads from it until it ends"
        raise ConfigError(f"reference cache {path}: {error}; see who may write to it") from error
    except sqlite3.DatabaseError as error:
        raise DataError(
            f"reference cache {path}: {error}; move the file away, it will be made again"
        ) from error
    return None


def _alone(path: Path, seconds: float) -> sqlite3.Connection:
    """A connection whose first statement needs the file for itself: SQLite refuses it while anybody has it open."""
    database = sqlite3.connect(path, timeout=seconds, isolation_level=None)
    database.execute("PRAGMA locking_mode=EXCLUSIVE")
    return database


def _database_bytes(path: Path) -> int:
    parts = (path, *(path.with_name(f"{path.name}{part}") for part in ("-wal", "-shm")))
    return sum(part.stat().st_size for part in parts if part.exists())


# Folders


def _row_indexes() -> Iterator[CacheEntry]:
    folder = indexes_folder()
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        with suppress(FileNotFoundError):  # cleared meanwhile
            if path.is_dir() and path.name[:1] != ".":
                yield _row_index(path)


def _row_index(path: Path) -> CacheEntry:
    header = read_header(path)
    if header is None:
        holds, sha256, count = "damaged; the next run makes it again", None, None
    else:
        sha256, count = header.sha256, header.usable
        holds = f"{count:,} rows, {header.refused:,} refused, of a file with SHA-256 {sha256[:12]}…"
    return CacheEntry(
        "rows", str(path), size_below(path), _age_days(path), holds, is_used(path), sha256, count
    )


def _tokenizers() -> Iterator[CacheEntry]:
    for path in stored_tokenizers():
        with suppress(FileNotFoundError):
            yield CacheEntry("tokenizers", str(path), size_below(path), _age_days(path), "a tokenizer", False)


def _leftovers() -> Iterator[CacheEntry]:
    for left in removal.leftovers():
        yield _left(left.path, f"half of {left.of}, of a fetch that was killed")
    for path in sorted(indexes_folder().glob(".partial-*")):
        with suppress(FileNotFoundError):
            if not is_used(path):
                yield _left(path, "half of an index of rows, of a run that was killed")


def _left(path: Path, holds: str) -> CacheEntry:
    return CacheEntry("leftovers", str(path), size_below(path), _age_days(path), holds, False)


def _age_days(*paths: Path) -> float:
    written = max(path.stat().st_mtime for path in paths if path.exists())
    return max(0.0, (time.time() - written) / _DAY)
