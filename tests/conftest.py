"""Real tiny models, made once per test run; nothing here is a stand-in for our own code."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, PretrainedConfig, Qwen2Config

from firesteel.sdk import Datum, ModelInput

VOCABULARY = 200

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
ARCHITECTURES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_SIZES, num_key_value_heads=2),
    "qwen2": Qwen2Config(**_SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    "gpt_neox": GPTNeoXConfig(**_SIZES),
}


@pytest.fixture(scope="session", autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the user's models, caches or settings, and none reaches a network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FIRESTEEL_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("WANDB_MODE", "offline")
        # Where there is a GPU, only the tests of it use it (test_cuda): the others expect a CPU's bits.
        patch.setenv("FIRESTEEL_DEVICE", "cpu")
        for name in ("FIRESTEEL_BASE_URL", "FIRESTEEL_API_KEY", "FIREWORKS_BASE_URL", "FIREWORKS_API_KEY"):
            patch.delenv(name, raising=False)
        patch.delenv("FIRESTEEL_CATALOG", raising=False)
        # Tiny models gain nothing from threads, and lose much on a machine that is busy with something else.
        patch.setenv("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)
        yield


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One folder per architecture, random weights."""
    folders = {}
    for name, config in ARCHITECTURES.items():
        torch.manual_seed(0)
        folders[name] = tmp_path_factory.mktemp(name)
        AutoModelForCausalLM.from_config(config).save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="session")
def llama_folder(model_folders: dict[str, Path]) -> str:
    """The tiny Llama that most tests use; its path is a model name."""
    return str(model_folders["llama"])


@pytest.fixture
def rng() -> np.random.Generator:
    """Reproducible numbers."""
    return np.random.default_rng(0)


def make_datum(tokens: np.ndarray, prompt_length: int) -> Datum:
    """A sequence whose tokens after the prompt are scored."""
    weights = np.zeros(len(tokens) - 1, np.float32)
    weights[prompt_length - 1 :] = 1
    return Datum(
        ModelInput.from_ints(tokens[:-1]), {"target_tokens": np.asarray(tokens[1:]), "weights": weights}
    )


def make_pairs(rng: np.random.Generator, count: int, prompt: int = 12, response: int = 8) -> list[Datum]:
    """Datums of `count` pairs, chosen and rejected in turn, each pair with its own prompt."""
    data = []
    for _ in range(count):
        shared = rng.integers(2, VOCABULARY, prompt)
        for _ in ("chosen", "rejected"):
            answer = rng.integers(2, VOCABULARY, rng.integers(2, response + 1))
            data.append(make_datum(np.concatenate([shared, answer]), prompt))
    return data


_unexpected_skips: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note a test that skips itself."""
    _note_skip(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Note a whole file that skips itself, for instance by `importorskip`: its tests are never reported."""
    _note_skip(report)


def _note_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if "needs CUDA" not in reason:
            _unexpected_skips.append(f"{report.nodeid}: {reason}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Where FIRESTEEL_NO_SKIPS is set, a test that did not run is a failure."""
    if os.environ.get("FIRESTEEL_NO_SKIPS") and _unexpected_skips:
        print("\nskipped, and must not be:", *_unexpected_skips, sep="\n  ")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
