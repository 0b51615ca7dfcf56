"""What a run costs as it grows: tokens of a sequence, pairs of a step, rows of a file, and memory for a token budget.

    python benchmarks/scaling.py [--part length|batch|budget|rows] [--model smollm2-135m-instruct]
                                 [--most-rows 100000] [--json scaling.json]

Each case runs in a process of its own, so that its peak memory is its own. Token ids are random: what they mean
does not change what they cost. Timed is the median of the steps after the first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from firesteel.sdk import AdamParams
from training.utils import DpoObjective, PreferencePair, TrainerConfig, build_dpo_datums, make_pair_loss
from training.utils.losses import PairLogprobs
from training.utils.preference_rows import PREFERENCES
from training.utils.rendering import Renderer
from training.utils.row_index import index_rows
from training.utils.row_outcomes import Rendering
from training.utils.row_sets import select_rows
from training.utils.schedules import Epochs
from training.utils.service import build_service_client

STEPS = 3
LORA_RANK = 16
LARGEST_TOKEN_ID = 30000


@dataclass(frozen=True)
class Steps:
    """Optimizer steps on random pairs, half of each sequence being the prompt."""

    length: int
    """Tokens of each sequence."""
    pairs: int
    rank: int
    budget: int | None = None
    """`activation_token_budget`."""


@dataclass(frozen=True)
class Rows:
    """A file that is indexed, and of which some batches are taken."""

    count: int


Case = Steps | Rows

PARTS: dict[str, list[Case]] = {
    "length": [Steps(length, 1, rank) for rank in (0, LORA_RANK) for length in (128, 512, 2048)],
    "batch": [Steps(96, pairs, rank) for rank in (0, LORA_RANK) for pairs in (1, 4, 16)],
    "budget": [Steps(512, 6, LORA_RANK, budget) for budget in (1024, 2048, 4096, 8192)],
    "rows": [Rows(count) for count in (1_000, 10_000, 100_000, 1_000_000)],
}


def main() -> None:
    """Run every case of the parts asked for; print a line for each."""
    options = parse_options()
    if options.case:
        case = {"Steps": Steps, "Rows": Rows}[options.case[0]](**json.loads(options.case[1]))
        measured = (
            run_steps(case, options.model) if isinstance(case, Steps) else run_rows(case, options.model)
        )
        print(json.dumps(measured))
        return
    results = []
    for part, cases in PARTS.items():
        if options.part not in (None, part):
            continue
        print(part)
        for case in cases:
            if isinstance(case, Rows) and case.count > options.most_rows:
                continue
            measured = in_own_process(case, options.model)
            results.append({"part": part, **asdict(case), **measured})
            described = "  ".join(
                f"{name} {value}" for name, value in asdict(case).items() if value is not None
            )
            found = "  ".join(f"{name} {value:,.4g}" for name, value in measured.items())
            print(f"  {described:<44} {found}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--most-rows", type=int, default=100_000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def in_own_process(case: Case, model: str) -> dict[str, float]:
    """A case's numbers."""
    given = ["--case", type(case).__name__, json.dumps(asdict(case)), "--model", model]
    done = subprocess.run([sys.executable, __file__, *given], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{case} failed:\n{done.stderr[-3000:]}")
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def run_steps(case: Steps, model: str) -> dict[str, float]:
    """Forward, backward and optimizer step."""
    rng = np.random.default_rng(0)
    trainer = TrainerConfig(activation_token_budget=case.budget)
    seconds, metrics = [], {}
    with build_service_client(base_model=model, lora_rank=case.rank, trainer=trainer) as service:
        policy = service.create_training_client()
        for _ in range(STEPS + 1):
            pairs = [random_pair(rng, case.length) for _ in range(case.pairs)]
            zeros = [np.zeros(case.length // 2, np.float32)] * 2
            loss = make_pair_loss(pairs, [PairLogprobs(*zeros) for _ in pairs], DpoObjective(0.1))
            started = time.perf_counter()
            data = [datum for pair in pairs for datum in pair.datums]
            metrics = policy.forward_backward_custom(data, loss, weighted_only=True).metrics
            policy.optim_step(AdamParams(learning_rate=1e-6)).result()
            seconds.append(time.perf_counter() - started)
    step = statistics.median(seconds[1:])
    return {
        "seconds": step,
        "pairs/s": case.pairs / step,
        "computed tokens/s": metrics["computed_tokens:sum"] / step,
        "micro-batches": metrics["micro_batches:sum"],
        "activations GiB": metrics["activation_bytes:max"] / 2**30,
        "peak GiB": memory_mib("VmHWM") / 1024,
    }


def random_pair(rng: np.random.Generator, length: int) -> PreferencePair:
    """Two sequences of this many tokens with half of them shared."""
    prompt = rng.integers(0, LARGEST_TOKEN_ID, length // 2)
    sides = [
        np.concatenate([prompt, rng.integers(0, LARGEST_TOKEN_ID, length - len(prompt))]).tolist()
        for _ in range(2)
    ]
    return PreferencePair(*build_dpo_datums(sides[0], sides[1], len(prompt)), len(prompt), line=1)


def run_rows(case: Rows, model: str) -> dict[str, float]:
    """Index a file of short chats, then take batches of 8 as a run would, as fast as they come."""
    renderer = Renderer.load(model)
    assert renderer.identity  # what loading a tokenizer needs is not growth
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        with path.open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in short_chats(case.count))
        before, started = memory_mib("VmRSS"), time.perf_counter()
        index = index_rows(str(path), renderer, PREFERENCES)
        indexed = time.perf_counter() - started
        epochs = Epochs(len(index.rows), 8, epochs=1, seed=0, shuffle=True)
        with closing(select_rows(index, renderer, Rendering(512))) as selected:
            batches = (batch.rows for batch, _ in zip(epochs.batches(), range(200), strict=False))
            started = time.perf_counter()
            taken = sum(len(batch.items) for batch in selected.rows.taken_ahead(batches))
            seconds = time.perf_counter() - started
        return {
            "rows/s read once": case.count / indexed,
            "index MB": index.rows.nbytes / 1e6,
            "pairs/s taken ahead": taken / seconds,
            "resident memory grew by MiB": memory_mib("VmRSS") - before,
            "at its peak by MiB": memory_mib("VmHWM") - before,
        }


def short_chats(count: int) -> Iterator[dict[str, object]]:
    """Rows that all differ."""
    for number in range(count):
        sides = {
            "chosen": f"{number + 1} comes after it.",
            "rejected": f"I cannot say what follows {number}.",
        }
        yield {
            "prompt": [{"role": "user", "content": f"What comes after {number}?"}],
            **{side: [{"role": "assistant", "content": text}] for side, text in sides.items()},
        }


def memory_mib(which: str) -> float:
    """`VmRSS` (now) or `VmHWM` (the peak) of this process (Linux)."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if which in line)
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main()
