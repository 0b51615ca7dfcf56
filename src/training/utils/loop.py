"""The steps of a run as they are logged, counted, saved and ended; what a step is, the recipe says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from firesteel.sdk import NonFiniteError
from training.utils.checkpoints import Checkpoints, Identity, Notes, Position, ReferenceRecord, finite
from training.utils.client import ReconnectableClient
from training.utils.progress import Display
from training.utils.run_folder import RunFolder
from training.utils.run_settings import RunSettings
from training.utils.schedules import Batch
from training.utils.sinks import MetricsLog
from training.utils.stopping import StopRequest


@dataclass(frozen=True)
class SavedRun:
    """What is the same in every checkpoint of a run."""

    identity: Identity
    reference: ReferenceRecord
    total_steps: int


@dataclass
class Loop:
    """How far a run has come, and where that is written."""

    settings: RunSettings
    saved: SavedRun
    policy: ReconnectableClient
    folder: RunFolder
    metrics: MetricsLog
    display: Display
    stop: StopRequest
    checkpoints: Checkpoints
    position: Position

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log numbers of a step, if the folder is still this run's."""
        self.folder.refuse_if_taken_over()
        self.metrics.log(step, metrics)

    def is_last(self, batch: Batch) -> bool:
        """Whether no step follows."""
        return batch.step == self.saved.total_steps

    def made(self, batch: Batch, heldout: Mapping[str, float]) -> None:
        """A step was made, logged and, where it was due, evaluated: save it where that is due, and end if asked to."""
        before = self.position
        rows = len(batch.rows) + (before.rows if batch.epoch == before.epoch else 0)
        self.position = replace(before, step=batch.step, epoch=batch.epoch, rows=rows)
        self.evaluated(heldout)
        interval, stopping = self.settings.dcp_save_interval, self.stop.asked
        if interval and (batch.step % interval == 0 or self.is_last(batch) or stopping):
            self.checkpoints.save(self.policy, self._notes())
        if stopping and (interval or not self.is_last(batch)):
            self._end()

    def evaluated(self, heldout: Mapping[str, float]) -> None:
        """What the held-out metrics of the last step are; empty where it was not evaluated."""
        self.position = replace(self.position, heldout=finite(heldout))

    def skip_or_refuse(self, batch: Batch, lines: Sequence[int], error: NonFiniteError) -> dict[str, float]:
        """What is logged of a step that was not finite and changed nothing.

        Where such a step ends the run, raises `NonFiniteError` naming its rows, after a checkpoint of the step before.
        """
        done, interval = self.position.step, self.settings.dcp_save_interval
        told = f"step {batch.step}, lines {', '.join(map(str, lines))} of the training data: {error}"
        if self.settings.on_nonfinite == "stop":
            if interval and done % interval:
                self.checkpoints.save(self.policy, self._notes())
            raise NonFiniteError(
                f"{told}. The weights are those after step {done}; look at these rows, lower learning_rate, or set "
                "on_nonfinite: skip"
            ) from error
        skipped = self.position.skipped_steps + 1
        self.position = replace(self.position, skipped_steps=skipped)
        self.display.say(f"{told}; skipped, {skipped} so far")
        return {"train/epoch": batch.epoch, "train/skipped_steps": skipped}

    def _notes(self) -> Notes:
        """All that a checkpoint of now keeps beside the trainer's state."""
        now = replace(self.position, seq_id=self.policy.next_seq_id, metrics_bytes=self.metrics.synced())
        budget = self.policy.description.activation_token_budget
        saved = self.saved
        return Notes(now, saved.identity, saved.reference, saved.total_steps, budget)

    def _end(self) -> None:
        self.checkpoints.finish()
        saved = "saved; started again (resume: auto) it goes on from there"
        unsaved = "nothing is saved, dcp_save_interval is 0"
        outcome = saved if self.settings.dcp_save_interval else unsaved
        self.display.say(f"stopped after step {self.position.step}: {outcome}")
        self.stop.exit_if_asked()
