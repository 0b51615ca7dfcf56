"""What a server takes from its clients: no body, however large or strange, ends it or fills its memory."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import select
import socket
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

import firesteel
from conftest import VOCABULARY, make_pairs
from firesteel.sdk import CheckpointError, OperationError
from firesteel.sealed import new_folder
from firesteel.service.service import Limits
from stock import Failure, Refusal, Standing, Stock, StockModel, call, standing, text
from transports import RecordingEngine, Server, service_in, serving

MB = 10**6


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory, llama_folder: str) -> Iterator[Standing]:
    with standing(tmp_path_factory.mktemp("service"), llama_folder, limits=Limits(datums=64)) as made:
        yield made


@pytest.fixture
def client(stand: Standing) -> Stock:
    return stand.client()


@pytest.fixture
def model(client: Stock, llama_folder: str) -> Iterator[StockModel]:
    made = client.model(llama_folder)
    yield made
    client.post(f"sessions/{made.session}/finish", {})


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, llama_folder: str) -> Iterator[Server]:
    """Behind a socket, where a body comes bit by bit."""
    limits = Limits(body_bytes=4 * MB, transfer_bytes=4 * MB)
    engine = RecordingEngine()
    with (
        service_in(tmp_path_factory.mktemp("service"), llama_folder, engine=engine, limits=limits) as service,
        serving(service) as made,
    ):
        yield made
    engine.close()


def datum(length: int = 2) -> dict[str, Any]:
    targets = {"data": [5] * length, "dtype": "int64", "shape": [length]}
    return {"model_input": text([7] * length), "loss_fn_inputs": {"target_tokens": targets}}


# Bodies that are too large


class Growth:
    """The most that this process, client and server in one, grew by."""

    bytes = 0


@contextmanager
def growing() -> Iterator[Growth]:
    growth, over = Growth(), threading.Event()

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    start = resident()

    def watch() -> None:
        while not over.wait(0.002):
            growth.bytes = max(growth.bytes, resident() - start)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield growth
    finally:
        over.set()
        watcher.join()


def send(
    server: Server, head: str, total: int, chunked: bool = False, key: str | None = None
) -> tuple[int, int]:
    """Send a request of many zeros until it is answered; gives the status and how much was sent by then."""
    piece = bytes(MB // 4)
    frame = f"{len(piece):x}\r\n".encode() + piece + b"\r\n" if chunked else piece
    host = urlsplit(server.url)
    with socket.create_connection((host.hostname, host.port), timeout=30) as connection:
        lines = f"{head} HTTP/1.1\r\nhost: x\r\nx-api-key: {key or server.key}\r\ncontent-type: application/json\r\n"
        length = "transfer-encoding: chunked" if chunked else f"content-length: {total}"
        connection.sendall(f"{lines}{length}\r\n\r\n".encode())
        sent = 0
        connection.setblocking(False)
        answer, waiting = b"", frame
        while sent < total:
            readable, writable, _ = select.select([connection], [connection], [], 30)
            if readable:
                break
            if writable:
                try:
                    waiting = waiting[connection.send(waiting) :]
                except OSError:
                    break
                if not waiting:
                    sent, waiting = sent + len(piece), frame
        connection.settimeout(30)
        while b"\r\n\r\n" not in answer:
            received = connection.recv(65536)
            assert received, "closed without an answer"
            answer += received
    return int(answer.split()[1]), sent


@pytest.mark.parametrize("chunked", [False, True], ids=["declared", "without a length"])
def test_a_body_of_200_megabytes_is_refused_and_fills_no_memory(server: Server, chunked: bool) -> None:
    with growing() as growth:
        status, sent = send(server, "POST /api/v1/forward", 200 * MB, chunked)
    assert status == 413
    assert sent < 20 * MB
    assert growth.bytes < 50 * MB
    quick(server)


def test_a_body_without_a_key_is_not_even_read(server: Server) -> None:
    with growing() as growth:
        status, sent = send(server, "POST /api/v1/forward", 200 * MB, chunked=True, key="fs-wrong")
    assert status == 401
    assert sent < 20 * MB  # what fits into the buffers of the system
    assert growth.bytes < 10 * MB


@pytest.mark.parametrize("chunked", [False, True], ids=["declared", "without a length"])
def test_a_file_on_its_way_is_bounded_too(server: Server, chunked: bool) -> None:
    client = Stock(_http(server), server.key)
    transfer = client.post("transfers")["transfer_id"]
    with growing() as growth:
        status, _ = send(server, f"PUT /api/v1/transfers/{transfer}/weights.bin", 200 * MB, chunked)
    assert status == 413
    assert growth.bytes < 50 * MB


def test_more_tokens_than_one_request_may_draw_are_refused_with_the_number(
    stand: Standing, model: StockModel
) -> None:
    answer = model.run("save_weights_for_sampler", {"sampling_session_seq_id": 0})
    params = {"max_tokens": 1025, "temperature": 1.0}
    asked = {"sampling_session_id": answer["sampling_session_id"], "seq_id": 0, "num_samples": 128}
    with pytest.raises(Refusal) as caught:
        model.client.post("asample", {**asked, "prompt": text([5]), "sampling_params": params})
    assert caught.value.status == 400
    assert "131200; this server draws 131072 tokens in one request" in caught.value.text


@pytest.mark.parametrize("name", ["/etc/passwd", "/dev/zero", "../../records.sqlite"])
def test_a_state_that_is_sent_cannot_name_a_file_of_the_server(
    server: Server, llama_folder: str, name: str, tmp_path: Path
) -> None:
    """The manifest is the client's. Were it followed, its hashes would tell what is in any file."""
    with new_folder(tmp_path / "state", 0) as folder:
        for part in ("weights.safetensors", "optimizer.safetensors", "state.json", "notes.json"):
            folder.write(part, [b"{}"])
    manifest = json.loads((tmp_path / "state/manifest.json").read_bytes())
    manifest["files"].append({"name": name, "size": 0, "sha256": "0" * 64})
    listed = json.dumps(manifest["files"], indent=1, sort_keys=True).encode() + b"\n"
    manifest["sha256"] = hashlib.sha256(listed).hexdigest()
    (tmp_path / "state/manifest.json").write_text(json.dumps(manifest))
    # Our client sends any folder; it does not look into a manifest.
    with (
        firesteel.connect(server.url, server.key) as service,
        pytest.raises(CheckpointError, match="is not the name of a file in it"),
    ):
        service.create_training_client(llama_folder, 2, start=str(tmp_path / "state"))


def test_a_transfer_that_nothing_was_sent_to_is_empty(client: Stock) -> None:
    transfer = client.post("transfers")["transfer_id"]
    assert client.get(f"transfers/{transfer}") == {"files": []}


def test_what_our_client_is_refused_at_the_door_does_not_hold_up_what_follows(
    tmp_path: Path, llama_folder: str, rng: np.random.Generator
) -> None:
    """The server has not read the number of a body with too many data: the client gives it up itself."""
    data, engine = make_pairs(rng, 4), RecordingEngine()
    with (
        service_in(tmp_path, llama_folder, engine=engine, limits=Limits(datums=4)) as served,
        serving(served) as made,
        firesteel.connect(made.url, made.key) as service,
    ):
        trainer = service.create_training_client(llama_folder, 2)
        with pytest.raises(OperationError, match="4"):
            trainer.forward(data).result()
        started = time.monotonic()
        assert len(trainer.forward(data[:2]).result().loss_fn_outputs) == 2
        assert time.monotonic() - started < 10
    engine.close()


def test_a_job_with_the_name_of_a_transfer_takes_no_more(server: Server, llama_folder: str) -> None:
    client = Stock(_http(server), server.key)
    client.create_job("transfers", llama_folder)
    status, sent = send(server, f"POST {client.at_job('transfers').root}/forward", 200 * MB, chunked=True)
    assert status == 413
    assert sent < 20 * MB


def test_a_body_that_is_not_as_long_as_it_says_hurts_nobody(server: Server) -> None:
    host = urlsplit(server.url)
    head = f"POST /api/v1/create_session HTTP/1.1\r\nhost: x\r\nx-api-key: {server.key}\r\n"
    head += "content-type: application/json\r\n"
    with socket.create_connection((host.hostname, host.port), timeout=30) as connection:
        connection.sendall(f"{head}content-length: 1000\r\n\r\n{{}}".encode())  # and hangs up
    with socket.create_connection((host.hostname, host.port), timeout=30) as connection:
        connection.sendall(f"{head}content-length: 2\r\n\r\n{{}}".encode() + b"x\r\n\r\n")
        answers = b""
        while received := connection.recv(65536):
            answers += received
    assert answers.startswith(b"HTTP/1.1 200")  # what was declared
    assert b"HTTP/1.1 400" in answers  # the rest is no request
    quick(server)


def _http(server: Server) -> Any:
    import httpx2

    return httpx2.Client(base_url=server.url, timeout=30)


def quick(server: Server) -> None:
    """The server answers at once."""
    start = time.monotonic()
    with _http(server) as http:
        assert http.get("/healthz").status_code == 200
        assert http.get("/v1/accounts", headers={"x-api-key": server.key}).status_code == 200
    assert time.monotonic() - start < 1


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "gzip, identity", "x"])
def test_a_compressed_body_is_refused_unread(stand: Standing, client: Stock, encoding: str) -> None:
    bomb = (gzip.compress if encoding == "gzip" else zlib.compress)(bytes(100 * MB))
    headers = {"x-api-key": client.key, "content-type": "application/json", "content-encoding": encoding}
    with growing() as growth:
        answer = stand.http.post("/api/v1/forward", content=bomb, headers=headers)
    assert (answer.status_code, "compressed" in answer.text) == (415, True)
    assert growth.bytes < 10 * MB


# Bodies that are small, and mean much


def raw(client: Stock, path: str, content: bytes | str, kind: str = "application/json") -> Any:
    headers = {"x-api-key": client.key, "content-type": kind}
    return client.http.post(f"{client.root}/{path}", content=content, headers=headers)


def test_a_million_data_are_refused_and_the_server_goes_on(model: StockModel) -> None:
    one = '{"model_input":{"chunks":[]},"loss_fn_inputs":{}}'
    body = model.body({"forward_input": call([])})
    content = json.dumps(body).replace('"data": []', f'"data": [{",".join([one] * 10**6)}]')
    answer = raw(model.client, "forward", content)
    assert (answer.status_code, "1000000" in answer.text) == (400, True)
    start = time.monotonic()
    assert model.forward([datum()])["loss_fn_outputs"]
    assert time.monotonic() - start < 2


def test_more_data_than_the_limit_are_refused(model: StockModel) -> None:
    with pytest.raises(Refusal, match="65 in one request; this server takes 64") as caught:
        model.forward([datum()] * 65)
    assert caught.value.status == 400
    assert len(model.forward([datum()] * 64)["loss_fn_outputs"]) == 64


MISTAKES = {
    "data": '{"forward_input": {"loss_fn": "cross_entropy", "data": [%s]}}',
    "chunks": '{"forward_input": {"data": [{"model_input": {"chunks": [%s]}, "loss_fn_inputs": {}}]}}',
    "tokens": '{"forward_input": {"data": [{"model_input": {"chunks": [{"tokens": [%s]}]}}]}}',
    "values": '{"forward_input": {"data": [{"loss_fn_inputs": {"w": {"data": [%s], "dtype": "int64"}}}]}}',
    "rows": '{"forward_input": {"data": [{"loss_fn_inputs": {"w": {"sparse_crow_indices": [%s]}}}]}}',
    "columns": '{"forward_input": {"data": [{"loss_fn_inputs": {"w": {"sparse_col_indices": [%s]}}}]}}',
    "dimensions": '{"forward_input": {"data": [{"loss_fn_inputs": {"w": {"shape": [%s]}}}]}}',
}


@pytest.mark.parametrize("where", MISTAKES)
def test_a_million_mistakes_are_one_answer(model: StockModel, where: str) -> None:
    content = MISTAKES[where] % ",".join(["{}"] * 10**6)
    start = time.monotonic()
    with growing() as growth:
        answer = raw(model.client, "forward", content)
    assert answer.status_code == 400
    assert len(answer.content) < 2000
    assert time.monotonic() - start < 3
    assert growth.bytes < 300 * MB  # what JSON makes of it, and not a message for each


@pytest.mark.parametrize("where", ["loss_fn_inputs", "tensor", "loss_fn_config"])
def test_a_hundred_thousand_fields_are_one_mistake(model: StockModel, where: str) -> None:
    many = {f"f{number}": "x" for number in range(10**5)}
    one, config = datum(), {}
    if where == "loss_fn_inputs":
        one["loss_fn_inputs"] = many
    elif where == "tensor":
        one["loss_fn_inputs"]["target_tokens"] |= many
    else:
        config = {"loss_fn_config": many}
    start = time.monotonic()
    with pytest.raises(Refusal, match="at most 64") as caught:
        model.forward([one], **config)
    assert len(caught.value.text) < 2000
    assert time.monotonic() - start < 1
    assert model.forward([datum()])  # the number was used up


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        "[" * 900 + "]" * 900,
        '{"a":' * 500 + "1" + "}" * 500,
        '{"forward_input": ' + "[" * 5000 + "]" * 5000 + "}",
        "",
        " ",
        "null",
        "true",
        "[]",
        '"text"',
        "{",
        '{"model_id": 1}',
        '{"model_id": null, "seq_id": null}',
        '{"seq_id": 1, "seq_id": 2}',
        '{"model_id": "x", "seq_id": ' + "9" * 5000 + "}",
        '{"model_id": "x", "seq_id": 1e999}',
        '{"model_id": "x", "seq_id": NaN}',
        '{"model_id": "\\ud800", "seq_id": 1}',
        '{"model_id": "\\u0000", "seq_id": 1}',
        b"\xff\xfe\x00",
        b"\x00" * 100,
        b"\x1f\x8b\x08\x00",
        b'{"model_id": "\xe9"}',
    ],
    ids=lambda content: ascii(content)[:24],
)
def test_json_that_is_none_or_strange_is_refused(client: Stock, content: bytes | str) -> None:
    for path in ("forward", "create_model", "retrieve_future"):
        answer = raw(client, path, content)
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["message"]
        assert len(answer.content) < 5000


@pytest.mark.parametrize("metadata", ['{"a":' * 600 + "1" + "}" * 600, '{"a": "\\ud800"}'])
def test_metadata_that_cannot_be_written_is_refused(client: Stock, llama_folder: str, metadata: str) -> None:
    session = client.session()
    body = {"session_id": session, "model_seq_id": 0, "base_model": llama_folder, "base_only": True}
    content = json.dumps({**body, "user_metadata": 0}).replace(
        '"user_metadata": 0', f'"user_metadata": {metadata}'
    )
    assert raw(client, "create_model", content).status_code == 400
    assert client.post("create_model", body)


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "x"]
)
def test_a_body_of_another_type_is_refused_with_what_is_expected(model: StockModel, kind: str) -> None:
    content = json.dumps(model.body({"forward_input": call([datum()])}, 1))
    answer = raw(model.client, "forward", content, kind)
    assert (answer.status_code, "application/json" in answer.text) == (400, True)
    assert raw(model.client, "forward", content, "application/json; charset=utf-8").status_code == 200


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none_are_refused_wherever_they_stand(model: StockModel, constant: str) -> None:
    tensor = {"weights": {"data": ["?"], "dtype": "float32", "shape": [1]}}
    unknown: Any = "?"
    for path, content in (
        ("forward", {"forward_input": call([datum()], loss_fn_config={"beta": "?"})}),
        ("forward", {"forward_input": call([{**datum(), "loss_fn_inputs": tensor}])}),
        ("forward", {"forward_input": call([{**datum(), "model_input": text([unknown])}])}),
        ("optim_step", {"adam_params": {"learning_rate": "?"}}),
        ("optim_step", {"adam_params": {"grad_clip_norm": "?"}}),
    ):  # fmt: skip
        answer = raw(model.client, path, json.dumps(model.body(content)).replace('"?"', constant))
        assert answer.status_code == 400, path
        assert "NaN" not in answer.text
    assert model.forward([datum()])


# Models


def test_a_sequence_longer_than_the_context_is_refused_with_both_lengths(model: StockModel) -> None:
    with pytest.raises(Refusal, match=r"data\[1\]: 128 input tokens.*128 tokens") as caught:
        model.forward([datum(), datum(128)])
    assert caught.value.status == 400
    assert len(model.forward([datum(127)])["loss_fn_outputs"][0]["logprobs"]["data"]) == 127


@pytest.mark.parametrize("token", [-1, VOCABULARY, 2**62])
def test_a_token_that_the_model_does_not_know_fails_its_promise(model: StockModel, token: int) -> None:
    with pytest.raises(Failure, match=f"token id {token}") as caught:
        model.forward([{**datum(1), "model_input": text([token])}])
    assert caught.value.category == "user"


def test_a_server_holds_so_many_models_and_takes_another_when_one_has_gone(
    tmp_path: Path, llama_folder: str
) -> None:
    with standing(tmp_path, llama_folder, limits=Limits(models=2)) as stand:
        one, other = stand.client(), stand.client()
        first = one.model(llama_folder)
        other.model(llama_folder, None)
        for client in (one, other):
            with pytest.raises(Refusal, match="holds 2 models and is set to hold 2") as caught:
                client.model(llama_folder)
            assert caught.value.status == 400
        one.result(one.post("unload_model", {"model_id": first.model_id}))
        assert other.model(llama_folder).model_id
