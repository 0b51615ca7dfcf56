from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from firesteel.sdk import (
    AdamParams,
    Datum,
    LoraConfig,
    ModelInput,
    OperationError,
    SamplingParams,
    TensorData,
)
from firesteel.sdk.conversion import (
    as_adam_params,
    as_data,
    as_datum,
    as_lora_config,
    as_model_input,
    as_sampling_params,
)


@dataclass
class ForeignChunk:
    tokens: list[int]
    type: str = "encoded_text"


@dataclass
class ForeignInput:
    chunks: list[Any]


@dataclass
class ForeignTensor:
    data: list[float]
    dtype: str
    shape: list[int] | None = None


@dataclass
class ForeignDatum:
    model_input: Any
    loss_fn_inputs: dict[str, Any] = field(default_factory=dict)


OURS = Datum(
    ModelInput.from_ints([1, 2, 3]),
    {"target_tokens": TensorData([2, 3, 4]), "weights": TensorData([0.0, 1.0, 1.0])},
)


def test_our_own_objects_pass_untouched() -> None:
    assert as_datum(OURS) is OURS
    assert as_model_input(OURS.model_input) is OURS.model_input
    for ours, convert in ((AdamParams(), as_adam_params), (LoraConfig(4), as_lora_config)):
        assert convert(ours) is ours
    params = SamplingParams()
    assert as_sampling_params(params) is params


@pytest.mark.parametrize("shape", [[3], None], ids=["with its shape", "without its shape"])
def test_a_datum_of_another_package_becomes_ours(shape: list[int] | None) -> None:
    foreign = ForeignDatum(
        ForeignInput([ForeignChunk([1, 2, 3])]),
        {
            "target_tokens": ForeignTensor([2, 3, 4], "int64", shape),
            "weights": ForeignTensor([0, 1, 1], "float32", shape),
        },
    )
    assert as_datum(foreign) == OURS
    assert as_data(iter([foreign, OURS])) == (OURS, OURS)


@pytest.mark.parametrize(
    "targets", [[2, 3, 4], np.asarray([2, 3, 4], np.int32), torch.tensor([2, 3, 4]), TensorData([2, 3, 4])]
)
def test_a_foreign_datum_may_hold_lists_arrays_and_tensors(targets: Any) -> None:
    datum = as_datum(SimpleNamespace(model_input=[1, 2, 3], loss_fn_inputs={"target_tokens": targets}))
    assert datum.model_input == OURS.model_input
    assert datum.loss_fn_inputs["target_tokens"] == TensorData([2, 3, 4])


def test_our_datum_may_hold_the_parts_of_another_package() -> None:
    mixed = Datum(ForeignInput([ForeignChunk([1, 2, 3])]), OURS.loss_fn_inputs)  # type: ignore[arg-type]
    assert as_datum(mixed) == OURS
    assert as_datum(Datum([1, 2, 3], OURS.loss_fn_inputs)) == OURS  # type: ignore[arg-type]


def test_a_two_dimensional_tensor_keeps_its_shape() -> None:
    foreign = ForeignDatum([1, 2], {"target_tokens": ForeignTensor([5, 6, 7, 8], "int64", [2, 2])})
    assert as_datum(foreign).loss_fn_inputs["target_tokens"].tolist() == [[5, 6], [7, 8]]


def test_a_sparse_tensor_becomes_dense() -> None:
    class Sparse:
        data, dtype, shape = [7], "int64", [2, 2]
        sparse_crow_indices, sparse_col_indices = [0, 0, 1], [1]

        def to_numpy(self) -> np.ndarray:
            return np.asarray([[0, 0], [0, 7]])

    foreign = ForeignDatum([1, 2], {"target_tokens": Sparse()})
    assert as_datum(foreign).loss_fn_inputs["target_tokens"].tolist() == [[0, 0], [0, 7]]


def test_several_chunks_are_read_as_one_sequence() -> None:
    assert as_model_input(ForeignInput([ForeignChunk([1, 2]), ForeignChunk([3])])).to_ints() == [1, 2, 3]
    assert as_model_input(SimpleNamespace(chunks=())).to_ints() == []


@pytest.mark.parametrize("tokens", [[1, 2, 3], (1, 2, 3), range(1, 4), np.asarray([1, 2, 3])])
def test_token_ids_alone_are_a_model_input(tokens: Any) -> None:
    assert as_model_input(tokens) == OURS.model_input


def test_an_image_is_refused_by_its_place() -> None:
    image = SimpleNamespace(type="image", data=b"", tokens=[1])
    with pytest.raises(OperationError, match=r"data\[1\]\.model_input\.chunks\[1\].*text"):
        as_data([OURS, ForeignDatum(ForeignInput([ForeignChunk([1]), image]))])
    with pytest.raises(OperationError, match="text"):
        as_model_input(ForeignInput([SimpleNamespace(tokens=[1])]))  # of no known type


def test_what_lacks_an_attribute_is_refused_by_place_type_and_attribute() -> None:
    with pytest.raises(OperationError, match=r"data\[1\]: SimpleNamespace.*loss_fn_inputs"):
        as_data([OURS, SimpleNamespace(model_input=[1])])
    with pytest.raises(OperationError, match=r"data\[0\]\.model_input: dict.*chunks"):
        as_data([SimpleNamespace(model_input={}, loss_fn_inputs={})])
    with pytest.raises(OperationError, match=r"model_input: str.*chunks"):
        as_model_input("some text")
    with pytest.raises(OperationError, match=r"AdamParams: dict.*learning_rate"):
        as_adam_params({"learning_rate": 1e-5})
    with pytest.raises(OperationError, match=r"LoraConfig: int.*rank"):
        as_lora_config(8)
    with pytest.raises(OperationError, match=r"SamplingParams: dict.*temperature"):
        as_sampling_params({"temperature": 0.0})


def test_settings_of_another_package_are_read_by_name() -> None:
    adam = SimpleNamespace(
        learning_rate=1.0, beta1=0.2, beta2=0.3, eps=0.4, weight_decay=0.5, grad_clip_norm=0.6, other=7
    )
    assert as_adam_params(adam) == AdamParams(1.0, 0.2, 0.3, 0.4, 0.5, 0.6)
    lora = SimpleNamespace(rank=4, alpha=8.0, seed=3, train_attn=False, train_mlp=True, train_unembed=True)
    assert as_lora_config(lora) == LoraConfig(4, 8.0, 3, False, True, True)
    sampling = SimpleNamespace(max_tokens=5, temperature=0.0, top_p=0.5, top_k=3, seed=1, stop=[9])
    assert as_sampling_params(sampling) == SamplingParams(5, 0.0, 0.5, 3, 1, [9])


def test_settings_that_are_missing_or_none_take_our_defaults_and_zero_is_a_setting() -> None:
    assert as_adam_params(SimpleNamespace(learning_rate=0.0, beta1=None)) == AdamParams(learning_rate=0.0)
    assert as_lora_config(SimpleNamespace(rank=0, seed=None)) == LoraConfig(0)
    assert as_sampling_params(SimpleNamespace(temperature=0.0, max_tokens=None)) == SamplingParams(
        temperature=0.0
    )


@pytest.mark.parametrize("stop", ["END", ["END"]])
def test_stop_texts_are_refused_before_they_are_sent(stop: object) -> None:
    with pytest.raises(OperationError, match=r"stop.*token ids"):
        as_sampling_params(SimpleNamespace(temperature=1.0, stop=stop))


def test_one_datum_in_the_place_of_a_list_is_refused() -> None:
    with pytest.raises((OperationError, TypeError)):
        as_data(OURS)  # type: ignore[arg-type]
