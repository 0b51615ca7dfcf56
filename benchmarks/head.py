"""Log-probabilities from hidden states, three ways: all logits, torch's `linear_cross_entropy`, and ours.

    python benchmarks/head.py [--rows 1000] [--width 576] [--vocabulary 49152] [--repeats 5]

Forward and backward of a weighted sum of one log-probability per row, with a frozen and a trained head; the ways
alternate. Memory is what the calls add to the process's peak, each way in a process of its own.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from firesteel.engine.head import Head, Targets, target_logprobs


def all_logits(hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """What a model's own code and `log_softmax` do."""
    return -F.cross_entropy(F.linear(hidden, weight), ids, reduction="none")


def torch_fused(chunk: int | None) -> Callable[..., torch.Tensor]:
    """torch's own, with its default chunks or chunks of so many rows."""

    def compute(hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        settings = {} if chunk is None else {"batch_chunk_size": chunk}
        options = torch.nn.LinearCrossEntropyOptions(**settings)
        return -F.linear_cross_entropy(hidden, weight, ids, reduction="none", options=options)

    return compute


def ours(hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The engine's."""
    return target_logprobs(Head(weight), hidden, Targets(np.arange(len(hidden)), ids.numpy()))


WAYS = {
    "all logits": all_logits,
    "torch, default": torch_fused(None),
    "torch, 256 rows": torch_fused(256),
    "firesteel": ours,
}


def main() -> None:
    """Time all ways in turn; with `--way` only add up one way's memory."""
    options = parse_options()
    torch.manual_seed(0)
    hidden = torch.randn(options.rows, options.width)
    weight = torch.randn(options.vocabulary, options.width) / options.width**0.5
    ids = torch.randint(options.vocabulary, (options.rows,))
    slope = torch.randn(options.rows)

    def once(way: str, trained: bool) -> float:
        leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_(trained)
        started = time.perf_counter()
        (WAYS[way](*leaves, ids) * slope).sum().backward()
        return time.perf_counter() - started

    if options.way:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident (Linux)
        before = peak_mib()
        once(options.way, options.trained)
        print(f"{peak_mib() - before:.0f}")
        return
    for trained in (False, True):
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(options.repeats + 1):
            for way in WAYS:
                seconds[way].append(once(way, trained))
        for way in WAYS:
            command = [sys.executable, *sys.argv, "--way", way, *["--trained"] * trained]
            memory = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
            middle = statistics.median(seconds[way][1:])
            print(
                f"{'trained' if trained else 'frozen'} head  {way:<16} {middle * 1e3:6.0f} ms  +{memory:>5} MiB"
            )


def peak_mib() -> float:
    """Largest resident memory since the peak was reset; `ru_maxrss` would start at that of the parent process."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    return int(line.split()[1]) / 1024


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--trained", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
