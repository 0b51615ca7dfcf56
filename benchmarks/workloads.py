"""The rows that Firesteel and TRL are compared on, made from the preferences that this project ships.

(a) prompt-heavy: long prompts, short answers, as in retrieval or long chats; (b) answer-heavy: short questions,
long answers; (c) short chat: both short. Plain strings: their tokens and masks are the same on both sides
(`tests/slow/test_trl_parity.py`).
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SHIPPED = Path(__file__).parent.parent / "examples/preferences/train.jsonl"
SEED = 7


@dataclass(frozen=True)
class Workload:
    """How many of the shipped texts a prompt and an answer are made of, and how many pairs a step takes."""

    name: str
    questions_before: int
    answers: int
    batch: int


WORKLOADS = {
    "a": Workload("prompt-heavy", questions_before=4, answers=1, batch=4),
    "b": Workload("answer-heavy", questions_before=0, answers=3, batch=4),
    "c": Workload("short chat", questions_before=0, answers=1, batch=4),
}


@dataclass(frozen=True)
class Shipped:
    """One shipped preference as texts."""

    question: str
    chosen: str
    rejected: str


def write_rows(workload: Workload, count: int, path: Path) -> None:
    """Write `count` rows of TRL's `prompt`, `chosen`, `rejected`; the same for the same arguments."""
    texts, choose = list(_shipped()), random.Random(SEED)
    with path.open("w") as file:
        for _ in range(count):
            history = "".join(
                f"Question: {text.question}\nAnswer: {text.rejected}\n"
                for text in choose.sample(texts, workload.questions_before)
            )
            asked = choose.sample(texts, workload.answers)
            short, long = (
                " ".join(side) for side in zip(*((t.chosen, t.rejected) for t in asked), strict=True)
            )
            row = {
                "prompt": f"{history}Question: {asked[0].question}\nAnswer:",
                "chosen": f" {short}" if workload.answers == 1 else f" In short: {short} At length: {long}",
                "rejected": f" {long}",
            }
            file.write(json.dumps(row) + "\n")


def _shipped() -> Iterator[Shipped]:
    for line in SHIPPED.read_text().splitlines():
        row = json.loads(line)
        if "chosen" in row:
            *prompt, chosen = row["chosen"]["messages"]
            yield Shipped(
                prompt[-1]["content"], chosen["content"], row["rejected"]["messages"][-1]["content"]
            )
