"""A model that does not fit is refused before it is loaded, with the numbers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from firesteel.engine import host
from firesteel.engine.capacity import Need, capacity_of
from firesteel.engine.engine import Engine
from firesteel.sdk import AdamParams, LoraConfig, ModelError, ServiceClient
from firesteel.sdk.shapes import Mode, TrainingShape

SHAPE = TrainingShape("cpu", "*", "cpu", "float32", Mode.POLICY_TRAINER)


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine()
    yield made
    made.close()


def weights_of(folder: str) -> int:
    return sum(tensor.numel() for tensor in load_file(Path(folder, "model.safetensors")).values())


def test_what_a_model_needs_is_its_parameters_and_four_times_that_where_they_are_trained(
    llama_folder,
) -> None:
    count = weights_of(llama_folder)
    frozen, trained = (Need.of("m", Path(llama_folder), SHAPE, trained) for trained in (False, True))
    assert (frozen.parameters, frozen.bytes, trained.bytes) == (count, 4 * count, 16 * count)


def test_main_memory_is_what_the_system_says_is_available() -> None:
    assert 2**28 < capacity_of("cpu") < 2**50


def test_as_many_models_are_loaded_as_fit_and_the_next_is_refused_with_the_numbers(
    engine: Engine, llama_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = 4 * weights_of(llama_folder)
    monkeypatch.setattr(host, "capacity_of", lambda device: int(11.5 * one))
    service = ServiceClient(engine)
    first, second = (service.create_training_client(llama_folder, 0) for _ in range(2))  # 4 times one each
    adapter = service.create_training_client(llama_folder, lora_config=LoraConfig(2))
    needs = r"needs 0\.00 GiB: [\d,]+ parameters in float32 × 4 \(weights, gradient, AdamW's two moments\)"
    with pytest.raises(ModelError, match=rf"{llama_folder} {needs}.* are taken by models.*unload some"):
        service.create_training_client(llama_folder, 0)
    # Another adapter shares the base that is there: nothing that counts.
    service.create_training_client(llama_folder, lora_config=LoraConfig(2)).unload()
    second.unload()
    again = service.create_training_client(llama_folder, 0)
    for client in (first, adapter, again):
        assert client.optim_step(AdamParams()).exception() is not None  # no gradient, but it is there
