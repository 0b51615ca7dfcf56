"""One run of Firesteel's own recipe for `compare.py`: its JSON says how long it took and what it computed."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from sides import RATE, Measured, Task, peak_gib
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from training.recipes.dpo_loop import Config, main
from training.utils import build_service_client

ROWS = {"cpu": 1000, "cuda": 16384}
"""Tokens of the products that the machine's rate is measured with: about those of a pass."""


def run(task: Task) -> Measured:
    """Train once, the reference pass first."""
    os.environ |= {"FIRESTEEL_HOME": str(task.folder / "home"), "FIRESTEEL_DEVICE": task.device}
    config = Config(
        log_path=str(task.folder / "run"),
        base_model=str(task.model),
        dataset=str(task.rows),
        lora_rank=task.rank,
        learning_rate=RATE[task.rank],
        weight_decay=0.0,
        batch_size=task.batch,
        shuffle=False,
    )
    rate_before = linear_rate(task)
    summary = main(config)
    peak = peak_gib(task.device)
    steps = [json.loads(line) for line in (task.folder / "run/metrics.jsonl").read_text().splitlines()]
    computed = sum(step["train/computed_tokens"] for step in steps)
    rate = (rate_before + linear_rate(task)) / 2  # the machine is not as fast at all times
    useful = useful_flops(task, computed, sum(step["train/scored_tokens"] for step in steps))
    return Measured(
        side="firesteel",
        seconds=summary.reference_seconds + summary.training_seconds,
        pairs=len(steps) * task.batch,
        tokens=int(sum(step["train/step_tokens"] for step in steps)),
        losses=[step["train/dpo_loss"] for step in steps],
        peak_gib=peak,
        threads=torch.get_num_threads(),
        step_seconds=[step["train/step_time_sec"] for step in steps],
        reference_seconds=summary.reference_seconds,
        useful_share=useful / sum(step["train/step_time_sec"] for step in steps) / rate,
        wait_share=sum(step["train/data_wait_sec"] for step in steps) / summary.training_seconds,
        linear_gflops=rate / 1e9,
    )


def layers(model: Path) -> list[tuple[int, int]]:
    """Widths of all linear layers, the head last."""
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    return [(m.in_features, m.out_features) for m in network.modules() if isinstance(m, nn.Linear)]


def useful_flops(task: Task, computed: float, scored: float) -> float:
    """Of the steps: forward, and backward for weights and inputs (full) or inputs (LoRA); head where scored."""
    *body, head = (2 * i * o for i, o in layers(task.model))
    return (2 if task.rank else 3) * (sum(body) * computed + head * scored)


def linear_rate(task: Task) -> float:
    """What `torch.nn.functional.linear` reaches here at the model's own shapes, head left out, FLOP/s."""
    flops = seconds = 0.0
    rows = ROWS[task.device]
    for wide, narrow in layers(task.model)[:7] * 3:  # one block, three times
        x, weight = (torch.randn(n, wide, device=task.device, dtype=task.dtype) for n in (rows, narrow))
        F.linear(x, weight).sum().item()
        started = time.perf_counter()
        for _ in range(10):
            y = F.linear(x, weight)
        y[0, 0].item()  # a GPU has finished only now
        seconds += time.perf_counter() - started
        flops += 20 * rows * wide * narrow
    return flops / seconds


def export_start(task: Task) -> None:
    """Write the adapter that both sides start from."""
    os.environ["FIRESTEEL_DEVICE"] = task.device
    with build_service_client(base_model=str(task.model), lora_rank=task.rank) as service:
        service.create_training_client(seed=0).save_weights(str(task.adapter)).result()


if __name__ == "__main__":
    given = Task.read(sys.argv[1])
    if sys.argv[2:] == ["export-start"]:
        export_start(given)
    else:
        given.answer.write_text(json.dumps(asdict(run(given))))
