"""What a training loop holds: one model in a trainer, wherever that runs."""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from firesteel.sdk.conversion import as_adam_params, as_data, as_model_input, as_sampling_params
from firesteel.sdk.errors import ClosedError, NonFiniteError, OperationError, TrainerLost
from firesteel.sdk.futures import APIFuture, Ledger
from firesteel.sdk.operations import (
    Backward,
    DropGradient,
    Examine,
    Forward,
    ForwardBackward,
    IdentifyModel,
    LoadState,
    LossName,
    ModelDescription,
    ModelIdentity,
    Operation,
    OptimStep,
    OrderedOperation,
    PlainAttention,
    ReleaseForward,
    Sample,
    SaveState,
    SaveWeights,
    UnloadModel,
    operation_name,
)
from firesteel.sdk.transport import Transport
from firesteel.sdk.types import (
    Datum,
    Examined,
    FloatArray,
    ForwardBackwardOutput,
    LoadStateResponse,
    OptimStepResponse,
    SampleResponse,
    SamplingParams,
    SaveStateResponse,
    SaveWeightsResponse,
)
from firesteel.sdk.validation import check_adam_params, check_data, check_sampling
from firesteel.sdk.verification import ExaminedPath, Verification, compare

if TYPE_CHECKING:
    import torch

    CustomLoss = Callable[[Sequence[Datum], list[torch.Tensor]], tuple[torch.Tensor, Mapping[str, float]]]


class TrainingClient:
    """Forward, backward, optimizer step, export and sampling of one model.

    Every call returns at once with an `APIFuture` (except the loss of `forward_backward_custom`, which runs
    here). Calls run in the order they are made. Gradients of several calls **add** until `optim_step`.
    An error of an earlier call whose result nobody read is raised by the next call.
    """

    def __init__(self, transport: Transport, description: ModelDescription) -> None:
        self.description = description
        self._transport = transport
        self._ledger = Ledger()
        self._next_seq = 1
        self._order = threading.Lock()
        self._closed = False

    @property
    def model_id(self) -> str:
        """The trainer's name for this model."""
        return self.description.model_id

    def forward(
        self,
        data: Iterable[Any],
        loss_fn: LossName = "cross_entropy",
        loss_fn_config: Mapping[str, float] | None = None,
        *,
        weighted_only: bool = False,
    ) -> APIFuture[ForwardBackwardOutput]:
        """Log-probability of every target (`loss_fn_outputs[i]["logprobs"]`) and the summed loss; no gradient.

        With `weighted_only` targets of weight 0 cost nothing and read 0.0: for losses that do not look at them.
        """
        ours = self._checked(data, loss_fn, loss_fn_config, weighted_only)
        return self._send(
            lambda seq: Forward(self.model_id, seq, ours, loss_fn, loss_fn_config, weighted_only)
        )

    def forward_backward(
        self,
        data: Iterable[Any],
        loss_fn: LossName = "cross_entropy",
        loss_fn_config: Mapping[str, float] | None = None,
        *,
        weighted_only: bool = False,
    ) -> APIFuture[ForwardBackwardOutput]:
        """Add the gradient of a built-in loss: a **sum** over tokens and data, divided by nothing."""
        ours = self._checked(data, loss_fn, loss_fn_config, weighted_only)
        return self._send(
            lambda seq: ForwardBackward(self.model_id, seq, ours, loss_fn, loss_fn_config, weighted_only)
        )

    def forward_backward_custom(
        self, data: Iterable[Any], loss_fn: CustomLoss, *, weighted_only: bool = False
    ) -> APIFuture[ForwardBackwardOutput]:
        """Add the gradient of any loss of the log-probabilities.

        `loss_fn(data, logprobs)` runs here, on the calling thread: `data` as they were passed, `logprobs` one
        float32 CPU tensor per datum, shaped like its targets. It returns a scalar tensor and a dict of numbers,
        which joins the result's `metrics` (its `loss:sum` is that of this loss). If it raises, nothing has happened: no
        gradient, no number used, the client goes on.

        With `weighted_only` targets of weight 0 are not scored and read 0.0; a loss that depends on them raises.
        """
        passed = list(data)
        ours = self._checked(_without_extras(passed), "cross_entropy", None, weighted_only)
        forward, of = self._send_numbered(
            lambda seq: Forward(self.model_id, seq, ours, weighted_only=weighted_only, retain=True)
        )
        output = forward.result()
        try:
            logprobs = [values["logprobs"].to_numpy() for values in output.loss_fn_outputs]
            gradient, metrics = _differentiate(loss_fn, passed, logprobs)
            if weighted_only:
                _refuse_unscored(ours, gradient)
            return self._send(
                lambda seq: Backward(self.model_id, seq, of, gradient),
                lambda result: replace(result, metrics={**result.metrics, **metrics}),
            )
        except BaseException:
            self._submit(ReleaseForward(self.model_id, of))
            raise

    def verify(
        self,
        data: Iterable[Any],
        loss_fn: CustomLoss,
        *,
        weighted_only: bool = False,
        timeout: float | None = None,
    ) -> Verification:
        """Compare what `forward_backward_custom` would compute with transformers' own forward, on this data.

        Log-probabilities, loss, gradient norm and a random projection of the gradient. An adapter that is still
        zero is given small numbers meanwhile: otherwise half of its arithmetic would not be seen. Changes nothing;
        refused while a gradient waits for its `optim_step`. Costs six forwards and three backwards, two thirds of
        them plain, and blocks until they are done; `timeout` is for each of them.
        """
        passed = list(data)
        ours = self._checked(_without_extras(passed), "cross_entropy", None, weighted_only)
        ways: dict[str, PlainAttention | None] = {"fast": None, "eager": "eager", "sdpa": "sdpa"}

        def ask(way: PlainAttention | None, slopes: tuple[FloatArray, ...] | None) -> Examined:
            future: APIFuture[Examined] = self._send(
                lambda seq: Examine(self.model_id, seq, ours, way, slopes, weighted_only)
            )
            return future.result(timeout)

        def examine(way: PlainAttention | None) -> ExaminedPath:
            logprobs = ask(way, None).logprobs
            slopes, metrics = _differentiate(loss_fn, passed, logprobs)
            gradient = ask(way, slopes).gradient
            assert gradient is not None
            return ExaminedPath(logprobs, metrics["loss:sum"], slopes, gradient)

        paths = {name: examine(way) for name, way in ways.items()}
        return compare(paths, self.description.shape.dtype)

    def optim_step(self, adam_params: Any) -> APIFuture[OptimStepResponse]:
        """One AdamW step with these settings on the gradient added so far, which it clears."""
        params = as_adam_params(adam_params)
        check_adam_params(params)
        return self._send(lambda seq: OptimStep(self.model_id, seq, params))

    def drop_gradient(self) -> APIFuture[None]:
        """Leave out what was added since the last `optim_step`: of a step of several calls, one has failed."""
        return self._send(lambda seq: DropGradient(self.model_id, seq))

    def save_weights(
        self, path: str | os.PathLike[str], *, merged: bool = False
    ) -> APIFuture[SaveWeightsResponse]:
        """Export to the folder `path`: PEFT's format for a LoRA policy, Hugging Face's for a full one.

        `merged` adds an adapter to its base and writes a whole model.
        """
        _check_path("save_weights", path)
        return self._send(lambda seq: SaveWeights(self.model_id, seq, str(path), merged))

    def save_state(
        self, path: str | os.PathLike[str], notes: Mapping[str, Any] | None = None
    ) -> APIFuture[SaveStateResponse]:
        """Write what training goes on from to the new folder `path`: trained weights, optimizer, and `notes` (JSON).

        The state is that of now; it is written while later calls run. The result is there when the folder is whole and
        on the disk. Refused while a gradient waits for its `optim_step`.
        """
        _check_path("save_state", path)
        noted = _checked_notes(notes or {})
        return self._send(lambda seq: SaveState(self.model_id, seq, str(path), noted))

    def load_state(self, path: str | os.PathLike[str]) -> APIFuture[LoadStateResponse]:
        """Take the weights of a saved state; the optimizer starts anew.

        Raises `CheckpointError`, with nothing changed, for a state that is damaged or of another model.
        """
        return self._load(path, optimizer=False)

    def load_state_with_optimizer(self, path: str | os.PathLike[str]) -> APIFuture[LoadStateResponse]:
        """Go on from a saved state as if nothing had happened between. Raises as `load_state`."""
        return self._load(path, optimizer=True)

    def _load(self, path: str | os.PathLike[str], optimizer: bool) -> APIFuture[LoadStateResponse]:
        _check_path("load_state", path)
        return self._send(lambda seq: LoadState(self.model_id, seq, str(path), optimizer))

    @property
    def next_seq_id(self) -> int:
        """The number that the next ordered operation will have, from 1."""
        return self._next_seq

    def sample(
        self, prompt: Any, num_samples: int = 1, sampling_params: Any = None
    ) -> APIFuture[SampleResponse]:
        """Continue `prompt` (a `ModelInput` or token ids) with the present weights."""
        self._ledger.raise_unread()
        params = as_sampling_params(sampling_params or SamplingParams())
        check_sampling(params, num_samples)
        return self._submit(Sample(self.model_id, as_model_input(prompt), params, num_samples))

    def identify(self) -> APIFuture[ModelIdentity]:
        """The hash of the weights as they are in memory, and what the arithmetic depends on."""
        self._ledger.raise_unread()
        return self._submit(IdentifyModel(self.model_id))

    def unload(self) -> None:
        """Free the model. Raises an error that nobody read; later calls raise `ClosedError`."""
        if self._closed:
            return
        try:
            self._ledger.wait()
            with suppress(TrainerLost):  # it is not there any more: that is what was asked for
                self._submit(UnloadModel(self.model_id)).result()
        finally:
            self.close()

    def close(self) -> None:
        """Wait for what is queued and raise an error that nobody read. The model stays in its trainer."""
        if not self._closed:
            self._closed = True
            self._ledger.close()

    def _checked(
        self,
        data: Iterable[Any],
        loss_fn: str,
        loss_fn_config: Mapping[str, float] | None,
        weighted_only: bool,
    ) -> tuple[Datum, ...]:
        self._ledger.raise_unread()
        ours = as_data(data)
        check_data(ours, loss_fn, loss_fn_config, weighted_only)
        return ours

    def _send(
        self, build: Callable[[int], OrderedOperation], convert: Callable[[Any], Any] | None = None
    ) -> APIFuture[Any]:
        return self._send_numbered(build, convert)[0]

    def _send_numbered(
        self, build: Callable[[int], OrderedOperation], convert: Callable[[Any], Any] | None = None
    ) -> tuple[APIFuture[Any], int]:
        self._ledger.raise_unread()
        # The number is taken and sent under one lock: two threads may not send 4 before 3.
        with self._order:
            seq = self._next_seq
            future = self._submit(build(seq), convert)
            self._next_seq += 1
        return future, seq

    def _submit(self, operation: Operation, convert: Callable[[Any], Any] | None = None) -> APIFuture[Any]:
        name = operation_name(operation)
        if self._closed:
            raise ClosedError(f"{name}: the client of {self.model_id} is closed")
        return self._ledger.track(APIFuture(self._transport.submit(operation), name, convert))


def _check_path(operation: str, path: object) -> None:
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise OperationError(f"{operation}: path: {path!r}; expected the path of a folder")


def _checked_notes(notes: Mapping[str, Any]) -> Mapping[str, Any]:
    """As they will be read again: refused now, not when the state has been written."""
    try:
        content: Mapping[str, Any] = json.loads(json.dumps(dict(notes), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise OperationError(f"save_state: notes: {error}; they are stored as JSON") from None
    return content


def _without_extras(data: list[Any]) -> list[Datum]:
    """What the trainer needs for log-probabilities; a custom loss may read more of its data than that."""
    needed = ("target_tokens", "weights")
    return [
        Datum(d.model_input, {name: d.loss_fn_inputs[name] for name in needed if name in d.loss_fn_inputs})
        for d in as_data(data)
    ]


def _refuse_unscored(data: Sequence[Datum], gradient: Sequence[FloatArray]) -> None:
    for index, (datum, slope) in enumerate(zip(data, gradient, strict=True)):
        if (slope[datum.loss_fn_inputs["weights"].to_numpy() == 0] != 0).any():
            raise OperationError(
                f"the custom loss depends on log-probabilities of data[{index}] whose weight is 0, which "
                "weighted_only leaves out; call without it"
            )


def _differentiate(
    loss_fn: CustomLoss, data: list[Any], logprobs: Sequence[FloatArray]
) -> tuple[tuple[FloatArray, ...], dict[str, float]]:
    """Run a custom loss on leaf tensors and return dLoss/dlogprob per datum, and its metrics."""
    import torch

    leaves = [torch.tensor(values.astype(np.float32), requires_grad=True) for values in logprobs]
    with torch.enable_grad():  # whatever the caller has switched off around this
        returned = loss_fn(data, leaves)
    if not (isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], Mapping)):
        raise OperationError(
            f"the custom loss must return (scalar tensor, dict of numbers), not {returned!r:.80}"
        )
    loss, metrics = returned
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        raise OperationError("the custom loss must return (scalar tensor, dict of numbers)")
    if not math.isfinite(loss.item()):
        raise NonFiniteError(f"the custom loss is {loss.item()}; nothing was added to the gradient")
    if loss.requires_grad:
        loss.backward()  # type: ignore[no-untyped-call]
    if all(leaf.grad is None for leaf in leaves):
        raise OperationError("the custom loss does not depend on the log-probabilities it was given")
    # A leaf that the loss does not use has derivative zero.
    gradient = tuple(
        np.zeros(leaf.shape, np.float32) if leaf.grad is None else leaf.grad.numpy() for leaf in leaves
    )
    return gradient, {"loss:sum": loss.item(), **{name: float(value) for name, value in metrics.items()}}
