"""The folder of one run: configuration, metrics, refused rows, answers, exported weights."""

from __future__ import annotations

import fcntl
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import orjson

from firesteel.sdk.errors import ConfigError

# What a run writes. Only these are moved out of the way; other files in the folder are the user's.
RUN_FILES = ("config.json", "metrics.jsonl", "bad_rows.jsonl", "samples.jsonl", "adapter", "model", "wandb")
# By these settings a run's `config.json` is told from that of a model, which has the same name.
_SETTINGS_OF_A_RUN = {"log_path", "base_model", "dataset"}


class RunFolder:
    """`<log_path>` of a recipe, held by one run at a time."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self.metrics = path / "metrics.jsonl"
        self.bad_rows = path / "bad_rows.jsonl"
        self.samples = path / "samples.jsonl"
        self._lock = lock

    @classmethod
    def start(cls, log_path: str, config: dict[str, Any]) -> tuple[RunFolder, Path | None]:
        """Make the folder and write `config.json`; an earlier run's files move to `previous-<n>/`.

        Returns the folder and where the earlier run went, None if there was none. Nothing is deleted. Raises
        `ConfigError` for a folder that cannot be written to, that another run is writing to, or that holds
        files of these names which are not a run's.
        """
        path = Path(log_path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            run = cls(path, _locked(path))
            with ExitStack() as on_failure:
                on_failure.callback(run.close)
                previous = _move_earlier_run(path)
                (path / "config.json").write_bytes(orjson.dumps(config, option=orjson.OPT_INDENT_2) + b"\n")
                on_failure.pop_all()
        except OSError as error:
            raise ConfigError(
                f"log_path: {log_path}: {error}; name a folder that can be written to"
            ) from error
        return run, previous

    def close(self) -> None:
        """Let another run have the folder."""
        os.close(self._lock)

    def export_path(self, adapter: bool) -> Path:
        """Where the final weights go."""
        return self.path / ("adapter" if adapter else "model")


def _locked(path: Path) -> int:
    """A lock on the folder itself, gone with the process that holds it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ConfigError(
            f"log_path: another run is writing to {path}; wait for it or name another folder"
        ) from None
    return descriptor


def _move_earlier_run(path: Path) -> Path | None:
    present = [path / name for name in RUN_FILES if (path / name).exists()]
    if not present:
        return None
    if not _is_a_run(path / "config.json"):
        names = ", ".join(file.name for file in present)
        raise ConfigError(
            f"log_path: {path} holds {names}, but is not the folder of a run; name another folder"
        )
    taken = [int(p.name.removeprefix("previous-")) for p in path.glob("previous-*") if p.name[9:].isdigit()]
    previous = path / f"previous-{max(taken, default=0) + 1}"
    previous.mkdir()
    for file in present:
        file.rename(previous / file.name)
    return previous


def _is_a_run(config: Path) -> bool:
    try:
        content = orjson.loads(config.read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return False
    return isinstance(content, dict) and content.keys() >= _SETTINGS_OF_A_RUN
