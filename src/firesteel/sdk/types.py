"""The data a training loop is written in, with the field names of the Tinker API.

Frozen, plain, and free of torch. Objects of other packages that carry the same attributes
(`tinker.Datum`, `tinker.AdamParams`, …) are accepted wherever these are: see `conversion.py`.

For a token sequence ``t[0..n-1]`` a datum holds ``model_input = t[:-1]`` and ``target_tokens = t[1:]``;
``weights[j]`` belongs to the target at position j, and ``logprobs[j]`` is the log-probability of
``target_tokens[j]`` given the input up to and including position j.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from firesteel.sdk.errors import OperationError

if TYPE_CHECKING:
    import torch

TensorDtype = Literal["float32", "int64"]
# Spelled out: from numpy 2.5 on, `NDArray` is a lazy alias that `wire`, which reads annotations, cannot look into.
IntArray = np.ndarray[Any, np.dtype[np.int64]]
FloatArray = np.ndarray[Any, np.dtype[np.float32]]
DoubleArray = np.ndarray[Any, np.dtype[np.float64]]
BoolArray = np.ndarray[Any, np.dtype[np.bool_]]

# The dtype of plain Python lists, by the name under which they arrive (the Tinker API's rule).
_DTYPE_OF_INPUT: dict[str, TensorDtype] = {
    "target_tokens": "int64",
    "weights": "float32",
    "advantages": "float32",
    "logprobs": "float32",
    "clip_low_threshold": "float32",
    "clip_high_threshold": "float32",
}


class TensorData:
    """An array on its way between loop and trainer: float32 or int64, stored as numpy.

    `.data` is the flat Python list that the Tinker API shows, made anew at each read;
    `.to_numpy()` gives the stored array itself and copies nothing.
    """

    __slots__ = ("_array",)
    _array: npt.NDArray[Any]

    def __init__(
        self,
        data: Sequence[float] | npt.NDArray[Any],
        dtype: TensorDtype | None = None,
        shape: Sequence[int] | None = None,
    ) -> None:
        array = np.asarray(data)
        if array.dtype.kind not in "biuf":
            raise OperationError(f"TensorData: values of type {array.dtype}; expected real numbers")
        wanted = dtype or ("int64" if array.dtype.kind in "iu" else "float32")
        if wanted not in ("float32", "int64"):
            raise OperationError(f"TensorData.dtype: {wanted!r} is not one of 'float32', 'int64'")
        if wanted == "int64":
            _refuse_what_int64_lacks(array)
        with np.errstate(
            over="ignore"
        ):  # what is too large becomes infinite, and is refused where it matters
            array = array.astype(wanted, copy=False)
        if shape is not None and tuple(shape) != array.shape:
            array = array.reshape(tuple(shape))
        object.__setattr__(self, "_array", array)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"TensorData is frozen: {name!r} cannot be set")

    @classmethod
    def from_numpy(cls, array: npt.NDArray[Any]) -> TensorData:
        """Wrap an array; other float types become float32, other integer types int64."""
        return cls(array)

    @classmethod
    def from_torch(cls, tensor: torch.Tensor) -> TensorData:
        """Wrap a tensor, detached and on the CPU."""
        plain = tensor.detach().cpu()
        return cls((plain.float() if plain.is_floating_point() else plain).numpy())

    @property
    def dtype(self) -> TensorDtype:
        """`"float32"` or `"int64"`."""
        return "int64" if self._array.dtype == np.int64 else "float32"

    @property
    def shape(self) -> list[int]:
        """Length of each dimension."""
        return list(self._array.shape)

    @property
    def data(self) -> list[Any]:
        """All values as one flat list, row by row."""
        flat: list[Any] = self._array.ravel().tolist()
        return flat

    def tolist(self) -> list[Any]:
        """Values as nested lists of `shape`."""
        nested: list[Any] = self._array.tolist()
        return nested

    def to_numpy(self) -> npt.NDArray[Any]:
        """The stored array itself, not a copy."""
        return self._array

    def to_torch(self) -> torch.Tensor:
        """A tensor of the same values (sharing memory where the array is writable)."""
        import torch

        return torch.from_numpy(self._array if self._array.flags.writeable else self._array.copy())

    def __len__(self) -> int:
        return len(self._array)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TensorData):
            return NotImplemented
        return self.dtype == other.dtype and np.array_equal(self._array, other._array)

    __hash__ = None  # type: ignore[assignment]  # equality by content of a mutable array

    def __repr__(self) -> str:
        return f"TensorData(dtype={self.dtype!r}, shape={self.shape}, data={_shortened(self._array)})"

    def __reduce__(self) -> tuple[type[TensorData], tuple[npt.NDArray[Any]]]:
        return TensorData, (self._array,)


def _refuse_what_int64_lacks(array: npt.NDArray[Any]) -> None:
    """A cast would cut off fractions and wrap what is too large, without a word."""
    if array.dtype.kind == "f":
        whole = np.isfinite(array) & (array == np.trunc(array))
        fits = whole & (array >= -(2.0**63)) & (array < 2.0**63)
    else:
        fits = array <= np.iinfo(np.int64).max
    if not fits.all():
        raise OperationError(
            "TensorData: int64 was asked for, but there are values that are no whole numbers of 64 bits"
        )


def _shortened(array: npt.NDArray[Any]) -> str:
    return np.array2string(array.ravel(), threshold=6, edgeitems=2, separator=", ")


@dataclass(frozen=True)
class EncodedTextChunk:
    """A run of token ids. Raises OperationError for what is no whole number."""

    tokens: Sequence[int]
    type: Literal["encoded_text"] = "encoded_text"

    def __post_init__(self) -> None:
        # Not int(): that would make a token id of 1.7, and of the text "3".
        try:
            object.__setattr__(self, "tokens", tuple(map(operator.index, self.tokens)))
        except TypeError as error:
            raise OperationError(f"tokens: expected whole numbers (token ids): {error}") from None

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.tokens)


@dataclass(frozen=True)
class ModelInput:
    """The tokens a model reads, as one or more chunks that are read as one sequence."""

    chunks: Sequence[EncodedTextChunk] = ()

    @classmethod
    def from_ints(cls, tokens: Iterable[int]) -> ModelInput:
        """One chunk of these token ids."""
        return cls((EncodedTextChunk(tuple(tokens)),))

    @classmethod
    def empty(cls) -> ModelInput:
        """No tokens."""
        return cls(())

    def to_ints(self) -> list[int]:
        """All token ids in order."""
        return [token for chunk in self.chunks for token in chunk.tokens]

    def append_int(self, token: int) -> ModelInput:
        """A new input with one token more."""
        return ModelInput.from_ints([*self.to_ints(), token])

    @property
    def length(self) -> int:
        """Number of tokens."""
        return sum(chunk.length for chunk in self.chunks)


@dataclass(frozen=True)
class Datum:
    """One sequence and what its loss needs. Lists, numpy arrays and tensors become `TensorData`."""

    model_input: ModelInput
    loss_fn_inputs: Mapping[str, TensorData] = field(default_factory=dict)

    def __post_init__(self) -> None:
        inputs = {name: _as_tensor_data(name, value) for name, value in self.loss_fn_inputs.items()}
        object.__setattr__(self, "loss_fn_inputs", inputs)


def _as_tensor_data(name: str, value: Any) -> TensorData:
    if isinstance(value, TensorData):
        return value
    if isinstance(value, np.ndarray):
        return TensorData.from_numpy(value)
    if isinstance(value, (list, tuple)):
        if name not in _DTYPE_OF_INPUT:
            raise TypeError(
                f"loss_fn_inputs[{name!r}] is a plain list and its dtype is not known by that name; "
                f"pass TensorData or an array (lists are fine for {', '.join(_DTYPE_OF_INPUT)})"
            )
        return TensorData(value, _DTYPE_OF_INPUT[name])
    if type(value).__module__.split(".")[0] == "torch":
        return TensorData.from_torch(value)
    raise TypeError(
        f"loss_fn_inputs[{name!r}]: {type(value).__name__} is neither list, array, tensor nor TensorData"
    )


@dataclass(frozen=True)
class AdamParams:
    """Settings of one AdamW step; all of them travel with every step.

    The defaults are those of the Tinker API, not the usual ones of DPO guides (0.9, 0.999, 1e-8): write
    out what you mean. `weight_decay` is decoupled: each step first multiplies every trained parameter by
    ``1 - learning_rate * weight_decay``. `grad_clip_norm` bounds the global gradient norm, 0 = off.
    """

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


@dataclass(frozen=True)
class LoraConfig:
    """A low-rank adapter: each chosen linear layer gains ``(alpha / rank) · B A``, with B = 0 at the start.

    `train_attn` and `train_mlp` choose the linear layers inside attention and outside it; `train_unembed`
    the output head. The head is off by default here (it is on in the Tinker API): common inference servers
    do not load adapters of the head. `seed` makes the starting A reproducible.
    """

    rank: int
    alpha: float = 32.0
    seed: int = 0
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = False


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt. `temperature` 0 is greedy; `top_k` -1 and `top_p` 1 are off.

    `stop` are token ids that end the answer, beside the model's own end-of-sequence; the token that
    stopped it is part of the answer. `seed` makes a sampled answer reproducible.
    """

    max_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    seed: int | None = None
    stop: Sequence[int] = ()


@dataclass(frozen=True)
class ForwardBackwardOutput:
    """What a forward or forward_backward gives back: one dict of tensors per datum, in order, and sums."""

    loss_fn_outputs: list[dict[str, TensorData]]
    metrics: dict[str, float]
    loss_fn_output_type: str = "ArrayRecord"


@dataclass(frozen=True)
class OptimStepResponse:
    """What an optimizer step reports, e.g. `grad_norm` before clipping."""

    metrics: dict[str, float]


@dataclass(frozen=True)
class GradientSketch:
    """What is compared of a gradient that is too large to be sent."""

    norm: float
    projection: DoubleArray
    """A random projection to few numbers, the same for every gradient: distances survive it."""

    def distance(self, other: GradientSketch) -> float:
        """Norm of the difference of the two gradients, within some 4 %."""
        return float(np.linalg.norm(self.projection - other.projection))


@dataclass(frozen=True)
class Examined:
    """Log-probabilities of one way to compute them, one array per datum, and its gradient if that was asked for."""

    logprobs: tuple[FloatArray, ...]
    gradient: GradientSketch | None


@dataclass(frozen=True)
class SaveWeightsResponse:
    """Where the weights were written."""

    path: str


@dataclass(frozen=True)
class SaveStateResponse:
    """Where the state was written, whole and on the disk."""

    path: str


@dataclass(frozen=True)
class LoadStateResponse:
    """What was loaded, and what is not as it was when the state was saved."""

    path: str
    differences: tuple[str, ...]
    """As `threads: 4, now 2`. With any of these the same steps may give other last bits; empty = they do not."""


@dataclass(frozen=True)
class SampledSequence:
    """One continuation. `logprobs` are those of the distribution sampled from."""

    stop_reason: Literal["stop", "length"]
    tokens: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class SampleResponse:
    """The continuations of one prompt."""

    sequences: list[SampledSequence]
    prompt_logprobs: list[float | None] | None = None
    """Of each prompt token after those before it, None for the first; only where they were asked for."""
