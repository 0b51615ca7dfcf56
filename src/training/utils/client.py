"""`ReconnectableClient`: a training client whose calls block and return results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from firesteel.sdk import (
    APIFuture,
    ForwardBackwardOutput,
    LoadStateResponse,
    OptimStepResponse,
    SampleResponse,
    SaveStateResponse,
    SaveWeightsResponse,
    TrainingClient,
    Verification,
)
from firesteel.sdk.operations import LossName, ModelDescription, ModelIdentity


class ReconnectableClient:
    """What recipes hold: one call, one result or one error. `timeout` is in seconds per call, None = no limit."""

    def __init__(self, client: TrainingClient, timeout: float | None = None) -> None:
        self._client = client
        self._timeout = timeout

    @classmethod
    def from_training_client(
        cls, client: TrainingClient, *, default_timeout: float | None = None, **described: Any
    ) -> ReconnectableClient:
        """Wrap a client. The cookbook's other keywords (`base_model`, `lora_rank`, `job_id`, …) describe it only.

        Raises TypeError for a keyword that the cookbook does not have.
        """
        if unknown := set(described) - {"base_model", "lora_rank", "job_id", "service", "base_only"}:
            raise TypeError(f"from_training_client does not know {', '.join(sorted(unknown))}")
        return cls(client, default_timeout)

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
        future = self._client.forward(data, loss_fn, loss_fn_config, weighted_only=weighted_only)
        return future.result(self._timeout)

    def forward_backward(
        self,
        data: Iterable[Any],
        loss_fn: LossName = "cross_entropy",
        loss_fn_config: Mapping[str, float] | None = None,
        *,
        weighted_only: bool = False,
    ) -> ForwardBackwardOutput:
        """See `TrainingClient.forward_backward`."""
        future = self._client.forward_backward(data, loss_fn, loss_fn_config, weighted_only=weighted_only)
        return future.result(self._timeout)

    def forward_backward_custom(
        self, data: Iterable[Any], loss_fn: Any, *, weighted_only: bool = False
    ) -> ForwardBackwardOutput:
        """See `TrainingClient.forward_backward_custom`."""
        future = self._client.forward_backward_custom(data, loss_fn, weighted_only=weighted_only)
        return future.result(self._timeout)

    def verify(self, data: Iterable[Any], loss_fn: Any, *, weighted_only: bool = False) -> Verification:
        """See `TrainingClient.verify`."""
        return self._client.verify(data, loss_fn, weighted_only=weighted_only, timeout=self._timeout)

    def optim_step(self, adam_params: Any) -> OptimStepResponse:
        """See `TrainingClient.optim_step`."""
        return self._client.optim_step(adam_params).result(self._timeout)

    def save_weights(self, path: str, *, merged: bool = False) -> SaveWeightsResponse:
        """See `TrainingClient.save_weights`."""
        return self._client.save_weights(path, merged=merged).result(self._timeout)

    def save_state(self, path: str, notes: Mapping[str, Any] | None = None) -> SaveStateResponse:
        """See `TrainingClient.save_state`; returns when the state is on the disk."""
        return self.submit_save_state(path, notes).result(self._timeout)

    def submit_save_state(
        self, path: str, notes: Mapping[str, Any] | None = None
    ) -> APIFuture[SaveStateResponse]:
        """The same without waiting: training goes on while the state is written."""
        return self._client.save_state(path, notes)

    def load_state(self, path: str) -> LoadStateResponse:
        """See `TrainingClient.load_state`: weights only."""
        return self._client.load_state(path).result(self._timeout)

    def load_state_with_optimizer(self, path: str) -> LoadStateResponse:
        """See `TrainingClient.load_state_with_optimizer`."""
        return self._client.load_state_with_optimizer(path).result(self._timeout)

    @property
    def next_seq_id(self) -> int:
        """See `TrainingClient.next_seq_id`."""
        return self._client.next_seq_id

    def sample(self, prompt: Any, num_samples: int = 1, sampling_params: Any = None) -> SampleResponse:
        """See `TrainingClient.sample`."""
        return self._client.sample(prompt, num_samples, sampling_params).result(self._timeout)

    def identify(self) -> ModelIdentity:
        """See `TrainingClient.identify`."""
        return self._client.identify().result(self._timeout)

    def close(self) -> None:
        """See `TrainingClient.close`."""
        self._client.close()
