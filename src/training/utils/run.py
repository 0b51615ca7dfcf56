"""One run: its settings, its rows, its folder, and where it starts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from firesteel.sdk import ConfigError
from training.utils.checkpoints import Identity
from training.utils.data_comparison import leakage
from training.utils.data_findings import DataFinding
from training.utils.doubts import Doubt
from training.utils.evaluation import Split, split_by_prompt
from training.utils.learner import Learner
from training.utils.progress import Display
from training.utils.rendering import Renderer
from training.utils.resume import (
    GoOn,
    Start,
)
from training.utils.row_index import RowIndex
from training.utils.row_outcomes import Rendering
from training.utils.row_sets import RowSet, SelectedRows
from training.utils.row_values import excerpt
from training.utils.run_folder import RunFolder
from training.utils.schedules import Epochs
from training.utils.training_settings import TrainingSettings


@dataclass(frozen=True)
class Run:
    """What the phases of one run share."""

    config: TrainingSettings
    split: Split[Any]
    renderer: Renderer
    folder: RunFolder
    display: Display
    identity: Identity
    start: Start | GoOn
    doubts: Sequence[Doubt]
    """About its data."""

    @cached_property
    def learner(self) -> Learner[Any]:
        """See `TrainingSettings.learner`."""
        return self.config.learner

    @property
    def epochs(self) -> Epochs:
        """The order of the training rows."""
        return epochs_of(self.config, self.split)


def refuse_prompts(config: TrainingSettings, renderer: Renderer, longest: int) -> None:
    """Raise ConfigError for a sample prompt that leaves no room for its answer: now, not once models are loaded.

    What the tokenizer lacks for a question is a ModelError. `longest` is the longest sequence of the trainer.
    """
    for place, prompt in enumerate(config.sample_prompts, start=1):
        tokens, answer = len(renderer.question(prompt)), config.sample_max_tokens
        if tokens + answer > longest:
            raise ConfigError(
                f"sample_prompts: prompt {place}, {excerpt(prompt)}, has {tokens:,} tokens; with an answer of up to "
                f"{answer:,} (sample_max_tokens) that is more than the {longest:,} that the trainer takes; shorten "
                "it, or make sample_max_tokens smaller"
            )


def split_pairs(sets: Sequence[RowSet[Any]], config: TrainingSettings) -> Split[Any]:
    """Training and held-out rows: from a file each, or drawn from one."""
    train, *heldout = sets
    if heldout:
        return Split(train, heldout[0])
    return split_by_prompt(train, config.eval_fraction, config.seed)


def epochs_of(config: TrainingSettings, split: Split[Any]) -> Epochs:
    """Every batch of a run."""
    return Epochs(len(split.train), config.batch_size, config.epochs, config.seed, config.shuffle)


def data_identity(
    indexes: Sequence[RowIndex[Any]],
    renderer: Renderer,
    rules: Rendering,
    split: Split[Any],
) -> dict[str, Any]:
    """What the tokens of this run follow from."""
    names = ("dataset content", "eval_dataset content")
    content = {name: index.sha256 for name, index in zip(names, indexes, strict=False)}
    longest = rules.max_seq_len  # where the setting leaves it to the trainer, another one may cut other rows
    return {
        **content,
        "tokenizer and template": renderer.identity,
        "longest row": longest,
        "day": renderer.today.isoformat(),
        f"{indexes[0].kind.item}s": len(split.train),
    }


def doubts_of(
    config: TrainingSettings, selections: Sequence[SelectedRows[Any]], split: Split[Any]
) -> Iterator[Doubt]:
    """What the data check warns of, of files that can be used, and what these settings make of their rows."""
    for selected in selections:
        for finding in selected.rows.source.index.kind.findings(selected.rows.kept):
            if finding.level == "warning":
                yield _doubt(selected.path, finding)
    if len(selections) > 1:
        for finding in leakage(split.heldout.kept, split.train.kept):
            yield _doubt("eval_dataset", finding)
    yield from config.doubts(split.train.records)


def _doubt(about: str, finding: DataFinding) -> Doubt:
    return Doubt(about, finding.name, str(finding), finding.rows)
