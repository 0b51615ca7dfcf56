"""The JSON bodies of the data plane, as Tinker 0.23 and Fireworks clients send them, and the operations they mean.

Unknown fields are ignored where stock clients of other versions may send more; within a tensor they are refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from firesteel.sdk.errors import NotBuiltYetError, OperationError
from firesteel.sdk.operations import LossName
from firesteel.sdk.types import (
    AdamParams,
    Datum,
    EncodedTextChunk,
    LoraConfig,
    ModelInput,
    SamplingParams,
    TensorData,
)
from firesteel.sdk.validation import check_adam_params, check_sampling

Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]
MOST_SEQ_ID = 2**62
SeqId = Annotated[int, Field(ge=0, lt=MOST_SEQ_ID)]
Name = Annotated[str, Field(min_length=1, max_length=512)]

# More than any server takes; what this one takes is less, and in its limits.
MOST_DATUMS = 2**14
_MOST_FIELDS = 64
# One wrong value is enough: a small body of millions of them would become gigabytes of messages.
_STOP_AT_FIRST = Field(fail_fast=True)


def _few(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > _MOST_FIELDS:
        raise ValueError(f"{len(value)} fields; at most {_MOST_FIELDS} are read")
    return value


class Body(BaseModel):
    """Base of the bodies."""

    model_config = ConfigDict(allow_inf_nan=False, protected_namespaces=())


class ChunkBody(Body):
    """A run of tokens; images are refused by their type."""

    type: Literal["encoded_text"] = "encoded_text"
    tokens: Annotated[list[Int64], _STOP_AT_FIRST]


class ModelInputBody(Body):
    """The tokens of a sequence."""

    chunks: Annotated[list[ChunkBody], _STOP_AT_FIRST]

    def to_model_input(self) -> ModelInput:
        """As ours."""
        return ModelInput(tuple(EncodedTextChunk(chunk.tokens) for chunk in self.chunks))


class TensorBody(Body):
    """Flat values and their shape, or a sparse matrix by rows."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    data: Annotated[list[float], _STOP_AT_FIRST]
    dtype: Literal["float32", "int64"]
    shape: Annotated[list[Annotated[Int64, Field(ge=0)]], Field(max_length=8, fail_fast=True)] | None = None
    sparse_crow_indices: Annotated[list[Int64], _STOP_AT_FIRST] | None = None
    sparse_col_indices: Annotated[list[Int64], _STOP_AT_FIRST] | None = None

    _few_fields = model_validator(mode="before")(_few)

    def to_tensor(self, where: str) -> TensorData:
        """As ours, dense. Raises `OperationError` for lengths that do not fit the shape."""
        values = np.asarray(self.data, dtype=np.float64)
        if self.sparse_crow_indices is not None:
            values = self._dense(values, where)
        shape = values.shape if self.shape is None else tuple(self.shape)
        if int(np.prod(shape, dtype=object)) != values.size:
            raise OperationError(f"{where}: {values.size} values do not fill the shape {list(shape)}")
        if not values.size:
            shape = values.shape  # without values the other lengths may be more than an array can have
        return TensorData(values.reshape(shape), self.dtype)

    def _dense(self, values: np.ndarray[Any, Any], where: str) -> np.ndarray[Any, Any]:
        rows = np.asarray(self.sparse_crow_indices, dtype=np.int64)
        columns = np.asarray(self.sparse_col_indices or [], dtype=np.int64)
        shape = self.shape or []
        fits = (
            len(shape) == 2
            and len(rows) == shape[0] + 1
            and len(columns) == len(values)
            and rows[0] == 0
            and rows[-1] == len(values)
            and bool((np.diff(rows) >= 0).all())
            and bool(((columns >= 0) & (columns < shape[1])).all())
        )
        if not fits:
            raise OperationError(f"{where}: these are no indices of a sparse matrix of shape {shape}")
        # A row of targets is one per token: what the dense form takes is bounded by the body that came.
        if shape[0] * shape[1] > 64 * (len(values) + len(rows)):
            raise OperationError(
                f"{where}: a matrix of shape {shape} with {len(values)} values is too sparse to be one"
            )
        dense = np.zeros(shape, values.dtype)
        dense[np.repeat(np.arange(shape[0]), np.diff(rows)), columns] = values
        return dense


class DatumBody(Body):
    """One sequence and what its loss reads."""

    model_input: ModelInputBody
    loss_fn_inputs: Annotated[dict[str, TensorBody], BeforeValidator(_few)]

    def to_datum(self, where: str) -> Datum:
        """As ours."""
        inputs = {
            name: tensor.to_tensor(f"{where}.loss_fn_inputs[{name!r}]")
            for name, tensor in self.loss_fn_inputs.items()
        }
        return Datum(self.model_input.to_model_input(), inputs)


class LossInputBody(Body):
    """The data of one call, and its loss."""

    data: Annotated[list[DatumBody], Field(max_length=MOST_DATUMS, fail_fast=True)]
    loss_fn: LossName
    loss_fn_config: Annotated[dict[str, float] | None, BeforeValidator(_few)] = None

    def to_data(self) -> tuple[Datum, ...]:
        """As ours."""
        return tuple(datum.to_datum(f"data[{index}]") for index, datum in enumerate(self.data))


class ForwardBody(Body):
    """`forward`."""

    model_id: Name
    seq_id: SeqId
    forward_input: LossInputBody


class ForwardBackwardBody(Body):
    """`forward_backward`."""

    model_id: Name
    seq_id: SeqId
    forward_backward_input: LossInputBody


class AdamBody(Body):
    """The settings of one optimizer step."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float | None = 0.0


class OptimStepBody(Body):
    """`optim_step`."""

    model_id: Name
    seq_id: SeqId
    adam_params: AdamBody
    grad_accumulation_normalization: str | None = None

    def to_params(self) -> AdamParams:
        """As ours. Raises `OperationError` for bad settings, and for a normalisation: the engine only ever sums."""
        if self.grad_accumulation_normalization not in (None, "none"):
            raise NotBuiltYetError(
                f"grad_accumulation_normalization: {self.grad_accumulation_normalization!r} is not built yet; "
                "divide the weights of the loss instead, and send none"
            )
        values = self.adam_params.model_dump()
        params = AdamParams(**{**values, "grad_clip_norm": values["grad_clip_norm"] or 0.0})
        check_adam_params(params)
        return params


class LoraBody(Body):
    """The adapter of a new model; rank 0 trains all weights."""

    rank: Annotated[int, Field(ge=0)]
    alpha: float | None = None
    seed: int | None = None
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True

    def to_lora(self) -> LoraConfig | None:
        """As ours. Clients that send no alpha mean 32, whatever the rank."""
        if self.rank == 0:
            return None
        return LoraConfig(
            self.rank,
            32.0 if self.alpha is None else self.alpha,
            self.seed or 0,
            self.train_attn,
            self.train_mlp,
            self.train_unembed,
        )


class CreateSessionBody(Body):
    """`create_session`."""

    tags: Annotated[list[str], _STOP_AT_FIRST] = []
    user_metadata: dict[str, Any] | None = None
    sdk_version: str = ""


class SessionBody(Body):
    """`session_heartbeat` and others that name a session."""

    session_id: Name


class CreateModelBody(Body):
    """`create_model`."""

    session_id: Name
    model_seq_id: SeqId
    base_model: Name
    lora_config: LoraBody | None = None
    base_only: bool = False
    user_metadata: dict[str, Any] | None = None


class ModelBody(Body):
    """`get_info`, `unload_model`."""

    model_id: Name


class SaveWeightsBody(Body):
    """`save_weights`."""

    model_id: Name
    seq_id: SeqId
    path: Name
    overwrite: bool = False
    ttl_seconds: int | None = None


class LoadWeightsBody(Body):
    """`load_weights` into a model that exists."""

    model_id: Name
    seq_id: SeqId
    path: Name
    optimizer: bool = False


class SaveForSamplerBody(Body):
    """`save_weights_for_sampler`, named (`path`) or for one sampling session (`sampling_session_seq_id`)."""

    model_id: Name
    seq_id: SeqId
    path: Name | None = None
    sampling_session_seq_id: SeqId | None = None
    checkpoint_type: Literal["base", "delta", "merged_base"] | None = None
    ttl_seconds: int | None = None


class LoadAdapterBody(Body):
    """`load_adapter`."""

    model_id: Name
    seq_id: SeqId
    adapter_path: Name


class RetrieveBody(Body):
    """`retrieve_future`."""

    request_id: Name


class SamplingSessionBody(Body):
    """`create_sampling_session`."""

    session_id: Name
    sampling_session_seq_id: SeqId
    base_model: Name | None = None
    model_path: Name | None = None


class SamplingBody(Body):
    """How to continue a prompt; `stop` are token ids."""

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    seed: int | None = None
    stop: str | Annotated[list[str], _STOP_AT_FIRST] | Annotated[list[int], _STOP_AT_FIRST] | None = None

    def to_params(self, num_samples: int) -> SamplingParams:
        """As ours. Raises `OperationError` for bad settings, and for texts to stop at: a trainer has no tokenizer."""
        stop = self.stop or []
        if isinstance(stop, str) or any(isinstance(item, str) for item in stop):
            raise OperationError(
                f"sampling_params.stop: {stop!r}; a trainer has no tokenizer, give token ids"
            )
        tokens = SamplingParams().max_tokens if self.max_tokens is None else self.max_tokens
        params = SamplingParams(
            tokens, self.temperature, self.top_p, self.top_k, self.seed, tuple(int(item) for item in stop)
        )
        check_sampling(params, num_samples)
        return params


class SampleBody(Body):
    """`asample`."""

    sampling_session_id: Name
    seq_id: SeqId
    num_samples: Annotated[int, Field(ge=1, le=128)] = 1
    prompt: ModelInputBody
    sampling_params: SamplingBody = SamplingBody()
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: int = 0


class WeightsInfoBody(Body):
    """`weights_info`."""

    tinker_path: Name
