"""Operations and results on their way between our own client and server: the same after it, or refused."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firesteel.sdk import AdamParams, Datum, LoraConfig, ModelInput, OperationError, SamplingParams, errors
from firesteel.sdk.errors import FiresteelError, OperationFailed, RowError, TrainerRewound
from firesteel.sdk.operations import (
    Backward,
    CreateBaseReference,
    CreateModel,
    DropGradient,
    Examine,
    Forward,
    ForwardBackward,
    IdentifyModel,
    LoadState,
    ModelDescription,
    ModelIdentity,
    OptimStep,
    Refused,
    ReleaseForward,
    ResolveShape,
    Sample,
    SaveState,
    SaveWeights,
    UnloadModel,
    fingerprint,
)
from firesteel.sdk.shapes import Mode, TrainingShape
from firesteel.sdk.types import (
    Examined,
    ForwardBackwardOutput,
    GradientSketch,
    LoadStateResponse,
    OptimStepResponse,
    SampledSequence,
    SampleResponse,
    SaveStateResponse,
    SaveWeightsResponse,
    TensorData,
)
from firesteel.sdk.wire import (
    decode_operation,
    decode_result,
    encode_error,
    encode_operation,
    encode_result,
)

SHAPE = TrainingShape("cpu-lora", "*", "cpu", "float32", Mode.LORA_TRAINER, 128)
FLOATS = st.floats(width=32, allow_nan=False)
TOKENS = st.lists(st.integers(-(2**40), 2**40), max_size=8)
NAMES = st.text(max_size=12)


@st.composite
def data(draw: st.DrawFn) -> tuple[Datum, ...]:
    made = []
    for _ in range(draw(st.integers(0, 3))):
        tokens = draw(TOKENS)
        rows = draw(st.sampled_from([(), (2,)]))
        targets = np.zeros((len(tokens), *rows), np.int64) + draw(st.integers(0, 200))
        weights = np.full(targets.shape, draw(FLOATS), np.float32)
        made.append(Datum(ModelInput.from_ints(tokens), {"target_tokens": targets, "weights": weights}))
    return tuple(made)


SLOPES = st.lists(st.lists(FLOATS, max_size=5).map(lambda v: np.asarray(v, np.float32)), max_size=3).map(
    tuple
)
NOTES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)
OPERATIONS = st.one_of(
    st.builds(Forward, NAMES, st.integers(1, 99), data(), retain=st.booleans(), offer=st.booleans()),
    st.builds(
        ForwardBackward,
        NAMES,
        st.integers(1, 99),
        data(),
        st.just("ppo"),
        st.none() | st.dictionaries(NAMES, FLOATS, max_size=2),
    ),
    st.builds(Backward, NAMES, st.integers(1, 99), st.integers(1, 99), SLOPES),
    st.builds(
        Examine, NAMES, st.integers(1, 99), data(), st.sampled_from([None, "eager"]), st.none() | SLOPES
    ),
    st.builds(OptimStep, NAMES, st.integers(1, 99), st.builds(AdamParams, *[FLOATS] * 6)),
    st.builds(DropGradient, NAMES, st.integers(1, 99)),
    st.builds(SaveState, NAMES, st.integers(1, 99), NAMES, st.dictionaries(NAMES, NOTES, max_size=3)),
    st.builds(SaveWeights, NAMES, st.integers(1, 99), NAMES, st.booleans()),
    st.builds(LoadState, NAMES, st.integers(1, 99), NAMES, st.booleans()),
    st.builds(
        Sample,
        NAMES,
        TOKENS.map(ModelInput.from_ints),
        st.builds(
            SamplingParams, stop=st.lists(st.integers(0, 9)).map(tuple), seed=st.none() | st.integers(0, 9)
        ),
        st.integers(1, 4),
        st.booleans(),
    ),
    st.builds(
        CreateModel,
        NAMES,
        st.just(SHAPE),
        st.none() | st.just(LoraConfig(4, 8.0, 3)),
        start=st.none() | NAMES,
    ),
    st.builds(ResolveShape, NAMES, st.just((Mode.FORWARD_ONLY, Mode.LORA_TRAINER)), st.none() | NAMES),
    st.builds(Refused, NAMES, st.integers(1, 99), NAMES),
    *(st.builds(kind, NAMES) for kind in (CreateBaseReference, IdentifyModel, UnloadModel)),
    st.builds(ReleaseForward, NAMES, st.integers(1, 99)),
)


@settings(deadline=None, max_examples=300)
@given(OPERATIONS)
def test_an_operation_arrives_as_it_was_sent(operation: Any) -> None:
    arrived = decode_operation(encode_operation(operation))
    assert type(arrived) is type(operation)
    assert fingerprint(arrived) == fingerprint(operation)


DATUM = Datum(ModelInput.from_ints([1, 2]), {"target_tokens": [2, 3], "weights": [0.0, 1.0]})
RESULTS: list[tuple[Any, Any]] = [
    (ResolveShape("m", (Mode.LORA_TRAINER,)), SHAPE),
    (CreateModel("m", SHAPE), ModelDescription("id", "m", SHAPE, 4, 128, "tree", True, 4096)),
    (IdentifyModel("id"), ModelIdentity("abc", "float32 cpu")),
    (UnloadModel("id"), None),
    (OptimStep("id", 1, AdamParams()), OptimStepResponse({"grad_norm": float("inf"), "x": 0.1 + 0.2})),
    (DropGradient("id", 1), None),
    (SaveWeights("id", 1, "p"), SaveWeightsResponse("p")),
    (SaveState("id", 1, "p", {}), SaveStateResponse("p")),
    (LoadState("id", 1, "p"), LoadStateResponse("p", ("threads: 1, now 2",))),
    (
        Sample("id", ModelInput.from_ints([1]), SamplingParams()),
        SampleResponse([SampledSequence("stop", [1, 2], [-0.1, -0.2])], [None, -1.5]),
    ),
]


@pytest.mark.parametrize(("operation", "result"), RESULTS, ids=lambda value: type(value).__name__)
def test_a_result_arrives_as_it_was_given(operation: Any, result: Any) -> None:
    assert decode_result(operation, encode_result(result)) == result


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_arrays_of_a_result_keep_every_bit_and_their_width(dtype: type) -> None:
    values = np.asarray([0.1, -np.inf, np.nan, 1e-45], dtype)
    result = Examined((values,), GradientSketch(0.1 + 0.2, np.asarray([np.pi])))
    arrived = decode_result(Examine("id", 1, (DATUM,)), encode_result(result))
    assert arrived.logprobs[0].dtype == dtype
    assert arrived.logprobs[0].tobytes() == values.tobytes()
    assert arrived.gradient.norm == 0.1 + 0.2
    assert arrived.gradient.projection.tobytes() == result.gradient.projection.tobytes()


def test_log_probabilities_of_any_shape_arrive() -> None:
    outputs = [{"logprobs": TensorData(np.arange(6, dtype=np.float32).reshape(3, 2))}, {}]
    result = ForwardBackwardOutput(outputs, {"loss:sum": 1.5})
    assert decode_result(Forward("id", 1, (DATUM,)), encode_result(result)) == result


ERRORS = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, FiresteelError)]


@pytest.mark.parametrize(
    "kind", [k for k in ERRORS if k not in (RowError, TrainerRewound)], ids=lambda k: k.__name__
)
def test_an_error_arrives_as_what_it_was(kind: type[FiresteelError]) -> None:
    with pytest.raises(FiresteelError, match="what happened") as caught:
        decode_result(IdentifyModel("id"), encode_error(kind("what happened")))
    assert type(caught.value) is kind


def test_an_error_that_is_made_of_more_than_a_text_arrives_as_its_parent() -> None:
    with pytest.raises(errors.DataError, match=r"rows.jsonl:3: chosen: empty") as caught:
        decode_result(IdentifyModel("id"), encode_error(RowError("rows.jsonl", 3, "chosen", "empty")))
    assert type(caught.value) is errors.DataError


@settings(deadline=None, max_examples=200)
@given(OPERATIONS, st.data())
def test_a_message_with_bytes_cut_off_or_changed_is_read_or_refused_and_nothing_else(
    operation: Any, drawn: st.DataObject
) -> None:
    message = bytearray(encode_operation(operation))
    if drawn.draw(st.booleans()):
        message = message[: drawn.draw(st.integers(0, len(message) - 1))]
    else:
        message[drawn.draw(st.integers(0, len(message) - 1))] ^= drawn.draw(st.integers(1, 255))
    with contextlib.suppress(OperationError):
        decode_operation(bytes(message))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"seq_id": "1"}, "OptimStep.seq_id: '1'; expected a value of type int"),
        ({"seq_id": True}, "OptimStep.seq_id: True; expected a value of type int"),
        ({"model_id": None}, "OptimStep.model_id: None; expected a value of type str"),
        ({"adam_params": []}, "OptimStep.adam_params: .*; expected an object"),
        ({"more": 1}, "OptimStep: OptimStep has no field 'more'"),
    ],
)
def test_a_field_of_another_type_is_named(changes: dict[str, Any], text: str) -> None:
    import orjson

    value = dataclasses.asdict(OptimStep("id", 1, AdamParams())) | changes
    head = orjson.dumps({"operation": "OptimStep", "value": value})
    with pytest.raises(OperationError, match=text):
        decode_operation(b"FSW1" + len(head).to_bytes(4, "little") + head)


@pytest.mark.parametrize("place", [[8], [2**60], [-8], ["x"]])
def test_an_array_outside_its_message_is_refused(place: list[Any]) -> None:
    import orjson

    slope = {"@": ["float32", [4], *place]}
    value = {"model_id": "id", "seq_id": 2, "of": 1, "dloss_dlogprob": [slope]}
    head = orjson.dumps({"operation": "Backward", "value": value})
    with pytest.raises(OperationError, match=r"dloss_dlogprob\[0\]"):
        decode_operation(b"FSW1" + len(head).to_bytes(4, "little") + head + bytes(16))


@pytest.mark.parametrize("shape", [[2**62, 2**62], [2**40]])
def test_an_array_of_an_absurd_shape_takes_no_memory(shape: list[int]) -> None:
    import orjson

    value = {"model_id": "id", "seq_id": 2, "of": 1, "dloss_dlogprob": [{"@": ["float32", shape, 0]}]}
    head = orjson.dumps({"operation": "Backward", "value": value})
    with pytest.raises(OperationError, match="not inside the message"):
        decode_operation(b"FSW1" + len(head).to_bytes(4, "little") + head)


def test_what_is_no_message_is_refused() -> None:
    with pytest.raises(OperationError, match="no message of Firesteel's"):
        decode_operation(b"{}")
    with pytest.raises(OperationFailed, match="cannot be read"):
        decode_result(IdentifyModel("id"), b"<html>")
