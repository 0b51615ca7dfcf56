"""Where each usable row of a file stands and how long it is: made in one pass, kept for later runs.

    $FIRESTEEL_HOME/row_indexes/KEY/
        rows.npy        some bytes for each usable row (`RowKind.record_type`)
        ranked.npy      some bytes for each answer of the ranked lists among them (`row_records.RANKED`)
        refused.jsonl   line, field and reason of each other one
        index.json      counts, and the hashes of the other three: written last

KEY is a hash of all that decides the content: the file's bytes, tokenizer and chat template, and the code that
reads and renders rows. Limits (`max_seq_len`) are not in it: lengths are whole, rules apply to them later.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import inspect
import json
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

import numpy as np

from firesteel.sdk.errors import ConfigError, DataError, RowError
from firesteel.sealed import FolderInUse, sync
from firesteel.store import home
from training.utils.jsonl import FileState, LocatedRow, hash_of_file, located_rows
from training.utils.rendering import Renderer
from training.utils.row_check import CheckedRows, RefusedRow, RowKind, check_rows
from training.utils.row_forms import ERRORS_SHOWN, FormatTally, refuse_nothing_left, refuse_rows
from training.utils.row_kinds import refuse_another_kind
from training.utils.row_outcomes import OnBadRow
from training.utils.row_records import RANKED, KeptRows, RowArray
from training.utils.row_workers import RowWorkers

T = TypeVar("T")

# What a worker is sent at once; a few of these are in memory at any time.
CHUNK_ROWS, CHUNK_BYTES = 512, 2**20
# Starting a worker takes seconds: smaller files are read here.
BYTES_WORTH_WORKERS = 8_000_000
# What all kinds of rows depend on; see `RowKind.code`.
_CODE = (
    "jsonl",
    "row_values",
    "row_forms",
    "conversations",
    "preference_examples",
    "row_records",
    "row_check",
)
_RENDERING = ("tokenizer", "chat_template", "rendering")
_PACKAGES = ("transformers", "tokenizers", "jinja2")
_HASHED = ("rows.npy", "ranked.npy", "refused.jsonl")
_STALE_SECONDS = 24 * 3600
_ATTEMPTS = 4

# Told so many rows, and the bytes of the file that they take.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class IndexHeader:
    """`index.json`."""

    sha256: str
    """Of the data file."""
    usable: int
    refused: int
    formats: FormatTally
    rows_sha256: str
    ranked_sha256: str
    refused_sha256: str


@dataclass(frozen=True, eq=False)
class RowIndex(Generic[T]):
    """A file whose rows are known, of one format, at least one of them usable."""

    path: str
    sha256: str
    kind: RowKind[T]
    format: str
    rows: RowArray
    """Mapped from the file, not read into memory."""
    ranked: RowArray
    """The same; see `row_records.RANKED`."""
    refused_count: int
    folder: Path
    state: FileState
    """Of the data file when it was read."""
    in_use: FolderInUse
    """As long as this index is, `firesteel cache clear` leaves its folder."""

    @property
    def total(self) -> int:
        """Rows of the file."""
        return len(self.rows) + self.refused_count

    @property
    def kept(self) -> KeptRows:
        """What is kept of all its usable rows."""
        return KeptRows(self.path, self.rows, self.ranked)

    def refused(self) -> Iterator[RefusedRow]:
        """Each row that cannot be used, in order."""
        return _refused(self.folder)


def index_rows(
    path: str,
    renderer: Renderer,
    kind: RowKind[T],
    on_bad_row: OnBadRow = "fail",
    progress: Progress = lambda rows, offset: None,
) -> RowIndex[T]:
    """The index of a file, from an earlier run or made now.

    Bad rows are left out and listed (`"skip"`), or refused all at once (`"fail"`). Either way raises DataError for
    a file that cannot be read, holds no usable row, or mixes formats.
    """
    if on_bad_row not in ("fail", "skip"):
        raise ConfigError(f"on_bad_row: {on_bad_row!r} is neither 'fail' nor 'skip'")
    sha256, state = hash_of_file(path)
    folder = indexes_folder() / _key(sha256, renderer, kind)
    file, check = _File(path, sha256), _Check(renderer, kind)
    header, in_use = _claimed(folder, lambda: _make(file, check, folder, progress))
    first = [
        RowError(path, row.line, row.field, row.reason) for row in islice(_refused(folder), ERRORS_SHOWN)
    ]
    form = header.formats.only(path) if header.formats.counts else ""
    if not header.usable and header.refused > 1:
        refuse_another_kind(path, kind)
    if on_bad_row == "fail":
        refuse_rows(path, first, header.refused)
    if not header.usable:
        refuse_nothing_left(path, first, header.refused, kind.shapes)
    rows, ranked = (np.load(folder / name, mmap_mode="r") for name in ("rows.npy", "ranked.npy"))
    return RowIndex(path, sha256, kind, form, rows, ranked, header.refused, folder, state, in_use)


def row_chunks(path: str, progress: Progress) -> Iterator[list[LocatedRow]]:
    """The rows of a file, so many at once that they do not fill the memory."""
    chunk: list[LocatedRow] = []
    for done, row in enumerate(located_rows(path), start=1):
        chunk.append(row)
        if len(chunk) >= CHUNK_ROWS or row.offset - chunk[0].offset >= CHUNK_BYTES:
            yield chunk
            progress(done, row.offset)
            chunk = []
    if chunk:
        yield chunk


def indexes_folder() -> Path:
    """Where all of them are kept."""
    return home() / "row_indexes"


def _claimed(folder: Path, make: Callable[[], None]) -> tuple[IndexHeader, FolderInUse]:
    """An index that is there, or is made, and that nobody clears from now on."""
    for attempt in range(_ATTEMPTS):
        if attempt:
            make()
        with suppress(
            OSError
        ):  # not there yet, or cleared this very moment; what else may be wrong, `make` says
            in_use = FolderInUse(folder)
            if (header := read_header(folder)) is not None:
                return header, in_use
    raise ConfigError(f"row index {folder}: is removed or damaged as often as it is made; find out by what")


def _refused(folder: Path) -> Iterator[RefusedRow]:
    with (folder / "refused.jsonl").open(encoding="utf-8") as file:
        for line in file:
            yield RefusedRow(**json.loads(line))


def _key(sha256: str, renderer: Renderer, kind: RowKind[Any]) -> str:
    told = f"{sha256} {renderer.identity} {kind.name} {kind.record_type.descr}"
    digest = hashlib.sha256(told.encode())
    package = __name__.rpartition(".")[0]
    for name in (*_CODE, *_RENDERING, *kind.code):
        digest.update(inspect.getsource(sys.modules[f"{package}.{name}"]).encode())
    for name in _PACKAGES:
        digest.update(importlib.metadata.version(name).encode())
    return digest.hexdigest()[:32]


def read_header(folder: Path) -> IndexHeader | None:
    """What an earlier run has kept; None where there is nothing, or not what was written."""
    try:
        content = json.loads((folder / "index.json").read_text())
        header = IndexHeader(**content | {"formats": FormatTally(**content["formats"])})
        found = [hash_of_file(str(folder / name))[0] for name in _HASHED]
    except (OSError, ValueError, TypeError, KeyError, DataError):
        return None
    return header if found == [header.rows_sha256, header.ranked_sha256, header.refused_sha256] else None


@dataclass(frozen=True)
class _File:
    """A data file as it is to be read."""

    path: str
    sha256: str


@dataclass(frozen=True)
class _Check:
    """What rows are checked by."""

    renderer: Renderer
    kind: RowKind[Any]


def _make(file: _File, check: _Check, folder: Path, progress: Progress) -> None:
    """Written aside, synced, renamed: what is there is whole. Of two makers the first wins; both wrote the same."""
    partial = folder.with_name(f".partial-{folder.name}-{secrets.token_hex(4)}")
    try:
        partial.mkdir(parents=True)
        with _held(partial), closing(_checked(file.path, check, progress)) as checked:
            _sweep(folder.parent)
            _write(partial, checked, file.sha256, check.kind)
            if hash_of_file(file.path)[0] != file.sha256:
                raise DataError(f"{file.path}: the file was changed while it was read; start again")
            _put(partial, folder)
    except OSError as error:
        raise ConfigError(
            f"row index {folder}: {error}; set FIRESTEEL_HOME to a writable folder with room"
        ) from error
    finally:
        for leftover in folder.parent.glob(f"{partial.name}*"):
            shutil.rmtree(leftover, ignore_errors=True)


def _put(partial: Path, folder: Path) -> None:
    if read_header(folder) is not None:
        return
    if folder.exists():
        folder.rename(partial.with_name(f"{partial.name}-damaged"))
    try:
        partial.rename(folder)
    except OSError:
        if read_header(folder) is None:  # otherwise another run was quicker
            raise
    sync(folder.parent)


def _checked(path: str, check: _Check, progress: Progress) -> Generator[CheckedRows]:
    count = min(os.cpu_count() or 1, 8)
    if check.renderer.source is None or count == 1 or os.path.getsize(path) < BYTES_WORTH_WORKERS:
        for chunk in row_chunks(path, progress):
            yield check_rows(chunk, check.renderer, check.kind)
        return
    with closing(RowWorkers(check.renderer, check.kind, count)) as workers:
        yield from workers.check(row_chunks(path, progress))


def _write(folder: Path, checked: Iterable[CheckedRows], sha256: str, kind: RowKind[Any]) -> None:
    formats, refused = FormatTally(), 0
    rows, ranked = folder / "rows.npy", folder / "ranked.npy"
    with (
        _array(rows, kind.record_type) as usable,
        _array(ranked, RANKED) as answers,
        (folder / "refused.jsonl").open("w", encoding="utf-8") as bad,
    ):
        for part in checked:
            usable.write(part.usable.tobytes())
            answers.write(part.ranked.tobytes())
            bad.writelines(json.dumps(asdict(row)) + "\n" for row in part.refused)
            formats.merge(part.formats)
            refused += len(part.refused)
    hashes = [hash_of_file(str(folder / name))[0] for name in _HASHED]
    count = len(np.load(rows, mmap_mode="r"))
    header = IndexHeader(sha256, count, refused, formats, *hashes)
    (folder / "index.json").write_text(json.dumps(asdict(header)))
    for name in (*_HASHED, "index.json", "."):
        sync(folder / name)


@contextmanager
def _array(path: Path, dtype: np.dtype[np.void]) -> Iterator[IO[bytes]]:
    """A file for the bytes of an array, which is made one when all are there: they need not pass through memory."""
    raw = path.with_suffix(".raw")
    with raw.open("wb") as file:
        yield file
    content = np.memmap(raw, dtype, mode="r") if raw.stat().st_size else np.empty(0, dtype)
    np.save(path, content)
    raw.unlink()


@contextmanager
def _held(partial: Path) -> Iterator[None]:
    """Shown to be in use, whatever its age and the clock say; gone with the process."""
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _sweep(parent: Path) -> None:
    """What killed runs have left half made: old, and in nobody's hands."""
    for leftover in parent.glob(".partial-*"):
        with suppress(OSError):  # held by its maker, or already gone
            if time.time() - leftover.stat().st_mtime > _STALE_SECONDS:
                descriptor = os.open(leftover, os.O_RDONLY)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(leftover, ignore_errors=True)
                finally:
                    os.close(descriptor)
