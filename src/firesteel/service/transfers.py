"""Folders on their way between a client's disk and a trainer: states, exports and adapters that a loop keeps itself.

A client of ours names paths on its own machine. What a trainer writes for it lands here, is fetched file by file, and
goes; what a trainer shall load is put here first. Nothing here outlives its client: what nobody fetches is swept.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from firesteel.sdk.errors import OperationError, StorageError
from firesteel.sdk.wire import FILE_NAME
from firesteel.sealed import WRITE_ERRORS

LEFT_SECONDS = 3600.0
_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class TransferFile:
    """One file of a folder in transit."""

    name: str
    size: int
    sha256: str


class Transfers:
    """The folders in transit of all accounts."""

    def __init__(self, folder: Path, most_bytes: int) -> None:
        """`most_bytes` bounds one file that a client sends."""
        self._folder = folder
        self._most_bytes = most_bytes

    def new(self, account: str) -> str:
        """Make room for one folder, and say by which id it goes."""
        transfer_id = secrets.token_hex(16)
        self._path(account, transfer_id).mkdir(parents=True)
        return transfer_id

    def place(self, account: str, transfer_id: str) -> Path:
        """Where the folder of a transfer will be. Raises `OperationError` for an id that this account was not given."""
        path = self._path(account, transfer_id) if _ID.fullmatch(transfer_id) else None
        if path is None or not path.is_dir():
            raise OperationError(f"there is no transfer {transfer_id!r} here (any more); send it again")
        os.utime(path)  # in use
        return path / "content"

    async def receive(
        self, account: str, transfer_id: str, name: str, chunks: AsyncIterator[bytes]
    ) -> TransferFile:
        """Write one file as its bytes arrive. Raises `OperationError` for a bad name or too many bytes."""
        folder = self.place(account, transfer_id)
        if not FILE_NAME.fullmatch(name):
            raise OperationError(f"{name!r} is not the name of a file in a state or an adapter")
        digest, size = hashlib.sha256(), 0
        try:
            folder.mkdir(exist_ok=True)
            with (folder / name).open("wb") as file:
                async for chunk in chunks:
                    size += len(chunk)
                    if size > self._most_bytes:
                        raise OperationError(
                            f"{name}: more than the {self._most_bytes:,} bytes that this server takes"
                        )
                    digest.update(chunk)
                    file.write(chunk)
        except WRITE_ERRORS as error:
            raise StorageError(f"{name} could not be kept after {size:,} bytes: {error}") from error
        return TransferFile(name, size, digest.hexdigest())

    def files(self, account: str, transfer_id: str) -> list[TransferFile]:
        """What there is to fetch."""
        folder = self.place(account, transfer_id)
        return [_described(path) for path in sorted(folder.iterdir())] if folder.is_dir() else []

    def file(self, account: str, transfer_id: str, name: str) -> Path:
        """One file to fetch."""
        path = self.place(account, transfer_id) / name
        if not FILE_NAME.fullmatch(name) or not path.is_file():
            raise OperationError(f"there is no file {name!r} in transfer {transfer_id!r}")
        return path

    def end(self, account: str, transfer_id: str) -> None:
        """Delete it; one that is gone already is gone."""
        if not _ID.fullmatch(transfer_id):
            raise OperationError(f"{transfer_id!r} is not the id of a transfer")
        shutil.rmtree(self._path(account, transfer_id), ignore_errors=True)

    def sweep(self) -> None:
        """Delete what nobody has touched for long."""
        limit = time.time() - LEFT_SECONDS
        for folder in self._folder.glob("*/*"):
            with suppress(FileNotFoundError):  # another request has just ended it
                if max(path.stat().st_mtime for path in (folder, *folder.rglob("*"))) < limit:
                    shutil.rmtree(folder, ignore_errors=True)

    def _path(self, account: str, transfer_id: str) -> Path:
        return self._folder / account / transfer_id


def _described(path: Path) -> TransferFile:
    with path.open("rb") as file:
        return TransferFile(path.name, path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())
