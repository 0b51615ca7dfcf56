"""What the three client scripts share: arguments, printed checks, rows as datums, the training loops.

`sdk` is the client's own module of types (`Datum`, `ModelInput`, `TensorData`, `AdamParams`); nothing here
belongs to one client or to Firesteel.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

TOLERANCE = 1e-5
MOVEMENT = 0.05  # losses that stand still agree with anything


@dataclass
class Checks:
    """Prints one line for each check and remembers whether one failed."""

    failed: int = 0
    made: int = 0
    started: float = field(default_factory=time.monotonic)

    def true(self, name: str, holds: bool, seen: Any = "") -> None:
        """One fact; `seen` is printed where it does not hold."""
        self.made += 1
        self.failed += not holds
        print(f"{'ok  ' if holds else 'FAIL'} {name}{'' if holds else f': {seen!r}'}", flush=True)

    def equal(self, name: str, seen: Any, expected: Any) -> None:
        """One value."""
        self.true(name, seen == expected, {"seen": seen, "expected": expected})

    def close(self, name: str, seen: Sequence[float], expected: Sequence[float]) -> None:
        """Numbers to 1e-5 absolute; each that differs is printed."""
        far = [
            {"index": index, "seen": one, "expected": other}
            for index, (one, other) in enumerate(zip(seen, expected, strict=False))
            if not abs(one - other) <= TOLERANCE  # NaN fails too
        ]
        distance = max((abs(one - other) for one, other in zip(seen, expected, strict=False)), default=0.0)
        same_length = len(seen) == len(expected)
        self.true(f"{name} (largest difference {distance:.1e})", same_length and not far, far or len(seen))

    def moved(self, name: str, losses: Sequence[float]) -> None:
        """The losses change by enough to tell one training from another."""
        self.true(f"{name}: the loss moves", max(losses) - min(losses) >= MOVEMENT, losses)

    def raises(self, name: str, call: Callable[[], Any], *, within: float = 20.0) -> None:
        """A mistake of the caller's is told at once: a client that retries for minutes is as bad as none."""
        begin = time.monotonic()
        try:
            returned = call()
        except Exception as error:  # noqa: BLE001 - which class it is, is the client's affair
            seconds = time.monotonic() - begin
            self.true(f"{name} ({type(error).__name__} after {seconds:.1f} s)", seconds <= within, error)
        else:
            self.true(name, False, returned)

    def end(self) -> None:
        """Print the sum and leave the process with its status."""
        seconds = time.monotonic() - self.started
        print(f"{self.made - self.failed} of {self.made} checks passed in {seconds:.0f} s", flush=True)
        sys.exit(1 if self.failed else 0)


@dataclass(frozen=True)
class Task:
    """Where the server is and what it must give."""

    url: str
    key: str
    model: str
    pairs: list[dict[str, Any]]
    scenarios: dict[str, dict[str, Any]]


def parse_task(description: str) -> Task:
    """The script's arguments and the file of expected numbers."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--url", required=True)
    parser.add_argument("--key", required=True)
    parser.add_argument("--expected", type=Path, required=True)
    options = parser.parse_args()
    expected = json.loads(options.expected.read_text())
    return Task(options.url, options.key, expected["model"], expected["pairs"], expected["scenarios"])


@contextmanager
def closing(service: Any) -> Any:
    """A service client that is closed whatever happens, as a user's script would."""
    try:
        yield service
    finally:
        service.close()


def datum(sdk: Any, tokens: list[int], prompt_tokens: int, scale: float = 1.0) -> Any:
    """The whole sequence, shifted by one; a weight of `scale` where the target belongs to the answer."""
    weights = [scale * (index + 1 >= prompt_tokens) for index in range(len(tokens) - 1)]
    inputs = {
        "target_tokens": sdk.TensorData(data=tokens[1:], dtype="int64", shape=[len(weights)]),
        "weights": sdk.TensorData(data=weights, dtype="float32", shape=[len(weights)]),
    }
    return sdk.Datum(model_input=sdk.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)


def pair_rows(sdk: Any, pairs: list[dict[str, Any]]) -> list[Any]:
    """Chosen and rejected of each pair in turn."""
    return [
        datum(sdk, pair[side], pair["prompt_tokens"]) for pair in pairs for side in ("chosen", "rejected")
    ]


def answer_rows(sdk: Any, pairs: list[dict[str, Any]]) -> list[Any]:
    """The chosen answers, weighted so that the sum over all of them is the mean over their tokens."""
    count = sum(len(pair["chosen"]) - pair["prompt_tokens"] for pair in pairs)
    return [datum(sdk, pair["chosen"], pair["prompt_tokens"], 1.0 / count) for pair in pairs]


def answer_sums(client: Any, rows: list[Any]) -> list[float]:
    """Per row the sum of the log-probabilities where the weight is not zero."""
    outputs = client.forward(rows, "cross_entropy").result().loss_fn_outputs
    return [
        sum(value for value, weight in zip(output["logprobs"].data, _weights(row), strict=True) if weight)
        for row, output in zip(rows, outputs, strict=True)
    ]


def answer_means(client: Any, rows: list[Any]) -> list[float]:
    """Per row the mean of the log-probabilities where the weight is not zero."""
    counts = [sum(weight != 0 for weight in _weights(row)) for row in rows]
    return [total / count for total, count in zip(answer_sums(client, rows), counts, strict=True)]


def dpo_steps(
    sdk: Any, policy: Any, rows: list[Any], reference: list[float], scenario: dict[str, Any], steps: int
) -> list[float]:
    """The loss of each step, before it: all pairs in one batch, the mean over them."""
    masks = [torch.tensor(_weights(row)) for row in rows]

    def loss_of(data: list[Any], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        sums = [
            (values * mask).sum() - base
            for values, mask, base in zip(logprobs, masks, reference, strict=True)
        ]
        margins = torch.stack(sums[0::2]) - torch.stack(sums[1::2])
        loss = -torch.nn.functional.logsigmoid(scenario["beta"] * margins).mean()
        return loss, {"dpo_loss": loss.item()}

    losses = []
    for _ in range(steps):
        result = policy.forward_backward_custom(rows, loss_of).result()
        policy.optim_step(sdk.AdamParams(**scenario["adam"])).result()
        losses.append(result.metrics["dpo_loss"])
    return losses


def cross_entropy_steps(
    sdk: Any, policy: Any, rows: list[Any], scenario: dict[str, Any], steps: int
) -> list[float]:
    """The loss of each step, before it: two calls whose gradients add, and no answer is waited for between."""
    half = len(rows) // 2
    losses = []
    for _ in range(steps):
        futures = [policy.forward_backward(part, "cross_entropy") for part in (rows[:half], rows[half:])]
        policy.optim_step(sdk.AdamParams(**scenario["adam"])).result()
        losses.append(sum(future.result().metrics["loss:sum"] for future in futures))
    return losses


def _weights(row: Any) -> list[float]:
    return list(row.loss_fn_inputs["weights"].data)
