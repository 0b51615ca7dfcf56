from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import firesteel
from conftest import VOCABULARY, make_datum, make_pairs
from firesteel.engine.engine import Engine
from firesteel.sdk import (
    AdamParams,
    ClosedError,
    Datum,
    FiresteelError,
    LoraConfig,
    ModelInput,
    OperationError,
    SamplingParams,
    ServiceClient,
    TensorData,
    TrainingClient,
)
from firesteel.sdk.operations import Backward, Forward, ReleaseForward
from transports import WAYS, RecordingEngine, Way, way_to

# Plain enough that equal gradients give equal weights and any other gradient gives others.
SGD_LIKE = AdamParams(learning_rate=1e-2, beta1=0.0, beta2=0.0, eps=1.0)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small lose more to threads than they gain, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=WAYS)
def way(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, llama_folder: str
) -> Iterator[Way]:
    """All of this file holds for a trainer in this process and for one behind HTTP."""
    with way_to(request.param, tmp_path_factory.mktemp("service"), llama_folder) as made:
        yield made


@pytest.fixture
def engine(way: Way) -> RecordingEngine:
    return way.engine


@pytest.fixture
def service(way: Way) -> ServiceClient:
    return ServiceClient(way.transport)


@pytest.fixture
def make(service: ServiceClient, llama_folder: str):
    """Fresh, equal LoRA policies on one base."""
    made: list[TrainingClient] = []

    def create() -> TrainingClient:
        # A spread-out start, so that gradients of both halves of the adapter matter.
        made.append(service.create_training_client(llama_folder, lora_config=LoraConfig(rank=2, seed=1)))
        return made[-1]

    yield create
    for client in made:
        client.unload()


@pytest.fixture
def client(make) -> TrainingClient:
    return make()


@pytest.fixture
def data(rng: np.random.Generator) -> list[Datum]:
    return make_pairs(rng, 2)


def cross_entropy(data: list[Datum], logprobs: list[torch.Tensor]):
    loss = sum(
        -(lp * d.loss_fn_inputs["weights"].to_torch()).sum() for d, lp in zip(data, logprobs, strict=True)
    )
    return loss, {"mine": 3}


def logprobs_of(client: TrainingClient, data: list[Datum]) -> np.ndarray:
    outputs = client.forward(data).loss_fn_outputs
    return np.concatenate([output["logprobs"].to_numpy().ravel() for output in outputs])


def after_a_step(client: TrainingClient, data: list[Datum]) -> tuple[float, np.ndarray]:
    """Gradient norm and log-probabilities after one step on the gradient so far."""
    norm = client.optim_step(SGD_LIKE).metrics["grad_norm"]
    return norm, logprobs_of(client, data)


def kept_forwards(engine: Engine, client: TrainingClient) -> int:
    client.identify().result()  # everything sent before has run
    return len(engine._host.models[client.model_id].retained)


# forward_backward_custom


def test_a_custom_loss_is_one_forward_then_the_loss_here_then_one_backward(engine, client, data) -> None:
    engine.log.clear()
    threads = []

    def loss(passed, logprobs):
        threads.append(threading.current_thread())
        assert [type(op) for op in engine.log] == [Forward]  # the backward has no number yet
        return cross_entropy(passed, logprobs)

    client.forward_backward_custom(data, loss).result()
    forward, backward = engine.log
    assert isinstance(forward, Forward)
    assert isinstance(backward, Backward)
    assert forward.retain
    assert (backward.of, backward.seq_id) == (forward.seq_id, forward.seq_id + 1)
    assert threads == [threading.current_thread()]
    assert kept_forwards(engine, client) == 0


def test_a_custom_loss_gets_the_data_as_passed_and_one_float32_leaf_per_datum(client, data) -> None:
    seen = {}

    def loss(passed, logprobs):
        seen.update(data=passed, logprobs=[lp.detach().clone() for lp in logprobs])
        assert all(lp.requires_grad and lp.is_leaf and lp.device.type == "cpu" for lp in logprobs)
        return cross_entropy(passed, logprobs)

    result = client.forward_backward_custom(iter(data), loss).result()
    assert all(one is other for one, other in zip(seen["data"], data, strict=True))
    plain = client.forward(data).result()
    for output, expected, leaf in zip(
        result.loss_fn_outputs, plain.loss_fn_outputs, seen["logprobs"], strict=True
    ):
        assert leaf.dtype == torch.float32
        assert output["logprobs"] == expected["logprobs"]
        assert torch.equal(leaf, expected["logprobs"].to_torch())


def test_the_metrics_are_the_loss_and_those_of_the_callback(client, data) -> None:
    result = client.forward_backward_custom(
        data,
        lambda d, lp: (
            cross_entropy(d, lp)[0],
            {"margin": torch.tensor(2.5), "pairs": 2, "x": np.float32(1)},
        ),
    )
    plain = client.forward(data).metrics
    assert result.metrics == {
        **plain,
        "activation_bytes:max": result.metrics["activation_bytes:max"],  # a forward keeps nothing
        "loss:sum": pytest.approx(plain["loss:sum"], rel=1e-6),
        "margin": 2.5,
        "pairs": 2.0,
        "x": 1.0,
    }
    assert all(type(value) is float for value in result.metrics.values())


def test_a_custom_cross_entropy_has_the_gradient_of_the_built_in_one(make, data) -> None:
    built_in, custom = make(), make()
    before = logprobs_of(built_in, data)
    for _ in range(2):  # after the first step both halves of the adapter have a gradient
        built_in.forward_backward(data)
        custom.forward_backward_custom(data, cross_entropy)
        norm, numbers = after_a_step(built_in, data)
        custom_norm, custom_numbers = after_a_step(custom, data)
        assert custom_norm == pytest.approx(norm, rel=1e-6)
        np.testing.assert_allclose(custom_numbers, numbers, rtol=0, atol=1e-6)
    assert np.abs(numbers - before).max() > 1e-3  # the comparison means something


def test_gradients_of_custom_and_built_in_losses_add(make, data) -> None:
    one, other = make(), make()
    one.forward_backward(data)
    one.forward_backward_custom(data, cross_entropy)
    other.forward_backward_custom(data, lambda d, lp: (2 * cross_entropy(d, lp)[0], {}))
    assert after_a_step(one, data)[0] == pytest.approx(after_a_step(other, data)[0], rel=1e-5)


def test_a_gradient_that_is_dropped_is_not_in_the_next_step(make, data) -> None:
    one, other = make(), make()
    one.forward_backward(data)
    assert one.drop_gradient().result() is None
    one.forward_backward(data[:2])
    other.forward_backward(data[:2])
    (norm, numbers), (other_norm, other_numbers) = (after_a_step(c, data) for c in (one, other))
    assert norm == other_norm
    assert np.array_equal(numbers, other_numbers)
    assert one.drop_gradient().result() is None  # where there is none it does nothing


@pytest.mark.parametrize("custom", [False, True], ids=["built in", "custom"])
def test_leaving_out_what_has_no_weight_changes_no_gradient(make, data, custom: bool) -> None:
    one, other = make(), make()
    for client, weighted_only in ((one, False), (other, True)):
        if custom:
            client.forward_backward_custom(data, cross_entropy, weighted_only=weighted_only)
        else:
            client.forward_backward(data, weighted_only=weighted_only)
    (norm, after), (norm_without, after_without) = after_a_step(one, data), after_a_step(other, data)
    assert norm == pytest.approx(norm_without, rel=1e-5)
    assert after_without == pytest.approx(after, abs=1e-5)


def test_what_has_no_weight_is_left_out_only_when_asked_for_and_then_reads_zero(client, data) -> None:
    whole = client.forward(data).loss_fn_outputs
    parts = client.forward(data, weighted_only=True).loss_fn_outputs
    for datum, every, some in zip(data, whole, parts, strict=True):
        weighted = datum.loss_fn_inputs["weights"].to_numpy() != 0
        assert 0 < weighted.sum() < weighted.size
        assert (every["logprobs"].to_numpy() < 0).all()
        assert some["logprobs"].to_numpy()[weighted] == pytest.approx(
            every["logprobs"].to_numpy()[weighted], abs=1e-6
        )
        assert (some["logprobs"].to_numpy()[~weighted] == 0).all()


def test_a_loss_that_depends_on_what_is_left_out_is_refused_and_leaves_nothing(make, engine, data) -> None:
    def everything(_, logprobs):
        return -sum(lp.sum() for lp in logprobs), {}

    client, fresh = make(), make()
    with pytest.raises(
        OperationError, match=r"depends on .* of data\[0\] whose weight is 0.*call without it"
    ):
        client.forward_backward_custom(data, everything, weighted_only=True)
    assert kept_forwards(engine, client) == 0
    client.forward_backward(data)
    fresh.forward_backward(data)
    assert after_a_step(client, data)[0] == after_a_step(fresh, data)[0]


def test_leaving_out_needs_weights_and_a_loss_that_heeds_them(client, data) -> None:
    unweighted = [Datum(d.model_input, {"target_tokens": d.loss_fn_inputs["target_tokens"]}) for d in data]
    with pytest.raises(OperationError, match=r"data\[0\].*weighted_only needs 'weights'"):
        client.forward_backward_custom(unweighted, cross_entropy, weighted_only=True)
    with pytest.raises(OperationError, match="weighted_only needs 'weights'"):
        client.forward(unweighted, weighted_only=True)
    zeros = {"logprobs": np.zeros(data[0].model_input.length, np.float32)}
    full = Datum(data[0].model_input, {**data[0].loss_fn_inputs, **zeros, "advantages": zeros["logprobs"]})
    with pytest.raises(OperationError, match="weighted_only: ppo reads every log-probability"):
        client.forward_backward([full], "ppo", weighted_only=True)


def test_targets_with_several_columns_go_through_a_custom_loss(make) -> None:
    targets = np.asarray([[3, 4], [5, 6], [7, 8]])
    wide = [Datum(ModelInput.from_ints([2, 3, 5]), {"target_tokens": targets, "weights": np.ones((3, 2))})]
    built_in, custom = make(), make()
    built_in.forward_backward(wide)
    result = custom.forward_backward_custom(wide, cross_entropy)
    assert result.loss_fn_outputs[0]["logprobs"].shape == [3, 2]
    assert after_a_step(custom, wide)[0] == pytest.approx(after_a_step(built_in, wide)[0], rel=1e-6)


def test_a_loss_may_call_other_clients_and_its_own(make, data) -> None:
    policy, reference = make(), make()
    alone = make()

    def loss(passed, logprobs):
        frozen = reference.forward(passed).loss_fn_outputs
        again = policy.forward(passed).loss_fn_outputs
        assert all(torch.equal(lp, o["logprobs"].to_torch()) for lp, o in zip(logprobs, again, strict=True))
        policy.forward_backward(passed).result()
        shifted = [lp - o["logprobs"].to_torch() for lp, o in zip(logprobs, frozen, strict=True)]
        return cross_entropy(passed, shifted)

    policy.forward_backward_custom(data, loss)
    alone.forward_backward(data)
    alone.forward_backward(data)
    assert after_a_step(policy, data)[0] == pytest.approx(after_a_step(alone, data)[0], rel=1e-5)


def test_custom_losses_may_be_nested(make, engine, data) -> None:
    policy, alone = make(), make()

    def loss(passed, logprobs):
        policy.forward_backward_custom(passed, cross_entropy).result()
        return cross_entropy(passed, logprobs)

    policy.forward_backward_custom(data, loss)
    alone.forward_backward(data)
    alone.forward_backward(data)
    assert kept_forwards(engine, policy) == 0
    assert after_a_step(policy, data)[0] == pytest.approx(after_a_step(alone, data)[0], rel=1e-5)


def raising(data, logprobs):
    raise RuntimeError("the user's own bug")


REFUSED = {
    "it raises": (raising, RuntimeError, "the user's own bug"),
    "it is nan": (lambda d, lp: (lp[0].sum() * float("nan"), {}), OperationError, "is nan"),
    "it is infinite": (lambda d, lp: (lp[0].sum() * float("inf"), {}), OperationError, "is -inf"),
    "it ignores the log-probabilities": (
        lambda d, lp: (torch.tensor(1.0), {}),
        OperationError,
        "does not depend",
    ),
    "it only depends on something else": (
        lambda d, lp: (torch.ones(1, requires_grad=True).sum(), {}),
        OperationError,
        "does not depend",
    ),
    "it detaches them": (lambda d, lp: (lp[0].detach().sum(), {}), OperationError, "does not depend"),
    "it is no scalar": (lambda d, lp: (lp[0], {}), OperationError, "scalar"),
    "it is no tensor": (lambda d, lp: (1.0, {}), OperationError, "scalar"),
    "it returns no metrics": (lambda d, lp: lp[0].sum(), (TypeError, OperationError), None),
    "a metric is no number": (lambda d, lp: (lp[0].sum(), {"a": "b"}), ValueError, "'b'"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_custom_loss_that_fails_leaves_everything_as_it_was(what: str, make, engine, data) -> None:
    loss, error, text = REFUSED[what]
    disturbed, calm = make(), make()
    for client in (disturbed, calm):
        client.forward_backward(data)
    with pytest.raises(error, match=text):
        disturbed.forward_backward_custom(data, loss)
    assert kept_forwards(engine, disturbed) == 0
    norm, numbers = after_a_step(disturbed, data)
    calm_norm, calm_numbers = after_a_step(calm, data)
    assert norm == calm_norm
    assert np.array_equal(numbers, calm_numbers)
    disturbed.forward_backward_custom(data, cross_entropy).result()


def test_an_interrupt_in_a_custom_loss_leaves_nothing_behind(engine, client, data) -> None:
    def interrupted(passed, logprobs):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        client.forward_backward_custom(data, interrupted)
    assert kept_forwards(engine, client) == 0
    assert isinstance(engine.log[-2], ReleaseForward)  # before the question above


def test_an_unread_failure_raised_after_the_loss_leaves_nothing_behind(engine, client, data) -> None:
    def loss(passed, logprobs):
        client.optim_step(SGD_LIKE)  # fails: there is no gradient; nobody looks
        client.identify().exception()
        return cross_entropy(passed, logprobs)

    with pytest.raises(OperationError, match="no gradient"):
        client.forward_backward_custom(data, loss)
    assert kept_forwards(engine, client) == 0


def test_a_log_probability_that_the_loss_does_not_use_has_no_gradient(make, data) -> None:
    some, only_those = make(), make()
    some.forward_backward_custom(data, lambda d, lp: cross_entropy(d[:1], lp[:1]))
    only_those.forward_backward(data[:1])
    norms = [client.optim_step(SGD_LIKE).metrics["grad_norm"] for client in (some, only_those)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_a_backward_after_a_change_of_the_weights_is_refused(make, data) -> None:
    client, calm = make(), make()

    def loss(passed, logprobs):
        client.forward_backward(passed)
        client.optim_step(SGD_LIKE).result()
        return cross_entropy(passed, logprobs)

    with pytest.raises(OperationError, match="the weights have changed"):
        client.forward_backward_custom(data, loss).result()
    with pytest.raises(OperationError, match="no gradient"):  # and none was added
        client.optim_step(SGD_LIKE).result()
    calm.forward_backward(data)
    calm.optim_step(SGD_LIKE)
    assert np.array_equal(logprobs_of(client, data), logprobs_of(calm, data))


def test_malformed_data_never_reach_a_custom_loss_or_the_trainer(engine, client, data) -> None:
    engine.log.clear()
    bad = Datum(ModelInput.from_ints([1, 2]), {"target_tokens": [1]})
    with pytest.raises(OperationError, match=r"data\[4\]"):
        client.forward_backward_custom([*data, bad], raising)
    assert engine.log == []
    client.forward(data).result()  # no number was used


# Calls


def test_calls_return_at_once_and_run_in_the_order_they_were_made(make, data) -> None:
    queued, waited = make(), make()
    for _ in range(3):
        queued.forward_backward(data)
        queued.optim_step(SGD_LIKE)
        waited.forward_backward(data).result()
        waited.optim_step(SGD_LIKE).result()
    assert np.array_equal(logprobs_of(queued, data), logprobs_of(waited, data))


def test_what_has_no_number_sees_the_weights_of_its_place_among_the_calls(make, data) -> None:
    queued, waited = make(), make()
    greedy = SamplingParams(max_tokens=4, temperature=0.0)
    samples, identities = [], []
    for _ in range(3):
        queued.forward_backward(data)
        samples.append(queued.sample([5, 6, 7], sampling_params=greedy))
        identities.append(queued.identify())
        queued.optim_step(AdamParams(0.3))
    for sample, identity in zip(samples, identities, strict=True):
        waited.forward_backward(data).result()
        assert sample.sequences == waited.sample([5, 6, 7], sampling_params=greedy).sequences
        assert identity.result() == waited.identify().result()
        waited.optim_step(AdamParams(0.3)).result()


def test_a_state_is_loaded_that_is_still_being_saved(make, data, tmp_path) -> None:
    client, other = make(), make()
    client.forward_backward(data)
    client.optim_step(AdamParams(0.1))
    client.save_state(tmp_path / "state")
    client.forward_backward(data)
    client.optim_step(AdamParams(0.1))
    client.load_state_with_optimizer(tmp_path / "state")
    other.load_state_with_optimizer(tmp_path / "state").result()
    assert np.array_equal(logprobs_of(client, data), logprobs_of(other, data))


def test_notes_are_whatever_json_can_say(client, tmp_path) -> None:
    notes = {
        "rng": 2**70,
        "text": "\ud800 ä",
        "nested": {"@": ["float32", [2], 0]},
        "none": None,
        "list": [1.5, True],
    }
    client.save_state(tmp_path / "state", notes).result()
    assert json.loads((tmp_path / "state/notes.json").read_bytes()) == notes


@pytest.mark.parametrize("content", [None, "no state"], ids=["missing", "something else"])
def test_a_state_that_is_none_is_named_and_the_client_goes_on(client, data, tmp_path, content) -> None:
    folder = tmp_path / "there"
    if content is not None:
        folder.mkdir()
        (folder / "a file with spaces").write_text(content)
        (folder / ".gitattributes").write_text(content)
    failed = client.load_state_with_optimizer(folder)
    after = client.forward(data)
    with pytest.raises(FiresteelError):
        failed.result()
    assert len(after.result(30).loss_fn_outputs) == len(data)


def test_gradients_of_several_calls_add_and_nothing_is_divided(make, data) -> None:
    together, apart, halves = make(), make(), make()
    together.forward_backward([*data, *data])
    for _ in range(2):
        apart.forward_backward(data)
        halves.forward_backward(data[:2])
        halves.forward_backward(data[2:])
    norm = together.optim_step(SGD_LIKE).metrics["grad_norm"]
    assert apart.optim_step(SGD_LIKE).metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert halves.optim_step(SGD_LIKE).metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)


def test_a_failure_that_nobody_read_is_raised_by_the_next_call_and_only_by_it(client, data) -> None:
    failing = client.optim_step(SGD_LIKE)
    while not failing.done():
        time.sleep(0.001)
    with pytest.raises(OperationError, match="no gradient") as caught:
        client.forward_backward(data)
    assert "nobody read the result of optim_step seq 1" in caught.value.__notes__[0]
    client.forward_backward(data).result()  # the raised call was not made: this is the first gradient
    client.optim_step(SGD_LIKE).result()


@pytest.mark.parametrize(
    "call",
    [
        lambda c, d: c.forward(d),
        lambda c, d: c.forward_backward(d),
        lambda c, d: c.forward_backward_custom(d, cross_entropy),
        lambda c, d: c.optim_step(SGD_LIKE),
        lambda c, d: c.save_weights("never-written"),
        lambda c, d: c.sample([5, 6], sampling_params=None),
        lambda c, d: c.identify(),
        lambda c, d: c.close(),
        lambda c, d: c.unload(),
    ],
    ids=[
        "forward",
        "forward_backward",
        "custom",
        "optim_step",
        "save_weights",
        "sample",
        "identify",
        "close",
        "unload",
    ],
)
def test_every_call_raises_what_nobody_read(call, client, data) -> None:
    failing = client.optim_step(SGD_LIKE)
    while not failing.done():
        time.sleep(0.001)
    with pytest.raises(OperationError, match="no gradient"):
        call(client, data)


def test_a_failure_that_was_read_is_not_raised_again(client, data) -> None:
    assert client.optim_step(SGD_LIKE).exception() is not None
    client.forward(data).result()
    client.close()


def test_a_closed_client_says_so_and_closing_twice_is_nothing(service, llama_folder, data) -> None:
    client = service.create_training_client(llama_folder, 2)
    client.unload()
    client.unload()
    client.close()
    for call in (client.forward, client.forward_backward):
        with pytest.raises(ClosedError, match=rf"of {client.model_id}.*closed"):
            call(data)


def test_unloading_waits_for_what_is_queued(service, llama_folder, data) -> None:
    client = service.create_training_client(llama_folder, 2)
    answers = [client.forward(data) for _ in range(5)]
    client.unload()
    assert all(answer.done() and answer.exception() is None for answer in answers)


TOO_LONG = make_datum(np.arange(130) % 150 + 2, 4)
LONGEST = make_datum(np.arange(128) % 150 + 2, 4)
UNKNOWN = make_datum(np.asarray([2, 3, VOCABULARY, 5]), 2)
UNKNOWN_TARGET = make_datum(np.asarray([2, 3, VOCABULARY]), 2)
NEGATIVE = make_datum(np.asarray([2, -100, 4]), 1)


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (TOO_LONG, r"data\[1\].*129 input tokens.*128 tokens"),
        (UNKNOWN, rf"data\[1\].*token id {VOCABULARY};.* 0 to {VOCABULARY - 1}"),
        (UNKNOWN_TARGET, rf"data\[1\].*token id {VOCABULARY};"),
        (NEGATIVE, r"data\[1\].*token id -100;"),
    ],
    ids=["longer than the context", "token out of vocabulary", "target out of vocabulary", "negative token"],
)
def test_what_the_model_cannot_read_is_refused_naming_the_datum(bad, text, client, data) -> None:
    for call in (client.forward, client.forward_backward):
        with pytest.raises(OperationError, match=text) as caught:
            call([data[0], bad, data[1]]).result()
        assert caught.value.category == "user"
    with pytest.raises(OperationError, match="no gradient"):
        client.optim_step(SGD_LIKE).result()


def test_a_sequence_that_just_fits_runs(client) -> None:
    assert client.description.max_context_length == 128
    assert client.forward([LONGEST]).loss_fn_outputs[0]["logprobs"].shape == [127]


@pytest.mark.parametrize("path", [None, "", 3])
def test_weights_are_not_saved_to_what_names_no_folder(client, path) -> None:
    with pytest.raises(OperationError, match=r"save_weights: path: .*; expected the path of a folder"):
        client.save_weights(path)


def test_a_frozen_reference_only_runs_forward(service, client, data, tmp_path) -> None:
    reference = service.create_reference_client(client.description.base_model, 2, policy_client=client)
    reference.forward(data).result()
    calls = {
        "forward_backward": lambda: reference.forward_backward(data),
        "optim_step": lambda: reference.optim_step(SGD_LIKE),
        "forward_backward ": lambda: reference.forward_backward_custom(data, cross_entropy),
        "save_weights": lambda: reference.save_weights(str(tmp_path / "reference")),
    }
    for name, call in calls.items():
        with pytest.raises(OperationError, match=f"{name.strip()}.*frozen reference"):
            call().result()
    assert list(tmp_path.iterdir()) == []
    service.release_references()


def test_a_look_alike_of_adam_params_steps_like_ours(make, data) -> None:
    from types import SimpleNamespace

    ours, theirs = make(), make()
    for client, params in (
        (ours, SGD_LIKE),
        (theirs, SimpleNamespace(learning_rate=1e-2, beta1=0.0, beta2=0.0, eps=1.0)),
    ):
        client.forward_backward(data)
        client.optim_step(params).result()
    assert np.array_equal(logprobs_of(ours, data), logprobs_of(theirs, data))


def test_a_learning_rate_may_be_a_number_of_numpy(make, data) -> None:
    ours, theirs = make(), make()
    for client, rate in ((ours, 0.5), (theirs, np.float32(0.5))):
        client.forward_backward(data)
        client.optim_step(AdamParams(rate, 0.0, 0.0, 1.0)).result()
    assert np.array_equal(logprobs_of(ours, data), logprobs_of(theirs, data))


def test_tensors_of_another_shape_of_output_are_what_they_are(client, data) -> None:
    outputs = client.forward(data).loss_fn_outputs
    assert [o["logprobs"].shape for o in outputs] == [d.loss_fn_inputs["target_tokens"].shape for d in data]
    assert all(isinstance(o["logprobs"], TensorData) and o["logprobs"].dtype == "float32" for o in outputs)
    assert client.forward(data).loss_fn_output_type == "ArrayRecord"


def test_threads_that_share_a_client_keep_its_order(make, data) -> None:
    shared, alone = make(), make()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda _: shared.forward_backward(data), range(12)))
            answers = list(threads.map(lambda n: shared.forward(data[: 1 + n % 4]), range(200)))
    finally:
        sys.setswitchinterval(interval)
    assert [len(answer.loss_fn_outputs) for answer in answers] == [1 + n % 4 for n in range(200)]
    for _ in range(12):
        alone.forward_backward(data)
    # Equal calls in any order: the sum is the same to the bit.
    assert shared.optim_step(SGD_LIKE).metrics == alone.optim_step(SGD_LIKE).metrics


def test_the_package_gives_the_way_in() -> None:
    assert firesteel.connect is firesteel.connection.connect


@pytest.mark.parametrize("returned", [None, "loss", ["a", "list"]], ids=["nothing", "text", "a list"])
def test_a_custom_loss_that_returns_something_else_is_refused_with_it(client, data, returned: object) -> None:
    with pytest.raises(OperationError, match=r"must return .scalar tensor, dict of numbers., not"):
        client.forward_backward_custom(data, lambda data, logprobs: returned)


def test_a_custom_loss_has_a_gradient_even_where_the_caller_switched_gradients_off(client, data) -> None:
    with torch.no_grad():
        client.forward_backward_custom(
            data, lambda data, rows: (-sum(row.sum() for row in rows), {})
        ).result()
    assert client.optim_step(AdamParams(1e-3)).metrics["grad_norm"] > 0
