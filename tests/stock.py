"""What a stock client sends: plain JSON, written out by hand. Shares nothing with our own client and wire."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from starlette.testclient import TestClient

from firesteel.sdk import Datum
from firesteel.service import keys
from firesteel.service.app import build_app
from firesteel.service.service import Limits, Service
from transports import RecordingEngine, service_in

# Plain enough that equal gradients give equal weights and any other gradient gives others.
SGD_LIKE = {"learning_rate": 1e-2, "beta1": 0.0, "beta2": 0.0, "eps": 1.0}
ADAM = {"learning_rate": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.01}


class Refusal(Exception):
    """An answer that is no 200."""

    def __init__(self, answer: httpx2.Response) -> None:
        super().__init__(f"{answer.status_code}: {answer.text}")
        self.status = answer.status_code
        self.headers = answer.headers
        self.body = answer.json()
        self.text = self.body["error"]["message"]


class Failure(Exception):
    """A promise that failed."""

    def __init__(self, body: dict[str, Any]) -> None:
        super().__init__(body["error"])
        assert set(body) == {"error", "category"}
        self.category = body["category"]


@dataclass(frozen=True)
class Stock:
    """A client with a key, at one root of the data plane."""

    http: httpx2.Client
    key: str
    root: str = "/api/v1"

    def ask(self, method: str, path: str, body: Any = None, **options: Any) -> httpx2.Response:
        """Any request below the root, or one to `/v1` by its whole path; whatever comes back."""
        where = path if path.startswith("/") else f"{self.root}/{path}"
        options = {"headers": {"x-api-key": self.key}, **options}
        return self.http.request(method, where, json=body, **options)

    def get(self, path: str) -> dict[str, Any]:
        """What is there. Raises `Refusal`."""
        return _good(self.ask("GET", path))

    def post(self, path: str, body: Any = None) -> dict[str, Any]:
        """The answer to a body. Raises `Refusal`."""
        return _good(self.ask("POST", path, body))

    def result(self, promise: dict[str, Any]) -> dict[str, Any]:
        """What was promised, asked for until it is there. Raises `Failure`."""
        body = {"request_id": promise["request_id"], "allow_metadata_only": False}
        while True:
            answer = self.ask("POST", "retrieve_future", body)
            if answer.status_code == 408:
                assert answer.json()["type"] == "try_again"
                continue
            content = _good(answer)
            if "error" in content:
                raise Failure(content)
            return content

    def session(self) -> str:
        """A new one."""
        answer = self.post("create_session", {"tags": [], "user_metadata": {}, "sdk_version": "0.23.0"})
        return str(answer["session_id"])

    def model(
        self, base_model: str, rank: int | None = 2, session: str | None = None, number: int = 0, **more: Any
    ) -> StockModel:
        """A new model, trainable with an adapter of this rank; 0 is all weights and None a frozen base."""
        session = session or self.session()
        kind: dict[str, Any] = (
            {"base_only": True} if rank is None else {"lora_config": {"rank": rank, "seed": 1, **more}}
        )
        body = {"session_id": session, "model_seq_id": number, "base_model": base_model, **kind}
        made = self.result(self.post("create_model", body))
        assert made["type"] == "create_model"
        return StockModel(self, session, made["model_id"])

    @cached_property
    def account(self) -> str:
        """That of the key."""
        (account,) = self.get("/v1/accounts?pageSize=2")["accounts"]
        return str(account["name"].removeprefix("accounts/"))

    def control(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        """The control plane's answer, of a path below this account. Raises `Refusal`."""
        return _good(self.ask(method, f"/v1/accounts/{self.account}/{path}", body))

    def create_job(
        self, job: str, base_model: str, rank: int = 0, shape: str = "", **more: Any
    ) -> dict[str, Any]:
        """What a Fireworks client provisions. Raises `Refusal`."""
        config = {"baseModel": base_model, "loraRank": rank, "learningRate": 1e-5, **more.pop("config", {})}
        body = {"serviceMode": True, "keepAlive": False, "dataset": "", "trainingConfig": config, **more}
        named = f"&trainingShape={shape}" if shape else ""
        return self.control("POST", f"rlorTrainerJobs?rlorTrainerJobId={job}{named}", body)

    def at_job(self, job: str) -> Stock:
        """The same client below a trainer job."""
        return Stock(self.http, self.key, f"/training/v1/rlorTrainerJobs/{self.account}/{job}/api/v1")


@dataclass
class StockModel:
    """A model, and the numbers of its requests."""

    client: Stock
    session: str
    model_id: str
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def body(self, content: dict[str, Any], seq: int | None = None) -> dict[str, Any]:
        """A request of this model under its next number, or this one."""
        return {"model_id": self.model_id, "seq_id": next(self.numbers) if seq is None else seq, **content}

    def send(self, path: str, content: dict[str, Any], seq: int | None = None) -> dict[str, Any]:
        """The promise of a request. Raises `Refusal`."""
        promise = self.client.post(path, self.body(content, seq))
        assert promise["model_id"] == self.model_id
        return promise

    def run(self, path: str, content: dict[str, Any], seq: int | None = None) -> dict[str, Any]:
        """Its result. Raises `Refusal` and `Failure`."""
        return self.client.result(self.send(path, content, seq))

    def forward(self, data: Sequence[Any], **more: Any) -> dict[str, Any]:
        """`forward` of these data."""
        return self.run("forward", {"forward_input": call(data, **more)})

    def forward_backward(self, data: Sequence[Any], **more: Any) -> dict[str, Any]:
        """`forward_backward` of these data."""
        return self.run("forward_backward", {"forward_backward_input": call(data, **more)})

    def step(self, adam: dict[str, Any] | None = None) -> float:
        """`optim_step`; gives the gradient's norm."""
        answer = self.run("optim_step", {"adam_params": adam or SGD_LIKE})
        return float(answer["metrics"]["grad_norm"])

    def logprobs(self, data: Sequence[Any]) -> np.ndarray:
        """Of all targets in a row."""
        return np.concatenate([values(output) for output in self.forward(data)["loss_fn_outputs"]])


def _good(answer: httpx2.Response) -> dict[str, Any]:
    if answer.status_code != 200:
        raise Refusal(answer)
    # Python reads NaN and Infinity, which are no JSON; these clients do not.
    content: dict[str, Any] = json.loads(answer.content, parse_constant=_no_number)
    return content


def _no_number(constant: str) -> float:
    raise AssertionError(f"{constant} in an answer")


def values(output: dict[str, Any]) -> np.ndarray:
    """The log-probabilities of one datum, flat."""
    return np.asarray(output["logprobs"]["data"])


def call(data: Sequence[Any], loss_fn: str = "cross_entropy", **more: Any) -> dict[str, Any]:
    """The input of a forward: data as JSON, or ours, and a loss."""
    written = [datum if isinstance(datum, dict) else as_json(datum) for datum in data]
    return {"data": written, "loss_fn": loss_fn, **more}


def as_json(datum: Datum) -> dict[str, Any]:
    """A datum of ours as stock clients write it."""
    inputs = {
        name: {"data": tensor.data, "dtype": tensor.dtype, "shape": tensor.shape}
        for name, tensor in datum.loss_fn_inputs.items()
    }
    return {"model_input": text(datum.model_input.to_ints()), "loss_fn_inputs": inputs}


def text(*chunks: Sequence[int]) -> dict[str, Any]:
    """A model input of these chunks."""
    return {"chunks": [{"type": "encoded_text", "tokens": list(chunk)} for chunk in chunks]}


def weighted(datum: dict[str, Any], weights: Sequence[float]) -> dict[str, Any]:
    """The same datum with other weights."""
    old = datum["loss_fn_inputs"]["target_tokens"]
    new = {"data": [float(w) for w in weights], "dtype": "float32", "shape": old["shape"]}
    return {**datum, "loss_fn_inputs": {**datum["loss_fn_inputs"], "weights": new}}


@dataclass(frozen=True)
class Standing:
    """A service in this process, and clients of it."""

    service: Service
    engine: RecordingEngine
    http: TestClient

    def client(self, account: str | None = None) -> Stock:
        """A client with a key of its own, of this account or of a new one."""
        return Stock(self.http, keys.create(self.service.records, "", account)[1])


@contextmanager
def standing(
    folder: Path,
    *base_models: str,
    limits: Limits | None = None,
    engine: RecordingEngine | None = None,
    no_auth: bool = False,
) -> Iterator[Standing]:
    """A service over a real engine, reached without a socket; it ends with the block."""
    engine = engine or RecordingEngine()
    try:
        with (
            service_in(folder, *base_models, engine=engine, limits=limits) as service,
            TestClient(build_app(service, no_auth), "http://localhost") as http,
        ):
            yield Standing(service, engine, http)
    finally:
        engine.close()
