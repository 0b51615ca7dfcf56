"""Firesteel and TRL 1.16 on the same rows, weights, order, optimizer and batch size, in alternating processes.

    python benchmarks/compare.py [--only a-full-cold] [--repeats 2] [--model smollm2-135m-instruct]
                                 [--checkpointing] [--device cuda] [--batch 32] [--json benchmarks/results.json]

A cell is a workload (a prompt-heavy, b answer-heavy, c short chat), `full` or `lora`, and `cold` (the reference
is computed) or `warm` (it is known on both sides: TRL has it computed before it is timed; here it comes first, and
a warm run is a cold one without it). Every repeat checks that all losses agree to 1e-3 while
they move by 0.05 or more; otherwise it ends there. Timed is from the first row to the last step; on a GPU, whose
first steps compile kernels, the ratio is that of the median later steps, and losses in bfloat16 agree to 0.05.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import transformers
from sides import STEPS, WARM_UP, Measured, Task
from workloads import WORKLOADS, write_rows

from firesteel import store
from firesteel.catalog import load_catalog

HERE = Path(__file__).parent
RANKS = {"full": 0, "lora": 16}
AGREEMENT = {torch.float32: 1e-3, torch.bfloat16: 0.05}
MOVEMENT = 0.05


@dataclass(frozen=True)
class Cell:
    """One row of the table."""

    workload: str
    policy: str
    start: str

    @property
    def name(self) -> str:
        """As `--only` takes it."""
        return f"{self.workload}-{self.policy}-{self.start}"


@dataclass(frozen=True)
class Repeat:
    """One alternation."""

    ours: Measured
    theirs: Measured
    device: str

    @property
    def speed(self) -> float:
        """How many times faster."""
        if self.device == "cuda":
            return self.theirs.step_time(self.device) / self.ours.step_time(self.device)
        return self.theirs.seconds / self.ours.seconds

    @property
    def memory(self) -> float:
        """Our peak over theirs."""
        return self.ours.peak_gib / self.theirs.peak_gib


def main() -> None:
    """Run the cells asked for; print a line for each and write all numbers as JSON."""
    options = parse_options()
    cells = [Cell(*parts) for parts in itertools.product(WORKLOADS, RANKS, ("cold", "warm"))]
    names = {cell.name for cell in cells}
    if unknown := set(options.only or []) - names:
        sys.exit(f"--only {', '.join(sorted(unknown))}: there is {', '.join(sorted(names))}")
    chosen = [cell for cell in cells if not options.only or cell.name in options.only]
    model = store.fetch(load_catalog().resolve_model(options.model))
    print(f"{options.model}, {STEPS} steps, {environment()}", flush=True)
    results: dict[str, Sequence[Repeat]] = {}
    started = time.monotonic()
    for _, group in itertools.groupby(chosen, key=lambda cell: (cell.workload, cell.policy)):
        with tempfile.TemporaryDirectory() as folder:
            measured = run_cells(tuple(group), Path(folder), model, options)
        for cell, repeats in measured.items():
            results[cell.name] = repeats
            print(line(cell, repeats), flush=True)
        if options.json:
            write_json(options, results)  # now: an hour's numbers are not lost by a key
    print(f"{(time.monotonic() - started) / 60:.0f} minutes")


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", action="append", help="a cell, as `a-full-cold`; may be given several times"
    )
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, help="pairs of a step, instead of the workload's own number")
    parser.add_argument("--checkpointing", action="store_true", help="TRL with gradient checkpointing on")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def run_cells(
    cells: Sequence[Cell], folder: Path, model: Path, options: argparse.Namespace
) -> dict[Cell, list[Repeat]]:
    """Cells that differ by their start alone: a run of ours and one of TRL's for each, every repeat in other order."""
    rank = RANKS[cells[0].policy]
    workload = WORKLOADS[cells[0].workload]
    batch = options.batch or workload.batch
    task = Task(folder, model, folder / "rows.jsonl", folder / "start", rank, batch, options.device)
    write_rows(workload, (STEPS + WARM_UP[options.device]) * batch, task.rows)
    if rank:
        launch("firesteel_side.py", task, "export-start")
    repeats: dict[Cell, list[Repeat]] = {cell: [] for cell in cells}
    for number in range(options.repeats):
        runs = [None, *cells][:: 1 if number % 2 == 0 else -1]  # None: ours
        measured = {run: run_side(run, replace(task, folder=folder / f"{number}"), options) for run in runs}
        for cell in cells:
            repeat = Repeat(as_started(measured[None], cell), measured[cell], options.device)
            check_losses(cell, repeat, AGREEMENT[task.dtype])
            repeats[cell].append(repeat)
    return repeats


def run_side(cell: Cell | None, task: Task, options: argparse.Namespace) -> Measured:
    """One process: TRL's for a cell, or ours."""
    folder = task.folder / (cell.name if cell else "firesteel")
    folder.mkdir(parents=True)
    if cell is None:
        run = replace(task, folder=folder)
        launch("firesteel_side.py", run)
    else:
        run = replace(task, folder=folder, warm=cell.start == "warm", checkpointing=options.checkpointing)
        launch("trl_side.py", run)
    return Measured(**json.loads(run.answer.read_text()))


def as_started(ours: Measured, cell: Cell) -> Measured:
    """Our run as that of a cell: without its reference pass where the references were known."""
    return replace(ours, seconds=ours.seconds - ours.reference_seconds) if cell.start == "warm" else ours


def launch(side: str, task: Task, *more: str) -> None:
    """Run a side in a process of its own; what it prints is shown if it fails."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, str(HERE / side), task.write(), *more]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def check_losses(cell: Cell, repeat: Repeat, agreement: float) -> None:
    """Only equal work may be timed."""
    ours, theirs = repeat.ours.losses, repeat.theirs.losses
    if len(ours) != len(theirs):
        sys.exit(f"{cell.name}: {len(ours)} steps here, {len(theirs)} in TRL")
    apart = max(abs(one - other) for one, other in zip(ours, theirs, strict=True))
    moved = max(ours) - min(ours)
    if apart > agreement or moved < MOVEMENT:
        sys.exit(f"{cell.name}: losses differ by {apart:.1e} and move by {moved:.2g}\n{ours}\n{theirs}")


def line(cell: Cell, repeats: Sequence[Repeat]) -> str:
    """A cell for people: medians, the range of the ratio, and ours → theirs."""
    speeds = [repeat.speed for repeat in repeats]
    middle = sorted(repeats, key=lambda repeat: repeat.speed)[(len(repeats) - 1) // 2]  # of two the worse
    ours, theirs = middle.ours, middle.theirs
    useful = [repeat.ours.useful_share or 0.0 for repeat in repeats]
    steps = [side.step_time(middle.device) for side in (ours, theirs)]
    return (
        f"{cell.name:<12} {statistics.median(speeds):5.2f}x ({min(speeds):.2f}-{max(speeds):.2f})  "
        f"{ours.pairs / ours.seconds:5.2f} vs {theirs.pairs / theirs.seconds:5.2f} pairs/s  "
        f"{ours.tokens / ours.seconds:6.0f} vs {theirs.tokens / theirs.seconds:6.0f} tokens/s  "
        f"step {steps[0]:.3f} vs {steps[1]:.3f} s  "
        f"peak {ours.peak_gib:5.2f} vs {theirs.peak_gib:5.2f} GiB ({middle.memory:.2f}x)  "
        f"useful work {statistics.median(useful):.0%} of {ours.linear_gflops:.0f} GFLOP/s  "
        f"waited for rows {ours.wait_share:.1%}"
    )


def environment() -> str:
    """What the numbers depend on."""
    return (
        f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads, "
        f"{torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()}"
    )


def write_json(options: argparse.Namespace, results: Mapping[str, Sequence[Repeat]]) -> None:
    """All runs, not only medians."""
    cells = {name: [asdict(repeat) for repeat in repeats] for name, repeats in results.items()}
    written = {
        "date": time.strftime("%Y-%m-%d"),
        "steps": STEPS,
        "trl_gradient_checkpointing": options.checkpointing,
        "environment": environment(),
        "device": options.device,
        "cells": cells,
    }
    options.json.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
