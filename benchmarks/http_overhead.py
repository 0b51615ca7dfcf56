"""What HTTP costs a DPO step on the loopback: the same steps with a trainer in this process and behind a server.

Alternating, step by step, so that both meet the same machine. Quoted are the median difference and its quartiles.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

import firesteel
from firesteel.sdk import AdamParams, Datum, ModelInput, TrainingClient
from training.utils.losses import DpoObjective, PairLogprobs, make_pair_loss
from training.utils.pairs import PreferencePair

PAUSE_SECONDS = 0.25


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny-llama")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=200, help="of each sequence")
    parser.add_argument("--steps", type=int, default=60)
    settings = parser.parse_args()
    with served(settings.model) as url, firesteel.connect("local") as here, firesteel.connect(url) as there:
        clients = [s.create_training_client(settings.model, lora_rank=8) for s in (here, there)]
        pairs = make_pairs(settings.pairs, settings.tokens)
        for client in clients:
            for _ in range(3):
                step(client, pairs)
        times = [[timed(client, pairs) for client in clients] for _ in range(settings.steps)]
    embedded = [one for one, _ in times]
    extra = [(other - one) * 1e3 for one, other in times]
    low, middle, high = statistics.quantiles(extra, n=4)
    base = statistics.median(embedded) * 1e3
    print(
        f"{settings.model}, {settings.pairs} pairs of {settings.tokens} tokens, {settings.steps} alternations"
    )
    print(f"step in this process   {base:8.1f} ms (median)")
    print(
        f"HTTP adds              {middle:8.1f} ms (quartiles {low:.1f} to {high:.1f}), {middle / base:.1%} of it"
    )


@contextmanager
def served(model: str) -> Iterator[str]:
    """A server process with as many threads as this one."""
    command = [
        Path(sys.executable).with_name("firesteel"),
        "serve",
        "--no-auth",
        "--port",
        "0",
        "--base-model",
        model,
    ]
    with tempfile.TemporaryDirectory() as home:
        environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        process = subprocess.Popen(
            [*command, "--home", home],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert process.stdout is not None
        try:
            yield process.stdout.readline().split()[-1]
        finally:
            process.terminate()
            process.wait()


def make_pairs(count: int, tokens: int) -> list[PreferencePair]:
    """Pairs that share two thirds of their tokens."""
    rng = np.random.default_rng(0)
    made = []
    for line in range(count):
        prompt = rng.integers(5, 200, 2 * tokens // 3)
        made.append(PreferencePair(*(datum(prompt, rng, tokens) for _ in range(2)), len(prompt), line))
    return made


def datum(prompt: np.ndarray, rng: np.random.Generator, tokens: int) -> Datum:
    """One side, its response scored."""
    whole = np.concatenate([prompt, rng.integers(5, 200, tokens - len(prompt))])
    weights = np.zeros(len(whole) - 1, np.float32)
    weights[len(prompt) - 1 :] = 1
    return Datum(ModelInput.from_ints(whole[:-1]), {"target_tokens": whole[1:], "weights": weights})


def step(client: TrainingClient, pairs: list[PreferencePair]) -> None:
    """As the recipe makes it."""
    zeros = [np.zeros(int(d.loss_fn_inputs["weights"].to_numpy().sum()), np.float32) for d in pairs[0].datums]
    loss = make_pair_loss(pairs, [PairLogprobs(*zeros)] * len(pairs), DpoObjective(0.1))
    data = [side for pair in pairs for side in pair.datums]
    client.forward_backward_custom(data, loss, weighted_only=True).result()
    client.optim_step(AdamParams(1e-5)).result()


def timed(client: TrainingClient, pairs: list[PreferencePair]) -> float:
    """Seconds of one step, after a pause: the other trainer's threads wait actively for a while."""
    time.sleep(PAUSE_SECONDS)
    begin = time.perf_counter()
    step(client, pairs)
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
