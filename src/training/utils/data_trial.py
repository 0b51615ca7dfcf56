"""The beginning of a run, made for real and thrown away, to see what its parts take.

The rows of the timed steps are those that the run itself begins with, in its order, so that they are as long as the
others on average; they are rendered ahead as there. The first steps of a process are slower, and kept apart. Nothing
goes into the caches that runs use.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from firesteel.sdk import ServiceClient
from firesteel.sdk.types import IntArray
from training.utils.client import ReconnectableClient
from training.utils.evaluation import Answers, Split
from training.utils.learner import Learner
from training.utils.progress import Display
from training.utils.reference_cache import BLOCK_PAIRS
from training.utils.reference_pass import AnyReferences, NoReferences, References
from training.utils.rendering import Renderer
from training.utils.row_sets import RowSet
from training.utils.run import epochs_of
from training.utils.schedules import Batch
from training.utils.training_settings import TrainingSettings

WARM_STEPS = 2
FEWEST_STEPS = 4
ROWS_OF_STEPS = 64
"""Of the steps behind the first two; fewer if that takes longer than this."""
SECONDS_OF_STEPS = 60.0
ROWS_EVALUATED = 48


@dataclass(frozen=True)
class Timed:
    """How long something took for so many computed tokens."""

    seconds: float = 0.0
    tokens: int = 0
    calls: int = 0

    def __add__(self, other: Timed) -> Timed:
        return Timed(self.seconds + other.seconds, self.tokens + other.tokens, self.calls + other.calls)

    def of_tokens(self, tokens: int) -> float:
        """Seconds for these; 0 where nothing was timed."""
        return self.seconds / self.tokens * tokens if self.tokens else 0.0


@dataclass(frozen=True)
class Steps:
    """What steps took, apart for forward and backward and for the optimizer."""

    passes: Timed
    optimizer: Timed

    def seconds(self, tokens: int, steps: int) -> float:
        """Of so many steps with so many tokens."""
        per_step = self.optimizer.seconds / max(self.optimizer.calls, 1)
        return self.passes.of_tokens(tokens) + per_step * steps


@dataclass(frozen=True)
class Written:
    """A folder that was saved: how long that took, and what is in it."""

    seconds: float = 0.0
    size: int = 0


@dataclass(frozen=True)
class Measured:
    """All that was tried out. Seconds and bytes; nothing where the run does not do it."""

    loading: float
    reference: Timed
    warming: Steps
    """The first steps."""
    steps: Steps
    """Those after them."""
    shared: float
    """Computed tokens of steps, for each token of their rows after sharing: rows of a batch share beginnings, too."""
    evaluation: Timed
    answers: float
    export: Written
    checkpoint: Written
    peak: int
    """Memory of this process."""


@dataclass(frozen=True, eq=False)
class Trial:
    """The beginning of a run."""

    config: TrainingSettings
    split: Split[Any]
    renderer: Renderer
    service: ServiceClient
    display: Display

    def measured(self, scratch: Path) -> Measured:
        """Try out each part, in the order of a run. `scratch` is a folder for what a run would write."""
        started = time.monotonic()
        policy = self._policy()
        references = self._references(scratch / "reference.sqlite")
        loading = time.monotonic() - started
        with closing(references):
            reference = self._reference_pass(references)
            evaluation = self._evaluation(policy, references)
            warming, steps, shared = self._steps(policy, references)
        self._largest_step(policy)
        answers = self._answers(policy)
        export = _written(scratch / "export", policy.save_weights)
        checkpoint = Written()
        if self.config.dcp_save_interval:
            checkpoint = _written(scratch / "state", policy.save_state)
        parts = (loading, reference, warming, steps, shared, evaluation, answers, export, checkpoint)
        return Measured(*parts, _peak_memory())

    @cached_property
    def order(self) -> list[Batch]:
        """The batches of the first epoch."""
        epochs = epochs_of(self.config.model_copy(update={"epochs": 1}), self.split)
        return list(epochs.batches())

    @cached_property
    def _learner(self) -> Learner[Any]:
        return self.config.learner

    @cached_property
    def _first(self) -> list[Batch]:
        """The batches that may be tried."""
        wanted = max(FEWEST_STEPS, -(-ROWS_OF_STEPS // self.config.batch_size))
        return self.order[: WARM_STEPS + wanted]

    @cached_property
    def _some_heldout(self) -> RowSet[Any]:
        """Of the held-out rows, spread over all of them."""
        heldout = self.split.heldout
        apart = max(1, len(heldout) // ROWS_EVALUATED)
        return replace(heldout, places=heldout.places[::apart][:ROWS_EVALUATED])

    def tokens(self, rows: RowSet[Any]) -> IntArray:
        """Of each row, after sharing."""
        return self._learner.rows.computed(rows.records, rows.source.rules.max_seq_len)

    def _policy(self) -> ReconnectableClient:
        config = self.config
        return ReconnectableClient.from_training_client(
            self.service.create_training_client(
                config.base_model,
                config.lora_rank,
                lora_alpha=config.lora_alpha,
                seed=config.seed,
                start=config.start,
            )
        )

    def _references(self, cache: Path) -> AnyReferences:
        settings = self.config.reference_settings
        if settings is None:
            return NoReferences()
        start = None if settings.held_to == "base" else self.config.start
        return References(self.service, self.renderer, settings.mode, start, cache)

    def _reference_pass(self, references: AnyReferences) -> Timed:
        """Over the rows that are tried, in blocks as the run's; the first block warms up."""
        train = self.split.train
        first = replace(train, places=train.places[[row for batch in self._first for row in batch.rows]])
        sets = [rows for rows in (first, self._some_heldout) if len(rows)]
        ends = [time.monotonic()]
        references.prepare(sets, self.display, self.config.seed, lambda: ends.append(time.monotonic()))
        blocks = [tokens for rows in sets for tokens in _blocks(self.tokens(rows))]
        timed = [
            Timed(end - start, tokens, 1)
            for (start, end), tokens in zip(pairwise(ends), blocks, strict=False)
        ]
        return sum(timed[1:] or timed, Timed())

    def _evaluation(self, policy: ReconnectableClient, references: AnyReferences) -> Timed:
        rows = self._some_heldout
        if not len(rows):
            return Timed()
        began = time.monotonic()
        self._learner.evaluate(policy, rows, references, lambda: False, lambda kept: None)
        return Timed(time.monotonic() - began, int(self.tokens(rows).sum()), 1)

    def _steps(self, policy: ReconnectableClient, references: AnyReferences) -> tuple[Steps, Steps, float]:
        """The first steps, those after them until that has taken long enough, and see `Measured.shared`."""
        made: list[Steps] = []
        computed = 0.0
        tokens = self.tokens(self.split.train)
        with closing(self.split.train.taken_ahead(batch.rows for batch in self._first)) as ahead:
            for batch, taken in zip(self._first, ahead, strict=True):
                step_made = self._step(policy, batch, taken.items, references)
                passes = Timed(step_made.passes + taken.waited, int(tokens[list(batch.rows)].sum()), 1)
                made.append(Steps(passes, Timed(step_made.optimizer, 0, 1)))
                computed += step_made.computed
                spent = sum(step.passes.seconds + step.optimizer.seconds for step in made[WARM_STEPS:])
                self.display.say(f"estimate: step {batch.step} of {len(self._first)} tried")
                if len(made) >= WARM_STEPS + FEWEST_STEPS and spent > SECONDS_OF_STEPS:
                    break
        shared = computed / sum(step.passes.tokens for step in made)
        return _sum(made[:WARM_STEPS]), _sum(made[WARM_STEPS:] or made), shared

    def _step(
        self, policy: ReconnectableClient, batch: Batch, items: Sequence[Any], references: AnyReferences
    ) -> _Step:
        config, began = self.config, time.monotonic()
        computed = self._learner.accumulate(policy, items, references).metrics["computed_tokens:sum"]
        passed = time.monotonic()
        total = epochs_of(config, self.split).total_steps
        rate = config.lr_scheduler.learning_rate(config.learning_rate, batch.step, total)
        policy.optim_step(config.adam_params(rate))
        return _Step(passed - began, time.monotonic() - passed, computed)

    def _largest_step(self, policy: ReconnectableClient) -> None:
        """The batch of the first epoch with the most tokens: what memory is needed for."""
        tokens = self.tokens(self.split.train)
        largest = max(self.order, key=lambda batch: int(tokens[list(batch.rows)].sum()))
        self._step(policy, largest, self.split.train.take(largest.rows), NoReferences())

    def _answers(self, policy: ReconnectableClient) -> float:
        started = time.monotonic()
        Answers(self.renderer, self.config.sample_prompts, self.config.sample_max_tokens).of(policy)
        return time.monotonic() - started


@dataclass(frozen=True)
class _Step:
    """The seconds of one step, and the tokens that it computed."""

    passes: float
    optimizer: float
    computed: float


def _blocks(tokens: IntArray) -> list[int]:
    return [int(tokens[start : start + BLOCK_PAIRS].sum()) for start in range(0, len(tokens), BLOCK_PAIRS)]


def _sum(steps: Sequence[Steps]) -> Steps:
    return Steps(
        sum((step.passes for step in steps), Timed()), sum((step.optimizer for step in steps), Timed())
    )


def _peak_memory() -> int:
    """Of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _written(folder: Path, write: Callable[[str], object]) -> Written:
    began = time.monotonic()
    write(str(folder))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Written(time.monotonic() - began, size)
