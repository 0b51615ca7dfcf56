"""JSON Lines, as it is or gzipped: bytes → one object per line, or why a line is none."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, cast

from firesteel.sdk.errors import DataError
from training.utils.preference_examples import ExampleError
from training.utils.row_values import Row, field_path, shown

MAX_ROW_BYTES = 50_000_000
# So much of the first line tells what kind of file it is.
_START = 100_000
_GZIP, _BYTE_ORDER_MARK = b"\x1f\x8b", b"\xef\xbb\xbf"


@dataclass(frozen=True)
class LocatedRow:
    """One line that is not blank: its number from 1, where it starts, and its bytes."""

    line: int
    offset: int
    """In bytes from the start of the (unpacked) file."""
    raw: bytes


def located_rows(path: str) -> Iterator[LocatedRow]:
    """Each row of a file. One over the size limit is cut just behind it. Raises DataError for an unreadable file."""
    with _explained(path), _open(path) as stream:
        offset = 0
        for line, (raw, length) in enumerate(_bounded_lines(stream), start=1):
            row = raw.removeprefix(_BYTE_ORDER_MARK) if line == 1 else raw
            if line == 1:
                _refuse_foreign_file(path, row)
            if row.strip():
                yield LocatedRow(line, offset, row)
            offset += length


class RowsFile:
    """Rows of one file by where they start. A gzipped file is unpacked into a temporary one first.

    The file stays open: replaced by another of its name, it is still read as it was. Changed in place, it is
    refused. Threads may share one.
    """

    def __init__(self, path: str, checked: FileState) -> None:
        """Raises DataError if the file is another one than when it was `checked`."""
        self._path = path
        self._checked = checked
        self._place = threading.Lock()
        with _explained(path):
            self._original = open(path, "rb")  # noqa: SIM115  # until `close`
            self._refuse_changed()
            self._stream: IO[bytes] = self._original
            if self._original.peek(2)[:2] == _GZIP:
                self._stream = tempfile.TemporaryFile()  # noqa: SIM115
                with gzip.GzipFile(fileobj=self._original) as packed:
                    shutil.copyfileobj(packed, self._stream)

    def row_at(self, offset: int) -> bytes:
        """The row that starts there. Raises DataError if the file has changed since it was opened."""
        with _explained(self._path):
            self._refuse_changed()
            with self._place:
                self._stream.seek(offset)
                raw = self._stream.readline(MAX_ROW_BYTES + 1)
        return raw.removeprefix(_BYTE_ORDER_MARK) if offset == 0 else raw

    def close(self) -> None:
        """Close the file."""
        self._stream.close()
        self._original.close()

    def _refuse_changed(self) -> None:
        if FileState.of(self._original) != self._checked:
            raise DataError(f"{self._path}: the file was changed since its rows were checked; start again")


@dataclass(frozen=True)
class FileState:
    """What tells a file from another of its name, and from itself after a change."""

    device: int
    inode: int
    size: int
    changed_ns: int

    @classmethod
    def of(cls, file: IO[bytes]) -> FileState:
        """Of an open file."""
        found = os.fstat(file.fileno())
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def hash_of_file(path: str) -> tuple[str, FileState]:
    """SHA-256 of the bytes as they are on disk, and the state of the file that they were read from."""
    with _explained(path), open(path, "rb") as stream:
        state = FileState.of(stream)
        return hashlib.file_digest(stream, "sha256").hexdigest(), state


@contextmanager
def _explained(path: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        from_where = "" if os.path.isabs(path) else f"; it was looked for from the folder {os.getcwd()}"
        raise DataError(f"{path}: there is no such file{from_where}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def _open(path: str) -> IO[bytes]:
    stream = open(path, "rb")  # noqa: SIM115  # closed by the caller's `with`
    if stream.peek(2)[:2] != _GZIP:
        return stream
    stream.close()
    return cast("IO[bytes]", gzip.open(path, "rb"))


def _bounded_lines(stream: IO[bytes]) -> Iterator[tuple[bytes, int]]:
    """Each line, and how many bytes it takes."""
    while raw := stream.readline(MAX_ROW_BYTES + 1):
        rest, length = raw, len(raw)
        while not rest.endswith(b"\n") and (rest := stream.readline(MAX_ROW_BYTES)):
            length += len(rest)  # what is over the limit is read in pieces and forgotten
        yield raw, length


_UNPACK = "unpack it, or pack it with gzip"
_AS_ROWS = "write each row as one JSON object on a line of its own"
# What is not JSON Lines at all, by how its first line begins, lower case: an error per line would help nobody.
_FOREIGN: tuple[tuple[bytes, str], ...] = (
    (rb"\xff\xfe\0\0|\0\0\xfe\xff", "is UTF-32; save it as UTF-8"),
    (rb"\xff\xfe|\xfe\xff|[{\[]\0|\0[{\[]", "is UTF-16; save it as UTF-8"),
    (rb"par1", "is Parquet; write its rows as JSON Lines"),
    (rb"arrow1", "is Arrow; write its rows as JSON Lines"),
    (rb"sqlite format 3", "is an SQLite database; write its rows as JSON Lines"),
    (rb"pk\x03\x04", "is a ZIP archive; unpack it first"),
    (rb"bzh[1-9]", f"is packed with bzip2; {_UNPACK}"),
    (rb"\xfd7zxz", f"is packed with xz; {_UNPACK}"),
    (rb"\x28\xb5\x2f\xfd", f"is packed with zstd; {_UNPACK}"),
    (rb"\x1f\x8b", "is packed with gzip twice; unpack it once"),
    (rb"%pdf-", "is a PDF; write its rows as JSON Lines"),
    (rb"<(!doctype|html|head|\?xml)", "is a web page: was the download refused?"),
    (rb"version https://git-lfs", "is a Git LFS pointer, not the data: run `git lfs pull`"),
    (rb"\[\s*(\{|$)", "is one JSON array; expected one object per line (`jq -c '.[]'`)"),
    (rb"\{$", "is JSON, but its first object goes over several lines; write each on one (`jq -c .`)"),
    (rb"---\s*$|- \w+:|\w+:(\s|$)", f"looks like YAML; {_AS_ROWS}"),
    (rb"\"?\w+\"?([,;\t]\"?\w+\"?)+$", f"looks like CSV; {_AS_ROWS}"),
)
_CARRIAGE_RETURNS_ALONE = re.compile(rb"\}\s*\r\s*\{")


def _refuse_foreign_file(path: str, first_line: bytes) -> None:
    start = first_line.strip().lower() if len(first_line) < _START else first_line[:_START].lower()
    for pattern, what in _FOREIGN:
        if re.match(pattern, start):
            raise DataError(f"{path}: the file {what}")
    if _CARRIAGE_RETURNS_ALONE.search(first_line):
        raise DataError(f"{path}: the file's lines end with CR alone; save it with LF")


class _Repeated(dict[str, Any]):
    """An object in which a key stands twice; JSON readers differ in which one they keep."""

    key: str = ""


class _NotFinite(str):
    """NaN, Infinity or -Infinity where JSON has a number."""


def parse_row(raw: bytes) -> Row:
    """The JSON object of one line. Raises ExampleError."""
    if len(raw) > MAX_ROW_BYTES:
        raise ExampleError("row", f"more than {MAX_ROW_BYTES:,} bytes in one line")
    try:
        row = _decoded(raw)
        _refuse_unusable_values(row, "")
    except RecursionError:
        raise ExampleError("row", "nested too deeply to be read") from None
    if not isinstance(row, dict):
        raise ExampleError("row", f"{shown(row)}; expected an object")
    return row


def _decoded(raw: bytes) -> object:
    if raw.startswith(_BYTE_ORDER_MARK):  # the file's own is gone by now
        raise ExampleError(
            "row", "a byte order mark in the middle of the file, where two were joined; remove it"
        )
    try:
        text = raw.decode("utf-8").rstrip()  # with its line end, an error at the end would be in column 1
        return json.loads(text, object_pairs_hook=_object, parse_constant=_NotFinite)
    except UnicodeDecodeError as error:
        place = f"byte 0x{raw[error.start]:02x} at byte {error.start + 1} of the line"
        raise ExampleError("row", f"not UTF-8: {place}") from None
    except json.JSONDecodeError as error:
        raise ExampleError("row", f"not valid JSON at column {error.colno}: {error.msg}") from None
    except ValueError as error:  # an integer of thousands of digits
        raise ExampleError("row", f"not usable as JSON: {error}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) == len(pairs):
        return content
    keys = [key for key, _ in pairs]
    repeated = _Repeated(content)
    repeated.key = next(key for key in keys if keys.count(key) > 1)
    return repeated


def _refuse_unusable_values(value: object, place: str) -> None:
    """Refuse what Python's JSON reader lets through although it is not JSON, or not text."""
    if isinstance(value, _NotFinite):
        raise ExampleError(place or "row", f"{value} is not JSON; write a number or null")
    if isinstance(value, str):
        _refuse_unusable_text(value, place or "row")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _refuse_unusable_values(item, f"{place}[{index}]")
    elif isinstance(value, dict):
        for key in value:
            _refuse_unusable_text(key, field_path(place, ascii(key)))
        if isinstance(value, _Repeated):
            raise ExampleError(
                field_path(place, value.key), f"the key {value.key!r} is there twice in one object"
            )
        for key, item in value.items():
            _refuse_unusable_values(item, field_path(place, key))


def _refuse_unusable_text(text: str, place: str) -> None:
    if "\0" in text:
        raise ExampleError(place, f"a NUL character at position {text.index(chr(0))}; remove it")
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise ExampleError(
            place,
            f"half a character ({half}, a lone surrogate) at position {error.start}; the text was cut",
        ) from None
