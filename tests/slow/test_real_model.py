"""On SmolLM2-135M the fast path is as near to transformers' eager forward as transformers' own sdpa is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from firesteel import store
from firesteel.catalog import load_catalog
from plain import load_plain, plain_logprobs
from training.utils import (
    DpoObjective,
    PreferencePair,
    ReconnectableClient,
    build_service_client,
    make_pair_loss,
)
from training.utils.losses import PairLogprobs
from training.utils.pairs import render_pairs
from training.utils.preference_data import read_preferences
from training.utils.rendering import Renderer
from training.utils.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow
NAME = "smollm2-135m-instruct"
ROOT = Path(__file__).parent.parent.parent


def test_log_probabilities_differ_by_at_most_twice_what_eager_and_sdpa_differ_by() -> None:
    rows = read_preferences(ROOT / "examples/preferences/heldout.jsonl")
    pairs = render_pairs(rows, Renderer(load_tokenizer(NAME)), max_pairs=8).pairs
    data = [datum for pair in pairs for datum in pair.datums]
    with build_service_client(base_model=NAME, lora_rank=0) as service:
        client = ReconnectableClient(service.create_reference_client())
        assert client.description.attention == "tree"
        ours = [output["logprobs"].to_torch() for output in client.forward(data).loss_fn_outputs]
    network = load_plain(store.fetch(load_catalog().resolve_model(NAME)))
    with torch.no_grad():
        eager = [plain_logprobs(network, datum) for datum in data]
        network.set_attn_implementation("sdpa")
        sdpa = [plain_logprobs(network, datum) for datum in data]
    theirs = max(float((a - b).abs().max()) for a, b in zip(eager, sdpa, strict=True))
    difference = max(float((a - b).abs().max()) for a, b in zip(eager, ours, strict=True))
    assert 0 < theirs < 1e-3
    assert difference <= 2 * theirs, f"ours {difference:.2e}, eager against sdpa {theirs:.2e}"


@pytest.mark.parametrize("rank", [16, 0], ids=["lora", "full"])
def test_verify_agrees_on_rows_of_the_demo(rank: int) -> None:
    rows = read_preferences(ROOT / "examples/preferences/train.jsonl")
    pairs = render_pairs(rows, Renderer.load(NAME), max_pairs=4).pairs
    rng = np.random.default_rng(0)
    references = [
        PairLogprobs(*(rng.normal(-2, 1, int(mask.sum())).astype(np.float32) for mask in masks(pair)))
        for pair in pairs
    ]
    loss = make_pair_loss(pairs, references, DpoObjective(0.1))
    with build_service_client(base_model=NAME, lora_rank=rank) as service:
        data = [datum for pair in pairs for datum in pair.datums]
        verification = service.create_training_client().verify(data, loss, weighted_only=True)
    verification.refuse_disagreement()
    logprob, _, _, gradient = verification.differences
    assert logprob.found > 0
    assert logprob.allowed < 1e-3
    assert 0 < gradient.found < 1e-3


def masks(pair: PreferencePair) -> list[np.ndarray]:
    return [datum.loss_fn_inputs["weights"].to_numpy() for datum in pair.datums]


def test_the_demo_learns_its_preference_within_its_limits(tmp_path: Path) -> None:
    """`make demo`'s program on a copy of the examples, so that the checkout's `runs/` is left alone."""
    subprocess.run(["cp", "-r", str(ROOT / "examples"), str(tmp_path)], check=True)
    script = (
        "import resource, runpy, sys\n"
        "try:\n    runpy.run_path('examples/demo.py', run_name='__main__')\n"
        "finally:\n    print('peak GiB', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)"
    )
    threads = {"OMP_NUM_THREADS": str(os.cpu_count())}
    demo = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, **threads},
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert demo.returncode == 0, demo.stdout + demo.stderr
    assert "Learned. The adapter is in runs/demo/adapter" in demo.stdout
    assert float(demo.stdout.split("peak GiB")[1]) < 4
    assert (tmp_path / "runs/demo/adapter/adapter_model.safetensors").exists()
