"""A run's numbers: their names, and how they read. Where they go: `sinks`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from training.utils.data_findings import LINES_SHOWN, lines_told
from training.utils.words import counted


@dataclass(frozen=True)
class StepWork:
    """What one optimizer step computed."""

    tokens: int
    """Of all its sequences."""
    seconds: float
    with_reference: bool
    """Whether these rows' reference values are used for the first time: in the first epoch. From the cache or not,
    so that the numbers of a run do not depend on runs before it; what was computed, `References.counts` says."""
    computed: Mapping[str, float]
    """The trainer's own figures, by the names of `Forward`'s result."""

    @property
    def metrics(self) -> dict[str, float]:
        """By the cookbook's names. `tokens_saved` is the share that sharing prefixes has left out."""
        ref_tokens = self.tokens if self.with_reference else 0
        given, computed = self.computed["tokens:sum"], self.computed["computed_tokens:sum"]
        return {
            "step_tokens": self.tokens,
            "ref_tokens": ref_tokens,
            "total_tokens": self.tokens + ref_tokens,
            "step_time_sec": self.seconds,
            "tokens_per_sec": self.tokens / self.seconds,
            "computed_tokens": computed,
            "tokens_saved": 1 - computed / given,
            "scored_tokens": self.computed["scored_tokens:sum"],
            "micro_batches": self.computed["micro_batches:sum"],
            "activation_gib": self.computed["activation_bytes:max"] / 2**30,
        }


class Savings:
    """What steps have not had to compute."""

    def __init__(self) -> None:
        self._given = self._computed = 0.0

    def add(self, metrics: Mapping[str, float]) -> None:
        """One more step; a skipped one says nothing."""
        computed = metrics.get("train/computed_tokens", 0.0)
        self._computed += computed
        self._given += computed / (1 - metrics.get("train/tokens_saved", 0.0))

    @property
    def tokens(self) -> float:
        """Share of all tokens that sharing prefixes has left out."""
        return 1 - self._computed / self._given if self._given else 0.0

    def line(self, reference: Mapping[str, float]) -> str:
        """For people. `reference` are the counts of its pairs, empty without one."""
        told = f"saved: {self.tokens:.1%} of the tokens, by shared prefixes"
        if not reference:
            return told
        hits, computed = reference["reference/cache_hits"], reference["reference/computed"]
        return f"{told}; reference values of {counted(int(hits), 'pair')} from the cache, of {computed:,.0f} computed"


def step_line(step: int, total_steps: int, metrics: Mapping[str, float], names: Sequence[str]) -> str:
    """What is shown of a step where there is no bar."""
    if f"train/{names[0]}" not in metrics:
        return f"step {step}/{total_steps}  skipped"
    return f"step {step}/{total_steps}  " + "  ".join(_told(name, metrics[f"train/{name}"]) for name in names)


def heldout_line(step: int, metrics: Mapping[str, float], names: Sequence[str]) -> str:
    """What is shown of an evaluation."""
    if names[0] not in metrics:
        return f"held out after step {step}: not one row has finite log-probabilities"
    told = [_told(name, metrics[name]) for name in names]
    if "accuracy" in names:
        low, high = metrics["accuracy_low"], metrics["accuracy_high"]
        told[names.index("accuracy")] += f" (95 %: {low:.3f}–{high:.3f})"
    if "policy_preference" in metrics:  # of pairs
        told.append(f"own preference {metrics['policy_preference']:.3f}")
    for compared, words in (("delta_logp", "Δlogp"), ("since_start", "logp since the start:")):
        if f"{compared}/chosen" in metrics:
            chosen, rejected = metrics[f"{compared}/chosen"], metrics[f"{compared}/rejected"]
            told.append(f"{words} chosen {chosen:+.2f} rejected {rejected:+.2f}")
    return f"held out after step {step}: " + "  ".join(told)


def nonfinite_told(lines: Sequence[int]) -> str:
    """What to say of held-out rows on these lines."""
    has, them = ("has", "it") if len(lines) == 1 else ("have", "them")
    some = lines_told(tuple(lines[:LINES_SHOWN]), len(lines))
    return (
        f"{counted(len(lines), 'row')} {has} log-probabilities that are not finite and count in no metric{some}: look "
        f"at {them}, or lower learning_rate"
    )


_FORMS = {"margin": "+.3f", "log_odds_ratio": "+.3f", "accuracy": ".3f"}


def _told(name: str, value: float) -> str:
    return f"{name} {value:{_FORMS.get(name, '.4f')}}"


def symptoms(step: int, metrics: Mapping[str, float]) -> Iterator[str]:
    """What is wrong with a run that learns nothing, with its likely cause."""
    if metrics.get("train/grad_norm") == 0 and metrics.get("train/loss") == 0:
        yield (
            "loss and gradient are exactly 0: every pair of the step is as far ahead as the loss asks for (hinge: its "
            "margin is above 1/beta), so it teaches nothing more"
        )
    elif metrics.get("train/grad_norm") == 0:
        yield (
            "the gradient is exactly 0: these rows say nothing to the trained weights (chosen and rejected read the "
            "same to them), or no trained weight is on the way"
        )
    # Policy and reference may have taken other paths: a policy that stands still has margins of rounding, ties.
    if step == 3 and metrics.get("train/tie_rate") == 1:
        yield (
            "after 3 steps all margins are still 0 (within 0.001 nats): the policy does not move; unless it is warming "
            "up, learning_rate is too small, or lost in the rounding of the weights"
        )
