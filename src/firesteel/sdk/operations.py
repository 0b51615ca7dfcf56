"""The closed set of messages that may cross from a client to a trainer, defined once for both sides.

Operations with a `seq_id` change or read the state of one model and run strictly in that order, each
``(model_id, seq_id)`` once. The others (provisioning, listings, sampling, release) carry no number.
The result of each is named in its docstring.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from typing import Any, Literal

import numpy as np

from firesteel.sdk.shapes import Mode, TrainingShape
from firesteel.sdk.types import (
    AdamParams,
    Datum,
    EncodedTextChunk,
    FloatArray,
    LoraConfig,
    ModelInput,
    SamplingParams,
    TensorData,
)

LossName = Literal["cross_entropy", "importance_sampling", "ppo", "cispo", "dro"]
PlainAttention = Literal["eager", "sdpa"]


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
    activation_token_budget: int
    """Most tokens after sharing whose graph is kept between a forward and its backward."""


@dataclass(frozen=True)
class ModelIdentity:
    """What decides a model's log-probabilities."""

    weights: str
    """SHA-256 of configuration and parameters as they are in memory, the model's adapter, if it has one, included."""
    numerics: str
    """dtype, device type, attention path, torch and transformers minor versions."""


@dataclass(frozen=True)
class ResolveShape:
    """Find a training shape, by name or by need; the model is fetched and not loaded.

    Result: `TrainingShape`, its `max_context_length` set: the shape's or, if smaller, the model's own.
    """

    base_model: str
    modes: tuple[Mode, ...]
    name: str | None = None
    min_context: int | None = None


@dataclass(frozen=True)
class CreateModel:
    """Load a model on a shape. Result: `ModelDescription`.

    With `lora` an adapter is trained, without it all weights; a model that is not `trainable` only runs forward. One
    that does not fit into memory is refused with the numbers.
    Memory is bounded by `activation_token_budget`: a longer call runs its forward again for the backward.
    """

    base_model: str
    shape: TrainingShape
    lora: LoraConfig | None = None
    trainable: bool = True
    activation_token_budget: int | None = None
    """None = what suits the device."""
    start: str | None = None
    """A saved state, or an adapter in PEFT's format, whose weights the model begins with; None = the base, or a fresh
    adapter. Refused, as by `LoadState`, where it is of another model."""
    model_id: str | None = None
    """What to call it; None = the engine's next name."""


@dataclass(frozen=True)
class CreateBaseReference:
    """A frozen model on the weights under a LoRA policy, its adapter off. Result: `ModelDescription`."""

    policy_id: str
    model_id: str | None = None
    """As of `CreateModel`."""


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

    Its metrics beside `loss:sum` say what was computed: `tokens:sum` of all sequences, `computed_tokens:sum`
    after sharing, `scored_tokens:sum`, `micro_batches:sum`, and `activation_bytes:max`, the most that was kept for
    a backward so far.

    With `retain`, a `Backward(of=seq_id)` may follow, as long as the weights do not change. With `offer`, a
    `ForwardBackward` of the same tokens and targets that follows takes this forward for its own: clients that know no
    `Backward` send a custom loss so. With `weighted_only`, targets of weight 0 are not scored: their
    log-probabilities read 0.0.
    """

    model_id: str
    seq_id: int
    data: tuple[Datum, ...]
    loss_fn: LossName = "cross_entropy"
    loss_fn_config: Mapping[str, float] | None = None
    weighted_only: bool = False
    retain: bool = False
    offer: bool = False


@dataclass(frozen=True)
class ForwardBackward:
    """As `Forward`, and the gradient of the loss is added to the model's. Result: `ForwardBackwardOutput`."""

    model_id: str
    seq_id: int
    data: tuple[Datum, ...]
    loss_fn: LossName = "cross_entropy"
    loss_fn_config: Mapping[str, float] | None = None
    weighted_only: bool = False


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
class Examine:
    """Log-probabilities by one of the ways to compute them, for comparison. Result: `Examined`.

    `attention` None is the fast path; otherwise transformers' own forward with that attention, one sequence at a
    time. With `dloss_dlogprob` (as in `Backward`) the gradient is summed up in a sketch and dropped; refused while a
    gradient waits for its `OptimStep`.
    """

    model_id: str
    seq_id: int
    data: tuple[Datum, ...]
    attention: PlainAttention | None = None
    dloss_dlogprob: tuple[FloatArray, ...] | None = None
    weighted_only: bool = False


@dataclass(frozen=True)
class OptimStep:
    """Apply the added gradient with AdamW and clear it. Result: `OptimStepResponse`."""

    model_id: str
    seq_id: int
    adam_params: AdamParams


@dataclass(frozen=True)
class DropGradient:
    """Leave out what has been added since the last `OptimStep`: a step of several calls, of which one has failed.

    Result: None.
    """

    model_id: str
    seq_id: int


@dataclass(frozen=True)
class SaveWeights:
    """Export to a new folder: an adapter in PEFT's format, all weights in Hugging Face's.

    With `merged` an adapter is added to its base, and the result written as a whole model.
    Result: `SaveWeightsResponse`.
    """

    model_id: str
    seq_id: int
    path: str
    merged: bool = False


@dataclass(frozen=True)
class SaveState:
    """Write what training goes on from: trained weights, optimizer. Result: `SaveStateResponse`.

    The state is that of the operation's turn; it is written while later operations run, and the result comes when it is
    whole on the disk. `notes` are kept beside it, for the loop that will go on. Refused while a gradient waits for its
    `OptimStep`: it is not part of a state.
    """

    model_id: str
    seq_id: int
    path: str
    notes: Mapping[str, Any]
    """JSON, stored as `notes.json`."""


@dataclass(frozen=True)
class LoadState:
    """Go on from a saved state, every byte of which is compared with its hash first. Result: `LoadStateResponse`.

    Without `optimizer` only weights are taken, of a state or of an adapter in PEFT's format, and the optimizer starts
    anew. A gradient and kept forwards are dropped.
    Refused, with nothing changed, where the state is damaged or of another model.
    """

    model_id: str
    seq_id: int
    path: str
    optimizer: bool = True


@dataclass(frozen=True)
class Sample:
    """Continue a prompt with the weights as they are when it runs. Result: `SampleResponse`."""

    model_id: str
    prompt: ModelInput
    sampling_params: SamplingParams
    num_samples: int = 1
    prompt_logprobs: bool = False
    """Also the log-probability of each prompt token but the first."""


@dataclass(frozen=True)
class Refused:
    """A request that could not be read as its operation. It takes its place in the order, and fails with `reason`."""

    model_id: str
    seq_id: int
    reason: str


OrderedOperation = (
    Forward
    | ForwardBackward
    | Backward
    | Examine
    | OptimStep
    | DropGradient
    | SaveWeights
    | SaveState
    | LoadState
    | Refused
)
UnorderedOperation = (
    ResolveShape | CreateModel | CreateBaseReference | IdentifyModel | UnloadModel | ReleaseForward | Sample
)
Operation = OrderedOperation | UnorderedOperation


def operation_name(operation: Operation) -> str:
    """For messages: `forward_backward seq 3 of model-1`."""
    name = "".join(f"_{c.lower()}" if c.isupper() else c for c in type(operation).__name__).lstrip("_")
    if isinstance(operation, OrderedOperation):
        return f"{name} seq {operation.seq_id} of {operation.model_id}"
    match operation:
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
        case EncodedTextChunk():  # not one by one: a call has hundreds of thousands
            _feed(digest, np.asarray(value.tokens, dtype=np.int64))
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
