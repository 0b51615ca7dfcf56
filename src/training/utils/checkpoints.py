"""The checkpoints of a run: saved while training goes on, listed when they are whole, kept or pruned, found again.

checkpoints/step-<n>/    a trainer's state (`engine.states`), and notes.json: where the loop was
checkpoints.jsonl        a line for each that is whole on the disk, in the order of their steps
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import orjson

from firesteel.sdk import APIFuture, CheckpointError, SaveStateResponse
from firesteel.sealed import MANIFEST, damage, read_json, remove_folder, replace_file, storage_errors
from training.utils.client import ReconnectableClient
from training.utils.run_folder import CHECKPOINTS, LISTING, RunFolder

NOTES = "notes.json"
FORMAT = 1


@dataclass(frozen=True)
class Position:
    """Where a loop stands after a step, and what it knows that cannot be computed again from weights and data."""

    step: int
    epoch: int
    rows: int
    """Pairs of this epoch that were trained on."""
    seq_id: int
    """The number of the trainer's next operation."""
    metrics_bytes: int
    """Length of metrics.jsonl."""
    skipped_steps: int
    before: Mapping[str, float]
    """Held-out metrics before the first step, those that are finite."""
    heldout: Mapping[str, float]
    """Those of this step, where it was evaluated."""
    answers_before: Mapping[str, str]
    """What the model answered before the first step, by prompt."""

    @classmethod
    def of_a_start(cls, before: Mapping[str, float], answers: Mapping[str, str]) -> Position:
        """Before the first step."""
        return cls(0, 0, 0, 1, 0, 0, finite(before), {}, answers)


@dataclass(frozen=True)
class ReferenceRecord:
    """The reference of a run: what it is, and what it says of a few rows."""

    weights: str
    numerics: str
    path: str | None
    """Where its weights were read, where that is neither the base model nor the run folder."""
    probes: Sequence[Sequence[float | None]]
    """Log-probabilities of the scored tokens of the probe rows, chosen and rejected in turn."""


@dataclass(frozen=True)
class Identity:
    """What a run is a run of."""

    config: Mapping[str, Any]
    data: Mapping[str, Any]
    """Hashes of the data's content and of what turns it into tokens, and the number of training pairs."""


@dataclass(frozen=True)
class Notes:
    """`notes.json`: all that a checkpoint holds beside the trainer's state."""

    position: Position
    identity: Identity
    reference: ReferenceRecord
    total_steps: int
    activation_token_budget: int
    format: int = FORMAT

    @classmethod
    def read(cls, checkpoint: Path) -> Notes:
        """Reads every byte of a checkpoint. Raises `CheckpointError` if it is damaged or not one of a run."""
        if problem := damage(checkpoint, names=(NOTES,)):
            raise CheckpointError(f"checkpoint {checkpoint} is damaged: {problem}")
        try:
            content = read_json(checkpoint / NOTES)
            if content["format"] != FORMAT:
                raise CheckpointError(
                    f"checkpoint {checkpoint} has notes of format {content['format']}, this program reads {FORMAT}"
                )
            parts = {f.name: content[f.name] for f in fields(cls)}
            return cls(
                Position(**parts.pop("position")),
                Identity(**parts.pop("identity")),
                ReferenceRecord(**parts.pop("reference")),
                **parts,
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"checkpoint {checkpoint} is not one of a run: {error!r}") from error


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay. With nothing set, all; the newest always does."""

    last: int | None = None
    """The newest so many."""
    every: int | None = None
    """Those whose step is a multiple of this."""
    best: str | None = None
    """That with the best value of this held-out metric."""

    def pruned(self, listed: Sequence[Listed]) -> list[Listed]:
        """Which of these, oldest first, go."""
        if self.last is None:
            return []
        kept = {entry.step for entry in listed[-self.last :]}
        kept |= {entry.step for entry in listed if self.every and entry.step % self.every == 0}
        if self.best is not None:
            sign = -1.0 if self.best.endswith("loss") else 1.0
            known = [entry for entry in listed if self.best in entry.heldout]
            kept |= {e.step for e in sorted(known, key=lambda e: sign * e.heldout[self.best or ""])[-1:]}
        return [entry for entry in listed if entry.step not in kept]


@dataclass(frozen=True)
class Listed:
    """A line of `checkpoints.jsonl`."""

    step: int
    epoch: int
    heldout: Mapping[str, float]

    @property
    def path(self) -> str:
        """Relative to the run folder."""
        return f"{CHECKPOINTS}/step-{self.step}"


class Checkpoints:
    """Saves the checkpoints of a run that trains; at most one is being written."""

    def __init__(self, folder: RunFolder, retention: Retention) -> None:
        self._folder = folder
        self._retention = retention
        self._writing: tuple[Listed, APIFuture[SaveStateResponse]] | None = None

    def save(self, policy: ReconnectableClient, notes: Notes) -> None:
        """Begin a checkpoint of now. Waits for the one before it to be on the disk, and raises its error."""
        self.finish()
        self._folder.refuse_if_taken_over()
        position = notes.position
        entry = Listed(position.step, position.epoch, position.heldout)
        # A fenced process may have had one in flight; this run has not made this step before.
        self._folder.set_aside([entry.path])
        future = policy.submit_save_state(str(self._folder.path / entry.path), asdict(notes))
        self._writing = entry, future

    def list_if_written(self) -> None:
        """List the one that is being written, if it is whole by now."""
        if self._writing is not None and self._writing[1].done():
            self.finish()

    def close(self) -> None:
        """See `finish`: whatever ends the run, what was begun is listed if it can be."""
        self.finish()

    def finish(self) -> None:
        """Wait for the one that is being written, list it, and prune. Raises `StorageError` if it was not written."""
        if self._writing is None:
            return
        (entry, future), self._writing = self._writing, None
        future.result()
        self._folder.refuse_if_taken_over()
        self.add(entry)

    def add(self, entry: Listed) -> None:
        """List a checkpoint that is whole on the disk, and prune. Raises `StorageError`."""
        listed = [*(e for e in listed_in(self._folder.path) if e.step < entry.step), entry]
        pruned = self._retention.pruned(listed)
        write_listing(self._folder, [e for e in listed if e not in pruned])
        for old in pruned:
            if (self._folder.path / old.path).exists():
                remove_folder(self._folder.path / old.path)


def listed_in(run: Path) -> list[Listed]:
    """The lines of `checkpoints.jsonl`, oldest first. Raises `CheckpointError` for a file that is not such a list."""
    path = run / LISTING
    try:
        lines = path.read_bytes().splitlines()
        return [Listed(**json.loads(line)) for line in lines if line.strip()]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path} is not a list of checkpoints ({error}); move it away, they are found without it"
        ) from error


def write_listing(folder: RunFolder, entries: Iterable[Listed]) -> None:
    """Replace `checkpoints.jsonl`."""
    replace_file(
        folder.listing,
        b"".join(orjson.dumps(asdict(entry), option=orjson.OPT_SORT_KEYS) + b"\n" for entry in entries),
    )


def found_in(run: Path) -> list[Listed]:
    """All checkpoints of a run, oldest first: those listed, and one that the run was killed before it could list."""
    known = {entry.step: entry for entry in listed_in(run)}
    for path in (run / CHECKPOINTS).glob("step-*"):
        number = path.name.removeprefix("step-")
        if number.isdigit() and int(number) not in known:
            known[int(number)] = _unlisted(path, int(number))
    return [known[step] for step in sorted(known)]


def _unlisted(path: Path, step: int) -> Listed:
    try:
        position = Notes.read(path).position
    except CheckpointError:
        return Listed(step, 0, {})  # whoever wants to go on from it is told what is wrong
    return Listed(step, position.epoch, position.heldout)


def finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """Those that JSON can hold."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def newest_checkpoint(path: str) -> Path:
    """The folder of a checkpoint that is named by itself or by its run. Raises `CheckpointError` if there is none."""
    folder = Path(path)
    if (folder / MANIFEST).exists():
        return folder
    found = found_in(folder)
    if not found:
        raise CheckpointError(f"init_from_checkpoint: {path} is neither a checkpoint nor a run that has one")
    return folder / found[-1].path


def cut_metrics(path: Path, length: int) -> bool:
    """Cut `metrics.jsonl` back to what it was; where that is no longer there, to its last whole line, and False."""
    with storage_errors(path, 0):
        content = path.read_bytes() if path.exists() else b""
        as_it_was = len(content) >= length and (not length or content[length - 1 : length] == b"\n")
        kept = length if as_it_was else content[:length].rfind(b"\n") + 1
        with path.open("ab") as file:
            file.truncate(kept)
            os.fsync(file.fileno())
    return as_it_was
