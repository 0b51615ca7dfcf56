"""Held-out pairs, and the model's own answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import orjson

from firesteel.sdk import DataError
from firesteel.sdk.types import BoolArray
from firesteel.sealed import replace_file
from training.utils.accuracy import Traits, accuracy_metrics
from training.utils.client import ReconnectableClient
from training.utils.displacement import standard_error
from training.utils.heldout_rows import HeldoutRows, rows_of_pairs
from training.utils.losses import PairObjective, PairScores, score_pairs
from training.utils.pairs import DistinctDatums, PreferencePair
from training.utils.reference_pass import AnyReferences
from training.utils.rendering import Renderer
from training.utils.row_sets import RowSet
from training.utils.sampling import Sampling, ask

T = TypeVar("T")


@dataclass(frozen=True)
class Split(Generic[T]):
    """Training and held-out rows; without any held out, that is a set of none."""

    train: RowSet[T]
    heldout: RowSet[T]


def split_by_prompt(rows: RowSet[T], fraction: float, seed: int) -> Split[T]:
    """Hold out some of the rows of one file, see `drawn_by_prompt`."""
    held = drawn_by_prompt(rows.prompts, fraction, seed)
    return Split(rows.where(~held), rows.where(held))


def drawn_by_prompt(prompts: np.ndarray[tuple[int], np.dtype[Any]], fraction: float, seed: int) -> BoolArray:
    """Which of the rows with these prompts are held out: `fraction` or a little more, whole prompts at a time.

    Raises `DataError` where there is only one prompt.
    """
    _, first, group_of = np.unique(prompts, return_index=True, return_inverse=True)
    # Groups are numbered by where they first appear, whatever their hashes.
    number = np.empty_like(first)
    number[np.argsort(first)] = np.arange(len(first))
    group_of = number[group_of]
    if fraction and len(first) < 2:
        raise DataError("eval_fraction: all rows have one prompt, so none can be held out; give eval_dataset")
    # The last group drawn stays in training, whatever the fraction.
    drawn = np.random.default_rng(seed).permutation(len(first))[:-1]
    sizes = np.bincount(group_of, minlength=len(first))[drawn]
    before = np.cumsum(sizes) - sizes
    return np.isin(group_of, drawn[before < fraction * len(prompts)])


def evaluate(
    policy: ReconnectableClient,
    pairs: RowSet[PreferencePair],
    references: AnyReferences,
    objective: PairObjective,
    batch_size: int = 16,
    abandon: Callable[[], bool] = lambda: False,
    keep: Callable[[HeldoutRows], None] = lambda rows: None,
) -> dict[str, float]:
    """Metrics over held-out pairs, each pair counted once: independent of `batch_size`.

    Empty where `abandon`, asked before each batch, says so. `keep` is told what there is of each pair. Rows one of
    whose pairs has numbers that are not finite count in `nonfinite_rows` alone.
    """
    scores, traits, lines = [], [], []
    for batch in pairs.blocks(batch_size):
        if abandon():
            return {}
        data = DistinctDatums.of(batch).data
        outputs = policy.forward(data, weighted_only=not objective.reads_prompt).loss_fn_outputs
        logprobs = [output["logprobs"].to_torch() for output in outputs]
        scores.append(score_pairs(batch, logprobs, references.of(batch)))
        traits += [Traits.of(pair) for pair in batch]
        lines += [pair.line for pair in batch]
    joined = PairScores.joined(scores)
    rows = rows_of_pairs(lines, joined, objective)
    keep(rows)
    if not (lost := rows.nonfinite_lines):
        return heldout_metrics(joined, traits, objective)
    finite = np.array([row.line not in lost for row in rows.rows])
    left = [pair for pair, kept in zip(traits, finite, strict=True) if kept]
    told = heldout_metrics(joined.only(finite), left, objective) if left else {}
    return {**told, "nonfinite_rows": len(lost)}


def heldout_metrics(
    scores: PairScores, traits: Sequence[Traits], objective: PairObjective
) -> dict[str, float]:
    """The loss's own metrics, and how far they can be trusted."""
    metrics = objective.metrics(scores)
    if "delta_logp/chosen" in metrics:  # there is a reference
        delta = scores.chosen.delta.detach().numpy()
        metrics["delta_logp/chosen_stderr"] = standard_error(delta, [pair.line for pair in traits])
    return metrics | accuracy_metrics(objective.margins(scores), traits)


@dataclass(frozen=True)
class Answers:
    """What a policy answers to some user messages, greedily."""

    renderer: Renderer
    prompts: Sequence[str]
    max_tokens: int

    def of(self, policy: ReconnectableClient) -> dict[str, str]:
        """One answer per prompt."""
        sampling = Sampling(self.max_tokens)
        return {prompt: ask(policy, self.renderer, prompt, sampling).text for prompt in self.prompts}

    def write_comparison(self, path: Path, before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
        """Write one JSON object per prompt, and return the same for people to read.

        A prompt that was not asked before training has null there.
        """
        lines, rows = [], b""
        for prompt in self.prompts:
            old, new = before.get(prompt), after[prompt]
            rows += orjson.dumps({"prompt": prompt, "before": old, "after": new}) + b"\n"
            known = "(was not asked)" if old is None else old
            lines.append(f"\nQ: {prompt}\n  before: {known}\n  after:  {new}")
        replace_file(path, rows)
        return lines
