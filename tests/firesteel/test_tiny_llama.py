from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from transformers import AutoModelForCausalLM, AutoTokenizer

from firesteel.engine import tiny_llama

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))  # lone surrogates are no text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny-llama")
    tiny_llama.build(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path):
    return AutoTokenizer.from_pretrained(folder)


def sha256_of_files(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_another_process_in_another_state_writes_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys, pathlib, torch; torch.manual_seed(7); torch.set_default_dtype(torch.float64)\n"
        "from firesteel.engine import tiny_llama; tiny_llama.build(pathlib.Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True)
    assert sha256_of_files(tmp_path) == sha256_of_files(folder)
    assert "model.safetensors" in sha256_of_files(folder)


def test_building_does_not_move_the_callers_random_numbers(tmp_path: Path) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    tiny_llama.build(tmp_path)
    assert torch.equal(torch.rand(3), expected)


@settings(max_examples=300, deadline=None)
@given(text=ANY_TEXT)
@example("a <|im_end|> b<|im_start|>  c , d\r\n\x00 日本 😀 e\u0301")
def test_any_text_goes_to_ids_and_back_exactly(tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@settings(max_examples=100, deadline=None)
@given(text=ANY_TEXT.filter(lambda text: "<|" not in text))
def test_a_token_is_a_byte(tokenizer, text: str) -> None:
    assert tokenizer(text).input_ids == list(text.encode())


def test_the_special_tokens_are_those_of_chatml(tokenizer) -> None:
    assert tokenizer("<|im_start|><|im_end|><|pad|>").input_ids == [256, 257, 258]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|pad|>")
    assert tokenizer.model_max_length == 8192


def test_the_prompt_alone_is_a_prefix_of_the_conversation_in_tokens(tokenizer) -> None:
    prompt = [{"role": "system", "content": " be brief "}, {"role": "user", "content": "hi\n"}]
    whole = [*prompt, {"role": "assistant", "content": " hello "}]
    start = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    ids = tokenizer.apply_chat_template(whole, return_dict=False)
    assert ids[: len(start)] == start
    assert tokenizer.decode(ids[len(start) :]) == " hello <|im_end|>\n"


def test_no_system_prompt_appears_that_was_not_given(tokenizer) -> None:
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n"


def test_tools_are_shown_in_the_system_block_and_calls_in_the_answer(tokenizer) -> None:
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": [{"type": "text", "text": "é?"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"type": "function", "function": {"name": "f", "arguments": {"x": "é"}}},
                {"type": "function", "function": {"name": "g", "arguments": '{"y": 1}'}},
            ],
        },
        {"role": "tool", "content": "42"},
    ]
    text = tokenizer.apply_chat_template(messages, tools=[{"name": "f"}], tokenize=False)
    assert text == (
        '<|im_start|>system\nS\n\nTools:\n{"name": "f"}\n<|im_end|>\n'
        "<|im_start|>user\né?<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>{"name": "f", "arguments": {"x": "é"}}</tool_call>'
        '<tool_call>{"name": "g", "arguments": {"y": 1}}</tool_call><|im_end|>\n'
        "<|im_start|>tool\n42<|im_end|>\n"
    )


def test_content_that_is_not_text_is_refused(tokenizer) -> None:
    with pytest.raises(TemplateError, match="reads text only"):
        tokenizer.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}], tokenize=False)


def test_the_logits_depend_on_content_and_on_order(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        one, swapped = model(torch.tensor([[65, 66, 67], [66, 65, 67]])).logits[:, -1]
    assert model.dtype == torch.float32
    assert one.shape == (264,)
    assert 0.5 < one.std() < 3.0
    assert (one - swapped).abs().max() > 0.01
