from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from firesteel.sdk import AdamParams, Datum, EncodedTextChunk, ModelInput, OperationError, TensorData

FLOAT_NAMES = ("weights", "advantages", "logprobs", "clip_low_threshold", "clip_high_threshold")


def inputs_of(**values: object) -> dict[str, TensorData]:
    return dict(Datum(ModelInput.from_ints([1]), values).loss_fn_inputs)  # type: ignore[arg-type]


@given(st.lists(st.integers(0, 2**31)))
def test_a_model_input_gives_back_the_tokens_it_was_made_from(tokens: list[int]) -> None:
    made = ModelInput.from_ints(tokens)
    assert made.to_ints() == tokens
    assert made.length == len(tokens)
    assert made == ModelInput.from_ints(np.asarray(tokens, dtype=np.int64))
    assert all(type(token) is int for token in ModelInput.from_ints(np.asarray(tokens, np.int64)).to_ints())


def test_the_chunks_of_a_model_input_read_as_one_sequence() -> None:
    chunked = ModelInput((EncodedTextChunk((3, 4)), EncodedTextChunk(()), EncodedTextChunk((5,))))
    assert chunked.to_ints() == [3, 4, 5]
    assert chunked.length == 3
    assert ModelInput.empty().to_ints() == []
    assert ModelInput.empty().length == 0


def test_appending_a_token_leaves_the_original_as_it_was() -> None:
    short = ModelInput.from_ints([3, 4])
    assert short.append_int(5).to_ints() == [3, 4, 5]
    assert short.to_ints() == [3, 4]
    assert ModelInput.empty().append_int(5).to_ints() == [5]


def test_data_is_always_the_flat_list_of_python_numbers() -> None:
    tensor = TensorData(np.arange(6).reshape(2, 3))
    assert tensor.data == [0, 1, 2, 3, 4, 5]
    assert tensor.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert tensor.shape == [2, 3]
    assert len(tensor) == 2
    assert type(tensor.data[0]) is int
    assert type(TensorData([1.5]).data[0]) is float
    # A view with other strides reads in its own order.
    assert TensorData(np.arange(6).reshape(2, 3).T).data == [0, 3, 1, 4, 2, 5]


@pytest.mark.parametrize("dtype", ["float32", "int64"])
def test_an_array_of_a_dtype_of_the_wire_is_wrapped_and_handed_out_without_a_copy(dtype: str) -> None:
    array = np.arange(5).astype(dtype)
    tensor = TensorData(array)
    assert np.shares_memory(tensor.to_numpy(), array)
    assert np.shares_memory(TensorData.from_numpy(array).to_torch().numpy(), array)
    assert np.shares_memory(TensorData(array, shape=[5, 1]).to_numpy(), array)
    torch_made = torch.from_numpy(array)
    assert np.shares_memory(TensorData.from_torch(torch_made).to_numpy(), array)


def test_a_tensor_of_a_read_only_array_may_be_written_without_touching_the_array() -> None:
    array = np.arange(3, dtype=np.float32)
    array.flags.writeable = False
    TensorData(array).to_torch().add_(1)
    assert array.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("array", "dtype"),
    [
        (np.ones(2, np.float64), "float32"),
        (np.ones(2, np.float16), "float32"),
        (np.ones(2, np.int32), "int64"),
        (np.ones(2, np.uint8), "int64"),
        (np.ones(2, ">i8"), "int64"),
        (np.ones(2, bool), "float32"),
        (np.ones(0), "float32"),
    ],
)
def test_other_number_types_become_float32_or_int64(array: np.ndarray, dtype: str) -> None:
    tensor = TensorData(array)
    assert tensor.dtype == dtype
    assert tensor.to_numpy().dtype == np.dtype(dtype)  # of this machine's byte order
    assert tensor.data == array.tolist()


def test_a_torch_tensor_is_detached_and_bfloat16_is_widened() -> None:
    tensor = TensorData.from_torch(torch.tensor([1.5, 2.5], dtype=torch.bfloat16, requires_grad=True))
    assert tensor.dtype == "float32"
    assert tensor.data == [1.5, 2.5]
    assert not tensor.to_torch().requires_grad
    assert TensorData.from_torch(torch.tensor([1, 2], dtype=torch.int32)).dtype == "int64"


def test_a_given_dtype_and_shape_win() -> None:
    assert TensorData([1, 2], "float32").dtype == "float32"
    assert TensorData([1, 2, 3, 4], "int64", [2, 2]).tolist() == [[1, 2], [3, 4]]
    with pytest.raises(ValueError, match="float16"):
        TensorData([1], "float16")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reshape"):
        TensorData([1, 2, 3], "int64", [2, 2])


@pytest.mark.parametrize("value", [1.5, float("nan"), float("inf")])
def test_a_value_that_int64_cannot_hold_is_refused_and_not_cut_off(value: float) -> None:
    with pytest.raises(ValueError, match="int64"):
        TensorData([1.0, value], "int64")
    assert TensorData([1.0, 2.0], "int64").data == [1, 2]


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([2**63], None),
        ([-(2**63) - 1], None),
        (np.array([2**63], np.uint64), None),
        ([2.0**63], "int64"),
        ([1 + 2j], None),
        (["1"], None),
        ([None], None),
        (np.array(["2020-01-01"], "datetime64[D]"), None),
    ],
)
def test_values_that_would_be_changed_by_storing_them_are_refused(values: Any, dtype: Any) -> None:
    with pytest.raises(OperationError, match="TensorData"):
        TensorData(values, dtype)


def test_the_largest_integers_are_kept() -> None:
    assert TensorData([-(2**63), 2**63 - 1]).data == [-(2**63), 2**63 - 1]


@pytest.mark.parametrize("tokens", [[1.0], [1, 2.5], ["3"], np.array([1.5]), [None]])
def test_a_token_id_is_a_whole_number_and_nothing_that_could_be_made_one(tokens: Any) -> None:
    with pytest.raises(OperationError, match="token ids"):
        ModelInput.from_ints(tokens)
    with pytest.raises(OperationError, match="token ids"):
        EncodedTextChunk(tokens)


def test_token_ids_of_arrays_and_tensors_become_plain_ones() -> None:
    for tokens in ([1, 2], np.array([1, 2], np.int32), torch.tensor([1, 2]), (i for i in (1, 2))):
        ids = ModelInput.from_ints(tokens).to_ints()
        assert ids == [1, 2]
        assert {type(token) for token in ids} == {int}


def test_tensor_data_cannot_be_changed() -> None:
    tensor = TensorData([1.0])
    for name in ("data", "dtype", "shape", "_array", "anything"):
        with pytest.raises(AttributeError):
            setattr(tensor, name, [2.0])
    assert tensor.data == [1.0]


def test_tensor_data_is_equal_by_content_dtype_and_shape() -> None:
    assert TensorData([1, 2]) == TensorData(np.asarray([1, 2], np.int32))
    assert TensorData([1, 2]) != TensorData([1.0, 2.0])
    assert TensorData([1, 2]) != TensorData([[1, 2]])
    assert TensorData([1, 2]) != TensorData([1, 3])
    assert TensorData([1, 2]) != [1, 2]
    with pytest.raises(TypeError, match="unhashable"):
        hash(TensorData([1]))


@pytest.mark.parametrize("tensor", [TensorData([[1, 2], [3, 4]]), TensorData([0.5, -0.0]), TensorData([])])
def test_tensor_data_survives_pickle_and_copies(tensor: TensorData) -> None:
    for other in (pickle.loads(pickle.dumps(tensor)), copy.copy(tensor), copy.deepcopy(tensor)):
        assert other == tensor
        assert other.dtype == tensor.dtype
        assert other.shape == tensor.shape


def test_a_datum_survives_pickle_and_is_equal_by_content() -> None:
    datum = Datum(ModelInput.from_ints([1, 2]), {"target_tokens": [2, 3], "weights": [0.0, 1.0]})  # type: ignore[dict-item]
    assert pickle.loads(pickle.dumps(datum)) == datum
    assert copy.deepcopy(datum) == datum
    assert datum != dataclasses.replace(datum, loss_fn_inputs={"target_tokens": [2, 4]})  # type: ignore[dict-item]


def test_plain_lists_get_their_dtype_by_the_name_they_arrive_under() -> None:
    inputs = inputs_of(target_tokens=[1, 2], **{name: [0, 1] for name in FLOAT_NAMES})
    assert inputs["target_tokens"].dtype == "int64"
    assert {inputs[name].dtype for name in FLOAT_NAMES} == {"float32"}
    assert inputs_of(target_tokens=())["target_tokens"].dtype == "int64"
    assert inputs_of(target_tokens=[[1, 2], [3, 4]])["target_tokens"].shape == [2, 2]


def test_a_plain_list_under_an_unknown_name_is_refused_and_an_array_is_not() -> None:
    with pytest.raises(TypeError, match=r"loss_fn_inputs\['mask'\].*dtype.*target_tokens"):
        inputs_of(mask=[1, 0])
    assert inputs_of(mask=np.asarray([1, 0]))["mask"].dtype == "int64"


def test_a_datum_takes_lists_arrays_tensors_and_tensor_data_alike() -> None:
    made = [
        inputs_of(weights=value)["weights"]
        for value in (
            [0.5, 1.0],
            (0.5, 1.0),
            np.asarray([0.5, 1.0]),
            torch.tensor([0.5, 1.0], dtype=torch.float64),
            TensorData([0.5, 1.0]),
        )
    ]
    assert all(tensor == TensorData([0.5, 1.0], "float32") for tensor in made)


def test_a_datum_refuses_what_is_no_array_by_field_and_type() -> None:
    with pytest.raises(TypeError, match=r"loss_fn_inputs\['weights'\]: str"):
        inputs_of(weights="0.5")
    with pytest.raises(TypeError, match=r"loss_fn_inputs\['weights'\]: float"):
        inputs_of(weights=0.5)


def test_a_datum_does_not_follow_later_changes_of_the_dict_it_was_made_from() -> None:
    given_inputs = {"target_tokens": TensorData([1])}
    datum = Datum(ModelInput.from_ints([1]), given_inputs)
    given_inputs["weights"] = TensorData([1.0])
    assert list(datum.loss_fn_inputs) == ["target_tokens"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        datum.model_input = ModelInput.empty()  # type: ignore[misc]


def test_adam_params_default_to_those_of_the_tinker_api() -> None:
    assert dataclasses.astuple(AdamParams()) == (1e-4, 0.9, 0.95, 1e-12, 0.0, 0.0)
    assert [field.name for field in dataclasses.fields(AdamParams)] == [
        "learning_rate",
        "beta1",
        "beta2",
        "eps",
        "weight_decay",
        "grad_clip_norm",
    ]
