"""`build_service_client`: the guide's way to provision trainers."""

from __future__ import annotations

from collections.abc import Mapping

import firesteel
from firesteel.sdk import ConfigError, NotBuiltYetError, Provisioning, ServiceClient
from training.utils.config import TrainerConfig


def build_service_client(
    *,
    base_model: str,
    api_key: str | None = None,
    base_url: str | None = None,
    additional_headers: Mapping[str, str] | None = None,
    tokenizer_model: str | None = None,
    lora_rank: int | None = None,
    max_lora_rank: int | None = None,
    max_context_length: int | None = None,
    learning_rate: float | None = None,
    trainer: TrainerConfig | None = None,
    deployment: object = None,
    cleanup_trainer_on_close: bool = True,
) -> ServiceClient:
    """A service client that resolves shapes, creates trainers and decides the reference strategy.

    Nothing is loaded before the first client is created. `max_lora_rank` is another name for `lora_rank`
    (0 = train all weights). `tokenizer_model` and `learning_rate` are accepted for the guide's sake: the
    loop tokenises, and the rate travels with each `optim_step`. Raises `NotBuiltYetError` for a
    `deployment`.
    """
    if deployment is not None:
        raise NotBuiltYetError(
            "deployment: inference deployments are not built yet; no recipe here needs one, pass None"
        )
    if lora_rank is not None and max_lora_rank is not None and lora_rank != max_lora_rank:
        raise ConfigError(
            f"lora_rank={lora_rank} and max_lora_rank={max_lora_rank} are two names of one setting"
        )
    rank = lora_rank if lora_rank is not None else max_lora_rank
    shapes = trainer or TrainerConfig()
    provisioning = Provisioning(
        base_model=base_model,
        lora_rank=rank or 0,
        max_context_length=max_context_length,
        training_shape_id=shapes.training_shape_id,
        reference_training_shape_id=shapes.reference_training_shape_id,
        activation_token_budget=shapes.activation_token_budget,
        cleanup_trainer_on_close=cleanup_trainer_on_close,
    )
    return firesteel.connect(
        base_url, api_key, additional_headers=additional_headers, provisioning=provisioning
    )
