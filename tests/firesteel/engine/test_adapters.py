"""Adapters: off is the base to the bit, on is what peft makes of the exported files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from trainers import (
    LORA,
    full_trainer,
    gradients,
    load,
    lora_trainer,
    pair,
    sequences,
    spread_lora,
    trained_parameters,
)
from transformers import AutoModelForCausalLM, BioGptConfig, GPT2Config, PretrainedConfig, PreTrainedModel

from conftest import ARCHITECTURES, VOCABULARY, make_pairs
from firesteel.engine.models import BaseModel
from firesteel.engine.trainer import Trainer, built_in_loss
from firesteel.sdk import AdamParams, Datum, LoraConfig, ModelInput
from firesteel.sdk.errors import ModelError
from plain import load_plain

STEP = AdamParams(learning_rate=1e-2, weight_decay=0.01)


def score(trainer: Trainer, data: list[Datum]) -> list[np.ndarray]:
    return list(trainer.forward(sequences(data), built_in_loss("cross_entropy", data, None)).logprobs)


def train(trainer: Trainer, data: list[Datum]) -> None:
    trainer.forward_backward(sequences(data), built_in_loss("cross_entropy", data, None))
    trainer.optim_step(STEP)


def everything(trainer: Trainer, rows: list[np.ndarray]) -> np.ndarray:
    """Log-probabilities of the whole vocabulary at every position: the logits but for a constant."""
    targets = [np.tile(np.arange(VOCABULARY), (len(row), 1)) for row in rows]
    data = [Datum(ModelInput.from_ints(r), {"target_tokens": t}) for r, t in zip(rows, targets, strict=True)]
    return np.concatenate(score(trainer, data))


def everything_plain(network: PreTrainedModel, rows: list[np.ndarray]) -> np.ndarray:
    with torch.no_grad():
        logits = [network(input_ids=torch.from_numpy(row)[None], use_cache=False).logits[0] for row in rows]
    return np.concatenate([scores.log_softmax(dim=-1).numpy() for scores in logits])


def probe_rows(rng: np.random.Generator) -> list[np.ndarray]:
    prompt = rng.integers(2, VOCABULARY, 7)
    return [np.concatenate([prompt, rng.integers(2, VOCABULARY, n)]) for n in (5, 4)]


def reference_on(base: BaseModel) -> Trainer:
    return Trainer(base, "reference", None, trainable=False)


def adapted_layers(trainer: Trainer) -> set[str]:
    return {name.split(".lora_")[0] for name in trained_parameters(trainer)}


def weights_of(network: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {
        n.replace(".base_layer.", "."): p.detach().clone()
        for n, p in network.named_parameters()
        if ".lora_" not in n
    }


def save(config: PretrainedConfig, folder: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


# Off is the base, and a fresh one is too


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_base_without_its_adapter_is_the_base_to_the_bit(
    model_folders: dict[str, Path], rng: np.random.Generator, name: str
) -> None:
    data = make_pairs(rng, 2)
    untouched = score(reference_on(load(model_folders[name])), data)
    base = load(model_folders[name])
    policy, reference = lora_trainer(base), reference_on(base)
    fresh = score(policy, data)
    for _ in range(2):
        train(policy, data)
    trained, off = score(policy, data), score(reference, data)
    for ours, base_alone, on, b_zero in zip(off, untouched, trained, fresh, strict=True):
        assert np.array_equal(ours, base_alone)
        assert np.array_equal(b_zero, base_alone)
        assert np.abs(on - base_alone).max() > 0.01
    policy.unload()
    assert all(np.array_equal(a, b) for a, b in zip(score(reference, data), untouched, strict=True))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_training_an_adapter_leaves_the_base_to_the_bit(
    model_folders: dict[str, Path], rng: np.random.Generator, name: str
) -> None:
    base = load(model_folders[name])
    before = weights_of(base.network)
    policy = lora_trainer(base, config=replace(LORA, train_unembed=True))
    for _ in range(3):
        train(policy, make_pairs(rng, 2))
    after = weights_of(base.network)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], before[n]) for n in before)
    assert all(p.grad is None for n, p in base.network.named_parameters() if ".lora_" not in n)


def test_a_seed_makes_the_start_reproducible(llama_folder: str) -> None:
    def start(seed: int) -> dict[str, torch.Tensor]:
        trainer = lora_trainer(load(llama_folder), config=replace(LORA, seed=seed))
        return {n: p.detach().clone() for n, p in trained_parameters(trainer).items()}

    torch.manual_seed(1)
    one = start(5)
    torch.manual_seed(2)
    two, other = start(5), start(6)
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert all(torch.equal(one[n], other[n]) == (".lora_B." in n) for n in one)
    assert all(not one[n].any() for n in one if ".lora_B." in n)


def test_making_an_adapter_draws_no_number_of_the_process(llama_folder: str) -> None:
    base = load(llama_folder)
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    lora_trainer(base)
    assert torch.equal(torch.rand(3), expected)


# Which layers


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ({"train_mlp": False}, {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ({"train_attn": False}, {"gate_proj", "up_proj", "down_proj"}),
        ({"train_attn": False, "train_mlp": False, "train_unembed": True}, {"lm_head"}),
    ],
)
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_the_settings_choose_the_layers(
    model_folders: dict[str, Path], name: str, settings: dict[str, bool], expected: set[str]
) -> None:
    layers = adapted_layers(lora_trainer(load(model_folders[name]), config=LoraConfig(4, **settings)))
    assert {layer.rsplit(".", 1)[-1] for layer in layers} == expected
    assert len(layers) == sum(1 if kind == "lm_head" else 2 for kind in expected)  # two blocks


def test_the_settings_choose_the_layers_of_gpt_neox(model_folders: dict[str, Path]) -> None:
    def chosen(**settings: bool) -> set[str]:
        layers = adapted_layers(
            lora_trainer(load(model_folders["gpt_neox"]), config=LoraConfig(4, **settings))
        )
        return {layer.rsplit(".", 1)[-1] for layer in layers}

    assert chosen(train_mlp=False) == {"query_key_value", "dense"}
    assert chosen(train_attn=False) == {"dense_h_to_4h", "dense_4h_to_h"}


def test_layers_of_one_name_inside_and_outside_attention_are_told_apart(tmp_path: Path) -> None:
    # GPT-2 has a `c_proj` in both places.
    small = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    folder = save(GPT2Config(**small, bos_token_id=1, eos_token_id=1), tmp_path)
    attention = adapted_layers(lora_trainer(load(folder), config=LoraConfig(4, train_mlp=False)))
    rest = adapted_layers(lora_trainer(load(folder), config=LoraConfig(4, train_attn=False)))
    assert {layer.split(".")[-2] for layer in attention} == {"attn"}
    assert {layer.split(".")[-2] for layer in rest} == {"mlp"}
    assert len(attention) == len(rest) == 4


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_an_adapter_of_the_head_is_trained(
    model_folders: dict[str, Path], rng: np.random.Generator, name: str
) -> None:
    data = make_pairs(rng, 2)
    trainer = lora_trainer(load(model_folders[name]), config=replace(LORA, train_unembed=True))
    spread_lora(trainer)
    before = score(trainer, data)
    trainer.forward_backward(sequences(data), built_in_loss("cross_entropy", data, None))
    head = [g for n, g in gradients(trainer).items() if n.startswith("lm_head.")]
    assert len(head) == 2
    assert all(float(g.norm()) > 1e-3 for g in head)
    trainer.optim_step(STEP)
    assert max(np.abs(a - b).max() for a, b in zip(score(trainer, data), before, strict=True)) > 0.01


class Doubled(torch.nn.Linear):
    """A layer that computes otherwise, as quantised ones do."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(states)


def test_a_layer_that_computes_otherwise_does_so_under_an_adapter(
    llama_folder: str, rng: np.random.Generator
) -> None:
    base, data = load(llama_folder), make_pairs(rng, 1)
    usual = score(Trainer(base, "before", None, trainable=False), data)
    base.network.model.layers[0].self_attn.q_proj.__class__ = Doubled
    frozen = score(Trainer(base, "frozen", None, trainable=False), data)
    adapted = score(lora_trainer(base), data)  # a fresh adapter adds nothing
    assert not np.allclose(usual[0], frozen[0], atol=1e-3)
    assert all(np.allclose(one, two, atol=1e-6) for one, two in zip(adapted, frozen, strict=True))


def test_an_adapter_that_would_train_nothing_is_refused(llama_folder: str) -> None:
    with pytest.raises(ModelError, match="nothing would be trained"):
        lora_trainer(load(llama_folder), config=LoraConfig(4, train_attn=False, train_mlp=False))


def test_a_rank_that_no_layer_has_is_refused_before_it_takes_memory(llama_folder: str) -> None:
    lora_trainer(load(llama_folder), config=LoraConfig(32))
    with pytest.raises(ModelError, match=r"lora_rank: 1000000000 is more than .*; at most 32"):
        lora_trainer(load(llama_folder), config=LoraConfig(10**9))


@pytest.mark.parametrize("head_first", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "biogpt"])
def test_an_adapter_chooses_the_same_layers_on_a_base_that_another_has_changed(
    llama_folder: str, tmp_path: Path, architecture: str, head_first: bool
) -> None:
    folder = llama_folder
    if architecture == "biogpt":  # its head is not called `lm_head`
        small = {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        }
        folder = str(save(BioGptConfig(**small, intermediate_size=64), tmp_path))
    with_head, without = replace(LORA, train_unembed=True), LORA
    first, second = (with_head, without) if head_first else (without, with_head)
    base = load(folder)
    lora_trainer(base, "first", first)
    assert adapted_layers(lora_trainer(base, "second", second)) == adapted_layers(
        lora_trainer(load(folder), "second", second)
    )


# Several on one base


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_two_adapters_on_one_base_train_as_if_each_were_alone(
    model_folders: dict[str, Path], rng: np.random.Generator, name: str
) -> None:
    folder = model_folders[name]
    # One's name is the beginning of the other's, and they adapt different layers.
    configs = {"model-1": LORA, "model-10": LoraConfig(2, alpha=4.0, seed=9, train_mlp=False)}
    batches = {who: [make_pairs(rng, 2) for _ in range(3)] for who in configs}
    alone = {}
    for who, config in configs.items():
        trainer = lora_trainer(load(folder), who, config)
        for data in batches[who]:
            train(trainer, data)
        alone[who] = {n: p.detach().clone() for n, p in trained_parameters(trainer).items()}

    base = load(folder)
    shared = {who: lora_trainer(base, who, config) for who, config in configs.items()}
    for step in range(3):
        # The finest interleaving there is: both have a gradient when either steps.
        for who, trainer in shared.items():
            data = batches[who][step]
            trainer.forward_backward(sequences(data), built_in_loss("cross_entropy", data, None))
        for trainer in shared.values():
            trainer.optim_step(STEP)
    for who, trainer in shared.items():
        ours = trained_parameters(trainer)
        assert ours.keys() == alone[who].keys()
        assert all(torch.equal(ours[n], alone[who][n]) for n in ours)


def test_removing_an_adapter_leaves_the_others(llama_folder: str, rng: np.random.Generator) -> None:
    base, data = load(llama_folder), make_pairs(rng, 2)
    untouched = score(reference_on(base), data)
    # One's name is the beginning of the other's.
    one, ten = lora_trainer(base, "model-1"), lora_trainer(base, "model-10", replace(LORA, seed=4))
    for trainer in (one, ten):
        train(trainer, data)
    kept = score(ten, data)
    one.unload()
    assert not any(".model-1." in name for name, _ in base.network.named_parameters())
    assert all(np.array_equal(a, b) for a, b in zip(score(ten, data), kept, strict=True))
    train(ten, data)
    assert any(not np.array_equal(a, b) for a, b in zip(score(ten, data), kept, strict=True))
    again = lora_trainer(base, "model-1")
    assert all(np.array_equal(a, b) for a, b in zip(score(again, data), untouched, strict=True))


def test_the_gradient_of_one_adapter_waits_while_another_works(
    llama_folder: str, rng: np.random.Generator
) -> None:
    base, data = load(llama_folder), make_pairs(rng, 2)
    one = lora_trainer(base, "one")
    one.forward_backward(sequences(data), built_in_loss("cross_entropy", data, None))
    waiting = gradients(one)
    other, reference = lora_trainer(base, "other"), reference_on(base)
    train(other, data)
    score(reference, data)
    other.unload()
    assert waiting.keys() == gradients(one).keys()
    assert all(torch.equal(gradients(one)[n], waiting[n]) for n in waiting)


# What others read


@pytest.mark.parametrize("unembed", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_peft_reads_an_exported_adapter_as_we_do(
    model_folders: dict[str, Path], tmp_path: Path, rng: np.random.Generator, name: str, unembed: bool
) -> None:
    trainer = lora_trainer(load(model_folders[name]), "model-1", replace(LORA, train_unembed=unembed))
    lora_trainer(
        trainer.base, "model-10", replace(LORA, seed=5)
    )  # another on the same base, which must stay out
    for _ in range(3):
        train(trainer, make_pairs(rng, 2))
    trainer.write_weights(tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]

    rows = probe_rows(rng)
    theirs = peft.PeftModel.from_pretrained(load_plain(model_folders[name]), str(tmp_path)).eval()
    assert np.abs(everything(trainer, rows) - everything_plain(theirs, rows)).max() <= 1e-5
    assert np.abs(everything(reference_on(trainer.base), rows) - everything_plain(theirs, rows)).max() > 0.01


def test_an_exported_adapter_has_the_keys_that_servers_look_for(
    llama_folder: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    trainer = lora_trainer(load(llama_folder), "model-1")
    train(trainer, pair(rng))
    trainer.write_weights(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.1.self_attn.q_proj"
    assert tensors[f"{prefix}.lora_A.weight"].shape == (4, 32)
    assert tensors[f"{prefix}.lora_B.weight"].shape == (32, 4)
    assert len(tensors) == 2 * 7 * 2
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 8.0, "LORA")
    assert config["task_type"] == "CAUSAL_LM"
    assert config["inference_mode"] is True
    assert config["base_model_name_or_path"] == llama_folder


def test_an_adapter_can_be_written_while_it_is_trained(
    llama_folder: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    data = [pair(rng) for _ in range(2)]
    straight, saving = (lora_trainer(load(llama_folder)) for _ in range(2))
    for i, batch in enumerate(data):
        train(straight, batch)
        train(saving, batch)
        (tmp_path / str(i)).mkdir()
        saving.write_weights(tmp_path / str(i))
    one, two = trained_parameters(straight), trained_parameters(saving)
    assert all(torch.equal(one[n], two[n]) for n in one)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_transformers_reads_an_exported_model_as_we_do(
    model_folders: dict[str, Path], tmp_path: Path, rng: np.random.Generator, name: str
) -> None:
    trainer = full_trainer(model_folders[name])
    rows = probe_rows(rng)
    before = everything(trainer, rows)
    for _ in range(2):
        train(trainer, make_pairs(rng, 2))
    trainer.write_weights(tmp_path)
    assert "firesteel" not in (tmp_path / "config.json").read_text()
    ours = everything(trainer, rows)
    assert np.abs(ours - everything_plain(load_plain(tmp_path), rows)).max() <= 1e-5
    assert np.abs(ours - everything_plain(AutoModelForCausalLM.from_pretrained(tmp_path), rows)).max() <= 1e-5
    assert np.abs(ours - before).max() > 0.01
    # Writing has not put the model on another path.
    assert np.array_equal(everything(trainer, rows), ours)


def test_an_adapter_on_a_bfloat16_base_is_float32_and_small_steps_move_it(
    llama_folder: str, rng: np.random.Generator
) -> None:
    trainer = lora_trainer(load(llama_folder, "bfloat16"))
    before = {name: p.detach().clone() for name, p in trained_parameters(trainer).items()}
    assert {p.dtype for p in before.values()} == {torch.float32}
    data = make_pairs(rng, 2)
    for _ in range(2):  # B is 0 at first, and with it the gradient of A
        trainer.forward_backward(sequences(data), built_in_loss("cross_entropy", data, None))
        trainer.optim_step(AdamParams(learning_rate=1e-5))
    moved = [float((p != before[name]).float().mean()) for name, p in trained_parameters(trainer).items()]
    assert min(moved) > 0.9


def test_all_weights_are_not_trained_in_bfloat16(llama_folder: str) -> None:
    with pytest.raises(ModelError, match="bfloat16 rounds most steps away"):
        Trainer(load(llama_folder, "bfloat16"), "full", None, trainable=True)
    Trainer(load(llama_folder, "bfloat16"), "reference", None, trainable=False)
