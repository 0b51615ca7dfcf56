"""Many users on one engine: each gets their own numbers and their share, and nobody notices another's mistakes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import VOCABULARY, make_pairs
from firesteel.engine import host
from firesteel.model_size import ACTIVATION_TOKEN_BUDGET
from firesteel.service.service import Limits
from stock import ADAM, Failure, Refusal, Standing, StockModel, as_json, call, standing, text
from transports import RecordingEngine


class TurnsEngine(RecordingEngine):
    """A real engine that also writes down whose operations ran, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[str] = []

    def submit(self, operation, lane=""):
        future = super().submit(operation, lane)
        future.add_done_callback(lambda _: self.ran.append(lane))
        return future


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory, llama_folder: str) -> Iterator[Standing]:
    with standing(tmp_path_factory.mktemp("service"), llama_folder, engine=TurnsEngine()) as made:
        yield made


@pytest.fixture
def rows(rng: np.random.Generator) -> list[list[dict[str, Any]]]:
    """Data of several users."""
    return [[as_json(datum) for datum in make_pairs(rng, 2)] for _ in range(3)]


def trained(model: StockModel, data: list[dict[str, Any]], steps: int = 2) -> list[Any]:
    """Everything that a user sees of a short training."""
    seen: list[Any] = []
    for _ in range(steps):
        kept = model.forward(data)
        seen.append(kept["loss_fn_outputs"])
        seen.append(model.forward_backward(data)["loss_fn_outputs"])
        seen.append(model.step(ADAM))
    return [*seen, model.logprobs(data).tolist()]


@pytest.mark.parametrize("rank", [2, 0])
def test_users_at_the_same_time_get_the_numbers_of_each_alone(
    stand: Standing, llama_folder: str, rows, rank: int
) -> None:
    def user(number: int) -> list[Any]:
        model = stand.client().model(llama_folder, rank, seed=number)
        return trained(model, rows[number])

    alone = [user(number) for number in range(len(rows))]
    with ThreadPoolExecutor(len(rows)) as pool:
        together = list(pool.map(user, range(len(rows))))
    assert together == alone
    assert len({str(seen) for seen in alone}) == len(rows)


def test_adapters_share_one_base_and_whole_models_do_not(stand: Standing, llama_folder: str) -> None:
    def network(rank: int | None) -> int:
        model = stand.client().model(llama_folder, rank)
        return id(stand.engine._host.models[model.model_id].trainer.base.network)

    shared = {network(2), network(4), network(None)}
    assert len(shared) == 1
    assert len({network(0), network(0), *shared}) == 3


def test_one_users_mistakes_change_nothing_for_another(stand: Standing, llama_folder: str, rows) -> None:
    calm = trained(stand.client().model(llama_folder), rows[0])
    good, bad = stand.client().model(llama_folder), stand.client().model(llama_folder)
    done = threading.Event()

    def disturb() -> int:
        rounds = 0
        while not done.is_set() or not rounds:
            for content in (
                {"forward_backward_input": call([])},
                {"forward_backward_input": "nonsense"},
                {"forward_backward_input": call([{**rows[1][0], "model_input": text([VOCABULARY])}])},
                {"forward_backward_input": call(rows[1])},
            ):
                try:
                    bad.run("forward_backward", content)
                except (Refusal, Failure):
                    rounds += 1
            bad.step({**ADAM, "learning_rate": 1e-3})
        return rounds

    with ThreadPoolExecutor(1) as pool:
        disturbing = pool.submit(disturb)
        seen = trained(good, rows[0])
        done.set()
        assert disturbing.result() >= 3
    assert seen == calm


def test_the_graphs_of_all_users_together_are_bounded(
    tmp_path: Path, stand: Standing, llama_folder: str, rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever finds no room has their forward computed again for its backward: slower, the same numbers."""
    model = stand.client().model(llama_folder)
    tokens = int(model.forward(rows[0])["metrics"]["computed_tokens:sum"])
    expected = trained(stand.client().model(llama_folder), rows[0], steps=1)
    monkeypatch.setattr(host, "SHARED_BUDGETS", 2)
    monkeypatch.setitem(ACTIVATION_TOKEN_BUDGET, "cpu", tokens)
    with standing(tmp_path, llama_folder) as full:
        users = [full.client().model(llama_folder) for _ in range(4)]
        outputs = [user.forward(rows[0])["loss_fn_outputs"] for user in users]
        hosted = [full.engine._host.models[user.model_id] for user in users]
        assert [one.graph_tokens for one in hosted] == [tokens, tokens, 0, 0]
        for user, output in zip(users, outputs, strict=True):
            seen = [output, user.forward_backward(rows[0])["loss_fn_outputs"], user.step(ADAM)]
            assert seen == expected[:3]


def test_what_waits_when_its_session_ends_is_told_so_and_of_nobody_else(
    stand: Standing, llama_folder: str, rows
) -> None:
    other, leaving = stand.client().model(llama_folder), stand.client().model(llama_folder)
    promises = queue(other, rows[0], 20) + queue(leaving, rows[1], 20)
    leaving.client.post(f"sessions/{leaving.session}/finish", {})
    told = [
        leaving.client.ask("POST", "retrieve_future", {"request_id": promise["request_id"]}).text
        for promise in promises[20:]
    ]
    assert any("its session ended" in text or "there is no request" in text for text in told)
    assert not any(other.model_id in text for text in told)
    other.client.result(promises[19])


def test_a_user_who_leaves_takes_nothing_from_those_who_stay(
    stand: Standing, llama_folder: str, rows
) -> None:
    calm = trained(stand.client().model(llama_folder), rows[0])
    stays, leaves = stand.client().model(llama_folder), stand.client().model(llama_folder)
    first = trained(stays, rows[0], steps=1)
    leaves.forward(rows[0])  # with a forward kept for a backward that never comes
    leaves.client.post(f"sessions/{leaves.session}/finish", {})
    assert first[:-1] + trained(stays, rows[0], steps=1) == calm


def test_two_models_of_one_session_are_numbered_apart(stand: Standing, llama_folder: str, rows) -> None:
    client = stand.client()
    one = client.model(llama_folder)
    other = client.model(llama_folder, 2, one.session, 1)
    assert one.forward(rows[0]) == other.forward(rows[0])
    one.forward_backward(rows[0])
    with pytest.raises(Failure, match="no gradient"):
        other.step()
    assert one.step() > 0


def queue(model: StockModel, data: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    return [model.send("forward", {"forward_input": call(data)}) for _ in range(count)]


def between(ran: list[str], mine: str, others: set[str]) -> list[int]:
    """How many operations of others ran before each of mine, since the one before."""
    found, waited = [], 0
    for lane in ran:
        if lane == mine:
            found.append(waited)
            waited = 0
        elif lane in others:
            waited += 1
    return found


@pytest.mark.parametrize(("users", "count"), [(1, 100), (3, 20)])
def test_queued_operations_make_another_user_wait_for_one_a_turn(
    stand: Standing, llama_folder: str, rows, users: int, count: int
) -> None:
    engine = stand.engine
    assert isinstance(engine, TurnsEngine)
    greedy = [stand.client().model(llama_folder) for _ in range(users)]
    modest = stand.client().model(llama_folder)
    gate = threading.Event()
    held = stand.engine._host.models[greedy[0].model_id].trainer.base.network.model.layers[0]
    hook = held.register_forward_pre_hook(lambda *_: gate.wait(60) and None)  # all of it waits at once
    try:
        promises = [promise for model in greedy for promise in queue(model, rows[0], count)]
        late = queue(modest, rows[1], 3)
        found = modest.client.get("/status")
        assert (found["waiting"] >= count * users, found["sessions"][0]["waiting"]) == (True, 3)
        engine.ran.clear()
        gate.set()
        for promise in late:
            modest.client.result(promise)
        ran = list(engine.ran)
    finally:
        hook.remove()
        gate.set()
    waited = between(ran, modest.session, {model.session for model in greedy})
    assert len(waited) == 3
    # The one that runs already, and one of each lane a turn.
    assert max(waited) <= users + 1
    assert len(promises) == count * users
    for model in greedy:
        model.client.post(f"sessions/{model.session}/finish", {})


def test_a_user_who_asks_again_and_again_gets_in_between(stand: Standing, llama_folder: str, rows) -> None:
    engine = stand.engine
    assert isinstance(engine, TurnsEngine)
    greedy, modest = stand.client().model(llama_folder), stand.client().model(llama_folder)
    gate = threading.Event()
    held = engine._host.models[greedy.model_id].trainer.base.network
    hook = held.register_forward_pre_hook(lambda *_: gate.wait(60) and None)  # all of it waits at once
    try:
        promises = queue(greedy, rows[0], 50)
        first = modest.send("forward", {"forward_input": call(rows[1])})
        engine.ran.clear()
        gate.set()
        modest.client.result(first)
        for _ in range(2):
            modest.forward(rows[1])  # each sent when the last is there
    finally:
        gate.set()
        hook.remove()
    before = between(engine.ran, modest.session, {greedy.session})
    assert len(before) == 3
    assert before[0] <= 2  # in the order of arrival it would have been 50
    greedy.client.result(promises[-1])


def test_a_user_who_queues_too_much_is_told_to_come_back_and_loses_no_number(
    tmp_path: Path, llama_folder: str, rows
) -> None:
    with standing(tmp_path, llama_folder, limits=Limits(waiting=2)) as stand:
        model = stand.client().model(llama_folder, 2)
        forward = {"forward_input": call(rows[0])}
        promises: list[dict[str, Any]] = []
        refusals: list[Refusal] = []
        while len(promises) < 30:
            try:
                promises.append(model.send("forward", forward, seq=len(promises) + 1))
            except Refusal as refusal:
                refusals.append(refusal)
        saves = []
        while len(saves) < 3:  # a save that was refused leaves its name free
            try:
                seq = len(promises) + len(saves) + 1
                saves.append(model.send("save_weights", {"path": f"step-{seq}"}, seq))
            except Refusal as refusal:
                refusals.append(refusal)
        results = [model.client.result(promise) for promise in promises]
        assert [model.client.result(promise)["type"] for promise in saves] == ["save_weights"] * 3
    assert all(result["loss_fn_outputs"] == results[0]["loss_fn_outputs"] for result in results)
    assert {refusal.status for refusal in refusals} == {429}
    assert all(int(refusal.headers["retry-after"]) > 0 for refusal in refusals)
