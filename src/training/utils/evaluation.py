"""Held-out pairs, and the model's own answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson

from firesteel.sdk import DataError, SamplingParams
from training.utils.client import ReconnectableClient
from training.utils.losses import DpoObjective, PairLogprobs, preference_metrics, score_pairs
from training.utils.pairs import PreferencePair
from training.utils.rendering import Renderer


@dataclass(frozen=True)
class Split:
    """Training and held-out pairs."""

    train: tuple[PreferencePair, ...]
    heldout: tuple[PreferencePair, ...]

    @property
    def overlap(self) -> int:
        """Held-out pairs whose prompt is trained on: possible only if they come from a file of their own."""
        trained = {pair.prompt for pair in self.train}
        return sum(pair.prompt in trained for pair in self.heldout)


def split_by_prompt(pairs: Sequence[PreferencePair], fraction: float, seed: int) -> Split:
    """Hold out `fraction` of the pairs or a little more, whole prompts at a time, drawn by `seed`.

    Both sides keep their order. Raises `DataError` where there is only one prompt.
    """
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for index, pair in enumerate(pairs):
        by_prompt.setdefault(pair.prompt, []).append(index)
    groups = list(by_prompt.values())
    held: set[int] = set()
    if fraction and len(groups) < 2:
        raise DataError(
            "eval_fraction: all pairs have one prompt, so none can be held out; give eval_dataset"
        )
    # The last group drawn stays in training, whatever the fraction.
    for group in np.random.default_rng(seed).permutation(len(groups))[:-1]:
        if len(held) >= fraction * len(pairs):
            break
        held.update(groups[group])
    return Split(
        tuple(pair for index, pair in enumerate(pairs) if index not in held),
        tuple(pair for index, pair in enumerate(pairs) if index in held),
    )


def evaluate(
    policy: ReconnectableClient,
    pairs: Sequence[PreferencePair],
    references: Sequence[PairLogprobs],
    objective: DpoObjective,
    batch_size: int = 16,
) -> dict[str, float]:
    """Metrics over held-out pairs, each pair counted once: independent of `batch_size`."""
    logprobs = []
    for start in range(0, len(pairs), batch_size):
        data = [datum for pair in pairs[start : start + batch_size] for datum in pair.datums]
        outputs = policy.forward(data, weighted_only=True).loss_fn_outputs
        logprobs += [output["logprobs"].to_torch() for output in outputs]
    return preference_metrics(score_pairs(pairs, logprobs, references), objective)


@dataclass(frozen=True)
class Answers:
    """What a policy answers to some user messages, greedily."""

    renderer: Renderer
    prompts: Sequence[str]
    max_tokens: int

    def of(self, policy: ReconnectableClient) -> list[str]:
        """One answer per prompt."""
        answers = []
        for prompt in self.prompts:
            stop = (self.renderer.end_of_turn,)
            params = SamplingParams(max_tokens=self.max_tokens, temperature=0.0, stop=stop)
            answer = policy.sample(self.renderer.question(prompt), 1, params).sequences[0]
            answers.append(self.renderer.answer_text(answer.tokens))
        return answers

    def write_comparison(self, path: Path, before: Sequence[str], after: Sequence[str]) -> list[str]:
        """Write one JSON object per prompt, and return the same for people to read."""
        lines = []
        with path.open("wb") as file:
            for prompt, old, new in zip(self.prompts, before, after, strict=True):
                file.write(orjson.dumps({"prompt": prompt, "before": old, "after": new}) + b"\n")
                lines.append(f"\nQ: {prompt}\n  before: {old}\n  after:  {new}")
        return lines
