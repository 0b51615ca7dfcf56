"""Saved states: training goes on from them as if nothing had happened, and nothing damaged or foreign is loaded."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import firesteel
from conftest import make_pairs
from firesteel.engine import states
from firesteel.sdk import (
    AdamParams,
    CheckpointError,
    Datum,
    LoraConfig,
    OperationError,
    ServiceClient,
    StorageError,
    TrainingClient,
)
from firesteel.sealed import MANIFEST

ADAM = AdamParams(learning_rate=1e-2, weight_decay=0.1)
RANKS = pytest.mark.parametrize("rank", [4, 0], ids=["lora", "full-parameter"])


@pytest.fixture
def service() -> Iterator[ServiceClient]:
    with firesteel.connect() as made:
        yield made


@pytest.fixture
def data(rng: np.random.Generator) -> list[Datum]:
    return make_pairs(rng, 3)


def train(policy: TrainingClient, data: list[Datum], steps: int) -> list[float]:
    """Cross-entropy steps; the loss of each."""
    losses = []
    for _ in range(steps):
        losses.append(policy.forward_backward(data).metrics["loss:sum"])
        policy.optim_step(ADAM).result()
    return losses


def bytes_of(policy: TrainingClient, folder: Path) -> dict[str, bytes]:
    """Every tensor of a policy's state."""
    policy.save_state(folder).result()
    files = (states.WEIGHTS, states.OPTIMIZER)
    return {
        f"{file}:{name}": t.numpy().tobytes()
        for file in files
        for name, t in load_file(folder / file).items()
    }


@RANKS
def test_a_loaded_state_goes_on_to_the_bit(
    service: ServiceClient, llama_folder: str, data: list[Datum], tmp_path: Path, rank: int
) -> None:
    whole = service.create_training_client(llama_folder, rank)
    train(whole, data, 2)
    whole.save_state(tmp_path / "step-2").result()
    rest = train(whole, data, 3)
    other = service.create_training_client(llama_folder, rank, seed=7)
    train(other, data, 1)
    assert other.load_state_with_optimizer(tmp_path / "step-2").result().differences == ()
    assert train(other, data, 3) == rest
    assert bytes_of(whole, tmp_path / "a") == bytes_of(other, tmp_path / "b")


@RANKS
def test_without_the_optimizer_only_weights_are_taken(
    service: ServiceClient, llama_folder: str, data: list[Datum], tmp_path: Path, rank: int
) -> None:
    policy = service.create_training_client(llama_folder, rank)
    train(policy, data, 2)
    policy.save_state(tmp_path / "saved").result()
    other = service.create_training_client(llama_folder, rank, seed=7)
    train(other, data, 1)
    other.load_state(tmp_path / "saved").result()
    other.save_state(tmp_path / "loaded").result()
    saved, loaded = (load_file(tmp_path / name / states.WEIGHTS) for name in ("saved", "loaded"))
    assert all(torch.equal(saved[name], loaded[name]) for name in saved.keys() | loaded.keys())
    assert load_file(tmp_path / "loaded" / states.OPTIMIZER) == {}


def test_the_state_is_that_of_its_turn_whatever_runs_while_it_is_written(
    service: ServiceClient, llama_folder: str, data: list[Datum], tmp_path: Path
) -> None:
    policy = service.create_training_client(llama_folder, 0)
    train(policy, data, 1)
    early = policy.save_state(tmp_path / "early")
    train(policy, data, 2)  # does not wait for it
    early.result()
    policy.save_state(tmp_path / "late").result()
    other = service.create_training_client(llama_folder, 0)
    train(other, data, 1)
    assert bytes_of(other, tmp_path / "other") == {
        f"{file}:{name}": t.numpy().tobytes()
        for file in (states.WEIGHTS, states.OPTIMIZER)
        for name, t in load_file(tmp_path / "early" / file).items()
    }


def test_notes_come_back_and_what_is_no_json_is_refused_at_once(
    service: ServiceClient, llama_folder: str, tmp_path: Path
) -> None:
    policy = service.create_training_client(llama_folder, 4)
    policy.save_state(tmp_path / "a", {"step": 3, "probes": [0.1, -2.5e-7]}).result()
    assert json.loads((tmp_path / "a" / states.NOTES).read_text()) == {"step": 3, "probes": [0.1, -2.5e-7]}
    for notes in ({"x": object()}, {"x": float("nan")}):
        with pytest.raises(OperationError, match="stored as JSON"):
            policy.save_state(tmp_path / "b", notes)


def test_a_gradient_that_waits_for_its_step_is_not_lost_to_a_checkpoint(
    service: ServiceClient, llama_folder: str, data: list[Datum], tmp_path: Path
) -> None:
    policy = service.create_training_client(llama_folder, 4)
    policy.forward_backward(data).result()
    with pytest.raises(OperationError, match="a gradient has been added"):
        policy.save_state(tmp_path / "a").result()
    policy.optim_step(ADAM).result()
    policy.save_state(tmp_path / "a").result()


def test_loading_drops_the_gradient_and_what_a_backward_would_need(
    service: ServiceClient, llama_folder: str, data: list[Datum], tmp_path: Path
) -> None:
    policy = service.create_training_client(llama_folder, 4)
    policy.save_state(tmp_path / "a").result()
    policy.forward_backward(data).result()
    policy.load_state_with_optimizer(tmp_path / "a").result()
    with pytest.raises(OperationError, match="there is no gradient"):
        policy.optim_step(ADAM).result()


def test_a_reference_is_neither_saved_nor_loaded(
    service: ServiceClient, llama_folder: str, tmp_path: Path
) -> None:
    reference = service.create_reference_client(llama_folder, 0)
    with pytest.raises(OperationError, match="save_state: this model is a frozen reference"):
        reference.save_state(tmp_path / "a").result()


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (
            LoraConfig(rank=2),
            "with lora {'alpha': 32.0, 'rank': 4}, this model is .* with lora {.*'rank': 2}",
        ),
        (LoraConfig(rank=4, alpha=8.0), "'alpha': 32.0.*'alpha': 8.0"),
        (LoraConfig(rank=4, train_mlp=False), "do not train the same weights"),
        (None, "with lora .*, this model is .* with lora None"),
    ],
    ids=["rank", "alpha", "layers", "full"],
)
def test_the_state_of_another_adapter_is_refused_and_nothing_changes(
    service: ServiceClient, llama_folder: str, tmp_path: Path, lora: LoraConfig | None, message: str
) -> None:
    service.create_training_client(llama_folder, 4).save_state(tmp_path / "a").result()
    other = service.create_training_client(llama_folder, 0 if lora is None else None, lora_config=lora)
    before = bytes_of(other, tmp_path / "before")
    with pytest.raises(CheckpointError, match=message):
        other.load_state(tmp_path / "a").result()
    assert bytes_of(other, tmp_path / "after") == before


def test_an_adapter_of_another_base_of_the_same_sizes_is_refused(
    service: ServiceClient, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model_folders["llama"])
    with torch.no_grad():
        next(iter(network.parameters()))[0, 0] += 1
    network.save_pretrained(tmp_path / "model")
    service.create_training_client(str(model_folders["llama"]), 4).save_state(tmp_path / "a").result()
    other = service.create_training_client(str(tmp_path / "model"), 4)
    with pytest.raises(CheckpointError, match="with base_weights"):
        other.load_state(tmp_path / "a").result()


FILES = (states.WEIGHTS, states.OPTIMIZER, states.STATE, states.NOTES, MANIFEST)


class Planted:
    """A pickle that leaves a mark if anything loads it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):  # type: ignore[no-untyped-def]
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("fault", ["truncated", "deleted", "bit flipped", "emptied", "pickle planted"])
def test_any_damage_to_any_file_is_refused_by_name_and_nothing_changes(
    service: ServiceClient, llama_folder: str, data: list[Datum], tmp_path: Path, name: str, fault: str
) -> None:
    policy = service.create_training_client(llama_folder, 4)
    train(policy, data, 1)
    policy.save_state(tmp_path / "a").result()
    path, content = tmp_path / "a" / name, bytearray((tmp_path / "a" / name).read_bytes())
    match fault:
        case "truncated":
            path.write_bytes(content[: len(content) // 2])
        case "deleted":
            path.unlink()
        case "bit flipped":
            content[len(content) * 3 // 4] ^= 1
            path.write_bytes(content)
        case "emptied":
            path.write_bytes(b"")
        case "pickle planted":
            path.write_bytes(pickle.dumps(Planted(tmp_path / "executed")))
    other = service.create_training_client(llama_folder, 4, seed=3)
    before = bytes_of(other, tmp_path / "before")
    with pytest.raises(CheckpointError, match=r"checkpoint .*a is damaged: .*" + name):
        other.load_state_with_optimizer(tmp_path / "a").result()
    assert not (tmp_path / "executed").exists()
    assert bytes_of(other, tmp_path / "after") == before


def test_a_folder_is_never_written_to_twice(
    service: ServiceClient, llama_folder: str, tmp_path: Path
) -> None:
    policy = service.create_training_client(llama_folder, 4)
    policy.save_state(tmp_path / "a").result()
    with pytest.raises(OperationError, match="exists already"):
        policy.save_state(tmp_path / "a").result()


def test_a_place_that_cannot_be_written_to_is_one_error_with_its_path_and_the_client_goes_on(
    service: ServiceClient, llama_folder: str, data: list[Datum], tmp_path: Path
) -> None:
    policy = service.create_training_client(llama_folder, 4)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file/a was not written, [\d,]+ bytes"):
        policy.save_state(tmp_path / "file/a").result()
    assert len(train(policy, data, 1)) == 1


def test_an_environment_that_differs_is_told_and_loaded(
    service: ServiceClient, llama_folder: str, tmp_path: Path
) -> None:
    service.create_training_client(llama_folder, 4).save_state(tmp_path / "a").result()
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with firesteel.connect() as elsewhere:  # an engine takes the number that holds when it starts
            policy = elsewhere.create_training_client(llama_folder, 4)
            told = policy.load_state(tmp_path / "a").result().differences
    finally:
        torch.set_num_threads(threads)
    assert told == (f"threads: {threads}, now {threads + 1}",)
