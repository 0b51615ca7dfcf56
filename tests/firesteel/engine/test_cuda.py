"""The same numbers on a GPU. Written where there is none: every test here skips itself without CUDA and says so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from trainers import LORA, gradients, relative_difference, sequences, spread_lora

from conftest import ARCHITECTURES, make_pairs
from firesteel.catalog import ModelEntry
from firesteel.engine.attention import TreeMask, tree_attention
from firesteel.engine.models import BaseModel, load_base
from firesteel.engine.packing import pack
from firesteel.engine.trainer import Trainer
from firesteel.sdk import LoraConfig
from firesteel.sdk.shapes import Mode, TrainingShape

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

# Of a per-token log-probability and of the gradient, against float32 on the CPU.
TOLERANCE = {"float32": (1e-4, 1e-3), "bfloat16": (0.1, 0.1)}


def load(folder: Path, device: str, dtype: str) -> BaseModel:
    shape = TrainingShape("test", "*", device, dtype, Mode.POLICY_TRAINER)  # type: ignore[arg-type]
    return load_base("test-model", ModelEntry("test-model", str(folder)), folder, shape)


def trained(base: BaseModel, lora: LoraConfig | None) -> Trainer:
    trainer = Trainer(base, "policy", lora, trainable=True)
    if lora:
        spread_lora(trainer)
    return trainer


@pytest.mark.parametrize("kind", ["lora float32", "lora bfloat16", "full float32"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_log_probabilities_and_gradients_are_those_of_the_cpu(
    model_folders: dict[str, Path], name: str, kind: str
) -> None:
    lora, dtype = (LORA if kind.startswith("lora") else None), kind.split()[1]
    data = sequences(make_pairs(np.random.default_rng(0), 4))
    outcomes = []
    for device, own_dtype in (("cpu", "float32"), ("cuda", dtype)):
        base = load(model_folders[name], device, own_dtype)
        assert base.attention == "tree"
        trainer = trained(base, lora)
        scores = trainer.forward_backward(data, lambda index, logprobs: -logprobs.sum())
        outcomes.append((scores.logprobs, {n: g.cpu().float() for n, g in gradients(trainer).items()}))
    (expected, expected_gradient), (found, gradient) = outcomes
    of_logprobs, of_gradient = TOLERANCE[dtype]
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_allclose(other, one, rtol=0, atol=of_logprobs)
    assert relative_difference(expected_gradient, gradient) < of_gradient


def test_an_adapter_on_a_bfloat16_base_is_float32(model_folders: dict[str, Path]) -> None:
    trainer = trained(load(model_folders["llama"], "cuda", "bfloat16"), LORA)
    assert trainer._adapter is not None
    assert {p.dtype for p in trainer._adapter.parameters().values()} == {torch.float32}


def test_the_host_does_not_wait_for_the_device_inside_attention() -> None:
    device = torch.device("cuda")
    rng = np.random.default_rng(0)
    tree = pack([np.concatenate([np.arange(200), rng.integers(0, 9, 40)]) for _ in range(6)])
    mask = TreeMask(tree, device, torch.bfloat16)
    query, key, value = (
        torch.randn(1, heads, len(tree.tokens), 64, device=device, dtype=torch.bfloat16)
        for heads in (8, 2, 2)
    )
    layer = torch.nn.Identity()
    expected, _ = tree_attention(layer, query, key, value, None, tree=mask)  # compiles; makes the blocks
    torch.cuda.set_sync_debug_mode("error")
    try:
        again, _ = tree_attention(layer, query, key, value, None, tree=mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(again, expected)
