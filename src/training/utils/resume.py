"""What a run does with the folder it is given: start, go on from a checkpoint, or say that all is done.

`auto` never starts afresh over something that could be gone on with, and never goes on with what it was not asked for:
where neither is right it refuses and names the flag for each.
"""

from __future__ import annotations

import logging
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from firesteel.sdk import CheckpointError, TrainerLost, TrainerRewound
from firesteel.sdk.types import FloatArray
from firesteel.sealed import damage, read_json, storage_errors
from training.utils.checkpoints import (
    NOTES,
    Identity,
    Listed,
    Notes,
    Position,
    ReferenceRecord,
    cut_metrics,
    found_in,
    write_listing,
)
from training.utils.heldout_rows import heldout_name, heldout_steps
from training.utils.reference_cache import largest_difference
from training.utils.run_folder import CHECKPOINTS, LISTING, RESULTS, RunFolder

logger = logging.getLogger("firesteel")

HELDOUT, DAY = "eval_dataset content", "day"
FRESH = "start anew with --fresh (resume: never): what is there moves to previous-<n>/, nothing is deleted"


BEFORE_IT_WAS_SAID = {"recipe": "dpo", "loss": "sigmoid", "sft_weight": 0.0}
"""What a checkpoint is of that does not say."""


@dataclass(frozen=True)
class Wanted:
    """The run that was asked for."""

    identity: Identity
    may_change: frozenset[str]
    """Settings that neither the objective nor the data depend on."""
    total_steps: int


@dataclass(frozen=True)
class Start:
    """A run from its beginning; what is in the folder has to be set aside."""


@dataclass(frozen=True)
class GoOn:
    """A run from a checkpoint."""

    checkpoint: Path
    notes: Notes
    said: tuple[str, ...]
    """What is different from the run that it goes on with, for people."""
    same_heldout: bool
    """Whether held-out metrics of before can be compared with those to come."""

    @property
    def position(self) -> Position:
        """Where the loop goes on, with what still holds."""
        then = self.notes.position
        return then if self.same_heldout else replace(then, before={}, heldout={})


@dataclass(frozen=True)
class Finished:
    """A run that has nothing left to do."""

    summary: Mapping[str, Any]
    said: tuple[str, ...]
    """What was asked for differently now, for people; it changes nothing."""


def find_start(folder: RunFolder, resume: str, wanted: Wanted) -> Start | GoOn | Finished:
    """`resume` is `auto`, `never` or `step-<n>`. Changes nothing: that is for when all is known to be right.

    Raises `CheckpointError` where the run cannot go on as asked.
    """
    if resume == "never":
        return Start()
    found = found_in(folder.path)
    if not found:
        if resume != "auto":
            raise CheckpointError(f"resume: {resume}: {folder.path} has no checkpoints; {FRESH}")
        return Start()
    chosen = found[-1] if resume == "auto" else _named(resume, found, folder.path)
    notes = _whole(chosen, found, folder.path)
    _refuse_another_run(notes, wanted, folder.path)
    summary = folder.read_summary()
    if resume == "auto" and summary is not None and summary.get("steps") == wanted.total_steps:
        return Finished(summary, tuple(_changes(notes, wanted)))
    if notes.position.step > wanted.total_steps:
        raise CheckpointError(
            f"epochs: {folder.path / chosen.path} is {notes.position.step} steps in, and this run would have "
            f"{wanted.total_steps}; ask for more epochs, for an earlier checkpoint (--resume-from), or {FRESH}"
        )
    same = notes.identity.data.get(HELDOUT) == wanted.identity.data.get(HELDOUT)
    return GoOn(folder.path / chosen.path, notes, tuple(_changes(notes, wanted)), same)


class Losses:
    """How often a run has lost its trainer, and whether it may go back to its newest checkpoint once more."""

    MOST_WITHOUT_PROGRESS = 5

    def __init__(self, log_path: str, verb: str) -> None:
        """`verb` is the recipe's name on the command line, for what people are told to run."""
        self._run = Path(log_path)
        self._command = shlex.join(["firesteel", verb, str(self._run / "config.json")])
        self._begun = False
        self._at = -2
        self._count = 0

    def begun(self) -> None:
        """From now on the folder's checkpoints are those of this run."""
        self._begun = True

    def go_back(self, lost: TrainerLost | TrainerRewound) -> bool:
        """Whether to take up the newest checkpoint; False = nothing has begun, try the same once more.

        Raises `TrainerLost` where there is no checkpoint, or nothing has been won since the last losses.
        """
        newest = self._newest(lost) if self._begun else -1
        self._count = self._count + 1 if newest == self._at else 1
        self._at = newest
        if self._count > self.MOST_WITHOUT_PROGRESS:
            raise TrainerLost(
                f"{lost}. That was the {self._count}th time without a step in between: look at the server, then go on "
                f"with: {self._command}"
            ) from lost
        where = f"goes back to its checkpoint of step {newest}" if self._begun else "loads its models again"
        logger.warning("%s; the run %s", lost, where)
        return self._begun

    def _newest(self, lost: TrainerLost | TrainerRewound) -> int:
        whole = [e for e in found_in(self._run) if damage(self._run / e.path, names=(NOTES,)) is None]
        if whole:
            return whole[-1].step
        raise TrainerLost(
            f"{lost}. The run has no checkpoint to go back to; start it again: {self._command}"
        ) from lost


def first_day(log_path: str, resume: str) -> date | None:
    """The day on which the run that will go on began: chat templates that print the date go on printing that one.

    None where there is none to go on with; what is wrong with a checkpoint is for `find_start` to say.
    """
    if resume == "never":
        return None
    for path in Path(log_path).glob(f"{CHECKPOINTS}/step-*/{NOTES}"):
        try:
            return date.fromisoformat(read_json(path)["identity"]["data"][DAY])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def rewind(folder: RunFolder, start: GoOn) -> Iterator[str]:
    """Make the folder what it was when the checkpoint was written; yields what people should know.

    Checkpoints after it and results of a finished run are set aside.
    """
    step = start.notes.position.step
    entries = found_in(folder.path)
    later = [entry for entry in entries if entry.step > step]
    names = folder.there_are([*(entry.path for entry in later), *RESULTS])
    of_heldout = [heldout_name(n) for n in heldout_steps(folder.path) if n > step or not start.same_heldout]
    # What they were the checkpoints of goes with them.
    aside = bool(names) or not start.same_heldout
    previous = folder.new_previous(("metrics.jsonl", LISTING) if later else ()) if aside else None
    # First the list: killed after this, those that are not moved yet are found without it.
    kept = [entry for entry in entries if entry.step <= step]
    if not start.same_heldout:
        yield "other held-out rows than before: what the metrics on them were is not carried on"
        kept = [replace(entry, heldout={}) for entry in kept]
    write_listing(folder, kept)
    if previous is not None:
        folder.move([*names, *of_heldout], previous)
        yield f"what came after step {step} moved to {previous}"
    with storage_errors(folder.bad_rows, 0):
        folder.bad_rows.unlink(missing_ok=True)  # the same rows are about to be found again
        for name in of_heldout:  # of evaluations that are about to be made again
            (folder.path / name).unlink(missing_ok=True)
    if not cut_metrics(folder.metrics, start.notes.position.metrics_bytes):
        yield f"{folder.metrics} is not what it was at step {step}: lines are missing or were changed"


def refuse_another_reference(
    then: ReferenceRecord, now: ReferenceRecord, checkpoint: Path, tolerance: float
) -> None:
    """Raise `CheckpointError` unless a reference is the one that the run began with.

    Its identity first; then what it says of the probe rows, within `tolerance` nats per token.
    """
    if then.weights != now.weights:
        raise CheckpointError(
            f"the reference is not the one that {checkpoint} was trained against: its weights are {now.weights}, "
            f"they were {then.weights}; give it the base model that it had, or {FRESH}"
        )
    rows = zip(then.probes, now.probes, strict=True)
    largest = max((largest_difference(_numbers(was), _numbers(is_)) for was, is_ in rows), default=0.0)
    if not largest <= tolerance:
        raise CheckpointError(
            f"the reference gives other log-probabilities than when {checkpoint} was trained: by {largest:.3g} nats "
            f"on its {len(then.probes) // 2} probe rows, allowed {tolerance:.0e} (weights {now.weights}, numerics "
            f"{now.numerics}, before {then.numerics}); run it where it ran, or {FRESH}"
        )


def _numbers(probe: Sequence[float | None]) -> FloatArray:
    """None is what was not finite."""
    return np.array([math.nan if value is None else value for value in probe], dtype=np.float32)


def _named(resume: str, found: list[Listed], run: Path) -> Listed:
    for entry in found:
        if f"step-{entry.step}" == resume:
            return entry
    there = ", ".join(f"step-{entry.step}" for entry in found)
    raise CheckpointError(f"resume: {run} has no checkpoint {resume}; there is {there}")


def _whole(chosen: Listed, found: list[Listed], run: Path) -> Notes:
    try:
        notes = Notes.read(run / chosen.path)
        if notes.position.step != chosen.step:
            raise CheckpointError(f"checkpoint {run / chosen.path} is of step {notes.position.step}")
        return notes
    except CheckpointError as error:
        earlier = [entry for entry in found if entry.step < chosen.step]
        whole = next((e for e in reversed(earlier) if damage(run / e.path, names=(NOTES,)) is None), None)
        offer = (
            f"go on from the one before it with --resume-from step-{whole.step}"
            if whole
            else ("there is no whole one before it")
        )
        raise CheckpointError(f"{error}; {offer}, or {FRESH}") from None


def _refuse_another_run(notes: Notes, wanted: Wanted, run: Path) -> None:
    refused = [
        f"  {name}: {then!r} then, {now!r} now"
        for name, then, now in _differences(notes, wanted)
        if name.split(".")[0] not in wanted.may_change
    ]
    if refused:
        raise CheckpointError(
            f"{run} holds a run of another objective or other data:\n"
            + "\n".join(refused)
            + "\ngo on with the "
            f"settings and data that it had, name another log_path, or {FRESH}"
        )


def _changes(notes: Notes, wanted: Wanted) -> Iterator[str]:
    for name, then, now in _differences(notes, wanted):
        yield f"{name}: {then!r} → {now!r}"
    if notes.total_steps != wanted.total_steps:
        yield f"the run and its learning-rate schedule now end at step {wanted.total_steps} (was {notes.total_steps})"


def _differences(notes: Notes, wanted: Wanted) -> Iterator[tuple[str, Any, Any]]:
    """Every setting and hash that is not what it was. A setting that one of the two does not know is not compared."""
    before, after = (
        dict(_flat({**identity.config, **identity.data})) for identity in (notes.identity, wanted.identity)
    )
    before = {**BEFORE_IT_WAS_SAID, **before}
    for name in before.keys() & after.keys():
        if before[name] != after[name]:
            yield name, before[name], after[name]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
