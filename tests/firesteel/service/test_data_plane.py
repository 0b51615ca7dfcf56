"""The data plane as stock clients speak it: JSON in, a promise out, the result by `retrieve_future`."""

from __future__ import annotations

import itertools
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from conftest import VOCABULARY, make_pairs
from firesteel.sdk import Datum, ModelInput
from firesteel.service import answers, app
from firesteel.service.service import Limits
from plain import load_plain, plain_logprobs
from stock import (
    ADAM,
    SGD_LIKE,
    Failure,
    Refusal,
    Standing,
    Stock,
    StockModel,
    as_json,
    call,
    standing,
    text,
    values,
    weighted,
)

Make = Callable[..., StockModel]


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory, llama_folder: str) -> Iterator[Standing]:
    limits = Limits(poll_seconds=0.3, datums=64)
    with standing(tmp_path_factory.mktemp("service"), llama_folder, limits=limits) as made:
        yield made


@pytest.fixture
def client(stand: Standing) -> Stock:
    return stand.client()


@pytest.fixture
def make(client: Stock, llama_folder: str) -> Iterator[Make]:
    """Fresh, equal models on one base, each in a session of its own."""
    made: list[StockModel] = []

    def create(rank: int | None = 2, **more: Any) -> StockModel:
        made.append(client.model(llama_folder, rank, **more))
        return made[-1]

    yield create
    for model in made:
        client.post(f"sessions/{model.session}/finish", {"reason": {"type": "success"}})


@pytest.fixture
def model(make: Make) -> StockModel:
    return make()


@pytest.fixture
def data(rng: np.random.Generator) -> list[dict[str, Any]]:
    return [as_json(datum) for datum in make_pairs(rng, 2)]


def tokens_of(datum: dict[str, Any]) -> list[int]:
    return [token for chunk in datum["model_input"]["chunks"] for token in chunk["tokens"]]


def weights_of(datum: dict[str, Any]) -> np.ndarray:
    return np.asarray(datum["loss_fn_inputs"]["weights"]["data"])


def scaled(data: list[dict[str, Any]], factor: float) -> list[dict[str, Any]]:
    return [weighted(datum, weights_of(datum) * factor) for datum in data]


def kept_forwards(stand: Standing, model: StockModel) -> int:
    return len(stand.engine._host.models[model.model_id].retained)


@contextmanager
def counted_passes(stand: Standing, model: StockModel) -> Iterator[list[int]]:
    """How often the network under a model runs."""
    counted: list[int] = []
    layer = stand.engine._host.models[model.model_id].trainer.base.network.model.layers[0]
    hook = layer.register_forward_pre_hook(lambda *_: counted.append(1))
    try:
        yield counted
    finally:
        hook.remove()


# What is there

POSTS = (
    *("client/config", "client/dynamic_config", "create_session", "session_heartbeat", "telemetry"),
    *("create_model", "get_info", "unload_model", "forward", "forward_backward", "optim_step"),
    *("save_weights", "load_weights", "save_weights_for_sampler", "load_adapter", "weights_info"),
    *("create_sampling_session", "asample", "retrieve_future"),
)
GETS = ("healthz", "list_checkpoints", "get_server_capabilities")


@pytest.mark.parametrize("path", [*POSTS, *GETS, "samplers/x"])
def test_every_endpoint_is_there(client: Stock, path: str) -> None:
    method = "POST" if path in POSTS else "GET"
    answer = client.ask(method, path, {} if method == "POST" else None)
    if path == "samplers/x":
        assert answer.status_code == 410  # its session is none
        return
    assert answer.status_code in (200, 400)
    assert answer.headers["content-type"] == "application/json"
    assert isinstance(answer.json(), dict)


def test_an_unknown_path_and_a_wrong_method_are_told_so_with_a_body(client: Stock) -> None:
    for method, path, status in (("POST", "no_such", 404), ("GET", "forward", 405), ("GET", "/v9", 404)):
        answer = client.ask(method, path)
        assert answer.status_code == status
        assert answer.json()["error"]["message"]


def test_the_start_of_plain_tinker_gets_what_it_needs(client: Stock, llama_folder: str) -> None:
    assert client.post("client/config", {"sdk_version": "0.23.0"}) == {}
    session = client.post("create_session", {"tags": ["a"], "user_metadata": {}, "sdk_version": "0.23.0"})
    assert session["type"] == "create_session"
    assert not session["session_id"].startswith(("ts-", "run-"))
    beat = client.post(
        "session_heartbeat", {"session_id": session["session_id"], "type": "session_heartbeat"}
    )
    assert beat == {"type": "session_heartbeat"}
    sent = {"events": [{"event": "x"}], "platform": "linux", "session_id": session["session_id"]}
    assert client.post("telemetry", sent) == {"status": "accepted"}
    assert client.get("get_server_capabilities") == {"supported_models": [{"model_name": llama_folder}]}


def test_a_model_is_named_after_its_session_and_says_what_it_is(client: Stock, llama_folder: str) -> None:
    session = client.session()
    adapter, whole = client.model(llama_folder, 2, session, 0), client.model(llama_folder, 0, session, 1)
    assert [m.model_id for m in (adapter, whole)] == [f"{session}:train:0", f"{session}:train:1"]
    infos = [client.post("get_info", {"model_id": m.model_id, "type": "get_info"}) for m in (adapter, whole)]
    assert [(info["is_lora"], info["lora_rank"]) for info in infos] == [(True, 2), (False, 0)]
    for info, model in zip(infos, (adapter, whole), strict=True):
        assert (info["model_id"], info["model_name"]) == (model.model_id, llama_folder)
        assert info["model_data"] == {"model_name": llama_folder, "tokenizer_id": llama_folder}
    client.post(f"sessions/{session}/finish", {})


def test_clients_that_send_no_alpha_mean_32(make: Make, stand: Standing) -> None:
    for model, alpha in ((make(), 32.0), (make(alpha=7.0), 7.0)):
        lora = stand.engine._host.models[model.model_id].trainer.lora
        assert lora is not None
        assert (lora.alpha, lora.train_unembed) == (alpha, True)


def test_fields_that_other_versions_send_are_ignored_but_not_in_a_tensor(model: StockModel, data) -> None:
    more = {"forward_input": {**call(data), "later": 1}, "type": "forward", "later": {"a": [None]}}
    assert model.run("forward", more)["loss_fn_outputs"]
    data[0]["loss_fn_inputs"]["weights"]["later"] = 1
    with pytest.raises(Refusal, match=r"weights\.later") as caught:
        model.forward(data)
    assert caught.value.status == 400


def test_an_unloaded_model_is_gone_and_unloading_it_again_gives_the_same_promise(model: StockModel) -> None:
    client, body = model.client, {"model_id": model.model_id, "type": "unload_model"}
    promise = client.post("unload_model", body)
    assert client.result(promise) == body
    assert client.post("unload_model", body) == promise
    with pytest.raises(Refusal, match="create it again") as caught:
        model.send("forward", {"forward_input": call([])})
    assert caught.value.status == 410


def test_making_a_model_again_gives_the_same_promise_also_where_no_more_fit(
    tmp_path, llama_folder: str
) -> None:
    with standing(tmp_path, llama_folder, limits=Limits(models=1)) as stand:
        client = stand.client()
        body = {"session_id": client.session(), "model_seq_id": 0, "base_model": llama_folder}
        body["lora_config"] = {"rank": 1}
        first = client.post("create_model", body)
        made = client.result(first)
        assert client.post("create_model", body) == first
        assert client.result(first) == made
        with pytest.raises(Refusal, match="other content") as caught:
            client.post("create_model", {**body, "lora_config": {"rank": 2}})
        assert caught.value.status == 400
        with pytest.raises(Refusal, match="set to hold 1") as caught:
            client.post("create_model", {**body, "model_seq_id": 1})
        assert caught.value.status == 400
        assert len(stand.engine._host.models) == 1


REFUSED_MODELS = {
    "an unknown base": ({"base_model": "acme/no-such"}, "this server trains"),
    "a path": ({"base_model": "../elsewhere"}, "this server trains"),
    "a frozen base with an adapter": ({"base_only": True}, "no lora_config"),
    "a negative rank": ({"lora_config": {"rank": -1}}, "greater than or equal to 0"),
    "a negative seed": ({"lora_config": {"rank": 1, "seed": -1}}, "LoRA seed"),
    "no alpha above 0": ({"lora_config": {"rank": 1, "alpha": 0}}, "lora_alpha"),
}


@pytest.mark.parametrize("what", REFUSED_MODELS)
def test_a_model_that_cannot_be_made_is_refused_at_once(client: Stock, llama_folder: str, what: str) -> None:
    changed, reason = REFUSED_MODELS[what]
    body = {"session_id": client.session(), "model_seq_id": 0, "base_model": llama_folder}
    with pytest.raises(Refusal, match=reason) as caught:
        client.post("create_model", {**body, "lora_config": {"rank": 1}, **changed})
    assert caught.value.status == 400
    assert caught.value.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("changed", [{"rank": 1000}, {"rank": 10**30}, {"train_mlp": False}])
def test_an_adapter_that_reaches_nothing_fails_its_promise(
    client: Stock, llama_folder: str, changed: dict[str, Any]
) -> None:
    none = {"train_attn": False, "train_unembed": False} if "train_mlp" in changed else {}
    body = {"session_id": client.session(), "model_seq_id": 0, "base_model": llama_folder}
    promise = client.post("create_model", {**body, "lora_config": {"rank": 1, **none, **changed}})
    with pytest.raises(Failure, match=r"rank|layer") as caught:
        client.result(promise)
    assert caught.value.category == "user"


# Order


def test_numbers_run_in_their_order_whatever_order_they_arrive_in(make: Make, data) -> None:
    calm, late = make(), make()
    for datum in data[:3]:
        calm.forward_backward([datum])
    expected = calm.step(ADAM), calm.logprobs(data)

    bodies = [{"forward_backward_input": call([datum])} for datum in data[:3]]
    promises = {seq: late.send("forward_backward", bodies[seq - 1], seq) for seq in (2, 3)}
    step = late.send("optim_step", {"adam_params": ADAM}, 4)
    for promise in (*promises.values(), step):
        answer = late.client.ask("POST", "retrieve_future", {"request_id": promise["request_id"]})
        assert answer.status_code == 408
        assert answer.json() == {
            "type": "try_again",
            "request_id": promise["request_id"],
            "queue_state": "active",
        }
    promises[1] = late.send("forward_backward", bodies[0], 1)
    for seq, datum in enumerate(data[:3], start=1):
        (output,) = late.client.result(promises[seq])["loss_fn_outputs"]
        assert len(values(output)) == len(weights_of(datum))  # each promise has its own answer
    norm = late.client.result(step)["metrics"]["grad_norm"]
    late.numbers = itertools.count(5)
    assert norm == expected[0]
    assert np.array_equal(late.logprobs(data), expected[1])


def test_a_number_that_never_comes_fails_what_waits_for_it_and_no_more(
    tmp_path, llama_folder: str, data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "TEND_SECONDS", 0.05)
    with standing(tmp_path, llama_folder, limits=Limits(gap_seconds=1.5)) as stand:
        model, calm = stand.client().model(llama_folder), stand.client().model(llama_folder)
        content = {"forward_backward_input": call(data)}
        calm.forward_backward(data)
        model.run("forward_backward", content, 1)
        waiting = [model.send("forward_backward", content, seq) for seq in (3, 4)]
        for promise in waiting:
            with pytest.raises(
                Failure, match=r"seq_id 2 has not come within 1\.5 s; nothing was done"
            ) as caught:
                model.client.result(promise)
            assert caught.value.category == "user"
        with pytest.raises(Refusal) as refused:  # too late
            model.send("forward_backward", content, 2)
        assert refused.value.status == 400
        model.numbers = itertools.count(5)
        assert model.step() == calm.step()  # the gradient of number 1 alone


def test_a_request_sent_again_gets_the_first_promise_and_adds_no_gradient(make: Make, data) -> None:
    once, twice = make(), make()
    once.forward_backward(data)
    content = {"forward_backward_input": call(data)}
    with ThreadPoolExecutor(4) as pool:
        promises = list(pool.map(lambda _: twice.send("forward_backward", content, 1), range(4)))
    assert len({promise["request_id"] for promise in promises}) == 1
    answer = twice.client.result(promises[0])
    assert twice.send("forward_backward", content, 1) == promises[0]  # also after it was delivered
    assert twice.client.result(promises[0]) == answer
    twice.numbers = itertools.count(2)
    assert twice.step() == once.step()


def test_a_number_that_was_used_for_something_else_is_refused_and_the_first_stays(make: Make, data) -> None:
    model, calm = make(), make()
    calm.forward_backward(data)
    model.forward_backward(data)
    for path, content in (
        ("forward_backward", {"forward_backward_input": call(data[:1])}),
        ("forward", {"forward_input": call(data)}),
        ("optim_step", {"adam_params": SGD_LIKE}),
        ("forward_backward", {"forward_backward_input": {"data": "none"}}),
    ):
        with pytest.raises(Refusal) as caught:
            model.send(path, content, 1)
        assert caught.value.status == 400
        assert caught.value.headers["x-should-retry"] == "false"
    assert model.step() == calm.step()


def bad_chunk(kind: str) -> dict[str, Any]:
    return {"chunks": [{"type": "encoded_text", "tokens": [5]}, {"type": kind, "data": "", "format": "png"}]}


TARGETS = {"data": [3, 4], "dtype": "int64", "shape": [2]}
BAD_DATA: dict[str, tuple[dict[str, Any], str]] = {
    "an image": ({"model_input": bad_chunk("image")}, "encoded_text"),
    "a pointer to an image": ({"model_input": bad_chunk("image_asset_pointer")}, "encoded_text"),
    "sound": ({"model_input": bad_chunk("dmel")}, "encoded_text"),
    "no tokens": ({"model_input": text()}, "no tokens"),
    "tokens that are texts": ({"model_input": text(["a", "b"])}, "valid integer"),
    "too few targets": ({"model_input": text([2, 3, 4])}, "shape"),
    "no targets": ({"loss_fn_inputs": {}}, "target_tokens"),
    "a shape that the values do not fill": (
        {"loss_fn_inputs": {"target_tokens": {**TARGETS, "shape": [3]}}},
        "do not fill",
    ),
    "a negative length": ({"loss_fn_inputs": {"target_tokens": {**TARGETS, "shape": [-2]}}}, "greater"),
    "more dimensions than arrays have": (
        {"loss_fn_inputs": {"target_tokens": {**TARGETS, "shape": [1] * 70}}},
        "at most 8",
    ),
    "a length that no machine has": (
        {"loss_fn_inputs": {"target_tokens": {**TARGETS, "data": [], "shape": [0, 2**62]}}},
        "shape",
    ),
    "a length that no number has": (
        {"loss_fn_inputs": {"target_tokens": {**TARGETS, "shape": [2, 10**30]}}},
        "less than",
    ),
    "another dtype": ({"loss_fn_inputs": {"target_tokens": {**TARGETS, "dtype": "float64"}}}, "float32"),
    "targets of half a token": (
        {"loss_fn_inputs": {"target_tokens": {**TARGETS, "data": [3, 4.5]}}},
        "whole",
    ),
    "an input that no loss reads": (
        {"loss_fn_inputs": {"target_tokens": TARGETS, "hint": TARGETS}},
        "no loss reads",
    ),
    "a weight too large for its dtype": (
        {
            "loss_fn_inputs": {
                "target_tokens": TARGETS,
                "weights": {**TARGETS, "dtype": "float32", "data": [1e300, 0]},
            }
        },
        "not finite",
    ),
    "sparse rows that lead nowhere": (
        {
            "loss_fn_inputs": {
                "target_tokens": {
                    **TARGETS,
                    "shape": [2, 2],
                    "sparse_crow_indices": [0, 9, 2],
                    "sparse_col_indices": [0, 0],
                }
            }
        },
        "no indices of a sparse matrix",
    ),
    "a sparse matrix of nothing": (
        {
            "loss_fn_inputs": {
                "target_tokens": {
                    **TARGETS,
                    "shape": [2, 2**40],
                    "sparse_crow_indices": [0, 1, 2],
                    "sparse_col_indices": [0, 0],
                }
            }
        },
        "too sparse",
    ),
}


@pytest.mark.parametrize("what", BAD_DATA)
def test_a_refused_call_says_why_and_uses_up_its_number(make: Make, what: str) -> None:
    changed, reason = BAD_DATA[what]
    datum = {"model_input": text([2, 3]), "loss_fn_inputs": {"target_tokens": TARGETS}}
    model, calm = make(), make()
    for one in (model, calm):
        one.forward_backward([datum])
    with pytest.raises(Refusal, match=re.escape(reason)) as caught:
        model.forward_backward([datum, {**datum, **changed}])
    assert caught.value.status == 400
    assert model.step() == calm.step()  # under the next number, with the gradient of the good call alone


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("forward_backward", {}),
        ("forward_backward", {"forward_backward_input": {"data": [], "loss_fn": "cross_entropy"}}),
        ("forward", {"forward_input": {"data": [], "loss_fn": "dpo"}}),
        ("forward", {"forward_input": {"data": [None] * 65, "loss_fn": "cross_entropy"}}),
        ("optim_step", {"adam_params": {"learning_rate": "fast"}}),
        ("optim_step", {"adam_params": {}, "grad_accumulation_normalization": "num_sequences"}),
        ("optim_step", {"adam_params": {"learning_rate": 10**400}}),
        ("optim_step", {"adam_params": {"learning_rate": -1e-3}}),
        ("optim_step", {"adam_params": {"beta1": 1.0}}),
        ("optim_step", {"adam_params": {"grad_clip_norm": -1.0}}),
        ("save_weights", {"path": "a", "overwrite": True}),
        ("save_weights", {"path": "../a"}),
        ("load_weights", {"path": "never-saved"}),
        ("load_weights", {}),
        ("load_adapter", {"adapter_path": "/etc"}),
        ("save_weights_for_sampler", {}),
        ("save_weights_for_sampler", {"path": "a", "sampling_session_seq_id": 0}),
        ("save_weights_for_sampler", {"path": "a", "checkpoint_type": "delta"}),
    ],
)
def test_every_kind_of_refused_request_uses_up_its_number(
    model: StockModel, path: str, content: dict[str, Any]
) -> None:
    for _ in range(2):  # a retry is refused in the same way
        with pytest.raises(Refusal) as caught:
            model.send(path, content, 1)
        assert caught.value.status == 400
    datum = {"model_input": text([2, 3]), "loss_fn_inputs": {"target_tokens": TARGETS}}
    model.numbers = itertools.count(2)
    model.forward([datum])


def test_a_number_beyond_all_numbers_is_refused_and_does_not_become_the_next(
    tmp_path, llama_folder: str, data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "TEND_SECONDS", 0.05)
    with standing(tmp_path, llama_folder, limits=Limits(gap_seconds=0.1)) as stand:
        model = stand.client().model(llama_folder)
        for seq in (10**30, -1, 0, "x"):
            with pytest.raises(Refusal) as caught:
                model.send("forward", {"forward_input": call(data)}, seq)
            assert caught.value.status == 400
        threading.Event().wait(0.4)  # longer than a gap may be
        model.forward(data)


def test_a_forward_waits_for_its_backward_from_when_it_has_run(
    tmp_path, llama_folder: str, data, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What others had to be done before it is not its client's delay."""
    monkeypatch.setattr(app, "TEND_SECONDS", 0.02)
    with standing(tmp_path, llama_folder, limits=Limits(retained_seconds=0.3)) as stand:
        model, gate, run = stand.client().model(llama_folder), threading.Event(), stand.engine._host.run
        monkeypatch.setattr(stand.engine._host, "run", lambda operation: gate.wait(10) and run(operation))
        promise = model.send("forward", {"forward_input": call(data)})
        time.sleep(0.6)  # longer than a forward may wait
        gate.set()
        model.client.result(promise)
        assert kept_forwards(stand, model) == 1
        time.sleep(0.6)
        assert kept_forwards(stand, model) == 0


def test_a_step_that_failed_does_not_keep_a_forward_for_ever(
    tmp_path, llama_folder: str, data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "TEND_SECONDS", 0.02)
    with standing(tmp_path, llama_folder, limits=Limits(retained_seconds=0.2)) as stand:
        model = stand.client().model(llama_folder)
        model.forward(data)
        with pytest.raises(Failure, match="no gradient"):
            model.step()
        assert kept_forwards(stand, model) == 1
        time.sleep(0.5)
        assert kept_forwards(stand, model) == 0


def test_a_client_that_only_asks_for_its_answers_is_alive(
    tmp_path, llama_folder: str, data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "TEND_SECONDS", 0.02)
    with standing(tmp_path, llama_folder, limits=Limits(session_seconds=0.4)) as stand:
        model = stand.client().model(llama_folder)
        promise = model.send("forward", {"forward_input": call(data)})
        for _ in range(10):
            model.client.result(promise)
            time.sleep(0.1)
        model.forward(data)


# Numbers


def test_metrics_have_a_name_and_one_reducer_and_the_sum_of_the_loss(model: StockModel, data) -> None:
    for answer in (model.forward(data), model.forward_backward(data)):
        assert answer["loss_fn_output_type"] == "ArrayRecord"
        assert "error" not in answer
        assert set(answer) == {"loss_fn_output_type", "loss_fn_outputs", "metrics"}
        for name, value in answer["metrics"].items():
            assert re.fullmatch(r"[a-z_]+:(sum|max|mean|min)", name)
            assert isinstance(value, float)
        weights = np.concatenate([weights_of(datum) for datum in data])
        logprobs = np.concatenate([values(output) for output in answer["loss_fn_outputs"]])
        assert answer["metrics"]["loss:sum"] == pytest.approx(-(weights * logprobs).sum(), rel=1e-6)
    step = model.run("optim_step", {"adam_params": SGD_LIKE, "type": "optim_step"})
    assert step["type"] == "optim_step"
    assert step["metrics"]
    assert all(isinstance(value, float | int) for value in step["metrics"].values())


def test_log_probabilities_are_those_of_transformers_own_forward(
    make: Make, llama_folder: str, rng: np.random.Generator
) -> None:
    pairs = make_pairs(rng, 2)
    plain = load_plain(llama_folder)
    with torch.no_grad():
        expected = [plain_logprobs(plain, datum).numpy() for datum in pairs]
    for rank in (2, 0, None):
        outputs = make(rank).forward([as_json(datum) for datum in pairs])["loss_fn_outputs"]
        for output, numbers in zip(outputs, expected, strict=True):
            tensor = output["logprobs"]
            assert (tensor["dtype"], tensor["shape"]) == ("float32", [len(numbers)])
            np.testing.assert_allclose(tensor["data"], numbers, rtol=0, atol=1e-5)


def test_gradients_are_sums_and_never_means(make: Make, data) -> None:
    norms = {}
    for what, calls in {
        "as it is": [data],
        "ten times": [scaled(data, 10)],
        "each twice": [[*data, *data]],
        "one by one": [[datum] for datum in data],
    }.items():
        model = make()
        losses = [model.forward_backward(part)["metrics"]["loss:sum"] for part in calls]
        norms[what] = sum(losses), model.step()
    loss, norm = norms["as it is"]
    assert norm > 0.1
    assert norms["ten times"] == pytest.approx((10 * loss, 10 * norm), rel=1e-5)
    assert norms["each twice"] == pytest.approx((2 * loss, 2 * norm), rel=1e-5)
    assert norms["one by one"] == pytest.approx((loss, norm), rel=1e-5)


def test_opposite_weights_have_the_opposite_gradient(make: Make, data) -> None:
    model = make()
    model.forward_backward(data)
    model.forward_backward(scaled(data, -1))
    assert model.step() == 0.0


def test_missing_weights_are_ones(make: Make, data) -> None:
    bare, ones = make(), make()
    without = [
        {**datum, "loss_fn_inputs": {"target_tokens": datum["loss_fn_inputs"]["target_tokens"]}}
        for datum in data
    ]
    answer = bare.forward_backward(without)
    other = ones.forward_backward([weighted(datum, np.ones(len(weights_of(datum)))) for datum in data])
    assert answer["loss_fn_outputs"] == other["loss_fn_outputs"]
    assert answer["metrics"]["loss:sum"] == other["metrics"]["loss:sum"]
    assert bare.step() == ones.step()


def test_a_datum_may_come_in_several_chunks(make: Make, data) -> None:
    whole, parts = make(), make()
    tokens = tokens_of(data[0])
    cut = {**data[0], "model_input": text(tokens[:3], [], tokens[3:4], tokens[4:])}
    assert parts.forward_backward([cut]) == whole.forward_backward(data[:1])
    assert parts.step() == whole.step()


def several_targets(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Two targets for each of five tokens, some of which weigh nothing."""
    targets = rng.integers(2, VOCABULARY, (5, 2))
    weights = np.asarray([[1, 0], [0.5, -2], [0, 0], [0, 3], [1, 1]], np.float32)
    return np.where(weights != 0, targets, 0), weights, rng.integers(2, VOCABULARY, 5).tolist()


def test_targets_may_have_several_columns(make: Make, rng: np.random.Generator) -> None:
    targets, weights, tokens = several_targets(rng)
    wide, narrow = make(), make()
    datum = as_json(Datum(ModelInput.from_ints(tokens), {"target_tokens": targets, "weights": weights}))
    answer = wide.forward_backward([datum])
    tensor = answer["loss_fn_outputs"][0]["logprobs"]
    assert tensor["shape"] == [5, 2]
    columns = [
        as_json(
            Datum(
                ModelInput.from_ints(tokens),
                {"target_tokens": targets[:, column], "weights": weights[:, column]},
            )
        )
        for column in range(2)
    ]
    apart = narrow.forward_backward(columns)
    both = np.stack([values(output) for output in apart["loss_fn_outputs"]], axis=1)
    np.testing.assert_allclose(np.reshape(tensor["data"], (5, 2)), both, rtol=0, atol=1e-5)
    assert answer["metrics"]["loss:sum"] == pytest.approx(apart["metrics"]["loss:sum"], rel=1e-5)
    assert wide.step() == pytest.approx(narrow.step(), rel=1e-5)


def test_sparse_targets_and_weights_are_what_they_stand_for(make: Make, rng: np.random.Generator) -> None:
    targets, weights, tokens = several_targets(rng)

    def sparse(matrix: np.ndarray, dtype: str) -> dict[str, Any]:
        rows, columns = np.nonzero(matrix)
        return {
            "data": matrix[rows, columns].tolist(),
            "dtype": dtype,
            "shape": list(matrix.shape),
            "sparse_crow_indices": [int((rows < row).sum()) for row in range(len(matrix) + 1)],
            "sparse_col_indices": columns.tolist(),
        }

    dense = as_json(Datum(ModelInput.from_ints(tokens), {"target_tokens": targets, "weights": weights}))
    thin = {
        "model_input": text(tokens),
        "loss_fn_inputs": {"target_tokens": sparse(targets, "int64"), "weights": sparse(weights, "float32")},
    }
    assert len(thin["loss_fn_inputs"]["weights"]["data"]) == 6
    one, other = make(), make()
    assert one.forward_backward([dense]) == other.forward_backward([thin])
    assert one.step() == other.step()


@pytest.mark.parametrize("loss_fn", ["importance_sampling", "ppo", "cispo", "dro"])
def test_the_other_losses_are_as_documented(make: Make, data, loss_fn: str) -> None:
    model = make()
    config = {"beta": 0.3} if loss_fn == "dro" else None
    now = [values(output) for output in model.forward(data)["loss_fn_outputs"]]
    loss, sent = 0.0, []
    for datum, logprobs in zip(data, now, strict=True):
        old, advantages = logprobs + np.linspace(-0.5, 0.5, len(logprobs)), np.linspace(-1, 2, len(logprobs))
        inputs = {"target_tokens": datum["loss_fn_inputs"]["target_tokens"]}
        for name, array in (("logprobs", old), ("advantages", advantages)):
            inputs[name] = {"data": array.tolist(), "dtype": "float32", "shape": [len(array)]}
        sent.append({**datum, "loss_fn_inputs": inputs})
        ratio = np.exp(logprobs - old)
        if loss_fn == "importance_sampling":
            loss -= (ratio * advantages).sum()
        elif loss_fn == "ppo":
            loss -= np.minimum(ratio * advantages, ratio.clip(0.8, 1.2) * advantages).sum()
        elif loss_fn == "cispo":
            loss -= (ratio.clip(0, 4) * logprobs * advantages).sum()
        else:
            loss -= (logprobs * advantages - 0.5 * 0.3 * (logprobs - old) ** 2).sum()
    answer = model.forward_backward(sent, loss_fn=loss_fn, loss_fn_config=config)
    assert answer["metrics"]["loss:sum"] == pytest.approx(loss, rel=1e-4)


def test_numbers_that_are_none_are_an_error_and_never_in_an_answer(make: Make, data) -> None:
    model = make(0)
    model.forward_backward(data)
    model.step({**SGD_LIKE, "learning_rate": 1e38})  # beyond what the model can compute with
    sampler = sampler_of(model)
    for ask in (
        lambda: model.forward(data),
        lambda: model.forward_backward(data),
        lambda: sample(model.client, sampler, [5, 6], 0),
        lambda: sample(model.client, sampler, [5, 6], 1, prompt_logprobs=True),
    ):
        with pytest.raises(Failure, match=r"not finite.*load a checkpoint") as caught:
            ask()
        assert caught.value.category == "user"


# A custom loss, as these clients send it: a forward, then its tokens again with -dC/dlogprob for weights


def surprise(logprobs: list[torch.Tensor], data: list[dict[str, Any]]) -> torch.Tensor:
    """A loss over pairs that is no sum over tokens."""
    sums = [
        (values * torch.from_numpy(weights_of(datum)).float()).sum()
        for values, datum in zip(logprobs, data, strict=True)
    ]
    return -torch.nn.functional.logsigmoid(0.1 * (torch.stack(sums[::2]) - torch.stack(sums[1::2]))).sum()


def custom_weights(answer: dict[str, Any], data: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The data with the weights that a client sends for the backward."""
    leaves = [
        torch.tensor(output["logprobs"]["data"]).requires_grad_() for output in answer["loss_fn_outputs"]
    ]
    surprise(leaves, data).backward()
    return [
        weighted(datum, (-leaf.grad).tolist())  # type: ignore[operator]
        for datum, leaf in zip(data, leaves, strict=True)
    ]


def without_weights(data: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As clients send the forward of a custom loss."""
    return [weighted(datum, np.zeros(len(weights_of(datum)))) for datum in data]


def custom(model: StockModel, data: list[dict[str, Any]]) -> dict[str, Any]:
    return model.forward_backward(custom_weights(model.forward(without_weights(data)), data))


def test_a_custom_loss_has_the_gradient_of_the_loss_itself(
    make: Make, llama_folder: str, rng: np.random.Generator
) -> None:
    pairs = make_pairs(rng, 2)
    data = [as_json(datum) for datum in pairs]
    plain = load_plain(llama_folder)
    surprise([plain_logprobs(plain, datum) for datum in pairs], data).backward()
    expected = torch.sqrt(sum((p.grad**2).sum() for p in plain.parameters() if p.grad is not None)).item()  # type: ignore[arg-type]
    model = make(0)
    custom(model, data)
    assert model.step() == pytest.approx(expected, rel=1e-4)


def test_a_custom_loss_runs_the_model_once(make: Make, stand: Standing, data) -> None:
    model, forgetful = make(), make()
    with counted_passes(stand, model) as passes:
        forward = model.forward(without_weights(data))
        assert kept_forwards(stand, model) == 1
        after_forward = len(passes)
        answer = model.forward_backward(custom_weights(forward, data))
        assert kept_forwards(stand, model) == 0
        assert after_forward == len(passes) > 0
    assert answer["loss_fn_outputs"] == forward["loss_fn_outputs"]
    # The same without a kept forward: its numbers are those of the two passes.
    sent = custom_weights(forward, data)
    with counted_passes(stand, forgetful) as passes:
        again = forgetful.forward_backward(sent)
        assert len(passes) == after_forward
    assert answer["metrics"]["loss:sum"] == pytest.approx(again["metrics"]["loss:sum"], rel=1e-6)
    assert model.step() == pytest.approx(forgetful.step(), rel=1e-6)


def test_other_tokens_and_other_targets_take_no_kept_forward(
    model: StockModel, stand: Standing, data
) -> None:
    model.forward(data)
    other = {**data[0], "model_input": text([token % 50 + 2 for token in tokens_of(data[0])])}
    targets = data[0]["loss_fn_inputs"]["target_tokens"]
    moved = {**targets, "data": [token % 50 + 2 for token in targets["data"]]}
    elsewhere = {**data[0], "loss_fn_inputs": {**data[0]["loss_fn_inputs"], "target_tokens": moved}}
    for different in ([other, *data[1:]], [elsewhere, *data[1:]], data[:-1], data[::-1]):
        model.forward_backward(different)
        assert kept_forwards(stand, model) == 1
    model.forward_backward(data)
    assert kept_forwards(stand, model) == 0


def test_a_forward_of_older_weights_is_not_taken(make: Make, stand: Standing, data) -> None:
    model, calm = make(), make()
    for one in (model, calm):
        one.forward_backward(data[:2])
    old = model.forward(data)
    for one in (model, calm):
        one.step({**SGD_LIKE, "learning_rate": 0.1})
    assert kept_forwards(stand, model) == 0
    answers = [one.forward_backward(data) for one in (model, calm)]
    assert answers[0] == answers[1]
    assert answers[0]["loss_fn_outputs"] != old["loss_fn_outputs"]
    assert model.step() == calm.step()


def test_kept_forwards_of_two_adapters_on_one_base_do_not_mix(make: Make, stand: Standing, data) -> None:
    rows, others = data[:2], [data[2], data[3]]

    def trained(model: StockModel, mine: list[dict[str, Any]]) -> Iterator[Any]:
        for _ in range(2):
            forward = model.forward(without_weights(mine))
            yield
            backward = model.forward_backward(custom_weights(forward, mine))
            yield
            norm = model.step(ADAM)
            yield forward, backward, norm
        yield model.logprobs(rows + others)

    def alone(mine: list[dict[str, Any]], seed: int) -> list[Any]:
        return list(trained(make(seed=seed), mine))

    expected = alone(rows, 1), alone(others, 2)
    one, other = make(seed=1), make(seed=2)
    bases = {id(stand.engine._host.models[m.model_id].trainer.base.network) for m in (one, other)}
    assert len(bases) == 1
    mixed = list(zip(trained(one, rows), trained(other, others), strict=True))
    for mine, theirs in zip(zip(*mixed, strict=True), expected, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b


# Results


def test_an_answer_stays_after_its_delivery(model: StockModel, data) -> None:
    promise = model.send("forward_backward", {"forward_backward_input": call(data)})
    first = model.client.result(promise)
    assert [model.client.result(promise) for _ in range(3)] == [first] * 3


def test_answers_go_a_while_after_they_were_fetched_or_made(
    tmp_path, llama_folder: str, data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "TEND_SECONDS", 0.02)
    monkeypatch.setattr(answers, "FORGOTTEN_SECONDS", 1.0)
    with standing(tmp_path, llama_folder) as stand:
        model = stand.client().model(llama_folder)
        content = {"forward_input": call(data)}
        late = model.send("forward", content, 2)
        threading.Event().wait(1.1)  # it waits for longer than an answer is kept
        first = model.send("forward", content, 1)
        model.client.result(first)
        threading.Event().wait(0.1)
        for promise in (late, first):  # both are there, some sweeps after they were made
            assert model.client.result(promise)["loss_fn_outputs"]
        unread = model.send("forward", content, 3)
        monkeypatch.setattr(answers, "DELIVERED_SECONDS", 0.0)
        wait_until_gone(stand, 1)
        with pytest.raises(Refusal, match="delivered some time ago") as caught:
            model.client.result(first)
        assert caught.value.status == 410
        monkeypatch.setattr(answers, "FORGOTTEN_SECONDS", 0.0)
        wait_until_gone(stand, 0)
        with pytest.raises(Refusal) as caught:
            model.client.result(unread)
        assert caught.value.status == 410


def wait_until_gone(stand: Standing, left: int) -> None:
    give_up = time.monotonic() + 20
    while len(stand.service.answers) > left:
        assert time.monotonic() < give_up, f"{len(stand.service.answers)} answers are left"
        time.sleep(0.01)


def test_an_unknown_request_is_gone(client: Stock) -> None:
    for name in ("request-0123456789abcdef", "", "x" * 600, "../..", "\0"):
        answer = client.ask("POST", "retrieve_future", {"request_id": name})
        assert answer.status_code == (410 if 0 < len(name) <= 512 else 400)
        assert answer.json()["error"]["message"]


def test_what_fails_when_it_runs_is_an_answer_with_a_category(
    make: Make, stand: Standing, data, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make()
    beyond = {
        "model_input": text([VOCABULARY]),
        "loss_fn_inputs": {"target_tokens": {**TARGETS, "data": [1], "shape": [1]}},
    }
    with pytest.raises(Failure, match=f"token id {VOCABULARY}") as caught:
        model.forward([beyond])
    assert caught.value.category == "user"
    with pytest.raises(Failure, match="no gradient") as caught:
        model.step()
    assert caught.value.category == "user"

    def breaks(*_: object) -> None:
        raise MemoryError("no room")

    with monkeypatch.context() as patch:  # a fault that is not the client's
        patch.setattr(stand.engine._host.models[model.model_id].trainer, "forward_backward", breaks)
        with pytest.raises(Failure, match="MemoryError: no room") as caught:
            model.forward_backward(data)
    assert caught.value.category == "server"
    model.forward_backward(data)  # and nothing else is broken


# Sampling


def sampler_of(model: StockModel, number: int = 0) -> str:
    answer = model.run("save_weights_for_sampler", {"sampling_session_seq_id": number})
    assert set(answer) == {"type", "sampling_session_id"}
    return str(answer["sampling_session_id"])


def sample(client: Stock, sampler: str, prompt: list[int], seq: int = 0, **more: Any) -> dict[str, Any]:
    params = {"max_tokens": 4, "temperature": 0.0, "top_p": 1.0, "top_k": -1, **more.pop("params", {})}
    body = {"sampling_session_id": sampler, "seq_id": seq, "num_samples": 1, "prompt": text(prompt), **more}
    promise = client.post("asample", {**body, "sampling_params": params, "topk_prompt_logprobs": 0})
    assert (
        len(set(promise["sample_sequence_ids"])) == len(promise["sample_sequence_ids"]) == body["num_samples"]
    )
    answer = client.result(promise)
    assert answer["type"] == "sample"
    return answer


def test_a_prompt_has_one_log_probability_per_token_and_none_for_the_first(make: Make, data) -> None:
    model = make()
    model.forward_backward(data)
    model.step({**SGD_LIKE, "learning_rate": 0.1})
    prompt = [*tokens_of(data[0]), data[0]["loss_fn_inputs"]["target_tokens"]["data"][-1]]
    answer = sample(model.client, sampler_of(model), prompt, prompt_logprobs=True, params={"max_tokens": 1})
    first, *others = answer["prompt_logprobs"]
    assert first is None
    np.testing.assert_allclose(others, model.logprobs(data[:1]), rtol=0, atol=1e-5)
    assert "prompt_logprobs" not in sample(model.client, sampler_of(model, 1), prompt)
    single = sample(model.client, sampler_of(model, 2), prompt[:1], prompt_logprobs=True)
    assert single["prompt_logprobs"] == [None]


def test_sequences_have_tokens_and_their_log_probabilities(make: Make) -> None:
    model = make()
    sampler = sampler_of(model)
    answer = sample(
        model.client,
        sampler,
        [5, 6, 7],
        num_samples=3,
        params={"temperature": 1.0, "seed": 3, "max_tokens": 6},
    )
    assert len(answer["sequences"]) == 3
    for sequence in answer["sequences"]:
        assert set(sequence) == {"stop_reason", "tokens", "logprobs"}
        assert len(sequence["tokens"]) == len(sequence["logprobs"])
        assert sequence["stop_reason"] in ("stop", "length")
        assert (sequence["stop_reason"] == "length") == (
            len(sequence["tokens"]) == 6 and sequence["tokens"][-1] != 1
        )
        assert all(number <= 0 for number in sequence["logprobs"])
    greedy = sample(model.client, sampler, [5, 6, 7], seq=1)["sequences"][0]
    stopped = sample(model.client, sampler, [5, 6, 7], seq=2, params={"stop": [greedy["tokens"][0]]})[
        "sequences"
    ][0]
    assert (stopped["stop_reason"], stopped["tokens"]) == ("stop", greedy["tokens"][:1])


def test_sampling_keeps_no_order_and_answers_a_number_once(make: Make) -> None:
    model = make()
    sampler = sampler_of(model)
    tokens = {seq: sample(model.client, sampler, [5, 6], seq) for seq in (7, 0, 10**9, 3)}
    assert len({str(answer) for answer in tokens.values()}) == 1
    body = {"sampling_session_id": sampler, "seq_id": 0, "num_samples": 1, "prompt": text([5, 6])}
    body |= {"sampling_params": {"max_tokens": 4, "temperature": 0.0, "top_p": 1.0, "top_k": -1}}
    body["topk_prompt_logprobs"] = 0
    assert model.client.result(model.client.post("asample", body)) == tokens[0]
    with pytest.raises(Refusal, match="other content") as caught:
        model.client.post("asample", {**body, "prompt": text([5, 7])})
    assert caught.value.status == 400


def test_an_ephemeral_sampler_reads_the_weights_of_its_turn(make: Make, data) -> None:
    model = make()
    before = sampler_of(model)
    prompt = tokens_of(data[0])
    known = sample(model.client, before, prompt, 0, prompt_logprobs=True)
    model.forward_backward(data)
    model.step({**SGD_LIKE, "learning_rate": 1.0})
    assert sample(model.client, before, prompt, 1, prompt_logprobs=True) == known
    after = sample(model.client, sampler_of(model, 1), prompt, 0, prompt_logprobs=True)
    assert np.abs(np.subtract(after["prompt_logprobs"][1:], known["prompt_logprobs"][1:])).max() > 1e-3


@pytest.mark.parametrize("rank", [2, 0])
def test_a_sampler_can_be_had_of_a_base_and_of_named_weights(
    make: Make, llama_folder: str, data, rank: int
) -> None:
    model = make(rank)
    client, session = model.client, model.session
    model.forward_backward(data)
    model.step({**SGD_LIKE, "learning_rate": 1.0})
    prompt = tokens_of(data[0])
    now = sample(client, sampler_of(model), prompt, prompt_logprobs=True)["prompt_logprobs"][1:]
    paths = [
        model.run(path, {"path": "now"})["path"] for path in ("save_weights", "save_weights_for_sampler")
    ]
    assert paths == [f"tinker://{model.model_id}/{kind}/now" for kind in ("weights", "sampler_weights")]
    for number, what in enumerate([{"model_path": path} for path in paths] + [{"base_model": llama_folder}]):
        body = {"session_id": session, "sampling_session_seq_id": number, **what}
        made = client.post("create_sampling_session", body)
        assert client.post("create_sampling_session", body) == made
        sampler = made["sampling_session_id"]
        assert client.get(f"samplers/{sampler}") == {"sampler_id": sampler, "base_model": llama_folder}
        found = sample(client, sampler, prompt, prompt_logprobs=True)["prompt_logprobs"][1:]
        apart = np.abs(np.subtract(found, now)).max()
        assert apart < 1e-5 if "model_path" in what else apart > 1e-3


def test_a_sampling_session_asked_for_twice_at_once_loads_one_model(
    make: Make, stand: Standing, llama_folder: str
) -> None:
    model = make()
    held = len(stand.engine._host.models)
    body = {"session_id": model.session, "sampling_session_seq_id": 0, "base_model": llama_folder}
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: model.client.post("create_sampling_session", body), range(4)))
    assert len({answer["sampling_session_id"] for answer in made}) == 1
    assert len(stand.engine._host.models) == held + 1
    with pytest.raises(Refusal, match="other content"):
        model.client.post("create_sampling_session", {**body, "base_model": "another/model"})


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"topk_prompt_logprobs": 3}, "topk_prompt_logprobs"),
        ({"sampling_params": {"stop": "word"}}, "no tokenizer"),
        ({"sampling_params": {"stop": ["word"]}}, "no tokenizer"),
        ({"sampling_params": {"max_tokens": 1, "temperature": -1}}, "temperature"),
        ({"sampling_params": {"max_tokens": 1, "top_p": 0}}, "top_p"),
        ({"sampling_params": {"max_tokens": 0}}, "max_tokens"),
        ({"sampling_params": {"max_tokens": 1, "seed": 10**30}}, "seed"),
        ({"num_samples": 0}, "greater than or equal"),
        ({"num_samples": 10**6}, "less than or equal"),
        ({"prompt": bad_chunk("image")}, "encoded_text"),
    ],
)
def test_sampling_that_cannot_be_is_refused(make: Make, changed: dict[str, Any], reason: str) -> None:
    model = make()
    sampler = sampler_of(model)
    body = {
        "sampling_session_id": sampler,
        "seq_id": 0,
        "prompt": text([5]),
        "sampling_params": {"max_tokens": 1},
    }
    with pytest.raises(Refusal, match=reason) as caught:
        model.client.post("asample", {**body, **changed})
    assert caught.value.status == 400


@pytest.mark.parametrize(("prompt", "max_tokens"), [([], 1), ([5], 10**5), ([VOCABULARY], 1)])
def test_sampling_that_the_model_cannot_do_fails_its_promise(make: Make, prompt, max_tokens: int) -> None:
    model = make()
    with pytest.raises(Failure, match="token") as caught:
        sample(model.client, sampler_of(model), prompt, params={"max_tokens": max_tokens})
    assert caught.value.category == "user"


# Checkpoints


@pytest.mark.parametrize("rank", [2, 0])
def test_training_goes_on_from_a_checkpoint_to_the_bit(make: Make, data, rank: int) -> None:
    model, other = make(rank), make(rank)

    def trained(one: StockModel) -> list[Any]:
        found: list[Any] = []
        for part in (data[:2], data[2:]):
            found.append(one.forward_backward(part)["metrics"]["loss:sum"])
            found.append(one.step(ADAM))
        return [*found, *one.logprobs(data)]

    trained(model)
    saved = model.run("save_weights", {"path": "half", "ttl_seconds": 3600})
    assert saved == {"type": "save_weights", "path": f"tinker://{model.model_id}/weights/half"}
    expected = trained(model)
    for one in (model, other):  # the same model, and one of another session
        loaded = one.run("load_weights", {"path": saved["path"], "optimizer": True})
        assert loaded == {"type": "load_weights", "path": saved["path"]}
        assert trained(one) == expected
    other.run("load_weights", {"path": saved["path"], "optimizer": False})
    fresh = trained(other)  # the same weights, another optimizer
    assert fresh[:2] == expected[:2]
    assert fresh != expected


def test_checkpoints_are_listed_by_name_and_described_by_path(make: Make, llama_folder: str, data) -> None:
    model = make()
    assert model.client.get("list_checkpoints") == {"checkpoints": []}
    paths = [model.run("save_weights", {"path": name})["path"] for name in ("step-2", "step-10")]
    export = model.run("save_weights_for_sampler", {"path": "out", "checkpoint_type": "base"})["path"]
    merged = model.run("save_weights_for_sampler", {"path": "all", "checkpoint_type": "merged_base"})["path"]
    assert model.client.get("list_checkpoints") == {"checkpoints": ["step-2", "step-10"]}
    adapter = {"base_model": llama_folder, "is_lora": True, "lora_rank": 2}
    adapter |= {"train_attn": True, "train_mlp": True, "train_unembed": True}
    for path in (*paths, export):
        assert model.client.post("weights_info", {"tinker_path": path}) == adapter
    whole = {"base_model": llama_folder, "is_lora": False}
    assert model.client.post("weights_info", {"tinker_path": merged}) == whole
    with pytest.raises(Refusal, match="already") as caught:  # a name is used once
        model.run("save_weights", {"path": "step-2"})
    assert caught.value.status == 400
    with pytest.raises(Refusal, match=r"no checkpoint .* has .*step-10"):
        model.client.post("weights_info", {"tinker_path": f"tinker://{model.model_id}/weights/step-3"})


def test_one_name_is_written_once_however_fast_it_is_asked_for_again(make: Make, data) -> None:
    model = make()
    promises = []
    refused = 0
    for _ in range(3):
        try:
            promises.append(model.send("save_weights", {"path": "name"}))
        except Refusal:
            refused += 1
    failed = 0
    for promise in promises[1:]:
        with pytest.raises(Failure):
            model.client.result(promise)
        failed += 1
    path = model.client.result(promises[0])["path"]
    assert refused + failed == 2
    assert model.run("load_weights", {"path": path, "optimizer": True})  # whole


def test_an_adapter_is_loaded_without_its_optimizer(make: Make, data) -> None:
    model, other = make(), make()
    model.forward_backward(data)
    model.step(ADAM)
    path = model.run("save_weights_for_sampler", {"path": "adapter"})["path"]
    other.forward_backward(data[:1])
    other.step(ADAM)
    answer = other.run("load_adapter", {"adapter_path": path})
    assert answer == {"type": "load_adapter", "model_id": other.model_id}
    np.testing.assert_allclose(other.logprobs(data), model.logprobs(data), rtol=0, atol=1e-6)
    with pytest.raises(Refusal, match="without an optimizer"):
        other.run("load_weights", {"path": path, "optimizer": True})


def test_a_checkpoint_of_another_kind_of_model_fails_and_changes_nothing(make: Make, data) -> None:
    narrow, wide = make(2), make(4)
    path = narrow.run("save_weights", {"path": "narrow"})["path"]
    before = wide.logprobs(data)
    for optimizer in (True, False):
        with pytest.raises(Failure, match=r"rank|lora|adapter|shape") as caught:
            wide.run("load_weights", {"path": path, "optimizer": optimizer})
        assert caught.value.category == "user"
    assert np.array_equal(wide.logprobs(data), before)


# Frozen models


def test_a_frozen_base_runs_forward_and_refuses_the_rest(make: Make, stand: Standing, data) -> None:
    frozen, policy = make(None), make(2)
    assert frozen.client.post("get_info", {"model_id": frozen.model_id})["is_lora"] is False
    assert np.array_equal(frozen.logprobs(data), policy.logprobs(data))
    for path, content in (
        ("forward_backward", {"forward_backward_input": call(data)}),
        ("optim_step", {"adam_params": SGD_LIKE}),
        ("save_weights", {"path": "frozen"}),
        ("save_weights_for_sampler", {"path": "frozen"}),
        ("save_weights_for_sampler", {"sampling_session_seq_id": 5}),
    ):
        with pytest.raises((Refusal, Failure)) as caught:
            frozen.run(path, content)
        if isinstance(caught.value, Failure):
            assert caught.value.category == "user"
        else:
            assert caught.value.status == 400
    frozen.forward(data)
    assert kept_forwards(stand, frozen) == 0  # no backward will ever come


def test_a_reference_beside_a_policy_does_not_move_with_it(
    make: Make, client: Stock, llama_folder: str, data
) -> None:
    policy = make(2)
    reference = client.model(llama_folder, None, policy.session, 1)
    before = reference.logprobs(data)
    policy.forward_backward(data)
    policy.step({**SGD_LIKE, "learning_rate": 1.0})
    assert np.array_equal(reference.logprobs(data), before)
    assert np.abs(policy.logprobs(data) - before).max() > 1e-3


def test_a_finished_session_frees_its_models(client: Stock, stand: Standing, llama_folder: str) -> None:
    model = client.model(llama_folder)
    client.model(llama_folder, None, model.session, 1)
    held = len(stand.engine._host.models)
    assert client.post(f"sessions/{model.session}/finish", {"reason": {"type": "errored"}, "detail": "x"})
    assert len(stand.engine._host.models) == held - 2
    for path, body in (
        ("session_heartbeat", {"session_id": model.session}),
        ("get_info", {"model_id": model.model_id}),
    ):
        with pytest.raises(Refusal, match=r"expired|unloaded") as caught:
            client.post(path, body)
        assert caught.value.status == 410


def test_a_silent_session_ends_and_one_with_heartbeats_does_not(
    tmp_path, llama_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "TEND_SECONDS", 0.05)
    with standing(tmp_path, llama_folder, limits=Limits(session_seconds=0.5)) as stand:
        client = stand.client()
        alive, silent = client.model(llama_folder), client.model(llama_folder)
        for _ in range(12):
            client.post("session_heartbeat", {"session_id": alive.session})
            threading.Event().wait(0.1)
        with pytest.raises(Refusal) as caught:
            client.post("session_heartbeat", {"session_id": silent.session})
        assert caught.value.status == 410
        assert list(stand.engine._host.models) == [alive.model_id]
