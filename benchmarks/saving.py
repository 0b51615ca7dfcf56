"""What a checkpoint costs training: for how long steps are held up by one, against one plain write of the same bytes.

    python benchmarks/saving.py [--model smollm2-135m-instruct] [--rank 0] [--steps 3] [--repeats 3]

Alternates: so many steps with nothing else; one write of the state's bytes to a file, synced; so many steps with a
checkpoint begun before the first. "Held up" is what the steps with a checkpoint took longer, the hashing and writing
beside them included; the state is on the disk when its future is done.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from firesteel.sdk import AdamParams, Datum, ModelInput
from training.utils import ReconnectableClient, build_service_client


def main() -> None:
    """Alternate, and print the medians."""
    options = parse_options()
    data = [datum(seed) for seed in range(8)]
    with (
        tempfile.TemporaryDirectory(dir=options.folder) as scratch,
        build_service_client(base_model=options.model, lora_rank=options.rank) as service,
    ):
        folder = Path(scratch)
        policy = ReconnectableClient(service.create_training_client())
        steps(policy, data, 2)  # the optimizer's state is there after the first
        policy.save_state(str(folder / "first"))
        size = sum(path.stat().st_size for path in (folder / "first").iterdir())
        plain, writes, held, whole = [], [], [], []
        for number in range(options.repeats):
            plain.append(steps(policy, data, options.steps))
            writes.append(write(folder / "plain", size))
            started = time.perf_counter()
            saving = policy.submit_save_state(str(folder / str(number)))
            held.append(steps(policy, data, options.steps) - plain[-1])
            saving.result()
            whole.append(time.perf_counter() - started)
            shutil.rmtree(folder / str(number))
    print(
        f"{options.model}, rank {options.rank}, state {size / 2**20:,.0f} MiB, {options.steps} steps of "
        f"{statistics.median(plain) / options.steps:.2f} s: one write {statistics.median(writes):.2f} s "
        f"({min(writes):.2f}-{max(writes):.2f}), steps held up {statistics.median(held):.2f} s "
        f"({min(held):.2f}-{max(held):.2f}), on the disk after {statistics.median(whole):.2f} s"
    )


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--folder", help="where to write: the disk that is measured; default: for temporary files"
    )
    return parser.parse_args()


def datum(seed: int) -> Datum:
    """A sequence of 64 tokens, the last half scored."""
    tokens = np.random.default_rng(seed).integers(100, 1000, 65)
    weights = np.repeat(np.float32([0, 1]), 32)
    return Datum(ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:], "weights": weights})


def steps(policy: ReconnectableClient, data: list[Datum], count: int) -> float:
    """Seconds of so many steps."""
    started = time.perf_counter()
    for _ in range(count):
        policy.forward_backward(data, weighted_only=True)
        policy.optim_step(AdamParams(learning_rate=1e-6))
    return time.perf_counter() - started


def write(path: Path, size: int) -> float:
    """Seconds of one write of so many bytes, synced."""
    block = np.random.default_rng(0).bytes(2**24)
    started = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for start in range(0, size, len(block)):
            file.write(block[: min(len(block), size - start)])
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    path.unlink()
    return seconds


if __name__ == "__main__":
    main()
