"""A run of the real small model that is killed and goes on, and its weights in other programs."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from processes import run, start, wait_for_step
from runs import outcome
from transformers import AutoModelForCausalLM

from training.recipes.dpo_loop import Config
from training.utils.export import export

pytestmark = pytest.mark.slow
ROWS = Path(__file__).parents[2] / "examples/preferences/train.jsonl"


def settings(folder: Path) -> Config:
    return Config(
        log_path=str(folder / "run"),
        base_model="smollm2-135m-instruct",
        dataset=str(ROWS),
        max_pairs=8,
        batch_size=2,
        lora_rank=8,
        learning_rate=2e-4,
        dcp_save_interval=2,
    )


def test_the_real_model_goes_on_to_the_same_bits_and_loads_elsewhere(tmp_path: Path) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole, killed = settings(tmp_path / "whole"), settings(tmp_path / "killed")
    status, said = run(whole)
    assert status == 0, said
    process = start(killed)
    wait_for_step(process, tmp_path / "killed/run", 3)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    status, said = run(killed)
    assert status == 0, said
    assert "going on from" in said
    assert outcome(killed) == outcome(whole)
    merged = export(tmp_path / "whole/run", "merged")
    tokens = torch.arange(100, 140)[None]
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(merged)(tokens).logits
        theirs = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "whole/run/adapter")(tokens).logits
    assert np.abs((ours - theirs).numpy()).max() < 1e-3
