"""One run of TRL's DPOTrainer for `compare.py`: no gradient checkpointing, nothing cut, saved or evaluated.

fp32 on a CPU; on a GPU an adapter is trained under bfloat16 autocast, on a base in bfloat16.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from sides import RATE, Measured, Task, peak_gib
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer


class StepTimes(TrainerCallback):  # type: ignore[misc]
    """Seconds of each step, the device's work included."""

    def __init__(self, device: str) -> None:
        self.seconds: list[float] = []
        self._device = device
        self._started = 0.0

    def _now(self) -> float:
        if self._device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """transformers' own hook."""
        self._started = self._now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """transformers' own hook."""
        self.seconds.append(self._now() - self._started)


def run(task: Task) -> Measured:
    """Train once. Warm: the reference is computed while the trainer is built, untimed."""
    # By the file, so that the references of one repeat are found by the next: TRL keeps them beside the dataset.
    rows = Dataset.from_json(str(task.rows), cache_dir=str(task.rows.parent / "datasets"))
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
        bf16=task.dtype is torch.bfloat16,
        use_cpu=task.device == "cpu",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    times = StepTimes(task.device)
    trainer = DPOTrainer(
        model(task),
        args=arguments,
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[times],
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
        peak_gib=peak_gib(task.device),
        threads=torch.get_num_threads(),
        step_seconds=times.seconds,
    )


def model(task: Task) -> Any:
    """The policy, on the start that the other side has."""
    network = AutoModelForCausalLM.from_pretrained(task.model, dtype=task.dtype)
    return PeftModel.from_pretrained(network, task.adapter, is_trainable=True) if task.rank else network


if __name__ == "__main__":
    given = Task.read(sys.argv[1])
    given.answer.write_text(json.dumps(asdict(run(given))))
