"""`ReconnectableClient`: a training client whose calls block and return results, through the loss of its trainer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from firesteel.sdk import (
    APIFuture,
    ForwardBackwardOutput,
    LoadStateResponse,
    OptimStepResponse,
    SampleResponse,
    SaveStateResponse,
    SaveWeightsResponse,
    ServiceClient,
    TrainerLost,
    TrainerRewound,
    TrainingClient,
    Verification,
)
from firesteel.sdk.operations import LossName, ModelDescription, ModelIdentity

T = TypeVar("T")

REWINDS = 5
"""How often a state is loaded where the server ends while that is done."""
REWIND_SECONDS = 1.0
"""How long after that."""


@dataclass(frozen=True)
class _SavedState:
    """A state that was asked for, or loaded, after so many steps."""

    step: int
    path: str
    written: APIFuture[SaveStateResponse] | None = None

    @property
    def is_whole(self) -> bool:
        return self.written is None or (self.written.done() and self.written.exception() is None)


class ReconnectableClient:
    """What recipes hold: one call, one result or one error. `timeout` is in seconds per call, None = no limit.

    A network that is cut, or a server that is started anew, is waited for (see `HTTPTransport`). Where the trainer's
    state is gone, and the `service` is known, the model is made again and the newest state that this client has saved
    or loaded is loaded into it; then the call raises `TrainerRewound`: the steps since have to be done again, and
    only the loop knows from which rows. Without such a state it raises `TrainerLost`.
    """

    def __init__(
        self, client: TrainingClient, timeout: float | None = None, service: ServiceClient | None = None
    ) -> None:
        self._client = client
        self._timeout = timeout
        self._service = service
        self._steps = 0
        self._states: list[_SavedState] = []

    @classmethod
    def from_training_client(
        cls,
        client: TrainingClient,
        *,
        default_timeout: float | None = None,
        service: ServiceClient | None = None,
        **described: Any,
    ) -> ReconnectableClient:
        """Wrap a client. The cookbook's other keywords (`base_model`, `lora_rank`, `job_id`, …) describe it only.

        Raises TypeError for a keyword that the cookbook does not have.
        """
        if unknown := set(described) - {"base_model", "lora_rank", "job_id", "base_only"}:
            raise TypeError(f"from_training_client does not know {', '.join(sorted(unknown))}")
        return cls(client, default_timeout, service)

    def _ask(self, call: Callable[[TrainingClient], T]) -> T:
        """The result of a call. Raises `TrainerRewound` or `TrainerLost` where the model is gone."""
        try:
            return call(self._client)
        except TrainerLost as lost:
            self._rewind(lost)

    def _rewind(self, lost: TrainerLost) -> NoReturn:
        whole = [state for state in self._states if state.is_whole]
        if self._service is None or not whole:
            raise TrainerLost(
                f"{lost}. This client has saved no state to go back to: create it again and start over, or load a "
                "state with load_state_with_optimizer(PATH)"
            ) from lost
        newest = whole[-1]
        for attempt in reversed(range(REWINDS)):
            try:
                self._client = self._service.recreate_training_client(self._client)
                self._client.load_state_with_optimizer(newest.path).result(self._timeout)
                break
            except TrainerLost:  # the server ended once more meanwhile
                if not attempt:
                    raise
                time.sleep(REWIND_SECONDS)
        self._steps, self._states = newest.step, whole
        raise TrainerRewound(newest.step, newest.path) from lost

    @property
    def description(self) -> ModelDescription:
        """The model behind this client."""
        return self._client.description

    def forward(
        self,
        data: Iterable[Any],
        loss_fn: LossName = "cross_entropy",
        loss_fn_config: Mapping[str, float] | None = None,
        *,
        weighted_only: bool = False,
    ) -> ForwardBackwardOutput:
        """See `TrainingClient.forward`."""
        return self._ask(
            lambda client: client.forward(data, loss_fn, loss_fn_config, weighted_only=weighted_only).result(
                self._timeout
            )
        )

    def forward_backward(
        self,
        data: Iterable[Any],
        loss_fn: LossName = "cross_entropy",
        loss_fn_config: Mapping[str, float] | None = None,
        *,
        weighted_only: bool = False,
    ) -> ForwardBackwardOutput:
        """See `TrainingClient.forward_backward`."""
        return self._ask(
            lambda client: client.forward_backward(
                data, loss_fn, loss_fn_config, weighted_only=weighted_only
            ).result(self._timeout)
        )

    def forward_backward_custom(
        self, data: Iterable[Any], loss_fn: Any, *, weighted_only: bool = False
    ) -> ForwardBackwardOutput:
        """See `TrainingClient.forward_backward_custom`."""
        return self._ask(
            lambda client: client.forward_backward_custom(data, loss_fn, weighted_only=weighted_only).result(
                self._timeout
            )
        )

    def verify(self, data: Iterable[Any], loss_fn: Any, *, weighted_only: bool = False) -> Verification:
        """See `TrainingClient.verify`."""
        return self._ask(
            lambda client: client.verify(data, loss_fn, weighted_only=weighted_only, timeout=self._timeout)
        )

    def optim_step(self, adam_params: Any) -> OptimStepResponse:
        """See `TrainingClient.optim_step`."""
        response = self._ask(lambda client: client.optim_step(adam_params).result(self._timeout))
        self._steps += 1
        return response

    def drop_gradient(self) -> None:
        """See `TrainingClient.drop_gradient`."""
        self._ask(lambda client: client.drop_gradient().result(self._timeout))

    def save_weights(self, path: str, *, merged: bool = False) -> SaveWeightsResponse:
        """See `TrainingClient.save_weights`."""
        return self._ask(lambda client: client.save_weights(path, merged=merged).result(self._timeout))

    def save_state(self, path: str, notes: Mapping[str, Any] | None = None) -> SaveStateResponse:
        """See `TrainingClient.save_state`; returns when the state is on the disk."""
        future = self.submit_save_state(path, notes)
        return self._ask(lambda client: future.result(self._timeout))

    def submit_save_state(
        self, path: str, notes: Mapping[str, Any] | None = None
    ) -> APIFuture[SaveStateResponse]:
        """The same without waiting: training goes on while the state is written."""
        future = self._ask(lambda client: client.save_state(path, notes))
        # Of those before, one that is whole is enough to go back to.
        whole = [state for state in self._states if state.is_whole][-1:]
        pending = [state for state in self._states if state.written is not None and not state.written.done()]
        self._states = [*whole, *pending, _SavedState(self._steps, path, future)]
        return future

    def load_state(self, path: str) -> LoadStateResponse:
        """See `TrainingClient.load_state`: weights only."""
        return self._ask(lambda client: client.load_state(path).result(self._timeout))

    def load_state_with_optimizer(self, path: str, step: int = 0) -> LoadStateResponse:
        """See `TrainingClient.load_state_with_optimizer`; `step` is how many steps are in that state."""
        response = self._ask(lambda client: client.load_state_with_optimizer(path).result(self._timeout))
        self._steps, self._states = step, [_SavedState(step, path)]
        return response

    @property
    def next_seq_id(self) -> int:
        """See `TrainingClient.next_seq_id`."""
        return self._client.next_seq_id

    def sample(self, prompt: Any, num_samples: int = 1, sampling_params: Any = None) -> SampleResponse:
        """See `TrainingClient.sample`."""
        return self._ask(
            lambda client: client.sample(prompt, num_samples, sampling_params).result(self._timeout)
        )

    def identify(self) -> ModelIdentity:
        """See `TrainingClient.identify`."""
        return self._ask(lambda client: client.identify().result(self._timeout))

    def close(self) -> None:
        """See `TrainingClient.close`."""
        self._client.close()
