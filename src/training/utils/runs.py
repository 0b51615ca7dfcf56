"""What there is of the runs in a folder: how far each has come, what it can go on from, how much room it takes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import orjson

from firesteel.sdk import CheckpointError
from firesteel.sealed import storage_errors
from training.utils.checkpoints import found_in
from training.utils.run_folder import RUN_FILES, Lock, RunFolder, is_a_run

State = Literal["running", "finished", "stopped", "damaged"]
DEPTH = 3
"""How deep below a folder runs are looked for."""


@dataclass(frozen=True)
class RunRow:
    """One run. `bytes` are those of all its files, earlier runs in its folder included."""

    path: str
    state: State
    step: int
    base_model: str
    lora_rank: int
    checkpoints: list[int]
    bytes: int
    last: dict[str, Any]
    """The last line of its metrics."""


def runs_below(folder: Path) -> Iterator[Path]:
    """Every run folder, those of earlier runs inside a run (`previous-<n>`) left out."""
    pattern = ["/".join(["*"] * depth + ["config.json"]) for depth in range(DEPTH + 1)]
    found = {path.parent for part in pattern for path in folder.glob(part) if is_a_run(path)}
    return iter(sorted(path for path in found if not path.name.startswith("previous-")))


def row_of(run: Path) -> RunRow:
    """Raises `CheckpointError` for a folder that is not one of a run."""
    if not is_a_run(run / "config.json"):
        raise CheckpointError(f"{run} is not the folder of a run: it has no config.json of one")
    config = orjson.loads((run / "config.json").read_bytes())
    last = _last_line(run / "metrics.jsonl")
    state: State = "finished" if (run / "summary.json").exists() else "stopped"
    try:
        checkpoints = [entry.step for entry in found_in(run)]
    except CheckpointError:
        state, checkpoints = "damaged", []
    return RunRow(
        path=str(run),
        state="running" if is_held(run) else state,
        step=int(last.get("train/step", 0)),
        base_model=config["base_model"],
        lora_rank=config.get("lora_rank", 0),
        checkpoints=checkpoints,
        bytes=_bytes_below(run),
        last=last,
    )


def is_held(run: Path) -> bool:
    """Whether a process writes to it now."""
    with closing(Lock(run)) as lock:
        return not lock.take()


def remove_run(run: Path) -> None:
    """Delete a run's files and the earlier runs in its folder; what else is there is the user's and stays.

    Raises `CheckpointError` for a folder that is none of a run, `ConfigError` for one that a process writes to.
    """
    row_of(run)
    folder = RunFolder.open(str(run))  # refused to whom writes there, and nobody can begin meanwhile
    earlier = [path for path in run.glob("previous-*") if path.name.removeprefix("previous-").isdigit()]
    # RUN_FILES ends with config.json: interrupted, what is left is still known as a run's.
    with storage_errors(run, 0), closing(folder):
        for path in (*earlier, *(run / name for name in RUN_FILES)):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    if not any(run.iterdir()):
        run.rmdir()


def _bytes_below(run: Path) -> int:
    total = 0
    for path in run.rglob("*"):
        with suppress(FileNotFoundError):  # of a run that prunes
            total += path.stat().st_size if path.is_file() else 0
    return total


def _last_line(path: Path) -> dict[str, Any]:
    """Of a run's own steps; empty before the first."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return {}
    for line in reversed(lines):
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError:
            continue  # of a process that is writing it
        if isinstance(record, dict):
            return record
    return {}
