"""Loading: which attention a model runs on, and what its identity depends on."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from trainers import (
    clear,
    full_trainer,
    gradients,
    load,
    lora_trainer,
    relative_difference,
    sequences,
    spread_lora,
)
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    MptConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from conftest import ARCHITECTURES, VOCABULARY, make_datum
from firesteel.engine.head import HeadForm
from firesteel.engine.models import numerics_identity, weights_identity
from firesteel.engine.trainer import Trainer, built_in_loss
from plain import load_plain, plain_logprobs

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
UNSUITABLE = {
    "a sliding window": MistralConfig(**SMALL, initializer_range=0.2, sliding_window=16),
    "soft-capping": Gemma2Config(
        **SMALL, initializer_range=0.2, head_dim=8, attn_logit_softcapping=2.0, sliding_window=128
    ),
    # These two compute their attention by themselves, with positions that a tree would need to change.
    "ALiBi": BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2),
    # So little weight that a wrong mask hardly shows in a small example.
    "ALiBi and small weights": BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
    "ALiBi made from a mask": MptConfig(
        vocab_size=VOCABULARY, d_model=32, n_layers=2, n_heads=4, max_seq_len=128, initializer_range=0.2
    ),
    # Small weights again: only the configuration says that one layer is no attention.
    "a convolution": Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]),
}


def save(config: PretrainedConfig, folder: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture
def folder_of(tmp_path: Path) -> Iterator:  # type: ignore[type-arg]
    """Save a random model of a configuration, with a position limit that any of them has a name for."""

    def build(config: PretrainedConfig) -> Path:
        folder = save(config, tmp_path / "model")
        written = json.loads((folder / "config.json").read_text())
        if not hasattr(config, "max_position_embeddings"):
            written["max_position_embeddings"] = 128
        (folder / "config.json").write_text(json.dumps(written))
        return folder

    return build


@pytest.mark.parametrize("name", UNSUITABLE)
def test_a_model_that_a_tree_cannot_serve_takes_the_plain_path_and_says_so(
    folder_of, rng: np.random.Generator, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    folder = folder_of(UNSUITABLE[name])
    with caplog.at_level(logging.WARNING, logger="firesteel"):
        trainer = full_trainer(folder)
    assert trainer.base.attention == "plain"
    assert [r for r in caplog.records if "test-model" in r.message and "by itself" in r.message]

    prompt = rng.integers(2, VOCABULARY, 30)  # longer than the window
    data = [make_datum(np.concatenate([prompt, rng.integers(2, VOCABULARY, n)]), 30) for n in (12, 9)]
    scores = trainer.forward_backward(sequences(data), built_in_loss("cross_entropy", data, None))
    plain = load_plain(folder)
    for ours, d in zip(scores.logprobs, data, strict=True):
        theirs = plain_logprobs(plain, d)
        assert np.abs(ours - theirs.detach().numpy()).max() <= 1e-5
        (-(theirs * d.loss_fn_inputs["weights"].to_torch()).sum()).backward()
    expected = {n: p.grad for n, p in plain.named_parameters()}
    assert relative_difference(expected, gradients(trainer)) <= 1e-5


class OddHead(torch.nn.Linear):
    """Does something to its output that no configuration tells."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return super().forward(states).sin()


def test_a_head_of_unknown_form_makes_its_own_logits_and_says_so(
    llama_folder: str,
    rng: np.random.Generator,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("transformers.models.llama.modeling_llama.nn.Linear", OddHead)
        with caplog.at_level(logging.WARNING, logger="firesteel"):
            trainer = full_trainer(llama_folder)
        plain = load_plain(llama_folder)
    assert isinstance(plain.lm_head, OddHead)
    assert trainer.base.head is None
    assert [r for r in caplog.records if "all its logits are computed" in r.message]
    assert "own-head" in numerics_identity(trainer.base)

    data = [make_datum(rng.integers(2, VOCABULARY, 20), 9)]
    scores = trainer.forward_backward(sequences(data), built_in_loss("cross_entropy", data, None))
    theirs = plain_logprobs(plain, data[0])
    assert scores.logprobs[0] == pytest.approx(theirs.detach().numpy(), abs=1e-5)
    (-(theirs * data[0].loss_fn_inputs["weights"].to_torch()).sum()).backward()
    assert relative_difference({n: p.grad for n, p in plain.named_parameters()}, gradients(trainer)) <= 1e-5


def test_heads_of_known_form_are_fused(model_folders: dict[str, Path], folder_of) -> None:
    assert all(full_trainer(folder).base.head is not None for folder in model_folders.values())
    capped = Gemma2Config(**SMALL, initializer_range=0.2, head_dim=8, final_logit_softcapping=3.0)
    assert full_trainer(folder_of(capped)).base.head == HeadForm(softcap=3.0)


def test_the_sliding_window_of_that_example_matters(folder_of, rng: np.random.Generator) -> None:
    config = MistralConfig(**SMALL, initializer_range=0.2, sliding_window=16)
    narrow = load_plain(folder_of(config))
    wide = load_plain(folder_of(MistralConfig(**SMALL, initializer_range=0.2, sliding_window=None)))
    row = make_datum(rng.integers(2, VOCABULARY, 40), 30)
    with torch.no_grad():
        difference = (plain_logprobs(narrow, row) - plain_logprobs(wide, row)).abs()
    assert difference[:16].max() <= 1e-5
    assert difference[17:].max() > 0.01


def test_a_window_as_long_as_the_model_reads_is_none(folder_of) -> None:
    assert load(folder_of(MistralConfig(**SMALL, sliding_window=128))).attention == "tree"


def test_a_tree_model_says_nothing(llama_folder: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="firesteel"):
        assert load(llama_folder).attention == "tree"
    assert not caplog.records


def test_a_loaded_base_is_frozen_and_without_dropout(llama_folder: str) -> None:
    network = load(llama_folder).network
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())


def test_weights_that_would_have_to_be_unpickled_are_refused(llama_folder: str, tmp_path: Path) -> None:
    network = AutoModelForCausalLM.from_pretrained(llama_folder)
    network.config.save_pretrained(tmp_path)
    torch.save(network.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(Exception, match="safetensors"):
        load(tmp_path)


def one_ulp_up(network: PreTrainedModel, name: str) -> None:
    weight = network.get_parameter(name).data.view(-1)
    weight[7] = torch.nextafter(weight[7], torch.tensor(torch.inf))


def test_two_loads_have_one_identity(llama_folder: str, tmp_path: Path) -> None:
    copy = shutil.copytree(llama_folder, tmp_path / "elsewhere")
    one, two = load(llama_folder), load(copy)
    assert weights_identity(one.network) == weights_identity(two.network)
    assert numerics_identity(one) == numerics_identity(two)


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.1.mlp.down_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_one_weight_by_one_ulp_is_another_identity(llama_folder: str, name: str) -> None:
    network = load(llama_folder).network
    before = weights_identity(network)
    one_ulp_up(network, name)
    assert weights_identity(network) != before


@pytest.mark.parametrize(
    ("architecture", "setting", "value"),
    [
        ("llama", "rms_norm_eps", 1e-4),
        ("llama", "rope_parameters", {"rope_type": "default", "rope_theta": 12345.0}),
        ("gpt_neox", "use_parallel_residual", False),
        ("qwen2", "hidden_act", "gelu"),
    ],
)
def test_another_configuration_is_another_identity(
    model_folders: dict[str, Path], tmp_path: Path, architecture: str, setting: str, value: object
) -> None:
    changed = shutil.copytree(model_folders[architecture], tmp_path / "changed")
    config = json.loads((changed / "config.json").read_text())
    assert config[setting] != value
    (changed / "config.json").write_text(json.dumps({**config, setting: value}))
    assert weights_identity(load(changed).network) != weights_identity(
        load(model_folders[architecture]).network
    )


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt_neox"])
def test_an_adapter_leaves_the_identity_of_its_base(
    model_folders: dict[str, Path], rng: np.random.Generator, architecture: str
) -> None:
    # The reference of a LoRA policy (adapter off) and a separate load of the base are one reference.
    base = load(model_folders[architecture])
    before = weights_identity(base.network)
    one, two = lora_trainer(base, "one"), lora_trainer(base, "two")
    spread_lora(one)
    data = [make_datum(rng.integers(2, VOCABULARY, 12), 4)]
    one.forward_backward(sequences(data), built_in_loss("cross_entropy", data, None))
    assert weights_identity(base.network) == before
    two.unload()
    clear(one)
    assert (
        weights_identity(base.network)
        == before
        == weights_identity(load(model_folders[architecture]).network)
    )


def test_numerics_name_the_dtype_and_the_attention_path(llama_folder: str, folder_of) -> None:
    single, double = numerics_identity(load(llama_folder)), numerics_identity(load(llama_folder, "float64"))
    plain = numerics_identity(load(folder_of(UNSUITABLE["a sliding window"])))
    assert len({single, double, plain}) == 3
    assert "float32" in single
    assert "float64" in double


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_a_position_embedding_that_depends_on_the_inputs_length_takes_the_plain_path(
    tmp_path: Path, rng: np.random.Generator, kind: str
) -> None:
    """In a packed row a short sequence was turned by its longest neighbour's factors: 0.6 nats off."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0], "attention_factor": 1.0}
    rope = {
        "rope_type": kind,
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        **(factors if kind == "longrope" else {}),
    }
    sizes = ARCHITECTURES["llama"].to_dict() | {"rope_parameters": rope}
    base = load(save(LlamaConfig(**{k: v for k, v in sizes.items() if k != "rope_scaling"}), tmp_path))
    assert base.attention == "plain"
    short, long = (make_datum(rng.integers(2, VOCABULARY, n), 5) for n in (20, 90))
    trainer = Trainer(base, "reference", None, trainable=False)
    loss = built_in_loss("cross_entropy", [short, long], None)
    alone = trainer.forward(sequences([short]), loss).logprobs[0]
    together = trainer.forward(sequences([short, long]), loss).logprobs[0]
    np.testing.assert_array_equal(alone, together)
