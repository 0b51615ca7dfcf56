"""Folders that are whole or not there: written aside, synced, hashed in a manifest, renamed into place.

::

    .partial-NAME-…/    being written; no reader looks into it, `sweep` removes it
    NAME/               whole: manifest.json lists the size and SHA-256 of every other file

A name is never written to twice. After a crash at any instant NAME is whole or absent; what happens to the bytes
afterwards (a disk, a hand) is what the hashes are for.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import stat
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from firesteel.sdk.errors import FiresteelError, StorageError

MANIFEST = "manifest.json"
# What a refusal to write is raised as: libraries that write safetensors do not raise the system's own.
WRITE_ERRORS = (OSError, SafetensorError)
_NOT_FOR_LACK_OF_ROOM = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS}
_READ_BYTES = 2**22


@dataclass(frozen=True)
class SealedFile:
    """One file of a folder: its size in bytes and the SHA-256 of its content."""

    name: str
    size: int
    sha256: str


class FolderWriter:
    """The files of a folder that is being written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: list[SealedFile] = []

    def write(self, name: str, chunks: Iterable[bytes | memoryview]) -> None:
        """One file, hashed as it is written and brought to the disk."""
        digest, size = hashlib.sha256(), 0
        with (self.folder / name).open("wb", buffering=0) as file:
            for chunk in chunks:
                _write_all(file.write, memoryview(chunk))
                digest.update(chunk)
                size += len(chunk)
            os.fsync(file.fileno())
        self._files.append(SealedFile(name, size, digest.hexdigest()))

    def write_json(self, name: str, content: object) -> None:
        """One file of JSON, as `write`."""
        self.write(name, [_as_json(content)])

    def seal(self) -> None:
        """Write the manifest as the last file, and bring the folder's list of names to the disk."""
        files = [asdict(file) for file in self._files]
        content = _as_json({"files": files, "sha256": _list_sha256(files)})
        with (self.folder / MANIFEST).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        sync(self.folder)


@contextmanager
def new_folder(target: Path, bytes_needed: int) -> Iterator[FolderWriter]:
    """Make `target`: filled in the block, sealed and renamed into place at its end, gone if the block raises.

    Raises `StorageError` with the path and the bytes needed where the disk is full or cannot be written to, or
    where there is something of that name already.
    """
    with storage_errors(target, bytes_needed):
        if target.exists():
            raise StorageError(f"{target} exists already; name a folder that does not")
        target.parent.mkdir(parents=True, exist_ok=True)
        _refuse_full_disk(target, bytes_needed)
        partial = target.with_name(f".partial-{target.name}-{secrets.token_hex(4)}")
        partial.mkdir()
        try:
            writer = FolderWriter(partial)
            yield writer
            writer.seal()
            partial.rename(target)
            sync(target.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _refuse_full_disk(target: Path, bytes_needed: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < bytes_needed:
        raise StorageError(
            f"{target} needs {bytes_needed:,} bytes and its disk has {free:,} free; make room, or name a folder "
            "elsewhere"
        )


def damage(folder: Path, *, names: Iterable[str] = ()) -> str | None:
    """What is wrong with a sealed folder, or None: every file is read and compared with the manifest.

    `names` are files that must be there.
    """
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
        files = [SealedFile(**file) for file in content["files"]]
        if content["sha256"] != _list_sha256(content["files"]):
            return f"{folder / MANIFEST} does not have the content that it was written with"
    except FileNotFoundError:
        return f"{folder / MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{folder / MANIFEST} is not a manifest ({error!r})"
    if missing := set(names) - {file.name for file in files}:
        return f"{folder / MANIFEST} does not list {', '.join(sorted(missing))}"
    # A manifest may come from anywhere, and must not lead out of its folder.
    if strange := [file.name for file in files if not _is_plain_name(file.name)]:
        return f"{folder / MANIFEST} lists {strange[0]!r}, which is not the name of a file in it"
    return next(filter(None, (_file_damage(folder / file.name, file) for file in files)), None)


def _is_plain_name(name: object) -> bool:
    return isinstance(name, str) and name not in ("", "..") and name == Path(name).name


def _list_sha256(files: Sequence[Mapping[str, Any]]) -> str:
    return hashlib.sha256(_as_json(files)).hexdigest()


def _file_damage(path: Path, expected: SealedFile) -> str | None:
    try:
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode):
            return f"{path} is not a file"
        size = found.st_size
        if size != expected.size:
            return f"{path} has {size} bytes instead of {expected.size}"
        if _sha256(path) != expected.sha256:
            return f"{path} does not have the content that it was written with"
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} cannot be read: {error}"
    return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def replace_file(path: Path, content: bytes) -> None:
    """Write a file aside and rename it over `path`: a reader sees the old content or the new, also after a crash.

    Raises `StorageError`: the old content is there then, or the new if only the last sync was refused.
    """
    partial = path.with_name(f".partial-{path.name}-{secrets.token_hex(4)}")
    with storage_errors(path, len(content)):
        try:
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.rename(path)
        finally:
            partial.unlink(missing_ok=True)
        sync(path.parent)


def remove_folder(folder: Path) -> None:
    """Remove a sealed folder; killed in between, its name is gone and `sweep` removes the rest."""
    doomed = folder.with_name(f".partial-{folder.name}-{secrets.token_hex(4)}")
    with storage_errors(folder, 0):
        folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


class FolderInUse:
    """A claim on a folder by one who reads in it: while there is any, `remove_unless_used` leaves the folder.

    It is the system's lock on the folder itself: gone with the process that has it, or with this object.
    """

    def __init__(self, folder: Path) -> None:
        """Raises FileNotFoundError where there is no such folder."""
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        self._let_go = weakref.finalize(self, os.close, descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if not os.path.samestat(os.fstat(descriptor), os.stat(folder)):
            self._let_go()  # removed while this waited; what has its name now is another
            raise FileNotFoundError(folder)

    def close(self) -> None:
        """Let it go."""
        self._let_go()


def is_used(folder: Path) -> bool:
    """Whether somebody has a claim on a folder."""
    with _only_claim(folder) as alone:
        return not alone


def remove_unless_used(folder: Path) -> bool:
    """As `remove_folder`, unless somebody has a claim on it; whether it was removed."""
    with _only_claim(folder) as alone:
        if alone:
            remove_folder(folder)
        return alone


@contextmanager
def _only_claim(folder: Path) -> Iterator[bool]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


@contextmanager
def storage_errors(target: Path, bytes_needed: int) -> Iterator[None]:
    """The system's refusals to write as one error that names the path and what it needs."""
    try:
        yield
    except FiresteelError:  # some of ours are the system's kind of error, too
        raise
    except WRITE_ERRORS as error:
        room = "" if isinstance(error, OSError) and error.errno in _NOT_FOR_LACK_OF_ROOM else "make room, or "
        raise StorageError(
            f"{target} was not written, {bytes_needed:,} bytes: {error}; {room}name a folder that can be written to"
        ) from error


def sweep(parent: Path) -> None:
    """Remove what killed processes have left half written. Only the one writer of `parent` may call this."""
    for leftover in parent.glob(".partial-*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Bring a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(write: Callable[[memoryview], int | None], chunk: memoryview) -> None:
    chunk = chunk.cast("B") if chunk.nbytes else chunk
    while len(chunk):
        chunk = chunk[write(chunk) or 0 :]


def _as_json(content: object) -> bytes:
    return json.dumps(content, indent=1, sort_keys=True).encode() + b"\n"


def read_json(path: Path) -> Mapping[str, Any]:
    """A JSON object. Raises ValueError where there is something else."""
    content = json.loads(path.read_bytes())
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content
