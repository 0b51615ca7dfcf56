from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import make_pairs
from firesteel.engine.engine import Engine
from firesteel.sdk import (
    AdamParams,
    ClosedError,
    ConfigError,
    Datum,
    LoraConfig,
    ModelError,
    OperationError,
    Provisioning,
    ServiceClient,
    TrainingClient,
)
from firesteel.sdk.service_client import ReferenceStrategy, decide_reference, policy_mode
from firesteel.sdk.shapes import Mode
from transports import WAYS, Way, way_to

STEP = AdamParams(learning_rate=1e-2)
SHARED, SEPARATE = ReferenceStrategy.SHARED, ReferenceStrategy.SEPARATE

SHAPES = """
shapes:
  policy-small: {base_model: "*", mode: POLICY_TRAINER, device: cpu, dtype: float32, max_context_length: 64}
  lora-small: {base_model: "*", mode: LORA_TRAINER, device: cpu, dtype: float32, max_context_length: 64}
  forward-small: {base_model: "*", mode: FORWARD_ONLY, device: cpu, dtype: float32, max_context_length: 32}
  forward-exact: {base_model: "*", mode: FORWARD_ONLY, device: cpu, dtype: float64}
  somebody-elses: {base_model: other, mode: LORA_TRAINER, device: cpu, dtype: float32}
"""


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small lose more to threads than they gain, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


Connect = Callable[..., ServiceClient]


@pytest.fixture(params=WAYS)
def way(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model_folders: dict[str, Path],
) -> Iterator[Way]:
    """All of this file holds for a trainer in this process and for one behind HTTP."""
    catalog = tmp_path / "catalog.yaml"
    catalog.write_text(SHAPES)
    monkeypatch.setenv("FIRESTEEL_CATALOG", str(catalog))
    with way_to(request.param, tmp_path / "service", *map(str, model_folders.values())) as made:
        yield made


@pytest.fixture
def engine(way: Way) -> Engine:
    return way.engine


@pytest.fixture
def connect(way: Way, llama_folder: str) -> Connect:
    def build(**settings: object) -> ServiceClient:
        return ServiceClient(way.transport, Provisioning(**{"base_model": llama_folder, **settings}))  # type: ignore[arg-type]

    return build


@pytest.fixture
def data(rng: np.random.Generator) -> list[Datum]:
    return make_pairs(rng, 1)


def logprobs(client: TrainingClient, data: list[Datum]) -> np.ndarray:
    return np.concatenate([o["logprobs"].to_numpy() for o in client.forward(data).loss_fn_outputs])


def train(client: TrainingClient, data: list[Datum]) -> None:
    for _ in range(2):
        client.forward_backward(data)
        client.optim_step(STEP).result()


def base_of(engine: Engine, client: TrainingClient) -> object:
    return engine._host.models[client.model_id].trainer.base.network


# The strategy


@pytest.mark.parametrize(
    ("rank", "shape", "strategy"),
    [(8, None, SHARED), (8, "s", SEPARATE), (0, None, SEPARATE), (0, "s", SEPARATE)],
)
def test_a_lora_policy_shares_its_base_unless_a_reference_shape_is_given(rank, shape, strategy) -> None:
    assert decide_reference(rank, shape) is strategy


@pytest.mark.parametrize(
    ("rank", "mode"), [(0, Mode.POLICY_TRAINER), (1, Mode.LORA_TRAINER), (8, Mode.LORA_TRAINER)]
)
def test_the_rank_decides_the_kind_of_shape(rank, mode) -> None:
    assert policy_mode(rank) is mode


@pytest.mark.parametrize(
    ("rank", "shape", "models", "loads"),
    [(0, None, 2, 2), (8, None, 2, 1), (0, "forward-exact", 2, 2), (8, "forward-exact", 2, 2)],
)
def test_the_engine_holds_the_models_that_the_strategy_asks_for(
    rank, shape, models, loads, connect, engine, data
) -> None:
    service = connect(lora_rank=rank, reference_training_shape_id=shape)
    policy = service.create_training_client()
    assert len(engine._host.models) == 1
    reference = service.create_reference_client()
    assert len(engine._host.models) == models
    assert len({id(base_of(engine, client)) for client in (policy, reference)}) == loads
    assert not reference.description.trainable
    assert policy.description.lora_rank == rank
    assert service.trainer_job_id == policy.model_id
    separate = decide_reference(rank, shape) is SEPARATE
    assert service.reference_trainer_job_id == (reference.model_id if separate else None)
    np.testing.assert_allclose(logprobs(policy, data), logprobs(reference, data), atol=1e-5)


@pytest.mark.parametrize("rank", [0, 2])
def test_the_reference_stays_what_the_policy_was_at_the_start(rank, connect, data) -> None:
    service = connect(lora_rank=rank)
    policy = service.create_training_client()
    start = logprobs(policy, data)
    early = service.create_reference_client()
    train(policy, data)
    late = service.create_reference_client()
    assert np.abs(logprobs(policy, data) - start).max() > 1e-2
    for reference in (early, late):
        np.testing.assert_allclose(logprobs(reference, data), start, atol=1e-5)
    assert early.identify().result() == late.identify().result()
    assert policy.identify().weights != early.identify().weights


def test_a_shared_reference_is_that_of_the_policy_named(connect, engine, llama_folder, data) -> None:
    service = connect(lora_rank=2)
    first, second = service.create_training_client(seed=1), service.create_training_client(seed=2)
    for policy in (first, second):
        train(policy, data)
    reference = service.create_reference_client(policy_client=first)
    assert base_of(engine, reference) is base_of(engine, first)
    assert service.trainer_job_id == second.model_id


def test_a_lora_reference_before_any_policy_is_refused(connect) -> None:
    with pytest.raises(ConfigError, match="create_training_client first"):
        connect(lora_rank=2).create_reference_client()


def test_a_policy_that_trains_all_weights_has_no_base_to_share(connect) -> None:
    full = connect(lora_rank=0).create_training_client()
    with pytest.raises(ConfigError, match=f"there is none \\(there is: {full.model_id} "):
        connect(lora_rank=2).create_reference_client(policy_client=full)


def test_the_rank_may_come_from_the_calls(connect, engine) -> None:
    service = connect()
    policy = service.create_training_client(lora_rank=2)
    reference = service.create_reference_client(lora_rank=2)
    assert base_of(engine, policy) is base_of(engine, reference)
    assert service.reference_trainer_job_id is None


# Shapes


def test_a_named_shape_is_used_and_its_context_is_the_limit(connect, data) -> None:
    service = connect(lora_rank=2, training_shape_id="lora-small")
    assert service.max_context_length is None
    policy = service.create_training_client()
    assert policy.description.shape.name == "lora-small"
    assert policy.description.max_context_length == 64
    assert service.max_context_length == 64


def test_each_model_has_the_context_of_its_own_shape_even_on_one_base(connect, engine) -> None:
    small = connect(lora_rank=2, training_shape_id="lora-small", reference_training_shape_id="forward-small")
    policy, reference = small.create_training_client(), small.create_reference_client()
    whole = connect(lora_rank=2, max_context_length=65).create_training_client()
    lengths = [client.description.max_context_length for client in (policy, reference, whole)]
    assert lengths == [64, 32, 128]


@pytest.mark.parametrize(
    ("rank", "shape", "has", "needs"),
    [
        (0, "lora-small", "LORA_TRAINER", "POLICY_TRAINER"),
        (0, "forward-small", "FORWARD_ONLY", "POLICY_TRAINER"),
        (8, "policy-small", "POLICY_TRAINER", "LORA_TRAINER"),
        (8, "forward-small", "FORWARD_ONLY", "LORA_TRAINER"),
    ],
)
def test_a_policy_on_a_shape_of_another_kind_is_refused_naming_both(
    rank, shape, has, needs, connect, engine
) -> None:
    with pytest.raises(ModelError, match=rf"'{shape}' is a {has}; needed here: {needs} for"):
        connect(lora_rank=rank, training_shape_id=shape).create_training_client()
    assert engine._host.models == {}


def test_a_reference_runs_forward_only_or_as_a_lora_trainer_and_on_nothing_else(connect) -> None:
    for shape in ("forward-small", "lora-small"):
        service = connect(lora_rank=2, reference_training_shape_id=shape)
        service.create_training_client()
        assert service.create_reference_client().description.shape.name == shape
    service = connect(lora_rank=2, reference_training_shape_id="policy-small")
    with pytest.raises(
        ModelError, match="'policy-small' is a POLICY_TRAINER; needed here: FORWARD_ONLY or LORA_TRAINER for"
    ):
        service.create_reference_client()


def test_a_shape_of_another_model_too_small_a_one_and_an_unknown_one_are_refused(
    connect, llama_folder
) -> None:
    with pytest.raises(
        ModelError, match=f"'somebody-elses' is for 'other'; needed here: LORA_TRAINER for '{llama_folder}'"
    ):
        connect(lora_rank=2, training_shape_id="somebody-elses").create_training_client()
    with pytest.raises(ModelError, match=r"'lora-small' holds 64 tokens; needed here: .* with 65 tokens"):
        connect(lora_rank=2, training_shape_id="lora-small", max_context_length=65).create_training_client()
    with pytest.raises(ModelError, match=r"lora-smal' is not in the catalogue.*lora-small"):
        connect(lora_rank=2, training_shape_id="lora-smal").create_training_client()


# Settings that come from two places


def test_a_setting_that_deviates_from_the_services_is_refused_with_both_values(connect, llama_folder) -> None:
    service = connect(lora_rank=8)
    for create in (service.create_training_client, service.create_reference_client):
        with pytest.raises(ConfigError, match=f"base_model: 'other'.*{llama_folder}"):
            create("other")
        with pytest.raises(ConfigError, match=r"lora_rank: 4 .*8"):
            create(lora_rank=4)
        with pytest.raises(ConfigError, match=r"lora_rank: 0 .*8"):
            create(lora_rank=0)
    with pytest.raises(ConfigError, match=r"lora_rank: 4 .*8"):
        service.create_training_client(lora_config=LoraConfig(rank=4))
    assert service.create_training_client(llama_folder, lora_rank=8).description.lora_rank == 8


def test_a_rank_and_a_lora_config_of_another_rank_are_refused(connect) -> None:
    with pytest.raises(ConfigError, match=r"lora_rank.*4.*8|lora_rank.*8.*4"):
        connect().create_training_client(lora_rank=8, lora_config=LoraConfig(rank=4))


def test_no_base_model_anywhere_is_refused(way) -> None:
    with pytest.raises(ConfigError, match="base_model: give it"):
        ServiceClient(way.transport).create_training_client()


@pytest.mark.parametrize("how", ["lora_rank", "lora_config"])
def test_a_rank_below_zero_is_refused(how, connect) -> None:
    settings = {"lora_rank": -1} if how == "lora_rank" else {"lora_config": LoraConfig(rank=-1)}
    with pytest.raises(ConfigError, match="lora_rank: -1"):
        connect().create_training_client(**settings)


def test_lora_settings_reach_the_adapter(connect, data) -> None:
    service = connect()
    clients = {
        "plain": service.create_training_client(lora_rank=2, lora_alpha=8.0, seed=3),
        "same": service.create_training_client(lora_config=LoraConfig(2, 8.0, 3)),
        "alpha": service.create_training_client(lora_rank=2, lora_alpha=64.0, seed=3),
        "seed": service.create_training_client(lora_rank=2, lora_alpha=8.0, seed=4),
    }
    norms = {}
    for name, client in clients.items():
        client.forward_backward(data)
        norms[name] = client.optim_step(STEP).metrics["grad_norm"]
    assert norms["same"] == norms["plain"]
    assert norms["alpha"] == pytest.approx(8 * norms["plain"], rel=1e-5)
    assert norms["seed"] != norms["plain"]


# Lives


def test_nothing_is_loaded_before_the_first_client(connect, engine) -> None:
    service = connect(lora_rank=2)
    assert engine._host.models == {}
    assert service.trainer_job_id is None
    assert service.reference_trainer_job_id is None
    service.close()


def test_a_separate_reference_is_freed_on_request_and_the_policy_goes_on(connect, engine, data) -> None:
    service = connect(lora_rank=0)
    policy, reference = service.create_training_client(), service.create_reference_client()
    network = weakref.ref(base_of(engine, reference))
    service.release_references()
    service.release_references()
    gc.collect()
    assert network() is None
    assert service.reference_trainer_job_id is None
    with pytest.raises(ClosedError):
        reference.forward(data)
    train(policy, data)
    again = service.create_reference_client()
    assert again.model_id != reference.model_id


def test_releasing_a_shared_reference_leaves_the_policy(connect, engine, data) -> None:
    service = connect(lora_rank=2)
    policy = service.create_training_client()
    service.create_reference_client()
    service.release_references()
    assert list(engine._host.models) == [policy.model_id]
    train(policy, data)


def test_closing_ends_everything_and_may_be_repeated(connect, engine, data, way) -> None:
    service = connect(lora_rank=0)
    policy, reference = service.create_training_client(), service.create_reference_client()
    policy.forward_backward(data)
    service.close()
    service.close()
    assert way.closed
    assert engine._host.models == {}
    for client in (policy, reference):
        with pytest.raises(ClosedError):
            client.forward(data)
    with pytest.raises(ClosedError):
        service.create_training_client()


def test_without_cleanup_closing_leaves_the_policy_in_its_trainer(connect, engine, data, way) -> None:
    service = connect(lora_rank=0, cleanup_trainer_on_close=False)
    policy = service.create_training_client()
    service.create_reference_client()
    service.close()
    assert not way.closed
    assert list(engine._host.models) == [policy.model_id]
    with pytest.raises(ClosedError):
        policy.forward(data)


@pytest.mark.parametrize("cleanup", [True, False])
def test_closing_raises_what_nobody_read_and_still_ends_everything(
    cleanup, connect, engine, data, way
) -> None:
    service = connect(lora_rank=2, cleanup_trainer_on_close=cleanup)
    failing, other = service.create_training_client(), service.create_training_client()
    reference = service.create_reference_client()
    reference.optim_step(STEP)
    failing.optim_step(STEP)
    with pytest.raises(OperationError, match=r"frozen reference|no gradient"):
        service.close()
    assert way.closed == cleanup
    for client in (failing, other, reference):
        with pytest.raises(ClosedError):
            client.forward(data)
    assert set(engine._host.models) == (set() if cleanup else {failing.model_id, other.model_id})
    service.close()


def test_a_with_block_closes_at_its_end(connect, engine, way) -> None:
    with connect(lora_rank=2) as service:
        service.create_training_client()
    assert way.closed


def test_a_close_after_the_trainer_is_gone_says_so_once(connect, way) -> None:
    service = connect(lora_rank=2)
    service.create_training_client()
    way.transport.close()
    with pytest.raises(ClosedError):
        service.close()
    service.close()


def test_a_shared_reference_is_of_the_model_asked_for(way, engine, model_folders, data) -> None:
    """The newest policy's base was given, whatever model was asked for."""
    llama, qwen = str(model_folders["llama"]), str(model_folders["qwen2"])
    service = ServiceClient(way.transport, Provisioning())
    first = service.create_training_client(llama, lora_rank=2)
    service.create_training_client(qwen, lora_rank=2)
    service.create_training_client(llama)  # all weights: it has no base to share
    reference = service.create_reference_client(llama, lora_rank=2)
    assert reference.description.base_model == llama
    assert base_of(engine, reference) is base_of(engine, first)
    with pytest.raises(ConfigError, match="a LoRA policy on 'other', and there is none"):
        service.create_reference_client("other", lora_rank=2)
    with pytest.raises(ConfigError, match="and there is none"):
        service.create_reference_client(qwen, lora_rank=2, policy_client=first)
