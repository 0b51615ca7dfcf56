"""The control plane of Fireworks clients: what they provision, look up, resume, delete and promote."""

from __future__ import annotations

import itertools
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import make_pairs
from firesteel.service import app, jobs, promotions
from firesteel.service.records import JobState, Records
from stock import ADAM, SGD_LIKE, Failure, Refusal, Standing, Stock, StockModel, as_json, standing, text

LORA = "accounts/local/trainingShapes/cpu-lora"


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory, llama_folder: str) -> Iterator[Standing]:
    with standing(tmp_path_factory.mktemp("service"), llama_folder) as made:
        yield made


@pytest.fixture
def client(stand: Standing) -> Stock:
    return stand.client()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The service looks after itself many times a second."""
    monkeypatch.setattr(app, "TEND_SECONDS", 0.05)


@pytest.fixture
def data(rng: np.random.Generator) -> list[dict[str, Any]]:
    return [as_json(datum) for datum in make_pairs(rng, 2)]


def state_of(client: Stock, job: str) -> str:
    return str(client.control("GET", f"rlorTrainerJobs/{job}")["state"])


def wait_for(state: str, client: Stock, job: str) -> None:
    give_up = time.monotonic() + 10
    while state_of(client, job) != state:
        assert time.monotonic() < give_up, f"{job} is {state_of(client, job)}"
        time.sleep(0.02)


def refusal(ask: Callable[[], object]) -> Refusal:
    with pytest.raises(Refusal) as caught:
        ask()
    return caught.value


# Accounts and shapes


def test_a_key_has_exactly_one_account(client: Stock) -> None:
    answer = client.get("/v1/accounts?pageSize=2")
    assert answer == {"accounts": [{"name": f"accounts/{client.account}"}]}


def test_a_shape_has_one_validated_version_whatever_the_callers_account(client: Stock) -> None:
    query = "?filter=latest_validated%3Dtrue&pageSize=1"
    (row,) = client.get(f"/v1/{LORA}/versions{query}")["trainingShapeVersions"]
    assert row["name"] == f"{LORA}/versions/1"
    assert row["snapshot"]["trainerMode"] == "LORA_TRAINER"
    assert client.get(f"/v1/{row['name']}") == row
    modes = {"policy": "POLICY_TRAINER", "forward": "FORWARD_ONLY"}
    for name, mode in modes.items():
        shape = LORA.replace("lora", name)
        assert client.get(f"/v1/{shape}/versions/1")["snapshot"]["trainerMode"] == mode


@pytest.mark.parametrize("path", [f"{LORA}x/versions", f"{LORA}/versions/2", f"{LORA}/versions/newest"])
def test_an_unknown_shape_is_refused(client: Stock, path: str) -> None:
    answer = refusal(lambda: client.get(f"/v1/{path}"))
    assert answer.status in (400, 404)
    assert "shape" in answer.text


# Jobs


def test_a_job_without_a_shape_gets_one_and_says_how_long_its_sequences_may_be(
    client: Stock, llama_folder: str
) -> None:
    job = client.create_job("auto", llama_folder, rank=4, displayName="a run")
    assert job["name"] == f"accounts/{client.account}/rlorTrainerJobs/auto"
    assert job["state"] == "JOB_STATE_RUNNING"
    assert job["status"] == {"code": 0, "message": ""}
    assert job["trainingConfig"] == {"baseModel": llama_folder, "loraRank": 4, "maxContextLength": 128}
    assert (job["displayName"], job["trainingShape"]) == ("a run", LORA)
    assert client.control("GET", "rlorTrainerJobs/auto") == job
    assert client.control("GET", "rlorTrainerJobs") == {"rlorTrainerJobs": [job]}
    healthz = client.at_job("auto").ask("GET", "healthz")
    assert (healthz.status_code, healthz.json()) == (200, {"status": "ok"})


@pytest.mark.parametrize("shape", [LORA, f"{LORA}/versions/1"])
def test_a_job_on_a_named_shape(client: Stock, llama_folder: str, shape: str) -> None:
    job = client.create_job("named", llama_folder, rank=4, shape=shape)
    assert (job["state"], job["trainingShape"]) == ("JOB_STATE_RUNNING", LORA)
    assert job["trainingConfig"]["maxContextLength"] == 128


def test_a_context_that_was_asked_for_is_that_of_the_job(client: Stock, llama_folder: str, data) -> None:
    job = client.create_job("short", llama_folder, rank=2, config={"maxContextLength": 8})
    assert job["trainingConfig"]["maxContextLength"] == 8
    model = client.at_job("short").model(llama_folder, 2)
    answer = refusal(lambda: model.forward(data))
    assert (answer.status, "8 tokens" in answer.text) == (400, True)


def test_the_same_request_gives_the_same_job_and_another_under_its_id_is_refused(
    client: Stock, stand: Standing, llama_folder: str
) -> None:
    first = client.create_job("twice", llama_folder, rank=2)
    assert client.create_job("twice", llama_folder, rank=2) == first
    answer = refusal(lambda: client.create_job("twice", llama_folder, rank=4))
    assert answer.status == 409
    assert answer.body["error"]["status"] == "ALREADY_EXISTS"
    assert client.control("GET", "rlorTrainerJobs/twice") == first
    assert stand.client().create_job("twice", llama_folder, rank=4)["name"] != first["name"]


BAD_JOBS: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown base": ({"base_model": "acme/none"}, "base_model"),
    "no base": ({"base_model": ""}, "baseModel"),
    "an unknown shape": ({"shape": f"{LORA}-8b"}, "training shape"),
    "a shape for another mode": ({"shape": LORA.replace("lora", "policy")}, "POLICY_TRAINER"),
    "a shape version that is not there": ({"shape": f"{LORA}/versions/7"}, "version"),
    "a negative rank": ({"rank": -1}, "loraRank"),
    "a rank that no number holds": ({"rank": 10**30}, "loraRank"),
    "a context that no number holds": ({"config": {"maxContextLength": 10**30}}, "maxContextLength"),
    "no context": ({"config": {"maxContextLength": 0}}, "maxContextLength"),
    "a time that is none": ({"inactivityTimeout": "soon"}, "inactivityTimeout"),
    "a time that is too long": ({"inactivityTimeout": "999999s"}, "inactivityTimeout"),
    "a long name": ({"displayName": "x" * 200}, "displayName"),
    "an id with capitals": ({"job": "Job"}, "rlorTrainerJobId"),
    "no id": ({"job": ""}, "rlorTrainerJobId"),
    "a long id": ({"job": "j" * 64}, "rlorTrainerJobId"),
    "an id that is a path": ({"job": "..%2Fother"}, "rlorTrainerJobId"),
    "an id with a NUL": ({"job": "a%00b"}, "rlorTrainerJobId"),
}


@pytest.mark.parametrize("what", BAD_JOBS)
def test_a_job_that_cannot_be_is_refused_at_once(client: Stock, llama_folder: str, what: str) -> None:
    changed, reason = BAD_JOBS[what]
    settings: dict[str, Any] = {"job": "bad", "base_model": llama_folder, "rank": 2, **changed}
    answer = refusal(lambda: client.create_job(**settings))
    assert answer.status == 400
    assert reason in answer.text
    assert set(answer.body["error"]) == {"code", "message", "status"}
    assert client.control("GET", "rlorTrainerJobs") == {"rlorTrainerJobs": []}


def test_a_job_says_the_context_that_its_model_has_and_not_what_was_asked_for(
    client: Stock, llama_folder: str
) -> None:
    job = client.create_job("long", llama_folder, config={"maxContextLength": 4096})
    assert (job["state"], job["trainingConfig"]["maxContextLength"]) == ("JOB_STATE_RUNNING", 128)


def test_a_deleted_job_is_gone_and_its_id_can_be_used_again(client: Stock, llama_folder: str) -> None:
    client.create_job("brief", llama_folder, rank=2)
    model = client.at_job("brief").model(llama_folder, 2)
    assert client.control("DELETE", "rlorTrainerJobs/brief") == {}
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", ":resume")):
        answer = refusal(lambda m=method, p=path: client.control(m, f"rlorTrainerJobs/brief{p}"))
        assert (answer.status, answer.body["error"]["status"]) == (404, "NOT_FOUND")
    assert client.control("GET", "rlorTrainerJobs") == {"rlorTrainerJobs": []}
    assert refusal(lambda: model.client.post("get_info", {"model_id": model.model_id})).status == 404
    assert client.create_job("brief", llama_folder, rank=2)["state"] == "JOB_STATE_RUNNING"
    assert refusal(lambda: model.client.post("get_info", {"model_id": model.model_id})).status == 410


def test_the_id_of_a_deleted_job_may_be_that_of_quite_another(client: Stock, llama_folder: str, data) -> None:
    client.create_job("again", llama_folder, rank=2)
    client.control("DELETE", "rlorTrainerJobs/again")
    assert client.create_job("again", llama_folder, rank=4)["state"] == "JOB_STATE_RUNNING"
    assert client.control("GET", "rlorTrainerJobs/again")["trainingConfig"]["loraRank"] == 4
    assert client.at_job("again").model(llama_folder, 4).logprobs(data).size
    assert refusal(lambda: client.create_job("again", llama_folder, rank=2)).status == 409


def test_a_deleted_job_frees_its_models(client: Stock, stand: Standing, llama_folder: str) -> None:
    held = set(stand.engine._host.models)
    client.create_job("freed", llama_folder, rank=2)
    model = client.at_job("freed").model(llama_folder, 2)
    assert model.model_id in stand.engine._host.models
    client.control("DELETE", "rlorTrainerJobs/freed")
    assert set(stand.engine._host.models) == held


def test_an_idle_job_is_paused_and_can_be_resumed(
    client: Stock, stand: Standing, llama_folder: str, quick: None, data
) -> None:
    client.create_job("idle", llama_folder, rank=2, inactivityTimeout="1s")
    client.create_job("patient", llama_folder, rank=2, inactivityTimeout="1s", disableInactivityCleanup=True)
    root = client.at_job("idle")
    model = root.model(llama_folder, 2)
    held = len(stand.engine._host.models)
    for _ in range(8):  # longer than it may be idle, kept alive by heartbeats alone
        root.post("session_heartbeat", {"session_id": model.session})
        threading.Event().wait(0.2)
    assert state_of(client, "idle") == "JOB_STATE_RUNNING"
    wait_for("JOB_STATE_PAUSED", client, "idle")
    assert len(stand.engine._host.models) == held - 1
    answer = refusal(lambda: model.forward(data))
    assert (answer.status, "idle for more than 1 s" in answer.text) == (400, True)
    assert state_of(client, "patient") == "JOB_STATE_RUNNING"
    assert client.control("POST", "rlorTrainerJobs/idle:resume")["state"] == "JOB_STATE_RUNNING"
    assert client.control("POST", "rlorTrainerJobs/idle:resume")["state"] == "JOB_STATE_RUNNING"
    assert root.model(llama_folder, 2).forward(data)


def test_a_job_whose_model_cannot_be_had_has_failed_with_the_reason_and_can_be_resumed(
    tmp_path: Path, llama_folder: str
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(llama_folder, broken)
    (broken / "config.json").rename(tmp_path / "config.json")
    with standing(tmp_path / "service", str(broken)) as stand:
        client = stand.client()
        job = client.create_job("broken", str(broken), rank=2)
        assert job["state"] == "JOB_STATE_FAILED"
        assert job["status"]["code"] != 0
        assert "config.json" in job["status"]["message"]
        assert refusal(lambda: client.at_job("broken").session()).status == 400
        (tmp_path / "config.json").rename(broken / "config.json")
        assert client.control("POST", "rlorTrainerJobs/broken:resume")["state"] == "JOB_STATE_RUNNING"
        assert client.at_job("broken").model(str(broken), 2)


def test_a_job_that_is_deleted_while_it_starts_stays_deleted(
    tmp_path: Path, llama_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "START_SECONDS", 0.05)
    with standing(tmp_path, llama_folder) as stand:
        gate, host = threading.Event(), stand.engine._host
        resolve = host._resolve_shape

        def slow(operation: Any) -> Any:
            assert gate.wait(20)
            return resolve(operation)

        monkeypatch.setattr(host, "_resolve_shape", slow)
        client = stand.client()
        for job in ("gone", "stays"):
            assert client.create_job(job, llama_folder)["state"] == "JOB_STATE_CREATING"
        assert refusal(lambda: client.at_job("stays").session()).status == 400
        client.control("DELETE", "rlorTrainerJobs/gone")
        gate.set()
        wait_for("JOB_STATE_RUNNING", client, "stays")
        assert refusal(lambda: state_of(client, "gone")).status == 404


def test_jobs_and_checkpoints_survive_the_server(
    tmp_path: Path, llama_folder: str, data, quick: None
) -> None:
    with standing(tmp_path, llama_folder) as stand:
        client = stand.client("acme")
        for job in ("runs", "starts", "ended"):
            client.create_job(job, llama_folder, rank=2)
        model = client.at_job("runs").model(llama_folder, 2)
        model.forward_backward(data)
        model.step(ADAM)
        assert model.run("save_weights", {"path": "step-1"})["path"] == "step-1"
        model.run("save_weights_for_sampler", {"path": "out"})
        made = promote(client, "out", "mine", "runs")["model"]
        model.forward_backward(data)
        expected = model.step(ADAM), *model.logprobs(data)
        listed = client.control("GET", "rlorTrainerJobs/runs/checkpoints")
        client.control("DELETE", "rlorTrainerJobs/ended")
    records = Records.open(f"sqlite:///{tmp_path}/records.sqlite")
    # As a server leaves it that is killed while it fetches a model.
    records.update_job("acme", "starts", JobState.CREATING, "", datetime.now(UTC))
    records.close()
    with standing(tmp_path, llama_folder) as stand:
        client = Stock(stand.http, client.key)  # the key is still good
        assert [job["name"][-4:] for job in client.control("GET", "rlorTrainerJobs")["rlorTrainerJobs"]] == [
            "runs",
            "arts",
        ]
        assert state_of(client, "runs") == "JOB_STATE_RUNNING"
        wait_for("JOB_STATE_RUNNING", client, "starts")
        operation = {"name": "accounts/acme/operations/mine", "done": True, "response": made}
        assert client.control("GET", "operations/mine") == operation
        assert client.control("GET", "rlorTrainerJobs/runs/checkpoints") == listed
        root = client.at_job("runs")
        lost = refusal(lambda: root.post("get_info", {"model_id": model.model_id}))
        assert (lost.status, "started anew" in lost.text) == (410, True)
        assert root.get("list_checkpoints") == {"checkpoints": ["step-1"]}
        again = root.model(llama_folder, 2)
        again.run("load_weights", {"path": "step-1", "optimizer": True})
        again.forward_backward(data)
        assert (again.step(ADAM), *again.logprobs(data)) == expected


# The models of a job


def test_a_model_of_a_job_is_one_that_the_job_was_made_for(client: Stock, llama_folder: str) -> None:
    client.create_job("lora", llama_folder, rank=4)
    client.create_job("full", llama_folder, rank=0)
    lora, full = client.at_job("lora"), client.at_job("full")
    for root, rank, reason in ((lora, 8, "rank"), (lora, 0, "rank"), (full, 2, "rank")):
        with pytest.raises((Failure, Refusal), match=reason):
            root.model(llama_folder, rank)
    for root, rank in ((lora, 4), (lora, 2), (lora, None), (full, 0), (full, None)):
        root.model(llama_folder, rank)


def test_a_forward_only_job_makes_frozen_models_whatever_its_client_says(
    client: Stock, stand: Standing, llama_folder: str, data
) -> None:
    job = client.create_job("reference", llama_folder, rank=0, forwardOnly=True)
    assert job["forwardOnly"] is True
    root = client.at_job("reference")
    for rank in (0, None):
        model = root.model(llama_folder, rank)  # clients send rank 0 and no base_only
        assert model.forward(data)["loss_fn_outputs"]
        description = stand.engine._host.models[model.model_id].description
        assert not description.trainable
        answer = refusal(lambda m=model: m.forward_backward(data))
        assert (answer.status, "frozen" in answer.text) == (400, True)


# Checkpoints


@pytest.fixture
def trained(client: Stock, llama_folder: str, data) -> StockModel:
    """A model of a job with checkpoints of every kind."""
    client.create_job("trained", llama_folder, rank=2)
    model = client.at_job("trained").model(llama_folder, 2)
    model.forward_backward(data)
    model.step({**SGD_LIKE, "learning_rate": 0.5})
    return model


def rows_of(client: Stock, job: str = "trained", query: str = "?pageSize=200") -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = client.control("GET", f"rlorTrainerJobs/{job}/checkpoints{query}")[
        "checkpoints"
    ]
    return rows


def clock() -> str:
    """As clients write it to compare it with the times of checkpoints."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def test_checkpoints_are_listed_at_once_oldest_first_with_times_that_compare_as_texts(
    client: Stock, trained: StockModel
) -> None:
    times = [clock()]
    for path, name in (
        ("save_weights", "step-2"),
        ("save_weights_for_sampler", "step-2-0a1b2c3d"),
        ("save_weights", "step-10"),
    ):
        assert trained.run(path, {"path": name})["path"] == name  # bare, below a job
        times.append(clock())
    rows = rows_of(client)
    for index, row in enumerate(rows):
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", row["createTime"])
        assert times[index] <= row["createTime"] <= times[index + 1]
        assert row["updateTime"] >= row["createTime"]
    prefix = f"accounts/{client.account}/rlorTrainerJobs/trained/checkpoints/"
    assert [(row["name"], row["checkpointType"], row["promotable"]) for row in rows] == [
        (prefix + "step-2", "CHECKPOINT_TYPE_TRAINING_LORA", False),
        (prefix + "step-2-0a1b2c3d", "CHECKPOINT_TYPE_INFERENCE_LORA", True),
        (prefix + "step-10", "CHECKPOINT_TYPE_TRAINING_LORA", False),
    ]
    assert trained.client.get("list_checkpoints") == {"checkpoints": ["step-2", "step-10"]}


def test_the_type_of_a_checkpoint_says_what_it_holds(
    client: Stock, trained: StockModel, llama_folder: str
) -> None:
    trained.run("save_weights_for_sampler", {"path": "merged", "checkpoint_type": "merged_base"})
    client.create_job("whole", llama_folder)
    whole = client.at_job("whole").model(llama_folder, 0)
    whole.run("save_weights", {"path": "state"})
    whole.run("save_weights_for_sampler", {"path": "export", "checkpoint_type": "base"})
    kinds = [row["checkpointType"] for row in [*rows_of(client), *rows_of(client, "whole")]]
    assert kinds == [
        "CHECKPOINT_TYPE_INFERENCE_BASE",
        "CHECKPOINT_TYPE_TRAINING",
        "CHECKPOINT_TYPE_INFERENCE_BASE",
    ]


def test_checkpoints_come_page_by_page(client: Stock, trained: StockModel) -> None:
    names = [f"step-{number}" for number in range(5)]
    for name in names:
        trained.run("save_weights", {"path": name})
    for size in (1, 2, 5, 200):
        found, token, pages = [], "", 0
        while True:
            query = f"?pageSize={size}" + (f"&pageToken={token}" if token else "")
            page = client.control("GET", f"rlorTrainerJobs/trained/checkpoints{query}")
            found += [row["name"].rpartition("/")[2] for row in page["checkpoints"]]
            pages += 1
            token = page.get("nextPageToken", "")
            if not token:
                break
        assert found == names
        assert pages == -(-5 // size)


@pytest.mark.parametrize(
    "query", ["?pageSize=0", "?pageSize=-1", "?pageSize=x", "?pageToken=x", "?pageToken=-1"]
)
def test_a_page_that_cannot_be_is_refused(client: Stock, trained: StockModel, query: str) -> None:
    assert refusal(lambda: rows_of(client, query=query)).status == 400


def test_the_checkpoints_of_an_unknown_job_are_not_an_empty_list(client: Stock) -> None:
    answer = refusal(lambda: rows_of(client, "never-made"))
    assert (answer.status, "never-made" in answer.text) == (404, True)


def test_names_become_labels_that_stay_apart(client: Stock, trained: StockModel) -> None:
    names = ["Step_1", "step.1", "step-1", "x" * 128, "x" * 127 + "y"]
    for name in names:
        trained.run("save_weights", {"path": name})
    labels = [row["name"].rpartition("/")[2] for row in rows_of(client)]
    assert len(set(labels)) == len(names)
    assert all(re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", label) for label in labels)


def test_a_checkpoint_by_a_model_of_another_job_is_not_this_jobs_of_that_name(
    client: Stock, trained: StockModel, llama_folder: str, data
) -> None:
    trained.run("save_weights", {"path": "step-4"})
    client.create_job("other", llama_folder, rank=2)
    other = client.at_job("other").model(llama_folder, 2)
    before = other.logprobs(data)
    other.run("save_weights", {"path": "step-4"})
    path = f"tinker://{trained.model_id}/weights/step-4"
    answer = refusal(lambda: other.send("load_weights", {"path": path}))
    assert (answer.status, "no model" in answer.text, "cross_job://" in answer.text) == (400, True, True)
    other.run("load_weights", {"path": f"tinker://{other.model_id}/weights/step-4"})
    assert np.array_equal(other.logprobs(data), before)
    plain = client.model(llama_folder, 2)
    saved = plain.run("save_weights", {"path": "step-4"})["path"]
    other.run("load_weights", {"path": saved})


def test_another_job_can_go_on_from_a_checkpoint(
    client: Stock, trained: StockModel, llama_folder: str, data
) -> None:
    trained.run("save_weights", {"path": "step-1"})
    client.create_job("other", llama_folder, rank=2)
    other = client.at_job("other").model(llama_folder, 2)
    assert refusal(lambda: other.run("load_weights", {"path": "step-1", "optimizer": True})).status == 400
    other.run("load_weights", {"path": "cross_job://trained/step-1", "optimizer": True})
    assert np.array_equal(other.logprobs(data), trained.logprobs(data))


# Promotion


def promote(
    client: Stock, checkpoint: str, model: str, job: str | None = "trained", **more: Any
) -> dict[str, Any]:
    account = client.account
    body = {"output_model": f"accounts/{account}/models/{model}", "async_promotion": True, **more}
    if job is not None:
        body["trainer_job_id"] = f"accounts/{account}/rlorTrainerJobs/{job}"
    return client.control("POST", f"checkpoints/{checkpoint}:promote", body)


def test_a_promoted_adapter_is_a_base_to_train_and_an_adapter_to_load(
    client: Stock, trained: StockModel, llama_folder: str, data
) -> None:
    expected = trained.logprobs(data)
    trained.run("save_weights_for_sampler", {"path": "out", "checkpoint_type": "base"})
    model = promote(client, "out", "mine", base_model=llama_folder)["model"]
    name = f"accounts/{client.account}/models/mine"
    assert (model["name"], model["state"], model["kind"]) == (name, "READY", "HF_PEFT_ADDON")
    assert (model["peftDetails"]["baseModel"], model["peftDetails"]["r"]) == (llama_folder, 2)
    assert client.get(f"/v1/{name}") == model
    assert promote(client, "out", "mine")["model"] == model  # again
    client.control("DELETE", "rlorTrainerJobs/trained")  # what becomes of the job does not matter
    client.create_job("next", name, rank=2)
    based = client.at_job("next").model(name, None)
    np.testing.assert_allclose(based.logprobs(data), expected, rtol=0, atol=1e-4)
    client.create_job("warm", llama_folder, rank=2)
    warm = client.at_job("warm").model(llama_folder, 2)
    warm.run("load_adapter", {"adapter_path": name})
    np.testing.assert_allclose(warm.logprobs(data), expected, rtol=0, atol=1e-5)


def test_an_export_under_a_name_that_was_used_before_is_another_model(
    client: Stock, llama_folder: str, data
) -> None:
    """What was loaded from the first is still in memory, and was promoted."""
    model = client.model(llama_folder, 0)

    def export() -> str:
        return str(model.run("save_weights_for_sampler", {"path": "final"})["path"])

    def says(path: str) -> Any:
        body = {"session_id": model.session, "sampling_session_seq_id": next(numbers), "model_path": path}
        sampler = client.post("create_sampling_session", body)["sampling_session_id"]
        asked = {"sampling_session_id": sampler, "seq_id": 0, "num_samples": 1, "prompt": text([5, 6, 7, 8])}
        params = {"max_tokens": 1, "temperature": 0.0}
        asked |= {"sampling_params": params, "prompt_logprobs": True}
        return client.result(client.post("asample", asked))["prompt_logprobs"][1:]

    numbers = itertools.count()
    first = says(export())
    run = model.model_id
    client.ask("DELETE", f"training_runs/{run}/checkpoints/sampler_weights/final")
    model.forward_backward(data)
    model.step(ADAM)
    second = says(export())
    assert not np.allclose(first, second, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rank", [2, 0])
def test_a_promoted_whole_model_is_a_base_to_train(client: Stock, llama_folder: str, data, rank: int) -> None:
    client.create_job("trained", llama_folder, rank=rank)
    model = client.at_job("trained").model(llama_folder, rank)
    model.forward_backward(data)
    model.step({**SGD_LIKE, "learning_rate": 0.5})
    kind = "merged_base" if rank else "base"
    model.run("save_weights_for_sampler", {"path": "out", "checkpoint_type": kind})
    promoted = promote(client, "out", "mine")["model"]
    assert promoted["kind"] == "HF_BASE_MODEL"
    assert "peftDetails" not in promoted
    job = client.create_job("next", promoted["name"])
    assert (job["state"], job["trainingConfig"]["baseModel"]) == ("JOB_STATE_RUNNING", promoted["name"])
    based = client.at_job("next").model(promoted["name"], 0)
    np.testing.assert_allclose(based.logprobs(data), model.logprobs(data), rtol=0, atol=1e-4)
    based.forward_backward(data)
    assert based.step() > 0


def test_checkpoints_of_a_deleted_job_can_be_listed_and_promoted(client: Stock, trained: StockModel) -> None:
    trained.run("save_weights_for_sampler", {"path": "out"})
    before = rows_of(client)
    client.control("DELETE", "rlorTrainerJobs/trained")
    assert rows_of(client) == before
    assert promote(client, "out", "late")["model"]["state"] == "READY"


def test_a_promotion_that_cannot_be_is_refused(client: Stock, trained: StockModel, stand: Standing) -> None:
    trained.run("save_weights", {"path": "state"})
    for name in ("out", "out-2"):
        trained.run("save_weights_for_sampler", {"path": name})
    promote(client, "out", "taken")
    other = stand.client().account
    for status, checkpoint, model, more in (
        (404, "never", "m", {}),
        (404, "out", "m", {"job": "never"}),
        (400, "state", "m", {}),
        (400, "out-2", "taken", {}),
        (400, "out", "Capital", {}),
        (400, "out", "x" * 64, {}),
        (400, "out", "", {}),
        (400, "out", "../../escape", {}),
        (400, "out", "m", {"output_model": f"accounts/{other}/models/m"}),
        (400, "out", "m", {"output_model": None}),
        (403, "out", "m", {"trainer_job_id": f"accounts/{other}/rlorTrainerJobs/trained", "job": None}),
    ):
        answer = refusal(lambda c=checkpoint, m=model, e=more: promote(client, c, m, **e))
        assert answer.status == status, (checkpoint, model, more)
        assert answer.text
    assert refusal(lambda: client.get(f"/v1/accounts/{client.account}/models/m")).status == 404


def test_a_promoted_model_does_not_take_the_place_of_one_with_its_bare_name(tmp_path: Path, data) -> None:
    with standing(tmp_path, "tiny-llama") as stand:
        client = stand.client()
        client.create_job("trained", "tiny-llama", rank=2)
        model = client.at_job("trained").model("tiny-llama", 2)
        before = model.logprobs(data)
        model.forward_backward(data)
        model.step({**SGD_LIKE, "learning_rate": 0.5})
        model.run("save_weights_for_sampler", {"path": "out"})
        promote(client, "out", "tiny-llama")
        assert np.array_equal(client.model("tiny-llama", None).logprobs(data), before)


def test_models_by_name(llama_folder: str, data, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name = "accounts/acme/models/chat"
    catalog = tmp_path / "catalog.yaml"
    catalog.write_text(f"models:\n  {name}: {{source: {llama_folder}}}\n")
    monkeypatch.setenv("FIRESTEEL_CATALOG", str(catalog))
    with standing(tmp_path / "service", name) as stand:
        client = stand.client()
        assert client.get(f"/v1/{name}")["kind"] == "HF_BASE_MODEL"
        for unknown in ("accounts/acme/models/other", f"accounts/{client.account}/models/chat"):
            assert refusal(lambda u=unknown: client.get(f"/v1/{u}")).status == 404
        assert client.create_job("by-name", name, rank=2)["state"] == "JOB_STATE_RUNNING"
        assert client.at_job("by-name").model(name, 2).forward(data)["loss_fn_outputs"]


def test_a_promotion_that_takes_long_is_an_operation_to_ask_for(
    client: Stock, trained: StockModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained.run("save_weights_for_sampler", {"path": "out"})
    monkeypatch.setattr(promotions, "WAIT_SECONDS", 0.0)
    told = [promote(client, "out", "mine")["operation"] for _ in range(2)]  # repeated: the same one
    assert {operation["name"] for operation in told} == {f"accounts/{client.account}/operations/mine"}
    assert told[0]["done"] is False
    for _ in range(200):
        operation = client.control("GET", "operations/mine")
        if operation["done"]:
            break
        time.sleep(0.05)
    assert operation["response"]["name"] == f"accounts/{client.account}/models/mine"
    assert promote(client, "out", "mine").keys() <= {"model", "operation"}
    assert client.ask("GET", f"/v1/accounts/{client.account}/operations/another").status_code == 404
