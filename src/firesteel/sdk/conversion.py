"""Objects of other packages → our types, by their attributes. The only place that looks at foreign objects."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any, TypeVar

import numpy as np

from firesteel.sdk.errors import OperationError
from firesteel.sdk.types import (
    AdamParams,
    Datum,
    EncodedTextChunk,
    LoraConfig,
    ModelInput,
    SamplingParams,
    TensorData,
)

Settings = TypeVar("Settings", AdamParams, LoraConfig, SamplingParams)


def as_data(data: Iterable[Any]) -> tuple[Datum, ...]:
    """Each item as `Datum`; ours pass untouched."""
    return tuple(as_datum(item, f"data[{index}]") for index, item in enumerate(data))


def as_datum(value: Any, where: str = "datum") -> Datum:
    """Anything with `model_input` and `loss_fn_inputs`."""
    if isinstance(value, Datum) and isinstance(value.model_input, ModelInput):
        return value
    _need(value, where, "model_input", "loss_fn_inputs")
    inputs = {name: _as_tensor(item, f"{where}.{name}") for name, item in dict(value.loss_fn_inputs).items()}
    return Datum(as_model_input(value.model_input, f"{where}.model_input"), inputs)


def as_model_input(value: Any, where: str = "model_input") -> ModelInput:
    """Anything with `chunks` of token ids, or a plain sequence of ids; images are refused."""
    if isinstance(value, ModelInput):
        return value
    if isinstance(value, (Sequence, np.ndarray)) and not isinstance(value, str):
        return ModelInput.from_ints(value)
    _need(value, where, "chunks")
    return ModelInput(tuple(_as_chunk(chunk, f"{where}.chunks[{i}]") for i, chunk in enumerate(value.chunks)))


def _as_chunk(chunk: Any, where: str) -> EncodedTextChunk:
    if getattr(chunk, "type", None) != "encoded_text":
        raise OperationError(
            f"{where}: {type(chunk).__name__}; only text chunks (`encoded_text`) are supported"
        )
    return EncodedTextChunk(tuple(chunk.tokens))


def _as_tensor(value: Any, where: str) -> Any:
    if isinstance(value, TensorData) or not _has(value, "data", "dtype") or isinstance(value, np.ndarray):
        return value  # our own, or a list, array or tensor that `Datum` itself takes
    if getattr(value, "sparse_crow_indices", None) is not None:
        return TensorData(np.asarray(value.to_numpy()), value.dtype)
    if value.dtype not in ("float32", "int64"):
        return value  # a torch tensor has the same attributes
    return TensorData(value.data, value.dtype, getattr(value, "shape", None))


def as_adam_params(value: Any) -> AdamParams:
    """Anything with the fields of `AdamParams`."""
    return _as_settings(value, AdamParams, required=("learning_rate",))


def as_lora_config(value: Any) -> LoraConfig:
    """Anything with a `rank`."""
    return _as_settings(value, LoraConfig, required=("rank",))


def as_sampling_params(value: Any) -> SamplingParams:
    """Anything with the fields of `SamplingParams`; `stop` must be token ids."""
    params = _as_settings(value, SamplingParams, required=("temperature",))
    if isinstance(params.stop, str) or any(isinstance(stop, str) for stop in params.stop):
        raise OperationError(
            f"SamplingParams.stop: {params.stop!r}; a trainer has no tokenizer, give token ids"
        )
    return params


def _as_settings(value: Any, kind: type[Settings], required: tuple[str, ...]) -> Settings:
    if isinstance(value, kind):
        return value
    _need(value, kind.__name__, *required)
    given = {field.name: getattr(value, field.name, None) for field in fields(kind)}
    return kind(**{name: item for name, item in given.items() if item is not None})


def _need(value: Any, where: str, *names: str) -> None:
    if not _has(value, *names):
        raise OperationError(f"{where}: {type(value).__name__} has not the attributes {', '.join(names)}")


def _has(value: Any, *names: str) -> bool:
    return all(getattr(value, name, None) is not None for name in names)
