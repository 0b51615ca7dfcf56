"""What this machine does per second: reference pass, LoRA step, full-parameter step.

    python benchmarks/step.py [--model smollm2-135m-instruct] [--data examples/preferences/train.jsonl]
                              [--pairs 48] [--batch-size 8] [--lora-rank 16]

Tokens are those of both whole sequences of a pair, before prompts are shared. Model load is not timed; the
first step of each part is a warm-up and is not timed either.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from firesteel.sdk import AdamParams
from training.utils import (
    DpoObjective,
    PreferencePair,
    ReconnectableClient,
    build_service_client,
    make_pair_loss,
)
from training.utils.losses import PairLogprobs
from training.utils.pairs import render_pairs
from training.utils.preference_data import read_preferences
from training.utils.rendering import Renderer
from training.utils.row_outcomes import Rendering
from training.utils.tokenizer import load_tokenizer


def main() -> None:
    """Run the parts in turn and print a line for each."""
    options = parse_options()
    renderer = Renderer(load_tokenizer(options.model))
    pairs = render_pairs(read_preferences(options.data, "skip"), renderer, Rendering(on_bad_row="skip")).pairs
    batches = [pairs[i : i + options.batch_size] for i in range(0, options.pairs, options.batch_size)]
    print(f"{options.model}, {options.pairs} pairs of {options.data}, {options.batch_size} a step, torch "
          f"{torch.__version__}, {torch.get_num_threads()} threads")  # fmt: skip
    references, reference_rate = time_reference(options.model, batches)
    for rank in (options.lora_rank, 0):
        rate = time_steps(options.model, rank, batches, references)
        print(f"{'':<22} the reference pass reads {reference_rate / rate:.2f} times as many tokens a second")


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--data", default="examples/preferences/train.jsonl")
    parser.add_argument("--pairs", type=int, default=48)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lora-rank", type=int, default=16)
    return parser.parse_args()


def time_reference(
    model: str, batches: Sequence[Sequence[PreferencePair]]
) -> tuple[list[list[PairLogprobs]], float]:
    """Forward only; returns the references of each batch, and tokens a second."""
    references: list[list[PairLogprobs]] = []
    with build_service_client(base_model=model, lora_rank=0) as service:
        reference = ReconnectableClient(service.create_reference_client())

        def forward(batch: Sequence[PreferencePair]) -> None:
            data = [datum for pair in batch for datum in pair.datums]
            outputs = reference.forward(data, weighted_only=True).loss_fn_outputs
            scored = [
                output["logprobs"].to_numpy()[datum.loss_fn_inputs["weights"].to_numpy() != 0]
                for output, datum in zip(outputs, (d for p in batch for d in p.datums), strict=True)
            ]
            references.append([PairLogprobs(*scored[i : i + 2]) for i in range(0, len(scored), 2)])

        rate = report("reference pass", batches, forward)
    return references, rate


def time_steps(
    model: str,
    rank: int,
    batches: Sequence[Sequence[PreferencePair]],
    references: Sequence[Sequence[PairLogprobs]],
) -> float:
    """forward_backward_custom and optim_step; returns tokens a second."""
    known = dict(zip(map(id, batches), references, strict=True))
    with build_service_client(base_model=model, lora_rank=rank) as service:
        policy = ReconnectableClient(service.create_training_client())

        def step(batch: Sequence[PreferencePair]) -> None:
            loss = make_pair_loss(batch, known[id(batch)], DpoObjective(0.1))
            policy.forward_backward_custom([d for p in batch for d in p.datums], loss, weighted_only=True)
            policy.optim_step(AdamParams(learning_rate=1e-5))

        return report(f"LoRA step, rank {rank}" if rank else "full-parameter step", batches, step)


def report(
    label: str, batches: Sequence[Sequence[PreferencePair]], run: Callable[[Sequence[PreferencePair]], None]
) -> float:
    """Time `run` on each batch after the first; print the medians, return tokens a second."""
    seconds = []
    for batch in batches:
        started = time.perf_counter()
        run(batch)
        seconds.append(time.perf_counter() - started)
    rates = [sum(p.tokens for p in b) / s for b, s in zip(batches[1:], seconds[1:], strict=True)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    pairs = len(batches[0]) / statistics.median(seconds[1:])
    print(
        f"{label:<22} {pairs:6.2f} pairs/s  {statistics.median(rates):7.0f} tokens/s  peak so far {peak:.2f} GiB"
    )
    return statistics.median(rates)


if __name__ == "__main__":
    main()
