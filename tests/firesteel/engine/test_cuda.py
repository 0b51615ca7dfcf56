"""The same numbers on a GPU. Every test here skips itself without CUDA and says so."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import config
from trainers import LORA, gradients, relative_difference, sequences, spread_lora, trained_parameters
from transformers import AutoModelForCausalLM

from conftest import ARCHITECTURES, make_datum, make_pairs
from firesteel.catalog import ModelEntry
from firesteel.engine.attention import TreeMask, tree_attention
from firesteel.engine.flex import SMALLEST_WIDTH
from firesteel.engine.head import TILE, Head, Targets, target_logprobs
from firesteel.engine.models import BaseModel, load_base
from firesteel.engine.packing import pack
from firesteel.engine.sampling import sample
from firesteel.engine.trainer import Trainer
from firesteel.sdk import AdamParams, Datum, LoraConfig, ModelInput, SamplingParams
from firesteel.sdk.shapes import Mode, TrainingShape
from training.recipes.dpo_loop import main

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

# Against float32 on the CPU: of per-token log-probabilities the largest difference and its root mean square, and the
# gradient's. In bfloat16 every layer rounds by chance: one token of hundreds is off by several times the mean.
TOLERANCE = {"float32": (1e-4, 1e-4, 1e-3), "bfloat16": (0.3, 0.05, 0.1)}
KINDS = pytest.mark.parametrize("kind", ["lora float32", "lora bfloat16", "full float32"])


@pytest.fixture(scope="module")
def wide_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tests' architectures with heads that FlexAttention takes, and room for several of its blocks."""
    folders = {}
    for name, small in ARCHITECTURES.items():
        torch.manual_seed(0)
        sizes = {"hidden_size": 4 * SMALLEST_WIDTH, "max_position_embeddings": 512, "initializer_range": 0.1}
        folders[name] = tmp_path_factory.mktemp(f"wide-{name}")
        AutoModelForCausalLM.from_config(type(small)(**{**small.to_dict(), **sizes})).save_pretrained(
            folders[name]
        )
    return folders


@pytest.fixture
def on_gpu() -> Iterator[None]:
    """Recipes choose the GPU, as they do outside of tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FIRESTEEL_DEVICE", "cuda")
        yield


def load(folder: Path, device: str, dtype: str) -> BaseModel:
    shape = TrainingShape("test", "*", device, dtype, Mode.POLICY_TRAINER)  # type: ignore[arg-type]
    return load_base("test-model", ModelEntry("test-model", str(folder)), folder, shape)


def trained(base: BaseModel, lora: LoraConfig | None) -> Trainer:
    trainer = Trainer(base, "policy", lora, trainable=True)
    if lora:
        spread_lora(trainer)
    return trainer


def trainer_of(kind: str, folder: Path, device: str) -> Trainer:
    policy, dtype = kind.split()
    return trained(
        load(folder, device, dtype if device == "cuda" else "float32"), LORA if policy == "lora" else None
    )


def ranked_lists(rng: np.random.Generator) -> list[Datum]:
    """Five answers to each prompt, two of which are one: at branches several targets are scored at one row."""
    data = []
    for _ in range(3):
        prompt = rng.integers(2, 200, 150)
        answers = [rng.integers(2, 200, n) for n in (1, 20, 40, 60)]
        data += [make_datum(np.concatenate([prompt, answer]), 150) for answer in (*answers, answers[-1])]
    return data


@KINDS
@pytest.mark.parametrize("heads", ["narrow", "wide"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_log_probabilities_and_gradients_are_those_of_the_cpu(
    model_folders: dict[str, Path], wide_folders: dict[str, Path], name: str, heads: str, kind: str
) -> None:
    rng = np.random.default_rng(0)
    if heads == "wide":
        folder, data = wide_folders[name], make_pairs(rng, 3, prompt=150, response=60) + ranked_lists(rng)
    else:
        folder, data = model_folders[name], make_pairs(rng, 4)
    outcomes = []
    for device in ("cpu", "cuda"):
        trainer = trainer_of(kind, folder, device)
        assert trainer.base.attention == "tree"
        scores = trainer.forward_backward(sequences(data), lambda index, logprobs: -logprobs.sum())
        outcomes.append((scores.logprobs, {n: g.cpu().float() for n, g in gradients(trainer).items()}))
    (expected, expected_gradient), (found, gradient) = outcomes
    largest, mean, of_gradient = TOLERANCE[kind.split()[1]]
    differences = np.concatenate(found) - np.concatenate(expected)
    assert np.abs(differences).max() < largest
    assert np.sqrt(np.square(differences).mean()) < mean
    assert relative_difference(expected_gradient, gradient) < of_gradient


@KINDS
def test_two_runs_of_the_same_steps_are_equal_to_the_bit(wide_folders: dict[str, Path], kind: str) -> None:
    runs = []
    for _ in range(2):
        trainer = trainer_of(kind, wide_folders["qwen2"], "cuda")
        runs.append([steps(trainer, count) for count in (3, 2)][-1])
    for name, expected in runs[0].items():
        assert torch.equal(expected, runs[1][name]), name


@KINDS
def test_from_a_state_training_goes_on_to_the_bit(wide_folders: dict[str, Path], kind: str) -> None:
    undisturbed = trainer_of(kind, wide_folders["llama"], "cuda")
    steps(undisturbed, 2)
    state = undisturbed.state()
    expected = steps(undisturbed, 2)
    other = trainer_of(kind, wide_folders["llama"], "cuda")
    steps(other, 1)
    other.load_state(state)
    found = steps(other, 2)
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


def steps(trainer: Trainer, count: int) -> dict[str, torch.Tensor]:
    """Steps on the same data; what the trained weights are after them."""
    data = sequences(ranked_lists(np.random.default_rng(0)))
    for _ in range(count):
        trainer.forward_backward(data, lambda index, logprobs: -logprobs.sum())
        trainer.optim_step(AdamParams(learning_rate=1e-3))
    return {name: p.detach().cpu().clone() for name, p in trained_parameters(trainer).items()}


def test_an_adapter_starts_as_on_the_cpu_and_leaves_the_process_s_random_state(
    wide_folders: dict[str, Path],
) -> None:
    before = torch.cuda.get_rng_state()
    starts = []
    for device in ("cpu", "cuda"):
        trainer = Trainer(load(wide_folders["llama"], device, "float32"), "policy", LORA, trainable=True)
        starts.append(trained_parameters(trainer))
    for name, expected in starts[0].items():
        assert starts[1][name].is_cuda
        assert torch.equal(expected.cpu(), starts[1][name].cpu()), name
    assert torch.equal(before, torch.cuda.get_rng_state())


def test_an_adapter_on_a_bfloat16_base_is_float32(wide_folders: dict[str, Path]) -> None:
    trainer = trainer_of("lora bfloat16", wide_folders["llama"], "cuda")
    assert {p.dtype for p in trained_parameters(trainer).values()} == {torch.float32}


def test_a_sample_depends_on_its_seed_alone(wide_folders: dict[str, Path]) -> None:
    base = load(wide_folders["llama"], "cuda", "float32")
    prompt, drawn = ModelInput.from_ints([5, 6, 7]), SamplingParams(max_tokens=12, temperature=1.0, seed=3)
    before = torch.cuda.get_rng_state()
    first = sample(base, prompt, drawn, 2)
    assert torch.equal(before, torch.cuda.get_rng_state())
    torch.rand(5, device="cuda")
    assert [s.tokens for s in sample(base, prompt, drawn, 2)] == [s.tokens for s in first]
    greedy = SamplingParams(max_tokens=12, temperature=0.0)
    on_cpu = sample(load(wide_folders["llama"], "cpu", "float32"), prompt, greedy, 1)
    assert sample(base, prompt, greedy, 1)[0].tokens == on_cpu[0].tokens


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


def test_no_logits_are_kept_nor_made_at_once() -> None:
    rows, vocabulary = 16384, 65536
    rng = np.random.default_rng(0)
    hidden, weight = (torch.randn(n, 64, device="cuda", dtype=torch.bfloat16) for n in (rows, vocabulary))
    hidden.requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    scores = target_logprobs(
        Head(weight), hidden, Targets(np.arange(rows), rng.integers(0, vocabulary, rows))
    )
    scores.sum().backward()
    # A tile in the model's type, its copy and one more in float32: far from the 4 GiB of all logits.
    tile = TILE["cuda"].rows * TILE["cuda"].columns
    assert torch.cuda.max_memory_allocated() - before < 12 * tile < 4 * rows * vocabulary / 5


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("rank", [4, 0], ids=["lora", "full-parameter"])
def test_the_recipe_trains_on_the_gpu_verified_and_goes_on_to_the_bit(tmp_path: Path, rank: int) -> None:
    whole = config(tmp_path / "whole", 12, lora_rank=rank, epochs=2, verify=True, dcp_save_interval=2)
    main(whole)
    cut = config(tmp_path / "cut", 12, lora_rank=rank, epochs=1, dcp_save_interval=2)
    main(cut)
    main(cut.model_copy(update={"epochs": 2}))
    of_whole, of_cut = (losses(Path(run.log_path)) for run in (whole, cut))
    assert of_cut == of_whole
    assert of_whole[-1] < of_whole[0] - 0.1


def losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["train/dpo_loss"] for line in lines if "train/dpo_loss" in line]
