"""Who may do what: keys, accounts that see nothing of each other, and names that lead nowhere else."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest

from conftest import make_pairs
from firesteel.cli.serve import serve
from firesteel.sdk import ConfigError, wire
from firesteel.sdk.operations import IdentifyModel, LoadState, Operation, SaveState
from firesteel.service import keys
from firesteel.service.app import ROOTS, build_app
from stock import ADAM, Refusal, Standing, Stock, StockModel, as_json, call, standing, text

OPEN = {"/healthz", "/metrics", *(f"{root}/healthz" for root in ROOTS)}


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory, llama_folder: str) -> Iterator[Standing]:
    with standing(tmp_path_factory.mktemp("around") / "home", llama_folder) as made:
        yield made


@pytest.fixture
def client(stand: Standing) -> Stock:
    return stand.client()


@pytest.fixture
def data(rng: np.random.Generator) -> list[dict[str, Any]]:
    return [as_json(datum) for datum in make_pairs(rng, 2)]


# Keys


def routes(stand: Standing) -> list[tuple[str, str]]:
    paths = build_app(stand.service).openapi()["paths"]
    return [(method.upper(), path) for path, methods in paths.items() for method in methods]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"x-api-key": ""},
        {"x-api-key": "tml-"},
        {"x-api-key": keys.new_key()},
        {"authorization": "Bearer "},
        {"authorization": f"Bearer {keys.new_key()}"},
        {"authorization": "Basic dXNlcjpwYXNz"},
        {"x-api-key": "k" * 5000},
        {"x-api-key": "\u00e9' OR '1'='1".encode()},
    ],
)
def test_without_a_good_key_every_route_but_the_open_ones_says_so(stand: Standing, headers: Any) -> None:
    found = routes(stand)
    assert len(found) > 60
    for method, path in found:
        where = re.sub(r"\{\w+\}", "x", path)
        answer = stand.http.request(method, where, headers=headers, content=b"{not even JSON")
        if path in OPEN:
            assert answer.status_code == 200
            continue
        assert answer.status_code == 401, (method, path)
        assert answer.json()["error"]["status"] == "UNAUTHENTICATED"
        assert "k" * 100 not in answer.text


def test_paths_that_are_none_say_nothing_without_a_key(stand: Standing) -> None:
    for path in ("/", "/admin", "/api/v1/no_such", "/v1/accounts/x"):
        assert stand.http.get(path).status_code == 401


def test_a_key_opens_in_every_spelling_that_clients_have(stand: Standing) -> None:
    key = keys.create(stand.service.records, "", "spelling")[1]
    for headers in (
        {"x-api-key": key},
        {"X-Api-Key": key},
        {"X-API-KEY": f"tml-{key}"},
        {"Authorization": f"Bearer {key}"},
        {"authorization": f"bearer tml-{key}"},
        {"x-api-key": f" {key} "},
    ):
        for path in ("/v1/accounts", "/api/v1/list_checkpoints"):
            assert stand.http.get(path, headers=headers).status_code == 200, headers
    swapped = {"x-api-key": key.swapcase()}
    assert stand.http.get("/v1/accounts", headers=swapped).status_code == 401


def test_a_revoked_key_opens_nothing_from_then_on(stand: Standing, llama_folder: str) -> None:
    records = stand.service.records
    key, secret = keys.create(records, "", "leaver")
    model = Stock(stand.http, secret).model(llama_folder)
    records.revoke_key(key.key_id, key.created)
    with pytest.raises(Refusal, match="revoked") as caught:
        model.forward([])
    assert caught.value.status == 401
    other = Stock(stand.http, keys.create(records, "", "leaver")[1])
    assert other.post("get_info", {"model_id": model.model_id})  # what the account has is still there


def test_without_authentication_everything_belongs_to_one_account(tmp_path: Path, llama_folder: str) -> None:
    with standing(tmp_path, llama_folder, no_auth=True) as stand:
        client = Stock(stand.http, keys.new_key())  # one that was never made
        assert client.account == "local"
        assert client.model(llama_folder).model_id
        assert stand.http.get("/v1/accounts").json() == {"accounts": [{"name": "accounts/local"}]}
        # A page in a browser that has its own name point to this machine.
        for host in ("evil.example:8350", "127.0.0.1.example.org", "", "["):
            answer = stand.http.get("/v1/accounts", headers={"host": host})
            assert answer.status_code == 403, host
        for host in ("127.0.0.1:8350", "[::1]:8350", "localhost"):
            assert stand.http.get("/v1/accounts", headers={"host": host}).status_code == 200, host


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "example.org", "127.0.0.1.example.org", ""])
def test_a_server_without_keys_listens_to_this_machine_only(host: str) -> None:
    with pytest.raises(ConfigError, match="--no-auth: allowed on loopback only"):
        serve(host=host, port=0, no_auth=True)


# Two accounts


@pytest.fixture
def owner(client: Stock, llama_folder: str) -> StockModel:
    """What another account must not reach: a job, its model, and what that has left behind."""
    client.create_job("secret-job", llama_folder, rank=2)
    model = client.at_job("secret-job").model(llama_folder, 2)
    for path in ("save_weights", "save_weights_for_sampler"):
        model.run(path, {"path": f"named-{path}"})
        model.run(path, {"path": f"unnamed-{path}"})
    return model


def refused(answer: httpx2.Response, of: StockModel, stand: Standing, *statuses: int) -> None:
    """With nothing said that its owner alone knows."""
    assert answer.status_code in (statuses or (403, 404, 410)), answer.text
    assert answer.json()["error"]["message"]
    for secret in (of.client.key, str(stand.service.checkpoints._home), "unnamed-save"):
        assert secret not in answer.text


def test_another_account_reaches_no_session_model_or_result(owner: StockModel, stand: Standing, data) -> None:
    stranger = stand.client()
    promise = owner.send("forward", {"forward_input": call(data)})
    sampler = owner.run("save_weights_for_sampler", {"sampling_session_seq_id": 0})["sampling_session_id"]
    seq = next(owner.numbers)
    session, model = {"session_id": owner.session}, {"model_id": owner.model_id, "seq_id": seq}
    asked = {"sampling_session_id": sampler, "seq_id": 0, "prompt": text([5]), "sampling_params": {}}
    for path, body in (
        ("session_heartbeat", session),
        (f"sessions/{owner.session}/finish", {}),
        ("create_model", {**session, "model_seq_id": 1, "base_model": "x", "base_only": True}),
        ("get_info", model),
        ("forward", {**model, "forward_input": call(data)}),
        ("forward_backward", {**model, "forward_backward_input": call(data)}),
        ("optim_step", {**model, "adam_params": ADAM}),
        ("save_weights", {**model, "path": "mine"}),
        ("load_weights", {**model, "path": "mine"}),
        ("load_adapter", {**model, "adapter_path": "mine"}),
        ("save_weights_for_sampler", {**model, "path": "mine"}),
        ("create_sampling_session", {**session, "sampling_session_seq_id": 1, "base_model": "x"}),
        ("asample", asked),
        ("retrieve_future", {"request_id": promise["request_id"]}),
        ("unload_model", model),
    ):
        for root in (stranger.root, owner.client.root):
            refused(Stock(stand.http, stranger.key, root).ask("POST", path, body), owner, stand)
    refused(stranger.ask("GET", f"samplers/{sampler}"), owner, stand)
    refused(stranger.ask("POST", "forward", {**model, "forward_input": "nonsense"}), owner, stand, 400)
    # Nothing of that reached the model, and its number is still to be had.
    owner.client.result(promise)
    assert owner.run("forward", {"forward_input": call(data)}, seq)


def test_another_account_sees_no_job_and_no_checkpoint(owner: StockModel, stand: Standing) -> None:
    stranger, account = stand.client(), owner.client.account
    assert stranger.control("GET", "rlorTrainerJobs") == {"rlorTrainerJobs": []}
    config = {"trainingConfig": {"baseModel": "x"}}
    promotion = {"output_model": f"accounts/{stranger.account}/models/m"}
    for method, path, body in (
        ("GET", "rlorTrainerJobs", None),
        ("POST", "rlorTrainerJobs?rlorTrainerJobId=mine", config),
        ("GET", "rlorTrainerJobs/secret-job", None),
        ("DELETE", "rlorTrainerJobs/secret-job", None),
        ("POST", "rlorTrainerJobs/secret-job:resume", None),
        ("GET", "rlorTrainerJobs/secret-job/checkpoints", None),
        ("POST", "checkpoints/named-save-weights-for-sampler:promote", promotion),
        ("GET", "models/any", None),
    ):
        for whose in (account, stranger.account):  # named as what it is, and as one of their own
            if whose == account or path.startswith(("rlorTrainerJobs/", "checkpoints", "models")):
                refused(stranger.ask(method, f"/v1/accounts/{whose}/{path}", body), owner, stand)
    foreign_job = {**promotion, "trainer_job_id": f"accounts/{account}/rlorTrainerJobs/secret-job"}
    path = f"/v1/accounts/{stranger.account}/checkpoints/named-save-weights-for-sampler:promote"
    refused(stranger.ask("POST", path, foreign_job), owner, stand)
    assert owner.client.control("GET", "rlorTrainerJobs/secret-job")["state"] == "JOB_STATE_RUNNING"


def test_another_account_loads_no_checkpoint(
    owner: StockModel, stand: Standing, llama_folder: str, data
) -> None:
    stranger = stand.client()
    mine = stranger.model(llama_folder)
    before = mine.logprobs(data)
    row, export = stand.service.checkpoints.of(owner.client.account)[::2]
    names = ["named-save_weights", "cross_job://secret-job/named-save_weights", row.folder, export.folder]
    names += [f"tinker://{owner.model_id}/weights/named-save_weights"]
    said = {}
    for name in (*names, "tinker://nobody:train:0/weights/never"):
        answers = [
            stranger.ask("POST", "load_weights", mine.body({"path": name, "optimizer": True})),
            stranger.ask("POST", "load_adapter", mine.body({"adapter_path": name})),
            stranger.ask("POST", "weights_info", {"tinker_path": name}),
            stranger.ask(
                "POST",
                "create_sampling_session",
                {"session_id": mine.session, "sampling_session_seq_id": 0, "model_path": name},
            ),
        ]
        for answer in answers:
            if name in (row.folder, export.folder):
                assert answer.status_code == 400
            else:
                refused(answer, owner, stand, 400)
        said[name] = [re.sub(r"'.*?'|models/\S+|jobs/\S+", "…", answer.text) for answer in answers]
    assert said[names[-1]] == said["tinker://nobody:train:0/weights/never"]  # as if it were not there
    assert np.array_equal(mine.logprobs(data), before)
    assert stranger.get("list_checkpoints") == {"checkpoints": []}


def test_a_model_belongs_to_the_job_under_which_it_was_made(
    owner: StockModel, client: Stock, llama_folder: str
) -> None:
    client.create_job("other-job", llama_folder, rank=2)
    for elsewhere in (client, client.at_job("other-job")):
        for path, body in (
            ("get_info", {"model_id": owner.model_id}),
            ("session_heartbeat", {"session_id": owner.session}),
        ):
            answer = elsewhere.ask("POST", path, body)
            assert (answer.status_code, "elsewhere" in answer.text) == (403, True)
    assert client.at_job("other-job").get("list_checkpoints") == {"checkpoints": []}


def operate(client: Stock, session: str, operation: Operation) -> httpx2.Response:
    """An operation as our own client sends it."""
    headers = {
        "x-api-key": client.key,
        "firesteel-request": os.urandom(16).hex(),
        "firesteel-session": session,
    }
    return client.http.post(
        f"{client.root}/operations", content=wire.encode_operation(operation), headers=headers
    )


def test_another_account_reaches_nothing_over_the_wire_of_our_own_client(
    owner: StockModel, stand: Standing, llama_folder: str
) -> None:
    stranger = stand.client()
    refused(operate(stranger, owner.session, IdentifyModel(owner.model_id)), owner, stand)
    mine = stranger.model(llama_folder)
    refused(operate(stranger, mine.session, IdentifyModel(owner.model_id)), owner, stand)
    saved = operate(owner.client, owner.session, SaveState(owner.model_id, next(owner.numbers), "x", {}))
    path = wire.decode_result(SaveState("", 0, "", {}), saved.content).path
    transfer = path.removeprefix("transfer:")
    files = owner.client.get(f"transfers/{transfer}")["files"]
    for method, where in (
        ("GET", f"transfers/{transfer}"),
        ("GET", f"transfers/{transfer}/{files[0]['name']}"),
        ("PUT", f"transfers/{transfer}/{files[0]['name']}"),
    ):
        refused(stranger.ask(method, where), owner, stand, 400, 403, 404, 410)
    stranger.ask("DELETE", f"transfers/{transfer}")  # ends one of their own, of which there is none
    loading = operate(stranger, mine.session, LoadState(mine.model_id, next(mine.numbers), path))
    refused(loading, owner, stand, 400, 403, 404, 410)
    assert owner.client.get(f"transfers/{transfer}")["files"] == files


# Names

EVIL = [
    "..",
    ".",
    "/",
    "../x",
    "a/../../x",
    "/etc/passwd",
    "~/x",
    "C:\\x",
    "%2e%2e%2fx",
    "..%2fx",
    "a\0b",
    "a\nb",
    ".hidden",
    "-rf",
    "a" * 200,
    "a" * 10_000,
    "ä",
    "．．／x",
    "\u202egnp",
    "",
    " ",
]


def tree(folder: Path) -> dict[str, int]:
    """All files and folders but the database's own."""
    found = (path for path in folder.rglob("*") if "records.sqlite" not in path.name)
    # Of folders the names only: one in transit is touched whenever it is asked for.
    return {str(path): path.stat().st_mtime_ns if path.is_file() else 0 for path in found}


@pytest.mark.parametrize("name", EVIL, ids=lambda name: ascii(name)[1:30])
def test_no_name_leads_anywhere(stand: Standing, client: Stock, llama_folder: str, name: str) -> None:
    home = Path(stand.service.checkpoints._home)
    client.create_job("traversal", llama_folder, rank=2)
    root = client.at_job("traversal")
    model = root.model(llama_folder, 2)
    transfer = client.post("transfers")["transfer_id"]
    before = tree(home.parent)
    account = client.account
    for path, content in (
        ("save_weights", {"path": name}),
        ("save_weights_for_sampler", {"path": name}),
        ("load_weights", {"path": name, "optimizer": True}),
        ("load_weights", {"path": f"cross_job://{name}/{name}"}),
        ("load_weights", {"path": f"tinker://{name}/weights/{name}"}),
        ("load_adapter", {"adapter_path": name}),
    ):
        answer = root.ask("POST", path, model.body(content))
        assert answer.status_code == 400, (path, answer.text)
    for path, body in (
        ("weights_info", {"tinker_path": name}),
        (
            "create_model",
            {"session_id": model.session, "model_seq_id": 9, "base_model": name, "base_only": True},
        ),
        (
            "create_sampling_session",
            {"session_id": model.session, "sampling_session_seq_id": 0, "model_path": name},
        ),
    ):
        assert root.ask("POST", path, body).status_code == 400, path
    escaped = "".join(f"%{byte:02x}" for byte in name.encode())
    for method, path, body in (
        ("GET", f"/api/v1/transfers/{escaped}", None),
        ("DELETE", f"/api/v1/transfers/{escaped}", None),
        ("PUT", f"/api/v1/transfers/{transfer}/{escaped}", {}),
        ("GET", f"/api/v1/transfers/{transfer}/{escaped}", None),
        ("GET", f"/v1/accounts/{account}/rlorTrainerJobs/{escaped}", None),
        ("GET", f"/v1/accounts/{account}/models/{escaped}", None),
        (
            "POST",
            f"/v1/accounts/{account}/rlorTrainerJobs?rlorTrainerJobId={escaped}",
            {"trainingConfig": {"baseModel": llama_folder}},
        ),
        (
            "POST",
            f"/v1/accounts/{account}/checkpoints/{escaped}:promote",
            {"output_model": f"accounts/{account}/models/{name}"},
        ),
        ("POST", f"/training/v1/rlorTrainerJobs/{account}/{escaped}/api/v1/create_session", {}),
    ):
        answer = client.ask(method, path, body)
        if not name.strip("/") and path.endswith((f"rlorTrainerJobs/{escaped}", f"{transfer}/{escaped}")):
            continue  # the list itself
        assert 400 <= answer.status_code < 500, (method, path, answer.text)
    assert tree(home.parent) == before


def test_a_server_that_offers_every_name_offers_no_folder_of_its_own(
    tmp_path: Path, llama_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    near = tmp_path / "near"
    near.mkdir()
    (near / "model").symlink_to(llama_folder)
    monkeypatch.chdir(tmp_path)
    with standing(tmp_path / "home") as stand:
        client = stand.client()
        assert client.model("tiny-llama").model_id
        for path in (
            *(llama_folder, "near/model", "./near/model", "near/../near/model", "near/..", "~", "~root/x"),
            *("..", "/", "near/model/model.gguf", f"/proc/self/cwd/{llama_folder}", "\0", "near/model\0"),
        ):
            with pytest.raises(Refusal) as caught:
                client.model(path, None)
            assert caught.value.status == 400
            with pytest.raises(Refusal) as caught:
                client.create_job("path", path)
            assert caught.value.status == 400
