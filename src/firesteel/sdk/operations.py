"""The closed set of messages that may cross from a client to a trainer, defined once for both sides.

Operations with a `seq_id` change or read the state of one model and run strictly in that order, each
``(model_id, seq_id)`` once. The others (provisioning, listings, sampling, release) carry no number.
The result of each is named in its docstring.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from numbers import Real
from typing import Any, Literal

import numpy as np

from firesteel.sdk.errors import OperationError
from firesteel.sdk.shapes import Mode, TrainingShape
from firesteel.sdk.types import (
    AdamParams,
    Datum,
    FloatArray,
    LoraConfig,
    ModelInput,
    SamplingParams,
    TensorData,
)

LossName = Literal["cross_entropy", "importance_sampling", "ppo", "cispo", "dro"]

# What each built-in loss reads from `loss_fn_inputs` beside `target_tokens`, and the settings it takes
# with their defaults (None = must be given).
_LOSS_INPUTS: dict[str, tuple[str, ...]] = {
    "cross_entropy": (),
    "importance_sampling": ("logprobs", "advantages"),
    "ppo": ("logprobs", "advantages"),
    "cispo": ("logprobs", "advantages"),
    "dro": ("logprobs", "advantages"),
}
LOSS_SETTINGS: dict[str, dict[str, float | None]] = {
    "cross_entropy": {},
    "importance_sampling": {},
    "ppo": {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
    "cispo": {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0},
    "dro": {"beta": None},
}


@dataclass(frozen=True)
class ModelDescription:
    """One model that an engine holds."""

    model_id: str
    base_model: str
    shape: TrainingShape
    lora_rank: int
    max_context_length: int
    """Longest sequence in tokens, the last target included."""
    attention: Literal["tree", "plain"]
    """`tree`: shared prefixes are computed once; `plain`: each sequence by itself, the model's own way."""
    trainable: bool


@dataclass(frozen=True)
class ModelIdentity:
    """What decides a model's log-probabilities."""

    weights: str
    """SHA-256 of configuration and parameters as they are in memory, adapter excluded where it is off."""
    numerics: str
    """dtype, device type, attention path, torch and transformers minor versions."""


@dataclass(frozen=True)
class ResolveShape:
    """Find a training shape, by name or by need. Result: `TrainingShape`."""

    base_model: str
    modes: tuple[Mode, ...]
    name: str | None = None
    min_context: int | None = None


@dataclass(frozen=True)
class CreateModel:
    """Load a model on a shape. Result: `ModelDescription`.

    With `lora` an adapter is trained, without it all weights; a model that is not `trainable` only runs forward.
    """

    base_model: str
    shape: TrainingShape
    lora: LoraConfig | None = None
    trainable: bool = True


@dataclass(frozen=True)
class CreateBaseReference:
    """A frozen model on the weights under a LoRA policy, its adapter off. Result: `ModelDescription`."""

    policy_id: str


@dataclass(frozen=True)
class IdentifyModel:
    """Hash a model's weights. Result: `ModelIdentity`."""

    model_id: str


@dataclass(frozen=True)
class UnloadModel:
    """Forget a model and free its memory. Result: None."""

    model_id: str


@dataclass(frozen=True)
class Forward:
    """Log-probabilities of the targets and the loss, no gradient. Result: `ForwardBackwardOutput`.

    With `retain`, a `Backward(of=seq_id)` may follow, as long as the weights do not change.
    """

    model_id: str
    seq_id: int
    data: tuple[Datum, ...]
    loss_fn: LossName = "cross_entropy"
    loss_fn_config: Mapping[str, float] | None = None
    retain: bool = False


@dataclass(frozen=True)
class ForwardBackward:
    """As `Forward`, and the gradient of the loss is added to the model's. Result: `ForwardBackwardOutput`."""

    model_id: str
    seq_id: int
    data: tuple[Datum, ...]
    loss_fn: LossName = "cross_entropy"
    loss_fn_config: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Backward:
    """Add the gradient that follows from ``dLoss/dlogprob`` at the targets of an earlier `Forward(retain)`.

    `dloss_dlogprob` has one array per datum of that forward, of the shape of its targets.
    Result: `ForwardBackwardOutput` (the log-probabilities of that forward).
    """

    model_id: str
    seq_id: int
    of: int
    dloss_dlogprob: tuple[FloatArray, ...]


@dataclass(frozen=True)
class ReleaseForward:
    """Drop what a `Forward(retain)` keeps, when no backward will follow. Result: None."""

    model_id: str
    of: int


@dataclass(frozen=True)
class OptimStep:
    """Apply the added gradient with AdamW and clear it. Result: `OptimStepResponse`."""

    model_id: str
    seq_id: int
    adam_params: AdamParams


@dataclass(frozen=True)
class SaveWeights:
    """Export to a new folder: an adapter in PEFT's format, all weights in Hugging Face's.

    Result: `SaveWeightsResponse`.
    """

    model_id: str
    seq_id: int
    path: str


@dataclass(frozen=True)
class Sample:
    """Continue a prompt with the weights as they are when it runs. Result: `SampleResponse`."""

    model_id: str
    prompt: ModelInput
    sampling_params: SamplingParams
    num_samples: int = 1


OrderedOperation = Forward | ForwardBackward | Backward | OptimStep | SaveWeights
UnorderedOperation = (
    ResolveShape | CreateModel | CreateBaseReference | IdentifyModel | UnloadModel | ReleaseForward | Sample
)
Operation = OrderedOperation | UnorderedOperation


def operation_name(operation: Operation) -> str:
    """For messages: `forward_backward seq 3 of model-1`."""
    name = "".join(f"_{c.lower()}" if c.isupper() else c for c in type(operation).__name__).lstrip("_")
    match operation:
        case Forward() | ForwardBackward() | Backward() | OptimStep() | SaveWeights():
            return f"{name} seq {operation.seq_id} of {operation.model_id}"
        case IdentifyModel() | UnloadModel() | Sample() | ReleaseForward():
            return f"{name} of {operation.model_id}"
        case _:
            return name


def fingerprint(operation: Operation) -> bytes:
    """SHA-256 of an operation's content: equal for a retry, different for another payload."""
    digest = hashlib.sha256()
    _feed(digest, operation)
    return digest.digest()


def _feed(digest: Any, value: Any) -> None:
    # A type tag and a length before every value keep ("ab", "c") and ("a", "bc") apart.
    match value:
        case TensorData():
            _feed(digest, value.to_numpy())
        case np.ndarray():
            digest.update(f"array {value.dtype} {value.shape} ".encode())
            digest.update(np.ascontiguousarray(value).tobytes())
        case np.generic():
            _feed(digest, value.item())
        case Enum():
            _feed(digest, value.value)
        case Mapping():
            digest.update(f"map {len(value)} ".encode())
            for key in sorted(value):
                _feed(digest, key)
                _feed(digest, value[key])
        case str() | bool() | int() | float() | None:
            text = repr(value)
            digest.update(f"{type(value).__name__} {len(text)} {text} ".encode())
        case Sequence():
            digest.update(f"list {len(value)} ".encode())
            for item in value:
                _feed(digest, item)
        case _ if is_dataclass(value):
            digest.update(f"{type(value).__name__} ".encode())
            for field in fields(value):
                _feed(digest, getattr(value, field.name))
        case _:
            raise TypeError(f"operations carry no {type(value).__name__}")


def check_data(
    data: Sequence[Datum], loss_fn: str, loss_fn_config: Mapping[str, float] | None = None
) -> None:
    """Refuse what no trainer could run, before it is sent.

    Raises `OperationError` naming the datum, the field, the lengths and what was expected.
    """
    if loss_fn not in _LOSS_INPUTS:
        raise OperationError(f"loss_fn: {loss_fn!r} is not one of {', '.join(_LOSS_INPUTS)}")
    if unknown := set(loss_fn_config or {}) - set(LOSS_SETTINGS[loss_fn]):
        known = ", ".join(LOSS_SETTINGS[loss_fn]) or "none"
        raise OperationError(
            f"loss_fn_config: {loss_fn} does not read {', '.join(sorted(unknown))} (it reads: {known})"
        )
    for name, default in LOSS_SETTINGS[loss_fn].items():
        if default is None and name not in (loss_fn_config or {}):
            raise OperationError(f"loss_fn_config: {loss_fn} needs {name!r}")
    for name, value in (loss_fn_config or {}).items():
        if not isinstance(value, Real) or not math.isfinite(value):
            raise OperationError(f"loss_fn_config: {name!r} is {value!r}, not a finite number")
    if not data:
        raise OperationError("data: empty; at least one datum is needed")
    for index, datum in enumerate(data):
        _check_datum(index, datum, loss_fn)


def _check_datum(index: int, datum: Datum, loss_fn: str) -> None:
    length = datum.model_input.length
    if length == 0:
        raise OperationError(f"data[{index}].model_input: no tokens")
    inputs = datum.loss_fn_inputs
    for name in ("target_tokens", *_LOSS_INPUTS[loss_fn]):
        if name not in inputs:
            present = ", ".join(inputs) or "nothing"
            raise OperationError(
                f"data[{index}].loss_fn_inputs: {loss_fn} needs {name!r}; there is {present}"
            )
    targets = inputs["target_tokens"]
    if targets.dtype != "int64":
        raise OperationError(
            f"data[{index}].loss_fn_inputs['target_tokens']: dtype {targets.dtype}, expected int64"
        )
    if not targets.shape or targets.shape[0] != length or not targets.to_numpy().size:
        raise OperationError(
            f"data[{index}].loss_fn_inputs['target_tokens']: shape {targets.shape} for {length} input tokens; "
            f"one target (or one row of targets) per input token is expected"
        )
    for name in ("weights", *_LOSS_INPUTS[loss_fn]):
        if name in inputs and inputs[name].shape != targets.shape:
            raise OperationError(
                f"data[{index}].loss_fn_inputs[{name!r}]: shape {inputs[name].shape} "
                f"for targets of shape {targets.shape}"
            )
        if name in inputs and not np.isfinite(inputs[name].to_numpy()).all():
            raise OperationError(f"data[{index}].loss_fn_inputs[{name!r}]: holds a value that is not finite")
