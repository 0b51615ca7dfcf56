from __future__ import annotations

import math
from typing import Any

import pytest

from firesteel.sdk import AdamParams, Datum, ModelInput, OperationError, SamplingParams, TensorData
from firesteel.sdk.validation import check_adam_params, check_data, check_sampling


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
        ({"max_tokens": 0}, 1, "max_tokens"),
        ({"temperature": -0.5}, 1, "temperature"),
        ({"top_p": 0.0}, 1, "top_p"),
    ],
)
def test_sampling_settings_out_of_range_are_refused_by_name(
    settings: dict[str, Any], samples: int, name: str
) -> None:
    with pytest.raises(OperationError, match=f"{name}: .*; expected"):
        check_sampling(SamplingParams(**settings), samples)
