"""Run folders made by hand: what a report says of numbers that are known."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training.utils.doubts import LEAKED_ROWS, Doubt
from training.utils.environment import Environment
from training.utils.heldout_rows import HeldoutRow, HeldoutRows, write_heldout
from training.utils.run_record import RunRecord, read_run

LAST = 9
"""The step of the newest evaluation."""


def made_run(
    folder: Path,
    metrics: Sequence[Mapping[str, float | None]] = (),
    rows: Sequence[HeldoutRows] = (),
    doubts: Sequence[Doubt] | None = None,
    **config: Any,
) -> RunRecord:
    """With these held-out metrics, and rows, before training and after its last step."""
    folder.mkdir(exist_ok=True)
    settings = {"log_path": str(folder), "base_model": "tiny-llama", "dataset": "rows.jsonl", **config}
    (folder / "config.json").write_text(json.dumps(settings))
    lines = [
        {"train/step": step, **{f"eval/{n}": v for n, v in told.items()}}
        for step, told in zip((0, LAST), metrics, strict=False)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step, evaluated in zip((0, LAST), rows, strict=False):
        write_heldout(folder, step, evaluated)
    if doubts is not None:
        Environment("dpo", LAST, "", "", {}, {}, {}, {}, doubts).write(folder / "environment.json")
    return read_run(folder)


def leaked(count: int) -> list[Doubt]:
    """That so many held-out rows are trained on."""
    return [Doubt("eval_dataset", LEAKED_ROWS, f"{count} held-out rows are among the training rows", count)]


def margins(values: Sequence[float], tokens: int = 10) -> HeldoutRows:
    """Of pairs, a row each."""
    both = {"chosen": tokens, "rejected": tokens + 3}
    return HeldoutRows("margin", [HeldoutRow(line, v, both) for line, v in enumerate(values, start=1)])


def lists(values: Sequence[Sequence[float]]) -> HeldoutRows:
    """Of ranked lists: the margins of each one's pairs."""
    both = {"chosen": 4, "rejected": 5}
    return HeldoutRows(
        "margin",
        [
            HeldoutRow(line, value, both, pair)
            for line, of_list in enumerate(values, start=1)
            for pair, value in enumerate(of_list, start=1)
        ],
    )


def losses(values: Sequence[float]) -> HeldoutRows:
    """Of supervised rows."""
    return HeldoutRows("sft_loss", [HeldoutRow(line, v, {"learned": 5}) for line, v in enumerate(values, 1)])
