"""Compute with the engine in this process what the clients must see: losses per step, final log-probabilities.

python compat/expected.py compat-expected.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import firesteel
from firesteel.sdk.training_client import TrainingClient
from firesteel.sdk.types import AdamParams, Datum, LoraConfig, ModelInput

MODEL = "tiny-llama"
ROWS = Path(__file__).parent / "rows.json"
BETA = 0.1
STEPS, SAVE_AFTER = 8, 4
# The guide's optimizer, with learning rates at which eight steps move the loss of a toy model. All settings are
# sent with each step: the clients' own defaults differ from these.
ADAM = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01, "grad_clip_norm": 0.0}
# The seed is sent: without it each side would draw adapters of its own. Alpha 32 is what the Fireworks clients
# send; plain tinker sends none and a server takes 32.
LORA = {"rank": 8, "alpha": 32, "seed": 7, "train_attn": True, "train_mlp": True, "train_unembed": True}

SCENARIOS: dict[str, dict[str, Any]] = {
    "dpo-full": {"loss": "dpo", "beta": BETA, "lora": None, "adam": {"learning_rate": 5e-4, **ADAM}},
    "dpo-lora": {"loss": "dpo", "beta": BETA, "lora": LORA, "adam": {"learning_rate": 2e-3, **ADAM}},
    "cross-entropy-lora": {"loss": "cross_entropy", "lora": LORA, "adam": {"learning_rate": 2e-3, **ADAM}},
}


def main() -> None:
    """Run every scenario and write its settings and results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    pairs = json.loads(ROWS.read_text())["pairs"]
    scenarios = {name: {**settings, **run(settings, pairs)} for name, settings in SCENARIOS.items()}
    expected = {"model": MODEL, "pairs": pairs, "scenarios": scenarios}
    output.write_text(json.dumps(expected, indent=1) + "\n")


def run(settings: dict[str, Any], pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """Losses of the steps of one scenario, and where the policy stands after the last."""
    with firesteel.connect("local") as service:
        lora = settings["lora"]
        policy = (
            service.create_training_client(MODEL, lora_config=LoraConfig(**lora))
            if lora
            else service.create_training_client(MODEL, 0)
        )
        reference = service.create_reference_client(MODEL, lora["rank"] if lora else 0)
        if settings["loss"] == "dpo":
            rows = [
                datum(pair[side], pair["prompt_tokens"]) for pair in pairs for side in ("chosen", "rejected")
            ]
            losses = dpo_losses(policy, rows, answer_sums(reference, rows), settings)
        else:
            rows = [datum(pair["chosen"], pair["prompt_tokens"]) for pair in pairs]
            losses = cross_entropy_losses(policy, rows, settings)
        return {
            "steps": STEPS,
            "save_after": SAVE_AFTER,
            "losses": losses,
            "reference_means": answer_means(reference, rows),
            "final_means": answer_means(policy, rows),
        }


def datum(tokens: Sequence[int], prompt_tokens: int) -> Datum:
    """The whole sequence, shifted by one; weight 1 where the target belongs to the answer."""
    weights = [float(index + 1 >= prompt_tokens) for index in range(len(tokens) - 1)]
    inputs: dict[str, Any] = {"target_tokens": list(tokens[1:]), "weights": weights}
    return Datum(ModelInput.from_ints(tokens[:-1]), inputs)


def answer_sums(client: TrainingClient, rows: list[Datum]) -> list[float]:
    """Per row the sum of the answer's log-probabilities."""
    outputs = client.forward(rows).result().loss_fn_outputs
    return [
        float((output["logprobs"].to_numpy() * row.loss_fn_inputs["weights"].to_numpy()).sum())
        for row, output in zip(rows, outputs, strict=True)
    ]


def answer_means(client: TrainingClient, rows: list[Datum]) -> list[float]:
    """Per row the mean of the answer's log-probabilities."""
    lengths = [float(row.loss_fn_inputs["weights"].to_numpy().sum()) for row in rows]
    return [total / length for total, length in zip(answer_sums(client, rows), lengths, strict=True)]


def dpo_losses(
    policy: TrainingClient, rows: list[Datum], reference: list[float], settings: dict[str, Any]
) -> list[float]:
    """The loss of each step, before it: all pairs in one batch, the mean over them."""

    def loss_of(data: Sequence[Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        sums = [
            (values * row.loss_fn_inputs["weights"].to_torch()).sum() - base
            for row, values, base in zip(data, logprobs, reference, strict=True)
        ]
        margins = torch.stack(sums[0::2]) - torch.stack(sums[1::2])
        loss = -torch.nn.functional.logsigmoid(settings["beta"] * margins).mean()
        return loss, {"dpo_loss": loss.item()}

    losses = []
    for _ in range(STEPS):
        result = policy.forward_backward_custom(rows, loss_of).result()
        policy.optim_step(AdamParams(**settings["adam"])).result()
        losses.append(result.metrics["dpo_loss"])
    return losses


def cross_entropy_losses(policy: TrainingClient, rows: list[Datum], settings: dict[str, Any]) -> list[float]:
    """The loss of each step, before it: two calls whose gradients add, together the mean over answer tokens."""
    count = sum(float(row.loss_fn_inputs["weights"].to_numpy().sum()) for row in rows)
    scaled = [
        Datum(
            row.model_input,
            {**row.loss_fn_inputs, "weights": row.loss_fn_inputs["weights"].to_numpy() / count},
        )
        for row in rows
    ]
    half = len(scaled) // 2
    losses = []
    for _ in range(STEPS):
        results = [policy.forward_backward(part) for part in (scaled[:half], scaled[half:])]
        policy.optim_step(AdamParams(**settings["adam"])).result()
        losses.append(sum(result.result().metrics["loss:sum"] for result in results))
    return losses


if __name__ == "__main__":
    main()
