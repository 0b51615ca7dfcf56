"""What a model takes, by arithmetic, against what is measured."""

from __future__ import annotations

from math import prod
from pathlib import Path

import pytest
from safetensors.torch import load_file

import firesteel
from conftest import make_pairs
from firesteel.model_size import ModelSize, parameters_of
from firesteel.sdk import LoraConfig, ModelError


def test_parameters_are_counted_from_the_heads_of_the_files(model_folders: dict[str, Path]) -> None:
    for folder in model_folders.values():
        numbers = sum(prod(tensor.shape) for tensor in load_file(folder / "model.safetensors").values())
        assert parameters_of(folder) == ModelSize.of(folder).parameters == numbers


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt_neox"])
def test_an_adapter_has_its_rank_times_so_many(
    model_folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    with firesteel.connect() as service:
        client = service.create_training_client(str(model_folders[name]), lora_config=LoraConfig(3))
        client.save_weights(str(tmp_path / "adapter")).result()
    made = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in made.values()) == 3 * ModelSize.of(model_folders[name]).per_rank


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_activations_are_about_what_a_backward_keeps(model_folders: dict[str, Path], rng, name: str) -> None:
    with firesteel.connect() as service:
        client = service.create_training_client(str(model_folders[name]), 0)
        data = make_pairs(rng, 8, prompt=40, response=20)
        metrics = client.forward_backward(data).result().metrics
    size = ModelSize.of(model_folders[name])
    expected = metrics["computed_tokens:sum"] * size.activations_per_token * 4
    assert 0.6 < expected / metrics["activation_bytes:max"] < 1.6


def test_a_file_that_holds_no_weights_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ModelError, match=r"model\.safetensors is not a file of weights"):
        parameters_of(tmp_path)
