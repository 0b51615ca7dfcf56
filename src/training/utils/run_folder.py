"""The folder of one run: configuration, metrics, refused rows, answers, exported weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson

from firesteel.sdk.errors import ConfigError

# What a run writes. Only these are moved out of the way; other files in the folder are the user's.
RUN_FILES = ("config.json", "metrics.jsonl", "bad_rows.jsonl", "samples.jsonl", "adapter", "model", "wandb")


class RunFolder:
    """`<log_path>` of a recipe."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = path / "metrics.jsonl"
        self.bad_rows = path / "bad_rows.jsonl"
        self.samples = path / "samples.jsonl"

    @classmethod
    def start(cls, log_path: str, config: dict[str, Any]) -> tuple[RunFolder, Path | None]:
        """Make the folder and write `config.json`; an earlier run's files move to `previous-<n>/`.

        Returns the folder and where the earlier run went, None if there was none. Nothing is deleted. Raises
        `ConfigError` for a folder that cannot be written to.
        """
        path = Path(log_path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            previous = _move_earlier_run(path)
            (path / "config.json").write_bytes(orjson.dumps(config, option=orjson.OPT_INDENT_2) + b"\n")
        except OSError as error:
            raise ConfigError(
                f"log_path: {log_path}: {error}; name a folder that can be written to"
            ) from error
        return cls(path), previous

    def export_path(self, adapter: bool) -> Path:
        """Where the final weights go."""
        return self.path / ("adapter" if adapter else "model")


def _move_earlier_run(path: Path) -> Path | None:
    present = [path / name for name in RUN_FILES if (path / name).exists()]
    if not present:
        return None
    taken = [int(p.name.removeprefix("previous-")) for p in path.glob("previous-*") if p.name[9:].isdigit()]
    previous = path / f"previous-{max(taken, default=0) + 1}"
    previous.mkdir()
    for file in present:
        file.rename(previous / file.name)
    return previous
