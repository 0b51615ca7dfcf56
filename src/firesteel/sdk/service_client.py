"""Finds shapes, creates trainers, decides where reference log-probabilities come from, owns their lives."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from firesteel.sdk.conversion import as_lora_config
from firesteel.sdk.errors import ClosedError, ConfigError, FiresteelError
from firesteel.sdk.operations import CreateBaseReference, CreateModel, ModelDescription, ResolveShape
from firesteel.sdk.shapes import Mode, TrainingShape
from firesteel.sdk.training_client import TrainingClient
from firesteel.sdk.transport import Transport
from firesteel.sdk.types import LoraConfig
from firesteel.sdk.validation import check_lora

logger = logging.getLogger("firesteel")


@dataclass(frozen=True)
class Provisioning:
    """What a service client creates when its first client is asked for."""

    base_model: str | None = None
    lora_rank: int | None = None
    """0 trains all weights; None leaves it to each `create_training_client`."""
    max_context_length: int | None = None
    """Tokens; None = whatever the shape and the model allow."""
    training_shape_id: str | None = None
    reference_training_shape_id: str | None = None
    activation_token_budget: int | None = None
    """Tokens after sharing whose graph a policy keeps between forward and backward; None suits the device."""
    cleanup_trainer_on_close: bool = True


class ReferenceStrategy(Enum):
    """Where the frozen reference of a policy lives."""

    SHARED = "shared"
    """On the policy's own base weights, adapter off: no second model."""
    SEPARATE = "separate"
    """A forward-only trainer of its own."""


def decide_reference(lora_rank: int, reference_training_shape_id: str | None) -> ReferenceStrategy:
    """A LoRA policy shares its base, unless a reference shape is asked for; everything else needs a second model."""
    if lora_rank > 0 and reference_training_shape_id is None:
        return ReferenceStrategy.SHARED
    return ReferenceStrategy.SEPARATE


def policy_mode(lora_rank: int) -> Mode:
    """The kind of shape that a policy of this rank needs."""
    return Mode.LORA_TRAINER if lora_rank > 0 else Mode.POLICY_TRAINER


REFERENCE_MODES = (Mode.FORWARD_ONLY, Mode.LORA_TRAINER)


class ServiceClient:
    """Creates training and reference clients. Nothing is loaded before the first is asked for.

    `close()` unloads the references and, with `cleanup_trainer_on_close`, the policies, and is idempotent.
    """

    def __init__(self, transport: Transport, provisioning: Provisioning | None = None) -> None:
        self.provisioning = provisioning or Provisioning()
        self._transport = transport
        self._policies: list[TrainingClient] = []
        self._adapters: dict[str, LoraConfig | None] = {}
        """Of each policy, by its model's id."""
        self._made_by: dict[str, CreateModel] = {}
        """What each policy was asked for with, by its model's id."""
        self._references: list[tuple[ReferenceStrategy, TrainingClient]] = []
        self._closed = False

    def create_training_client(
        self,
        base_model: str | None = None,
        lora_rank: int | None = None,
        *,
        lora_config: Any = None,
        lora_alpha: float = 32.0,
        seed: int = 0,
        activation_token_budget: int | None = None,
        start: str | None = None,
    ) -> TrainingClient:
        """Load a policy: all weights trainable at rank 0, else a fresh LoRA adapter on the frozen base.

        `lora_config` (ours or one with the same attributes) gives all adapter settings at once.
        `activation_token_budget` is used where the service was not built with one. `start` is the folder of a saved
        state or of an adapter in PEFT's format that it begins with; the optimizer is new.
        """
        config = as_lora_config(lora_config) if lora_config is not None else None
        if config is not None and lora_rank not in (None, config.rank):
            raise ConfigError(f"lora_rank: {lora_rank} was given, and a lora_config of rank {config.rank}")
        rank = self._agreed("lora_rank", config.rank if config else lora_rank, self.provisioning.lora_rank)
        if config is None:
            config = LoraConfig(rank=rank or 0, alpha=lora_alpha, seed=seed)
        if rank not in (None, 0):
            check_lora(config)
        model = self._agreed("base_model", base_model, self.provisioning.base_model)
        shape = self._policy_shape(model, rank or 0)
        budget = self.provisioning.activation_token_budget or activation_token_budget
        operation = CreateModel(
            model, shape, config if rank else None, activation_token_budget=budget, start=start
        )
        client = self._create(operation)
        self._policies.append(client)
        self._adapters[client.model_id] = config if rank else None
        self._made_by[client.model_id] = operation
        return client

    def recreate_training_client(self, lost: TrainingClient) -> TrainingClient:
        """The same policy again as it was made, in place of one that its trainer has lost."""
        operation = self._made_by[lost.model_id]
        client = self._create(replace(operation, start=None))
        del self._made_by[lost.model_id]
        self._policies[self._policies.index(lost)] = client
        self._adapters[client.model_id] = self._adapters.pop(lost.model_id)
        self._made_by[client.model_id] = operation
        return client

    def create_reference_client(
        self,
        base_model: str | None = None,
        lora_rank: int | None = None,
        *,
        policy_client: TrainingClient | None = None,
        start: str | None = None,
    ) -> TrainingClient:
        """A frozen model that gives the base model's log-probabilities, by the rule of `decide_reference`.

        With `start` (as in `create_training_client`) it is what a policy that starts there is before its first step:
        for LoRA a second, frozen adapter on the same base.

        With a shared reference, `policy_client` says whose base it is (default: the newest LoRA policy on that
        model). Raises `ConfigError` if there is no such policy.
        """
        rank = self._agreed("lora_rank", lora_rank, self.provisioning.lora_rank) or 0
        model = self._agreed("base_model", base_model, self.provisioning.base_model)
        strategy = decide_reference(rank, self.provisioning.reference_training_shape_id)
        shared = strategy is ReferenceStrategy.SHARED
        policy = self._policy_on(model, policy_client) if shared or (rank and start) else None
        if policy is not None and start is None:
            client = self._create(CreateBaseReference(policy.model_id))
        else:
            shape = policy.description.shape if policy and shared else self._reference_shape(model)
            lora = self._adapters[policy.model_id] if policy else None
            client = self._create(CreateModel(model, shape, lora, trainable=False, start=start))
        self._references.append((strategy, client))
        return client

    def longest_sequence(self, base_model: str | None = None, lora_rank: int | None = None) -> int:
        """Tokens that policy and reference of these settings both take, before either is loaded."""
        rank = self._agreed("lora_rank", lora_rank, self.provisioning.lora_rank) or 0
        model = self._agreed("base_model", base_model, self.provisioning.base_model)
        shapes = [self._policy_shape(model, rank)]
        if (
            decide_reference(rank, self.provisioning.reference_training_shape_id)
            is ReferenceStrategy.SEPARATE
        ):
            shapes.append(self._reference_shape(model))
        return min(shape.max_context_length for shape in shapes if shape.max_context_length is not None)

    def _policy_on(self, model: str, asked: TrainingClient | None) -> TrainingClient:
        """The LoRA policy whose base a reference of this model may share: the one asked for, or the newest."""
        candidates = [asked] if asked is not None else list(reversed(self._policies))
        for policy in candidates:
            if policy.description.lora_rank and policy.description.base_model == model:
                return policy
        found = ", ".join(
            f"{p.model_id} ({p.description.base_model}, rank {p.description.lora_rank})" for p in candidates
        )
        raise ConfigError(
            f"create_reference_client: a LoRA reference shares the base of a LoRA policy on {model!r}, "
            f"and there is none (there is: {found or 'no policy'}); call create_training_client first"
        )

    @property
    def trainer_job_id(self) -> str | None:
        """The policy created last, by the trainer's name for it."""
        return self._policies[-1].model_id if self._policies else None

    @property
    def reference_trainer_job_id(self) -> str | None:
        """The separate reference created last; None where the reference shares the policy's base."""
        separate = [client for strategy, client in self._references if strategy is ReferenceStrategy.SEPARATE]
        return separate[-1].model_id if separate else None

    @property
    def max_context_length(self) -> int | None:
        """The longest sequence that the policy created last takes, in tokens."""
        return self._policies[-1].description.max_context_length if self._policies else None

    def release_references(self) -> None:
        """Unload the reference models and free their memory."""
        while self._references:
            self._references.pop()[1].unload()

    def close(self) -> None:
        """Unload what this service client created. Raises an error of theirs that nobody read."""
        if self._closed:
            return
        self._closed = True
        cleanup = self.provisioning.cleanup_trainer_on_close
        # Last in, first out, and each is ended even if the end of another raises.
        with ExitStack() as ending:
            if cleanup:
                ending.callback(self._transport.close)
            for policy in self._policies:
                ending.callback(policy.unload if cleanup else policy.close)
            while self._references:
                ending.callback(self._references.pop()[1].unload)

    def __enter__(self) -> ServiceClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.close()
            return
        # What happened inside is what counts; nobody waits for the results of what is still under way.
        try:
            if self.provisioning.cleanup_trainer_on_close:
                self._transport.close()
            self.close()
        except FiresteelError as error:
            logger.debug("closing after an error: %s", error)

    def _create(self, operation: CreateModel | CreateBaseReference) -> TrainingClient:
        if self._closed:
            raise ClosedError("this service client is closed")
        description: ModelDescription = self._transport.submit(operation).result()
        return TrainingClient(self._transport, description)

    def _policy_shape(self, model: str, rank: int) -> TrainingShape:
        return self._resolve(model, (policy_mode(rank),), self.provisioning.training_shape_id)

    def _reference_shape(self, model: str) -> TrainingShape:
        return self._resolve(model, REFERENCE_MODES, self.provisioning.reference_training_shape_id)

    def _resolve(self, model: str, modes: tuple[Mode, ...], name: str | None) -> TrainingShape:
        operation = ResolveShape(model, modes, name, self.provisioning.max_context_length)
        shape: TrainingShape = self._transport.submit(operation).result()
        return shape

    def _agreed(self, field: str, asked: Any, configured: Any) -> Any:
        """The one value of a setting that may come from the call, the service or both."""
        if asked is not None and configured is not None and asked != configured:
            raise ConfigError(f"{field}: {asked!r} was asked for, this service was built for {configured!r}")
        value = asked if asked is not None else configured
        if value is None and field == "base_model":
            raise ConfigError("base_model: give it to connect()/build_service_client() or to this call")
        return value
