from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from firesteel.sdk import (
    AdamParams,
    ConfigError,
    Datum,
    LoraConfig,
    ModelInput,
    OperationError,
    SamplingParams,
    TensorData,
)
from firesteel.sdk.validation import check_adam_params, check_data, check_lora, check_sampling


def test_an_input_that_no_loss_reads_is_refused_by_name() -> None:
    misspelt = Datum(ModelInput.from_ints([1]), {"target_tokens": [2], "weigths": TensorData([1.0])})
    with pytest.raises(
        OperationError, match=r"data\[0\].*no loss reads weigths; known are target_tokens, weights"
    ):
        check_data([misspelt], "cross_entropy")


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"learning_rate": -1e-4}, "learning_rate"),
        ({"beta1": 1.0}, "beta1"),
        ({"beta2": -0.1}, "beta2"),
        ({"eps": math.inf}, "eps"),
        ({"weight_decay": "much"}, "weight_decay"),
        ({"grad_clip_norm": -1.0}, "grad_clip_norm"),
    ],
)
def test_optimizer_settings_out_of_range_are_refused_by_name(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(OperationError, match=f"adam_params.{name}: .*; expected"):
        check_adam_params(AdamParams(**settings))


def test_the_default_settings_pass() -> None:
    check_adam_params(AdamParams())
    check_sampling(SamplingParams(), 1)
    check_sampling(SamplingParams(temperature=0.0), 3)


@pytest.mark.parametrize(
    ("settings", "samples", "name"),
    [
        ({}, 0, "num_samples"),
        ({}, 1.5, "num_samples"),
        ({}, None, "num_samples"),
        ({"max_tokens": 2.5}, 1, "max_tokens"),
        ({"temperature": math.nan}, 1, "temperature"),
        ({"temperature": "hot"}, 1, "temperature"),
        ({"top_k": -2}, 1, "top_k"),
        ({"top_k": 1.5}, 1, "top_k"),
        ({"seed": -1}, 1, "seed"),
        ({"seed": 2**63}, 1, "seed"),
        ({"max_tokens": 0}, 1, "max_tokens"),
        ({"temperature": -0.5}, 1, "temperature"),
        ({"top_p": 0.0}, 1, "top_p"),
    ],
)
def test_sampling_settings_out_of_range_are_refused_by_name(
    settings: dict[str, Any], samples: Any, name: str
) -> None:
    with pytest.raises(OperationError, match=f"{name}: .*; expected"):
        check_sampling(SamplingParams(**settings), samples)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"rank": 0}, "lora_rank: 0"),
        ({"rank": 2.0}, "lora_rank: 2.0"),
        ({"rank": True}, "lora_rank: True"),
        ({"rank": 2, "alpha": 0}, "lora_alpha: 0"),
        ({"rank": 2, "alpha": math.inf}, "lora_alpha: inf"),
        ({"rank": 2, "alpha": "16"}, "lora_alpha: '16'"),
        ({"rank": 2, "seed": -1}, "LoRA seed: -1"),
        ({"rank": 2, "seed": 2**63}, "LoRA seed: 9223372036854775808"),
        ({"rank": 2, "seed": 0.5}, "LoRA seed: 0.5"),
    ],
)
def test_an_adapter_that_cannot_be_made_is_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=f"{named}; expected"):
        check_lora(LoraConfig(**settings))


def test_numbers_of_numpy_are_numbers() -> None:
    check_lora(LoraConfig(rank=np.int64(2), alpha=np.float32(8), seed=np.uint32(1)))  # type: ignore[arg-type]
    check_sampling(SamplingParams(temperature=np.float32(0.5), top_k=np.int32(4)), np.int64(2))  # type: ignore[arg-type]
