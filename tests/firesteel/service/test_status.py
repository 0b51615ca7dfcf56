"""How a server is doing: `/metrics` for Prometheus, `/status` for `firesteel ps`, and its log."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from firesteel.service import keys, status
from firesteel.service.server import JSONLines
from stock import SGD_LIKE, Failure, Refusal, Standing, Stock, standing, text


@pytest.fixture
def stand(tmp_path: Path, llama_folder: str) -> Iterator[Standing]:
    with standing(tmp_path, llama_folder) as made:
        yield made


@pytest.fixture
def data() -> list[dict[str, Any]]:
    targets = {"data": [4, 5, 6], "dtype": "int64", "shape": [3]}
    return [{"model_input": text([3, 4, 5]), "loss_fn_inputs": {"target_tokens": targets}}] * 2


def measured(stand: Standing) -> dict[str, float]:
    """Every sample, as `name{label=value,…}`."""
    answer = stand.http.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    found = {}
    for family in text_string_to_metric_families(answer.text):
        assert family.documentation
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def test_metrics_count_what_happens(stand: Standing, llama_folder: str, data) -> None:
    before = measured(stand)
    assert before["firesteel_queue_depth"] == before["firesteel_sessions"] == before["firesteel_models"] == 0
    client = stand.client()
    model = client.model(llama_folder)
    for _ in range(3):
        model.forward(data)
    model.forward_backward(data)
    model.step()
    with pytest.raises(Failure):
        model.step()  # no gradient
    with pytest.raises(Refusal):
        model.forward([])
    after = measured(stand)
    assert (after["firesteel_sessions"], after["firesteel_models"]) == (1, 1)
    assert after["firesteel_operation_seconds_count{operation=Forward}"] == 3
    assert after["firesteel_operation_seconds_count{operation=ForwardBackward}"] == 1
    assert after["firesteel_operation_seconds_count{operation=OptimStep}"] == 2
    assert after["firesteel_operation_seconds_sum{operation=Forward}"] > 0
    assert after["firesteel_operations_failed_total{category=user,operation=OptimStep}"] == 1
    assert after["firesteel_tokens_total{operation=Forward}"] == 3 * 6
    assert after["firesteel_tokens_total{operation=ForwardBackward}"] == 6
    assert after["firesteel_answers"] == 7  # the model, and what was promised
    assert after["firesteel_requests_total{method=POST,status=400}"] == 1
    assert after["firesteel_requests_total{method=POST,status=200}"] >= 14
    assert 2**24 < after["firesteel_resident_bytes"] < 2**38
    client.post(f"sessions/{model.session}/finish", {})
    ended = measured(stand)
    assert (ended["firesteel_sessions"], ended["firesteel_models"]) == (0, 0)


def test_metrics_name_nobody_and_grow_with_nobody(stand: Standing, llama_folder: str, data) -> None:
    client = stand.client("acme-secret")
    client.create_job("job-secret", llama_folder, rank=2)
    client.at_job("job-secret").model(llama_folder, 2).forward(data)
    names = set(measured(stand))
    for number in range(20):
        stand.http.request(f"WORD{number}", "/nowhere")
        client.ask("GET", f"samplers/{number}")
    everything = stand.http.get("/metrics").text
    for secret in ("secret", client.key, llama_folder, "session-"):
        assert secret not in everything
    new = set(measured(stand)) - names
    assert len(new) <= 6, new  # a handful of methods and statuses, whatever clients ask


def test_status_shows_an_account_its_own(stand: Standing, llama_folder: str, data) -> None:
    client, other = stand.client(), stand.client()
    client.create_job("mine", llama_folder, rank=4)
    client.create_job("gone", llama_folder, rank=4)
    client.control("DELETE", "rlorTrainerJobs/gone")
    model = client.at_job("mine").model(llama_folder, 2)
    frozen = client.model(llama_folder, None)
    other.model(llama_folder)
    found = client.get("/status")
    assert found["account"] == client.account
    assert found["resident_bytes"] > 2**24
    assert found["waiting"] == 0
    job = {"job": "mine", "state": "JOB_STATE_RUNNING", "base_model": llama_folder, "lora_rank": 4}
    assert found["jobs"] == [job]
    described = {"base_model": llama_folder, "lora_rank": 2, "trainable": True}
    assert found["sessions"] == [
        {
            "session": model.session,
            "job": "mine",
            "waiting": 0,
            "models": [{"model": model.model_id, **described}],
        },
        {
            "session": frozen.session,
            "job": None,
            "waiting": 0,
            "models": [{"model": frozen.model_id, **described, "lora_rank": 0, "trainable": False}],
        },
    ]
    assert len(other.get("/status")["sessions"]) == 1
    assert stand.http.get("/status").status_code == 401


def test_the_server_says_that_it_answers(stand: Standing) -> None:
    for path in ("/healthz", "/api/v1/healthz"):
        assert stand.http.get(path).json() == {"status": "ok"}
    assert status.resident_bytes() > 2**24


def lines_of(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """What `firesteel serve` would have written."""
    form = JSONLines()
    texts = [form.format(record) for record in caplog.records if record.name.startswith("firesteel")]
    assert all("\n" not in line for line in texts)
    return [json.loads(line) for line in texts]


def test_every_request_is_one_line_with_its_id_and_none_holds_a_key(
    stand: Standing, llama_folder: str, data, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    client = stand.client()
    unknown = keys.new_key()
    answers = [
        client.ask("GET", "/v1/accounts"),
        client.ask("POST", "create_session", {}),
        client.ask("POST", "forward", {"model_id": "x"}),
        client.ask("GET", "/no/such?key=in-the-query"),
        client.ask("GET", "/healthz"),
        stand.http.get("/v1/accounts", headers={"authorization": f"Bearer {unknown}"}),
        stand.http.get("/v1/accounts", headers={"x-api-key": f"tml-{client.key}"}),
    ]
    lines = [line for line in lines_of(caplog) if "path" in line]
    assert [line["request"] for line in lines] == [answer.headers["x-request-id"] for answer in answers]
    assert [line["status"] for line in lines] == [200, 200, 400, 404, 200, 401, 200]
    assert (lines[0]["method"], lines[0]["path"], lines[0]["level"]) == ("GET", "/v1/accounts", "info")
    assert all(line["ms"] >= 0 and line["time"] > 1.7e9 for line in lines)
    assert len({line["request"] for line in lines}) == len(lines)
    everything = json.dumps(lines_of(caplog))
    for key in (client.key, unknown, "in-the-query"):
        assert key not in everything
        assert all(key not in answer.text for answer in answers)


def test_a_bug_is_told_to_its_client_and_written_down_with_the_id_of_the_request(
    stand: Standing, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    client = stand.client()

    def breaks(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(stand.service.sessions, "create", breaks)
        answer = client.ask("POST", "create_session", {})
    # Not 5xx, which clients repeat for minutes.
    assert (answer.status_code, "ZeroDivisionError: a bug" in answer.text) == (400, True)
    assert answer.json()["error"]["code"] == "operation.failed"
    bug, request = [line for line in lines_of(caplog) if line.get("path") != "/v1/accounts"][-2:]
    assert bug["request"] == request["request"] == answer.headers["x-request-id"]
    assert "ZeroDivisionError: a bug" in bug["failed"]
    assert (bug["level"], request["status"]) == ("error", 400)
    assert client.post("create_session", {})["session_id"]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`firesteel serve`, and where it is."""
    home, log = tmp_path / "home", tmp_path / "log"
    command = [str(Path(sys.executable).with_name("firesteel")), "serve", "--port", "0", "--home", str(home)]
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [*command, "--base-model", "tiny-llama"], stdout=subprocess.PIPE, stderr=stderr, text=True
        )
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("firesteel serve: http://127.0.0.1:"), log.read_text()
        yield process, line.split()[-1]
        process.kill()
        process.wait()


def test_a_server_as_users_run_it(served: tuple[subprocess.Popen[str], str], tmp_path: Path, data) -> None:
    process, url = served
    assert process.stdout is not None
    key = process.stdout.readline().removeprefix("key: ").strip()
    assert "shown once" in process.stdout.readline()
    with httpx2.Client(base_url=url, timeout=30) as http:
        client = Stock(http, key)
        model = client.model("tiny-llama")
        model.forward_backward(data)
        model.step(SGD_LIKE)
        shown = subprocess.run(
            [process.args[0], "ps", "--url", url],  # type: ignore[index]
            env=os.environ | {"FIRESTEEL_API_KEY": key},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert f"session {model.session}: 0 wait" in shown.stdout
        assert f"model {model.model_id}: tiny-llama, rank 2" in shown.stdout
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) in (0, -signal.SIGTERM)
    log = (tmp_path / "log").read_text()
    # All of it is JSON but the progress of what is fetched, which is for people.
    lines = [json.loads(line) for line in log.splitlines() if not line.startswith("tiny-llama: ")]
    assert [line["path"] for line in lines if "path" in line][-1] == "/status"
    assert key not in log
