"""What an adapter costs: forward and backward with LoRA on all linear layers, over those of the bare frozen base.

    python benchmarks/lora.py [--model smollm2-135m-instruct] [--lora-rank 16] [--pairs 4] [--repeats 5]

The bare base computes the gradient of its inputs (of the embedded tokens) and of nothing else: what any adapter
needs at least. Both run the same prefix trees; they alternate.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from workloads import WORKLOADS, write_rows

from firesteel import store
from firesteel.catalog import load_catalog
from firesteel.engine.adapters import Adapter
from firesteel.engine.logprobs import Asked, tree_logprobs
from firesteel.engine.memory import keep_freed_memory
from firesteel.engine.models import BaseModel, load_base
from firesteel.engine.packing import pack
from firesteel.sdk import Datum, LoraConfig
from firesteel.sdk.shapes import Mode, TrainingShape
from training.utils.pairs import render_pairs
from training.utils.preference_data import read_preferences
from training.utils.rendering import Renderer


def main() -> None:
    """Time both in turn on each workload."""
    options = parse_options()
    keep_freed_memory()
    entry = load_catalog().resolve_model(options.model)
    shape = TrainingShape("benchmark", "*", "cpu", "float32", Mode.LORA_TRAINER)
    bare, adapted = (load_base(options.model, entry, store.fetch(entry), shape) for _ in range(2))
    embedded = bare.network.get_input_embeddings()
    embedded.register_forward_hook(lambda module, given, output: output.requires_grad_())
    adapter = Adapter(adapted, "policy", LoraConfig(rank=options.lora_rank, alpha=32.0))
    for name, workload in WORKLOADS.items():
        data = workload_data(name, options)
        seconds: dict[str, list[float]] = {"bare": [], "adapted": []}
        for _ in range(options.repeats + 1):
            seconds["bare"].append(once(bare, data))
            with adapter.active():
                seconds["adapted"].append(once(adapted, data))
        ratios = [a / b for a, b in zip(seconds["adapted"][1:], seconds["bare"][1:], strict=True)]
        print(
            f"{name} {workload.name:<14} bare base {statistics.median(seconds['bare'][1:]):.2f} s, "
            f"rank {options.lora_rank} {statistics.median(seconds['adapted'][1:]):.2f} s: "
            f"{statistics.median(ratios):.2f}x ({min(ratios):.2f}-{max(ratios):.2f})"
        )


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


def workload_data(name: str, options: argparse.Namespace) -> list[Datum]:
    """The datums of some of a workload's pairs."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_rows(WORKLOADS[name], options.pairs, path)
        pairs = render_pairs(read_preferences(path), Renderer.load(options.model)).pairs
    return [datum for pair in pairs for datum in pair.datums]


def once(base: BaseModel, data: list[Datum]) -> float:
    """Seconds of one forward and backward of the scored tokens' sum."""
    tokens = [np.asarray(datum.model_input.to_ints(), np.int64) for datum in data]
    asked = [
        Asked(d.loss_fn_inputs["target_tokens"].to_numpy(), d.loss_fn_inputs["weights"].to_numpy() != 0)
        for d in data
    ]
    started = time.perf_counter()
    scores = tree_logprobs(base.network, pack(tokens), asked, base.head)
    torch.stack([score.sum() for score in scores]).sum().backward()
    base.network.zero_grad(set_to_none=True)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
