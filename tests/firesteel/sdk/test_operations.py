from __future__ import annotations

import copy
import dataclasses
import pickle
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firesteel.sdk import AdamParams, Datum, EncodedTextChunk, ModelInput, OperationError, TensorData
from firesteel.sdk.operations import (
    Backward,
    Forward,
    ForwardBackward,
    LoadState,
    LossName,
    Operation,
    OptimStep,
    OrderedOperation,
    SaveState,
    SaveWeights,
    UnloadModel,
    fingerprint,
    operation_name,
)
from firesteel.sdk.validation import LOSS_SETTINGS, check_data

GOOD = Datum(
    ModelInput.from_ints([1, 2, 3]),
    {
        "target_tokens": TensorData([2, 3, 4]),
        "weights": TensorData([0.0, 1.0, 1.0]),
        "logprobs": TensorData([-1.0, -2.0, -3.0]),
        "advantages": TensorData([1.0, 1.0, 1.0]),
    },
)


def changed(**values: object) -> Datum:
    """The good datum with some inputs replaced, None = left out."""
    inputs = {**GOOD.loss_fn_inputs, **values}
    return dataclasses.replace(GOOD, loss_fn_inputs={k: v for k, v in inputs.items() if v is not None})  # type: ignore[misc]


@pytest.mark.parametrize("loss_fn", get_args(LossName))
def test_good_data_pass_for_every_loss(loss_fn: str) -> None:
    config = dict.fromkeys(LOSS_SETTINGS[loss_fn], 0.5)
    check_data([GOOD, GOOD], loss_fn, config)
    assert LOSS_SETTINGS.keys() == set(get_args(LossName))


def test_weights_may_be_missing_and_may_have_any_size_and_sign() -> None:
    check_data([changed(weights=None), changed(weights=[-10.0, 0.0, 1e6])], "cross_entropy")


def test_targets_may_have_several_columns() -> None:
    wide = changed(target_tokens=[[2, 3], [4, 5], [6, 7]], weights=[[1, 0], [0, 1], [1, 1]])
    check_data([wide], "cross_entropy")


MALFORMED: dict[str, tuple[Datum, str, list[str]]] = {
    "no tokens": (Datum(ModelInput.empty(), {}), "cross_entropy", ["model_input", "no tokens"]),
    "no targets": (
        changed(target_tokens=None),
        "cross_entropy",
        ["'target_tokens'", "weights, logprobs, advantages"],
    ),
    "nothing at all": (Datum(GOOD.model_input, {}), "cross_entropy", ["'target_tokens'", "nothing"]),
    "float targets": (
        changed(target_tokens=np.ones(3)),
        "cross_entropy",
        ["'target_tokens'", "float32", "int64"],
    ),
    "too few targets": (
        changed(target_tokens=[2, 3]),
        "cross_entropy",
        ["'target_tokens'", "[2]", "3 input tokens"],
    ),
    "one target for all": (
        changed(target_tokens=TensorData(np.full((), 2))),
        "cross_entropy",
        ["'target_tokens'", "[]", "3"],
    ),
    "no column of targets": (
        changed(target_tokens=np.zeros((3, 0), np.int64), weights=None),
        "cross_entropy",
        ["'target_tokens'", "[3, 0]"],
    ),
    "targets the wrong way round": (
        changed(target_tokens=np.ones((1, 3), np.int64)),
        "cross_entropy",
        ["[1, 3]", "3 input tokens"],
    ),
    "too many weights": (changed(weights=[1, 1, 1, 1]), "cross_entropy", ["'weights'", "[4]", "[3]"]),
    "weights of one column": (
        changed(target_tokens=[[2, 3]] * 3),
        "cross_entropy",
        ["'weights'", "[3]", "[3, 2]"],
    ),
    "a weight that is nan": (changed(weights=[0, np.nan, 1]), "cross_entropy", ["'weights'", "not finite"]),
    "an infinite advantage": (changed(advantages=[0, np.inf, 1]), "ppo", ["'advantages'", "not finite"]),
    "no sampler": (changed(logprobs=None), "importance_sampling", ["importance_sampling", "'logprobs'"]),
    "no advantages": (changed(advantages=None), "cispo", ["cispo", "'advantages'"]),
    "too few log-probabilities": (changed(logprobs=[0.0]), "ppo", ["'logprobs'", "[1]", "[3]"]),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_malformed_data_are_refused_naming_datum_field_and_lengths(what: str) -> None:
    datum, loss_fn, said = MALFORMED[what]
    with pytest.raises(OperationError) as caught:
        check_data([GOOD, datum], loss_fn)
    assert str(caught.value).startswith("data[1].")
    for part in said:
        assert part in str(caught.value)


def test_inputs_that_the_loss_does_not_read_are_not_its_business() -> None:
    check_data([changed(logprobs=[0.0], advantages=[np.inf])], "cross_entropy")


def test_no_data_unknown_losses_and_unknown_settings_are_refused() -> None:
    with pytest.raises(OperationError, match="data: empty"):
        check_data([], "cross_entropy")
    with pytest.raises(
        OperationError, match=r"loss_fn: 'dpo'.*cross_entropy, importance_sampling, ppo, cispo, dro"
    ):
        check_data([GOOD], "dpo")
    with pytest.raises(OperationError, match=r"cross_entropy does not read beta \(it reads: none\)"):
        check_data([GOOD], "cross_entropy", {"beta": 0.1})
    with pytest.raises(OperationError, match=r"ppo does not read clip, eps \(it reads: clip_low"):
        check_data([GOOD], "ppo", {"eps": 0.1, "clip": 1, "clip_low_threshold": 0.5})
    with pytest.raises(OperationError, match="dro needs 'beta'"):
        check_data([GOOD], "dro", {})


@pytest.mark.parametrize("beta", ["0.1", None, float("nan"), float("inf")])
def test_a_setting_that_is_no_finite_number_is_refused_by_name_and_value(beta: Any) -> None:
    with pytest.raises(OperationError, match=r"loss_fn_config: 'beta'.*finite number"):
        check_data([GOOD], "dro", {"beta": beta})


OPERATIONS: list[OrderedOperation] = [
    Forward("m", 3, (GOOD,), "ppo", {"clip_low_threshold": 0.5, "clip_high_threshold": 1.5}, True),
    ForwardBackward("m", 3, (GOOD, changed(weights=None)), "dro", {"beta": 0.5}),
    Backward("m", 3, 2, (np.asarray([1.0, 2.0], np.float32), np.zeros((2, 2), np.float32))),
    OptimStep("m", 3, AdamParams(1e-5, 0.9, 0.99, 1e-8, 0.01, 1.0)),
    SaveWeights("m", 3, "somewhere"),
    SaveState("m", 3, "somewhere", {"step": 2}),
    LoadState("m", 3, "somewhere"),
]


@pytest.mark.parametrize("operation", OPERATIONS, ids=operation_name)
def test_equal_content_has_an_equal_fingerprint(operation: Operation) -> None:
    digest = fingerprint(operation)
    assert fingerprint(operation) == digest
    assert fingerprint(copy.deepcopy(operation)) == digest
    assert fingerprint(pickle.loads(pickle.dumps(operation))) == digest


def test_operations_have_different_fingerprints_even_with_the_same_fields() -> None:
    assert len({fingerprint(operation) for operation in OPERATIONS}) == len(OPERATIONS)
    assert fingerprint(Forward("m", 1, (GOOD,))) != fingerprint(ForwardBackward("m", 1, (GOOD,)))


def test_a_fingerprint_is_the_same_in_another_process() -> None:
    code = (
        "from firesteel.sdk.operations import *; from firesteel.sdk import *\n"
        "print(fingerprint(ForwardBackward('m', 1, (Datum(ModelInput.from_ints([1]), {'target_tokens': [2]}),),"
        " 'ppo', {'clip_low_threshold': .5, 'clip_high_threshold': 2.})).hex())"
    )
    there = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()
    datum = Datum(ModelInput.from_ints([1]), {"target_tokens": TensorData([2])})
    config = {"clip_high_threshold": 2.0, "clip_low_threshold": 0.5}  # and in any order
    assert fingerprint(ForwardBackward("m", 1, (datum,), "ppo", config)).hex() == there


def test_the_kind_of_container_is_no_content() -> None:
    def digest(tokens: Any, targets: Any) -> bytes:
        return fingerprint(
            Forward("m", 1, (Datum(ModelInput((EncodedTextChunk(tokens),)), {"target_tokens": targets}),))
        )

    plain = digest((1, 2), [2, 3])
    assert digest([1, 2], TensorData([2, 3])) == plain
    assert digest([np.int64(1), np.int32(2)], np.asarray([2, 3], np.int32)) == plain
    assert digest((1, 2), (2, 3)) == plain
    datum = Datum(
        ModelInput.from_ints([1, 2]), {"target_tokens": TensorData(np.arange(2, 8).reshape(2, 3).T[:2])}
    )
    straight = dataclasses.replace(datum, loss_fn_inputs={"target_tokens": TensorData([[2, 5], [3, 6]])})
    assert fingerprint(Forward("m", 1, (datum,))) == fingerprint(Forward("m", 1, (straight,)))


def test_numbers_of_numpy_count_as_the_numbers_that_they_are() -> None:
    assert fingerprint(OptimStep("m", 1, AdamParams(np.float64(0.5)))) == fingerprint(
        OptimStep("m", 1, AdamParams(0.5))
    )
    assert fingerprint(OptimStep("m", 1, AdamParams(np.float32(0.5)))) == fingerprint(
        OptimStep("m", 1, AdamParams(0.5))
    )


def test_what_no_operation_carries_is_refused() -> None:
    with pytest.raises(TypeError, match="operations carry no object"):
        fingerprint(SaveWeights("m", 1, object()))  # type: ignore[arg-type]


NUMBERS = st.floats(allow_nan=False, width=32)
TENSORS = st.one_of(
    st.lists(NUMBERS, max_size=4).map(lambda v: TensorData(v, "float32")),
    st.lists(st.integers(-5, 5), max_size=4).map(lambda v: TensorData(v, "int64")),
    st.integers(0, 2).map(lambda n: TensorData(np.zeros((n, 2), np.float32))),
)
DATA = st.lists(
    st.builds(
        Datum,
        st.lists(st.integers(0, 300), max_size=3).map(ModelInput.from_ints),
        st.dictionaries(st.sampled_from(["target_tokens", "weights", "advantages"]), TENSORS),
    ),
    max_size=3,
).map(tuple)
FIELDS: Mapping[str, st.SearchStrategy[Any]] = {
    "model_id": st.text(max_size=3),
    "seq_id": st.integers(0, 300),
    "of": st.integers(0, 300),
    "data": DATA,
    "loss_fn": st.sampled_from(get_args(LossName)),
    "loss_fn_config": st.none() | st.dictionaries(st.text(max_size=3), NUMBERS, max_size=2),
    "weighted_only": st.booleans(),
    "retain": st.booleans(),
    "offer": st.booleans(),
    "dloss_dlogprob": st.lists(TENSORS.map(TensorData.to_numpy), max_size=2).map(tuple),
    "adam_params": st.builds(AdamParams, *[st.floats(0, 1)] * 6),
    "path": st.text(max_size=3),
    "merged": st.booleans(),
    "optimizer": st.booleans(),
    "notes": st.dictionaries(st.text(max_size=3), st.integers(0, 3) | st.text(max_size=2), max_size=2),
}


def _content(value: Any) -> Any:
    """An independent account of what a value holds, comparable with ==."""
    if isinstance(value, TensorData):
        return _content(value.to_numpy())
    if isinstance(value, np.ndarray):
        return ("array", str(value.dtype), value.shape, value.tobytes())
    if isinstance(value, Mapping):
        return ("map", sorted((key, _content(item)) for key, item in value.items()))
    if isinstance(value, (list, tuple)):
        return [_content(item) for item in value]
    if dataclasses.is_dataclass(value):
        return [_content(getattr(value, item.name)) for item in dataclasses.fields(value)]
    return (type(value).__name__, repr(value))  # -0.0 is not 0.0, 1 is not True


@settings(deadline=None, max_examples=60)
@given(st.data(), st.sampled_from(OPERATIONS))
def test_changing_any_field_changes_the_fingerprint(drawn: st.DataObject, operation: Any) -> None:
    for item in dataclasses.fields(operation):
        other = drawn.draw(FIELDS[item.name], label=item.name)
        changed_operation = dataclasses.replace(operation, **{item.name: other})
        same = _content(other) == _content(getattr(operation, item.name))
        assert (fingerprint(changed_operation) == fingerprint(operation)) == same


@settings(deadline=None, max_examples=100)
@given(DATA, DATA)
def test_data_are_never_confused_with_other_data(one: tuple[Datum, ...], other: tuple[Datum, ...]) -> None:
    digests = [fingerprint(Forward("m", 1, data)) for data in (one, other)]
    assert (digests[0] == digests[1]) == (_content(one) == _content(other))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"ab": 1.0}, {"a": 1.0}),
        ({"a": 1.0}, {"a": 1}),
        ({"a": 1}, {"a": True}),
        ({}, None),
        ({"a": 0.0}, {"a": -0.0}),
    ],
)
def test_near_misses_are_kept_apart(one: Any, other: Any) -> None:
    assert fingerprint(Forward("m", 1, (GOOD,), "ppo", one)) != fingerprint(
        Forward("m", 1, (GOOD,), "ppo", other)
    )


def test_how_tokens_are_cut_into_chunks_is_content() -> None:
    def digest(*chunks: tuple[int, ...]) -> bytes:
        return fingerprint(Forward("m", 1, (Datum(ModelInput(tuple(map(EncodedTextChunk, chunks))), {}),)))

    assert len({digest((1, 2)), digest((1,), (2,)), digest((12,)), digest((1, 2), ())}) == 4


def test_an_operation_is_named_for_people() -> None:
    assert operation_name(ForwardBackward("model-1", 3, ())) == "forward_backward seq 3 of model-1"
    assert operation_name(UnloadModel("model-1")) == "unload_model of model-1"


def test_neighbouring_numbers_and_other_shapes_are_kept_apart() -> None:
    def tokens(*ids: int) -> Operation:
        return Forward("m", 1, (Datum(ModelInput.from_ints(ids), {}),))

    def targets(value: object) -> Operation:
        return Forward("m", 1, (changed(target_tokens=np.asarray(value)),))

    assert fingerprint(tokens(1, 23)) != fingerprint(tokens(12, 3))
    assert fingerprint(Backward("m", 1, 23, ())) != fingerprint(Backward("m", 12, 3, ()))
    shapes = [[1, 2, 3, 4], [[1, 2, 3, 4]], [[1, 2], [3, 4]], [[1], [2], [3], [4]]]
    assert len({fingerprint(targets(value)) for value in shapes}) == len(shapes)
