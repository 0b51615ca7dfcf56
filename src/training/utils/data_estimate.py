"""What a run will cost on this machine: its first steps are made for real (`data_trial`), the rest is reckoned.

Time grows with the tokens that are computed (after sharing) and, for the optimizer, with the steps; memory is that of
this process after the run's largest batch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from firesteel.finding import size
from firesteel.sdk.types import IntArray
from firesteel.sealed import storage_errors
from firesteel.store import home
from training.utils.data_trial import Measured, Trial
from training.utils.progress import Display
from training.utils.reference_pass import RECORDED_PAIRS
from training.utils.rendering import Renderer
from training.utils.row_index import index_rows
from training.utils.row_outcomes import Rendering
from training.utils.row_records import RowArray
from training.utils.row_sets import RowSet, select_rows
from training.utils.run import epochs_of, refuse_prompts, split_pairs
from training.utils.trainers import build_service
from training.utils.training_settings import TrainingSettings
from training.utils.words import counted

# Beside its values, of a side in the reference cache; of a step in metrics.jsonl; of a value in a checkpoint's notes.
_CACHE_ENTRY_BYTES, _METRICS_BYTES, _NOTED_BYTES = 128, 1200, 20


@dataclass(frozen=True)
class Estimate:
    """What a run will take. Seconds, bytes; from an empty reference cache."""

    rows: int
    heldout_rows: int
    steps_per_epoch: int
    epochs: int
    computed_tokens_per_epoch: int
    """After sharing, what `train/computed_tokens` add up to."""
    steps_timed: int
    seconds_per_epoch: float
    """Of the training steps alone."""
    seconds_to_warm_up: float
    """By which the first steps take longer."""
    seconds_reference: float
    seconds_evaluations: float
    """All of them."""
    seconds_answers: float
    """To the sample prompts, before and after."""
    seconds_loading: float
    """Of the models."""
    seconds_saving: float
    """The export, and the checkpoints if there are any."""
    seconds_total: float
    """Without the start of the program and the reading of rows, which a check before it has done."""
    peak_memory_bytes: int
    """Of this process, as the run's own would be; of a trainer elsewhere nothing is known."""
    disk_export_bytes: int
    disk_checkpoints_bytes: int
    """All that are kept at the end."""
    disk_caches_bytes: int
    """In FIRESTEEL_HOME: reference log-probabilities and the rows' index."""
    disk_total_bytes: int

    def lines(self) -> Iterator[str]:
        """For people."""
        yield (
            f"estimate, from {counted(self.steps_timed, 'timed step')} of {self.steps_per_epoch * self.epochs:,}: "
            f"{_duration(self.seconds_total)} in all"
        )
        yield (
            f"  an epoch: {_duration(self.seconds_per_epoch)}, {self.steps_per_epoch:,} steps, {self.rows:,} rows, "
            f"{self.computed_tokens_per_epoch:,} tokens after sharing; epochs: {self.epochs}"
        )
        parts = (
            ("models loaded", self.seconds_loading),
            ("reference pass, nothing cached", self.seconds_reference),
            ("evaluations", self.seconds_evaluations),
            ("answers to sample prompts", self.seconds_answers),
            ("first steps are slower", self.seconds_to_warm_up),
            ("saving", self.seconds_saving),
        )
        for name, seconds in parts:
            if seconds >= 0.05:
                yield f"  {name}: {_duration(seconds)}"
        yield f"  memory: {size(self.peak_memory_bytes)} at its peak"
        yield (
            f"  disk: {size(self.disk_total_bytes)}: export {size(self.disk_export_bytes)}, checkpoints "
            f"{size(self.disk_checkpoints_bytes)}, caches {size(self.disk_caches_bytes)}"
        )


def estimate(config: TrainingSettings, display: Display) -> Estimate:
    """Load the models, make the first steps of the run, and reckon the rest from them. Raises what the run would."""
    renderer = Renderer.load(config.tokenizer_model or config.base_model)
    files = [path for path in (config.dataset, config.eval_dataset) if path]
    indexes = [index_rows(path, renderer, config.learner.rows, config.on_bad_row) for path in files]
    with ExitStack() as stack:
        service = stack.enter_context(build_service(config))
        longest = service.longest_sequence()
        refuse_prompts(config, renderer, longest)
        rules = Rendering(config.max_seq_len or longest, config.truncate)
        limits = (config.most_rows, None)
        sets = [
            stack.enter_context(closing(select_rows(index, renderer, rules, most))).rows
            for index, most in zip(indexes, limits, strict=False)
        ]
        trial = Trial(config, split_pairs(sets, config), renderer, service, display)
        with storage_errors(home(), 0):
            # On the disk that caches are on, which is not always where temporary files are.
            home().mkdir(parents=True, exist_ok=True)
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="estimate-", dir=home()))
        measured = trial.measured(Path(scratch))
        return _reckoned(trial, measured, sum(index.rows.nbytes + index.ranked.nbytes for index in indexes))


def _reckoned(trial: Trial, measured: Measured, index_bytes: int) -> Estimate:
    """The whole run, from its parts. `index_bytes` are those of the rows' indexes."""
    config, train, heldout = trial.config, trial.split.train, trial.split.heldout
    steps = epochs_of(config, trial.split).total_steps
    per_epoch = steps // config.epochs
    train_tokens, heldout_tokens = (int(trial.tokens(rows_of).sum()) for rows_of in (train, heldout))
    epoch = measured.steps.seconds(train_tokens, per_epoch)
    warming = measured.warming
    expected = measured.steps.seconds(warming.passes.tokens, warming.optimizer.calls)
    slower = max(warming.passes.seconds + warming.optimizer.seconds - expected, 0.0)
    reference = measured.reference.of_tokens(train_tokens + heldout_tokens)
    evaluations = measured.evaluation.of_tokens(heldout_tokens) * count_evaluations(config, steps)
    # A checkpoint is written while training goes on; only the last is waited for.
    saving = measured.export.seconds + measured.checkpoint.seconds * bool(config.dcp_save_interval)
    parts = (measured.loading, reference, evaluations, 2 * measured.answers, slower, saving)
    # What a reference says of some rows is noted in each checkpoint.
    noted = _NOTED_BYTES * _scored(train, RECORDED_PAIRS) if measured.reference.calls else 0
    checkpoint = measured.checkpoint.size + noted
    checkpoints = checkpoint * count_kept(config, steps)
    caches = index_bytes
    caches += sum(map(_cache_bytes, (train, heldout))) if measured.reference.calls else 0
    return Estimate(
        rows=len(train),
        heldout_rows=len(heldout),
        steps_per_epoch=per_epoch,
        epochs=config.epochs,
        computed_tokens_per_epoch=round(train_tokens * measured.shared),
        steps_timed=measured.steps.optimizer.calls,
        seconds_per_epoch=epoch,
        seconds_to_warm_up=slower,
        seconds_reference=reference,
        seconds_evaluations=evaluations,
        seconds_answers=2 * measured.answers,
        seconds_loading=measured.loading,
        seconds_saving=saving,
        seconds_total=epoch * config.epochs + sum(parts),
        peak_memory_bytes=measured.peak,
        disk_export_bytes=measured.export.size,
        disk_checkpoints_bytes=checkpoints,
        disk_caches_bytes=caches,
        disk_total_bytes=measured.export.size + checkpoints + caches + _METRICS_BYTES * steps,
    )


def count_evaluations(config: TrainingSettings, steps: int) -> int:
    """How often a run of so many steps evaluates its held-out rows: before, after, and in between."""
    return 2 + ((steps - 1) // config.eval_interval if config.eval_interval else 0)


def _checkpoints(config: TrainingSettings, steps: int) -> list[int]:
    """The steps after which one is written."""
    interval = config.dcp_save_interval
    return sorted({*range(interval, steps + 1, interval), steps}) if interval else []


def count_kept(config: TrainingSettings, steps: int) -> int:
    """How many checkpoints a run of so many steps leaves, at most: the best may be among the newest."""
    saved = _checkpoints(config, steps)
    if config.keep_last is None:
        return len(saved)
    newest = set(saved[-config.keep_last :])
    every = {step for step in saved if config.keep_every and step % config.keep_every == 0}
    best = 1 if config.keep_best else 0
    return min(len(newest | every) + best, len(saved))


def _scored(rows: RowSet[Any], first: int | None = None) -> int:
    """Tokens behind the prompts, each answer once."""
    records = rows.records[:first]
    tokens, answers = records["tokens"].astype(np.int64), _answers(records)
    return int((tokens - answers * records["prompt_len"].astype(np.int64)).sum())


def _answers(records: RowArray) -> IntArray:
    """Of each row, from how many twos of them there are."""
    twos = records["pairs"].astype(np.int64) + records["ties"]
    answers: IntArray = ((1 + np.sqrt(1 + 8 * twos)) / 2).round().astype(np.int64)
    return answers


def _cache_bytes(rows: RowSet[Any]) -> int:
    """Of the reference's values: 4 bytes for each token of the answers. What was there before is not known."""
    return 4 * _scored(rows) + _CACHE_ENTRY_BYTES * int(_answers(rows.records).sum())


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
