"""One run of TRL's DPOTrainer for `compare.py`: fp32, no gradient checkpointing, nothing cut, saved or evaluated."""

from __future__ import annotations

import json
import resource
import sys
import time
from dataclasses import asdict
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from sides import RATE, Measured, Task
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer


def run(task: Task) -> Measured:
    """Train once. Warm: the reference is computed while the trainer is built, untimed."""
    rows = [json.loads(line) for line in task.rows.read_text().splitlines()]
    arguments = DPOConfig(
        output_dir=str(task.folder / "trl"),
        per_device_train_batch_size=task.batch,
        num_train_epochs=1,
        learning_rate=RATE[task.rank],
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1e9,  # off, as on the other side
        optim="adamw_torch",
        train_sampling_strategy="sequential",
        gradient_checkpointing=task.checkpointing,
        precompute_ref_log_probs=task.warm,
        max_length=None,
        beta=0.1,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    trainer = DPOTrainer(
        model(task), args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    prompts, sides = (
        [len(row[name]) for row in trainer.train_dataset for name in names]
        for names in (("prompt_ids", "prompt_ids"), ("chosen_ids", "rejected_ids"))
    )
    return Measured(
        side="trl",
        seconds=seconds,
        pairs=len(rows),
        tokens=sum(prompts) + sum(sides),
        losses=[entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        peak_gib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        threads=torch.get_num_threads(),
    )


def model(task: Task) -> Any:
    """The policy, on the start that the other side has."""
    network = AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.float32)
    return PeftModel.from_pretrained(network, task.adapter, is_trainable=True) if task.rank else network


if __name__ == "__main__":
    given = Task.read(sys.argv[1])
    given.answer.write_text(json.dumps(asdict(run(given))))
