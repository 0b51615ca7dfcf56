"""DPO with nothing but the client: provision, ask the reference once, loss, loop. `docs/raw-api.md` explains each part.

    python examples/raw_api_loop.py

Seconds, on a model with random weights. The margin starts at 0, where policy and reference are one, and grows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from firesteel.sdk import AdamParams, Datum
from training.utils import build_dpo_datums, build_service_client

MODEL, RANK, BETA, STEPS = "tiny-llama", 8, 0.1, 8
QUESTIONS = ("Is water wet?", "Is two even?", "Is ice cold?", "Is fire hot?")
Loss = Callable[[Sequence[Datum], list[torch.Tensor]], tuple[torch.Tensor, dict[str, float]]]


def make_loss(before: Sequence[torch.Tensor], divisor: int) -> Loss:
    """DPO's loss of one pair, over the pairs of a step: the trainer only adds gradients."""

    def loss_fn(data: Sequence[Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        weights = [datum.loss_fn_inputs["weights"].to_torch() for datum in data]
        chosen, rejected = (((p - r) * w).sum() for p, r, w in zip(logprobs, before, weights, strict=True))
        margin = chosen - rejected
        return -F.logsigmoid(BETA * margin) / divisor, {"margin": margin.item()}

    return loss_fn


def train() -> list[float]:
    """The mean margin of each step, before that step."""
    # Bytes are this model's tokens.
    rows = [(question.encode(), b" Yes.", b" It depends on what you mean.") for question in QUESTIONS]
    pairs = [build_dpo_datums(prompt + good, prompt + bad, len(prompt)) for prompt, good, bad in rows]
    margins = []
    with build_service_client(base_model=MODEL, lora_rank=RANK) as service:
        policy = service.create_training_client(MODEL, lora_rank=RANK)
        reference = service.create_reference_client(MODEL, lora_rank=RANK)
        outputs: list[Any] = [reference.forward(pair).loss_fn_outputs for pair in pairs]
        frozen = [[output["logprobs"].to_torch() for output in pair] for pair in outputs]
        for _ in range(STEPS):
            results = [
                policy.forward_backward_custom(pair, make_loss(before, len(pairs)))
                for pair, before in zip(pairs, frozen, strict=True)
            ]
            policy.optim_step(AdamParams(learning_rate=1e-3))
            margins.append(sum(result.metrics["margin"] for result in results) / len(pairs))
    return margins


if __name__ == "__main__":
    for step, margin in enumerate(train(), 1):
        print(f"step {step}: margin {margin:+.3f}")
