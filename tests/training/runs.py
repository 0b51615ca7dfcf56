"""Small real runs of recipes, and what is compared of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from training.recipes import sft_loop
from training.recipes.dpo_loop import Config
from training.utils.training_settings import TrainingSettings

TIMED = {"train/step_time_sec", "train/tokens_per_sec", "train/data_wait_sec", "train/activation_gib"}
TIMED |= {
    "reference/cache_hits",
    "reference/computed",
    "reference/tokens",
}  # what earlier runs have left, like times, is not the run's own
RANKS = pytest.mark.parametrize("rank", [4, 0], ids=["lora", "full-parameter"])


def write_rows(path: Path, count: int, start: int = 0) -> str:
    """Learnable pairs: the answer `yes` is preferred to `nope`."""
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Question {index}?"}],
            "chosen": [{"role": "assistant", "content": f"yes {index}"}],
            "rejected": [{"role": "assistant", "content": f"nope {index}"}],
            "source": f"part {index % 2}",
        }
        for index in range(start, start + count)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config(folder: Path, count: int = 6, **settings: Any) -> Config:
    """A run in `folder` on rows of its own."""
    values = {
        "log_path": str(folder / "run"),
        "base_model": "tiny-llama",
        "dataset": write_rows(folder / "pairs.jsonl", count),
        "lora_rank": 4,
        "learning_rate": 3e-3 if settings.get("lora_rank", 4) else 3e-4,
        "batch_size": 2,
        "report": False,  # half a second, for every run of every test
        **settings,
    }
    return Config(**values)


def write_lists(path: Path, count: int, extra: Any = ()) -> str:
    """Learnable lists: `yes` before `maybe` before `nope`; every third row has a tie."""
    rows = []
    for index in range(count):
        texts = [f"yes {index}", f"maybe {index}", f"nope {index}", *extra]
        scores = [3, 2, 2 if index % 3 == 2 else 1, *range(-len(extra), 0)]
        prompt = [{"role": "user", "content": f"Question {index}, which is a somewhat longer one?"}]
        rows.append(
            {
                "prompt": prompt,
                "completions": [[{"role": "assistant", "content": text}] for text in texts],
                "scores": scores,
            }
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_chats(path: Path, count: int, start: int = 0) -> str:
    """Learnable rows: every answer is `yes` and the question's number. Some have two turns, some count double."""
    rows = []
    for index in range(start, start + count):
        messages = []
        for turn in range(1 + index % 2):
            messages.append({"role": "user", "content": f"Question {index}, part {turn}?"})
            messages.append({"role": "assistant", "content": f"yes {index}"})
        rows.append({"messages": messages, **({"weight": 2} if index % 3 == 0 else {})})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sft_config(folder: Path, count: int = 8, **settings: Any) -> sft_loop.Config:
    """The same of SFT."""
    values = {
        "log_path": str(folder / "run"),
        "base_model": "tiny-llama",
        "dataset": write_chats(folder / "rows.jsonl", count),
        "lora_rank": 4,
        "learning_rate": 3e-3 if settings.get("lora_rank", 4) else 3e-4,
        "batch_size": 3,
        "report": False,
        **settings,
    }
    return sft_loop.Config(**values)


def numbers(run: Path) -> list[dict[str, float]]:
    """All lines of metrics.jsonl without times, memory and cache hits."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMED} for line in lines]


def outcome(settings: TrainingSettings) -> dict[str, Any]:
    """All that must be equal to the bit between two runs of the same settings."""
    run = Path(settings.log_path)
    exported = run / (
        "adapter/adapter_model.safetensors" if settings.lora_rank else "model/model.safetensors"
    )
    last = max((run / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]), default=None)
    states = ("weights.safetensors", "optimizer.safetensors") if last else ()
    return {
        "metrics": numbers(run),
        "weights": exported.read_bytes(),
        "states": {
            name: {n: t.tobytes() for n, t in load_file(last / name).items()}
            for name in states
            if last is not None
        },
        "samples": (run / "samples.jsonl").read_text(),
        "bad rows": (run / "bad_rows.jsonl").read_text(),
        "checkpoints": (run / "checkpoints.jsonl").read_text() if last else "",
        "heldout": {path.name: path.read_text() for path in (run / "heldout").glob("*")},
    }
