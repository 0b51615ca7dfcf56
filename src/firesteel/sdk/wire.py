"""Operations and results as bytes, for the way between our own client and server.

A message is a JSON head, and after it the arrays as they are in memory, which JSON would make slow and large:

    "FSW1" | length of the head, 4 bytes | head | padding to 8 | array | padding to 8 | …

In the head an array is ``{"@": [dtype, shape, place]}``. Reading goes by the types that the operations declare: what
has another type, an unknown name or a place outside the message is refused, and nothing is ever executed.
"""

from __future__ import annotations

import functools
import json
import re
import struct
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from typing import Any, Literal

import numpy as np
import orjson

from firesteel.sdk import errors, operations
from firesteel.sdk.errors import FiresteelError, OperationError, OperationFailed
from firesteel.sdk.operations import Operation, SaveState
from firesteel.sdk.shapes import TrainingShape
from firesteel.sdk.types import (
    EncodedTextChunk,
    Examined,
    ForwardBackwardOutput,
    LoadStateResponse,
    OptimStepResponse,
    SampleResponse,
    SaveStateResponse,
    SaveWeightsResponse,
    TensorData,
)

MEDIA_TYPE = "application/x-firesteel"
TRANSFER = "transfer:"
"""Before the id of a folder on its way between the two sides, where an operation names a path."""
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""What a file of such a folder may be called, on either side."""
_MAGIC = b"FSW1"
_ALIGNMENT = 8
_DTYPES = ("float32", "float64", "int64")

_RESULTS: dict[type[Any], Any] = {
    operations.ResolveShape: TrainingShape,
    operations.CreateModel: operations.ModelDescription,
    operations.CreateBaseReference: operations.ModelDescription,
    operations.IdentifyModel: operations.ModelIdentity,
    operations.UnloadModel: None,
    operations.ReleaseForward: None,
    operations.Forward: ForwardBackwardOutput,
    operations.ForwardBackward: ForwardBackwardOutput,
    operations.Backward: ForwardBackwardOutput,
    operations.Examine: Examined,
    operations.OptimStep: OptimStepResponse,
    operations.DropGradient: None,
    operations.SaveWeights: SaveWeightsResponse,
    operations.SaveState: SaveStateResponse,
    operations.LoadState: LoadStateResponse,
    operations.Sample: SampleResponse,
    operations.Refused: None,
}
_OPERATIONS = {kind.__name__: kind for kind in _RESULTS}
_ERRORS = {
    kind.code: kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, FiresteelError)
}


def encode_operation(operation: Operation) -> bytes:
    """An operation as a message."""
    return _message({"operation": type(operation).__name__, "value": operation})


def decode_operation(message: bytes, most_items: int | None = None) -> Operation:
    """The operation of a message. Raises `OperationError` naming the field that is not as declared.

    Data and gradients of more than `most_items` are refused before they are read.
    """
    head, arrays = _parts(message)
    name = head.get("operation")
    if not isinstance(name, str) or name not in _OPERATIONS:
        raise OperationError(f"operation: {name!r} is not one of {', '.join(_OPERATIONS)}")
    value = head.get("value")
    for field in ("data", "dloss_dlogprob"):
        items = value.get(field) if isinstance(value, dict) else None
        if most_items is not None and isinstance(items, list) and len(items) > most_items:
            raise OperationError(
                f"{field}: {len(items)} in one request; this server takes {most_items}, send several"
            )
    operation: Operation = _decode(_OPERATIONS[name], head.get("value"), arrays, str(name))
    return operation


def encode_result(result: Any) -> bytes:
    """What an operation gave, as a message."""
    return _message({"value": result})


def encode_error(error: FiresteelError) -> bytes:
    """Why an operation failed, as a message."""
    return _message({"error": {"code": error.code, "text": str(error)}})


def decode_result(operation: Operation, message: bytes) -> Any:
    """What `operation` gave. Raises the error that it failed with, and `OperationFailed` for what is no message."""
    try:
        head, arrays = _parts(message)
        if "error" not in head:
            return _decode(_RESULTS[type(operation)], head.get("value"), arrays, "result")
        code, text = head["error"]["code"], head["error"]["text"]
    except (OperationError, KeyError, TypeError) as error:
        raise OperationFailed(f"the server's answer cannot be read: {error}") from error
    raise error_of(code, text)


def error_of(code: str, text: str, otherwise: type[FiresteelError] = OperationFailed) -> FiresteelError:
    """The error of this code; one that needs more than a text to be made comes as its parent."""
    kind = _ERRORS.get(code, otherwise)
    special: dict[type[FiresteelError], type[FiresteelError]] = {
        errors.RowError: errors.DataError,
        errors.TrainerRewound: errors.TrainerLost,
    }
    return special.get(kind, kind)(text)


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _message(content: Mapping[str, Any]) -> bytes:
    arrays = _Arrays()
    head = orjson.dumps(_encode(content, arrays))
    start = len(_MAGIC) + 4 + len(head)
    return b"".join([_MAGIC, struct.pack("<I", len(head)), head, bytes(-start % _ALIGNMENT), *arrays.buffers])


class _Arrays:
    """The arrays of a message that is being written."""

    def __init__(self) -> None:
        self.buffers: list[bytes] = []
        self._place = 0

    def add(self, array: np.ndarray[Any, Any]) -> dict[str, Any]:
        """Take an array; returns what stands for it in the head."""
        if array.dtype.name not in _DTYPES:
            raise TypeError(f"operations carry no arrays of {array.dtype}")
        content = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
        reference = {"@": [array.dtype.name, list(array.shape), self._place]}
        self.buffers += [content, bytes(-len(content) % _ALIGNMENT)]
        self._place += len(content) + len(self.buffers[-1])
        return reference


def _encode(value: Any, arrays: _Arrays) -> Any:
    match value:
        case np.generic():
            return _encode(value.item(), arrays)
        case None | bool() | int() | str():
            return value.value if isinstance(value, Enum) else value
        case float():
            # JSON has no number for these, and says nothing when it writes null instead.
            return value if np.isfinite(value) else arrays.add(np.array(value))
        case TensorData():
            return arrays.add(value.to_numpy())
        case np.ndarray():
            return arrays.add(value)
        case EncodedTextChunk():
            return arrays.add(np.asarray(value.tokens, dtype=np.int64))
        case SaveState():
            # Notes are whatever JSON can say, which is more than the writer of this head can.
            described = {f.name: getattr(value, f.name) for f in fields(value)}
            return _encode({**described, "notes": json.dumps(dict(value.notes))}, arrays)
        case Mapping():
            return {key: _encode(item, arrays) for key, item in value.items()}
        case Sequence():
            return [_encode(item, arrays) for item in value]
        case _ if is_dataclass(value):
            return {field.name: _encode(getattr(value, field.name), arrays) for field in fields(value)}
        case _:
            raise TypeError(f"operations carry no {type(value).__name__}")


class _Buffer:
    """The arrays of a message that is being read, each byte once: a small message does not become a large one."""

    def __init__(self, content: memoryview) -> None:
        self._content = content
        self._left = len(content)

    def take(self, dtype: str, count: int, place: int) -> np.ndarray[Any, Any]:
        """The values at a place. Raises ValueError where they are not in the message, or more than is in it."""
        size = count * np.dtype(dtype).itemsize
        if place + size > len(self._content) or size > self._left:
            raise ValueError("it is not inside the message")
        self._left -= size
        found = np.frombuffer(self._content, np.dtype(dtype).newbyteorder("<"), count, place)
        return found.astype(dtype)  # a copy of its own: the message need not stay


def _parts(message: bytes) -> tuple[dict[str, Any], _Buffer]:
    try:
        if message[:4] != _MAGIC:
            raise ValueError("it does not begin as one")
        (length,) = struct.unpack_from("<I", message, 4)
        head = orjson.loads(message[8 : 8 + length])
        if not isinstance(head, dict):
            raise ValueError("its head is no JSON object")
    except (ValueError, struct.error) as error:
        raise OperationError(f"this is no message of Firesteel's: {error}") from None
    start = 8 + length
    return head, _Buffer(memoryview(message)[start + -start % _ALIGNMENT :])


def _decode(hint: Any, raw: Any, arrays: _Buffer, where: str) -> Any:
    """`raw` as a value of type `hint`, or `OperationError` naming `where`."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if raw is None and type(None) in parts:
            return None
        (choice,) = [part for part in parts if part is not type(None)]  # all of ours are "or None"
        return _decode(choice, raw, arrays, where)
    if origin is Literal:
        return _expect(raw in parts, raw, where, f"one of {parts}")
    if origin is np.ndarray:
        return _array(raw, arrays, where, typing.get_args(parts[1])[0])
    if origin in (tuple, list, Sequence):
        _expect(isinstance(raw, list), raw, where, "a list")
        values = (_decode(parts[0], value, arrays, f"{where}[{i}]") for i, value in enumerate(raw))
        return list(values) if origin is list else tuple(values)
    if origin is Mapping and parts[1] is Any:
        return _notes(raw, where)
    if origin in (dict, Mapping):
        _expect(isinstance(raw, dict), raw, where, "an object")
        return {key: _decode(parts[1], value, arrays, f"{where}.{key}") for key, value in raw.items()}
    return _decode_plain(hint, raw, arrays, where)


def _notes(raw: Any, where: str) -> Mapping[str, Any]:
    try:
        notes = json.loads(_expect(isinstance(raw, str), raw, where, "a text of JSON"))
    except ValueError as error:
        raise OperationError(f"{where}: {error}") from None
    _expect(isinstance(notes, dict), notes, where, "a JSON object")
    return typing.cast("Mapping[str, Any]", notes)


def _decode_plain(hint: Any, raw: Any, arrays: _Buffer, where: str) -> Any:
    if hint is Any:
        return raw
    if hint is type(None) or hint is None:
        return _expect(raw is None, raw, where, "nothing")
    if hint is TensorData:
        return TensorData(_array(raw, arrays, where))
    if hint is EncodedTextChunk:
        return EncodedTextChunk(_array(raw, arrays, where, np.int64).tolist())
    if is_dataclass(hint):
        return _decode_dataclass(hint, raw, arrays, where)
    if hint is float:
        if isinstance(raw, dict):
            number = _array(raw, arrays, where, np.float64)
            _expect(number.shape == (), raw, where, "a number")
            return float(number)
        numeric = isinstance(raw, int | float) and not isinstance(raw, bool)
        return float(_expect(numeric, raw, where, "a number"))
    if issubclass(hint, Enum):
        return hint(_expect(raw in [member.value for member in hint], raw, where, f"a {hint.__name__}"))
    return _expect(type(raw) is hint, raw, where, f"a value of type {hint.__name__}")


def _decode_dataclass(kind: Any, raw: Any, arrays: _Buffer, where: str) -> Any:
    _expect(isinstance(raw, dict), raw, where, "an object")
    known = {field.name: field for field in fields(kind)}
    for name in raw.keys() - known.keys():
        raise OperationError(f"{where}: {kind.__name__} has no field {name!r}")
    for name, field in known.items():
        if name not in raw and field.default is MISSING and field.default_factory is MISSING:
            raise OperationError(f"{where}.{name}: must be given")
    hints = _hints(kind)
    values = {name: _decode(hints[name], raw[name], arrays, f"{where}.{name}") for name in raw}
    try:
        return kind(**values)
    except (ValueError, TypeError) as error:
        raise OperationError(f"{where}: {error}") from None


def _array(raw: Any, arrays: _Buffer, where: str, dtype: Any = None) -> np.ndarray[Any, Any]:
    """An array of the kind of `dtype`, as wide as it was sent: fp64 models answer in fp64."""
    try:
        name, shape, place = raw["@"]
        _expect(
            name in _DTYPES and (dtype is None or np.dtype(dtype).kind == np.dtype(name).kind),
            name,
            where,
            "another dtype",
        )
        _expect(all(type(n) is int and n >= 0 for n in (*shape, place)), raw, where, "an array")
        count = int(np.prod(shape, dtype=object)) if shape else 1
        return arrays.take(name, count, place).reshape(shape)
    except (KeyError, TypeError, ValueError) as error:
        raise OperationError(f"{where}: expected an array, not {raw!r:.80} ({error})") from None


def _expect(holds: bool, raw: Any, where: str, expected: str) -> Any:
    if not holds:
        raise OperationError(f"{where}: {raw!r:.80}; expected {expected}")
    return raw
