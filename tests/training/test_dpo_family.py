"""Every loss of the DPO family against its paper's formula, written down anew in numpy, and its gradient by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_losses import logprobs_of, pair, reference_of

from firesteel.sdk import DataError
from training.utils.losses import (
    DpoObjective,
    PairLogprobs,
    Stages,
    make_pair_loss,
    preference_metrics,
    score_pairs,
)
from training.utils.pairs import PreferencePair

LN_2 = math.log(2)
BETA, EPSILON, GAMMA, ALPHA = 0.7, 0.2, 0.5, 0.3

FAMILY = {
    "sigmoid": DpoObjective(BETA),
    "smoothed": DpoObjective(BETA, label_smoothing=EPSILON),
    "robust": DpoObjective(BETA, label_smoothing=EPSILON, loss="robust"),
    "hinge": DpoObjective(BETA, loss="hinge"),
    "ipo_sum": DpoObjective(BETA, loss="ipo_sum"),
    "ipo_mean": DpoObjective(BETA, loss="ipo_mean"),
    "sigmoid_norm": DpoObjective(BETA, loss="sigmoid_norm"),
    "simpo": DpoObjective(BETA, loss="simpo", simpo_gamma=GAMMA),
    "ld": DpoObjective(BETA, loss="ld", ld_alpha=ALPHA),
    "ld, reference as it is": DpoObjective(BETA, loss="ld", ld_alpha=ALPHA, ld_reference=False),
    "sigmoid with an SFT term": DpoObjective(BETA, sft_weight=ALPHA),
}
every = pytest.mark.parametrize("name", FAMILY)


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


class Pair:
    """Per-token log-probabilities of one pair: p policy, r reference, c chosen, r rejected."""

    def __init__(self, rng: np.random.Generator) -> None:
        chosen, rejected = (int(n) for n in rng.integers(1, 7, 2))
        self.pc, self.rc = (-rng.exponential(1.0, chosen) for _ in range(2))
        self.pr, self.rr = (-rng.exponential(1.0, rejected) for _ in range(2))
        self.nc, self.nr, self.k = chosen, rejected, min(chosen, rejected)

    @property
    def margin(self) -> float:
        return float(self.pc.sum() - self.rc.sum() - self.pr.sum() + self.rr.sum())

    @property
    def mean_margin(self) -> float:
        return float((self.pc - self.rc).mean() - (self.pr - self.rr).mean())

    def ld(self, tokens: np.ndarray, alpha: float = ALPHA) -> float:
        return float(tokens[: self.k].sum() + alpha * tokens[self.k :].sum())

    def ld_margin(self, scaled: bool) -> float:
        alpha = ALPHA if scaled else 1.0
        return self.ld(self.pc) - self.ld(self.rc, alpha) - self.ld(self.pr) + self.ld(self.rr, alpha)

    def preference(self) -> PreferencePair:
        return pair(self.nc, self.nr)

    def reference(self) -> PairLogprobs:
        return PairLogprobs(self.rc, self.rr)

    def rows(self) -> list[torch.Tensor]:
        """As a trainer gives them, unscored prompt targets first."""
        return [
            torch.tensor([-9.0, -9.0, *side], dtype=torch.float64, requires_grad=True)
            for side in (self.pc, self.pr)
        ]


def softplus_loss(m: float) -> float:
    return math.log1p(math.exp(-BETA * m))


def smoothed(m: float) -> float:
    return (1 - EPSILON) * softplus_loss(m) + EPSILON * softplus_loss(-m)


FORMULAS: dict[str, Callable[[Pair], float]] = {
    "sigmoid": lambda p: softplus_loss(p.margin),
    "smoothed": lambda p: smoothed(p.margin),
    "robust": lambda p: (
        ((1 - EPSILON) * softplus_loss(p.margin) - EPSILON * softplus_loss(-p.margin)) / (1 - 2 * EPSILON)
    ),
    "hinge": lambda p: max(0.0, 1 - BETA * p.margin),
    "ipo_sum": lambda p: (p.margin - 1 / (2 * BETA)) ** 2,
    "ipo_mean": lambda p: (p.mean_margin - 1 / (2 * BETA)) ** 2,
    "sigmoid_norm": lambda p: softplus_loss(p.mean_margin),
    "simpo": lambda p: -math.log(sigma(BETA * (p.pc.mean() - p.pr.mean()) - GAMMA)),
    "ld": lambda p: softplus_loss(p.ld_margin(scaled=True)),
    "ld, reference as it is": lambda p: softplus_loss(p.ld_margin(scaled=False)),
    "sigmoid with an SFT term": lambda p: softplus_loss(p.margin) - ALPHA * p.pc.mean(),
}


def tokens_of(value: float, count: int, k: int | None = None) -> np.ndarray:
    """The same for each of a side's tokens, or scaled beyond k."""
    values = np.full(count, value)
    if k is not None:
        values[k:] *= ALPHA
    return values


def constant(slope: Callable[[float], float]) -> Callable[[Pair], tuple[np.ndarray, np.ndarray]]:
    """Losses of the summed margin: dl/dm for each chosen token, its opposite for each rejected."""
    return lambda p: (tokens_of(slope(p.margin), p.nc), tokens_of(-slope(p.margin), p.nr))


def per_token(
    slope: Callable[[float], float], margin: Callable[[Pair], float]
) -> Callable[[Pair], tuple[np.ndarray, np.ndarray]]:
    return lambda p: (tokens_of(slope(margin(p)) / p.nc, p.nc), tokens_of(-slope(margin(p)) / p.nr, p.nr))


def of_ld(scaled: bool) -> Callable[[Pair], tuple[np.ndarray, np.ndarray]]:
    def slopes(p: Pair) -> tuple[np.ndarray, np.ndarray]:
        slope = -BETA * sigma(-BETA * p.ld_margin(scaled))
        return tokens_of(slope, p.nc, p.k), tokens_of(-slope, p.nr, p.k)

    return slopes


def with_sft(p: Pair) -> tuple[np.ndarray, np.ndarray]:
    slope = -BETA * sigma(-BETA * p.margin)
    return tokens_of(slope - ALPHA / p.nc, p.nc), tokens_of(-slope, p.nr)


GRADIENTS: dict[str, Callable[[Pair], tuple[np.ndarray, np.ndarray]]] = {
    "sigmoid": constant(lambda m: -BETA * sigma(-BETA * m)),
    "smoothed": constant(lambda m: -BETA * (sigma(-BETA * m) - EPSILON)),
    "robust": constant(
        lambda m: -BETA * ((1 - EPSILON) * sigma(-BETA * m) + EPSILON * sigma(BETA * m)) / (1 - 2 * EPSILON)
    ),
    "hinge": constant(lambda m: -BETA if BETA * m < 1 else 0.0),
    "ipo_sum": constant(lambda m: 2 * (m - 1 / (2 * BETA))),
    "ipo_mean": per_token(lambda m: 2 * (m - 1 / (2 * BETA)), lambda p: p.mean_margin),
    "sigmoid_norm": per_token(lambda m: -BETA * sigma(-BETA * m), lambda p: p.mean_margin),
    "simpo": per_token(lambda m: -BETA * sigma(GAMMA - BETA * m), lambda p: float(p.pc.mean() - p.pr.mean())),
    "ld": of_ld(scaled=True),
    "ld, reference as it is": of_ld(scaled=False),
    "sigmoid with an SFT term": with_sft,
}


@every
@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 4))
def test_value_and_gradient_are_those_of_the_paper(name: str, seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    pairs = [Pair(rng) for _ in range(count)]
    rows = [row for p in pairs for row in p.rows()]
    loss, metrics = make_pair_loss(
        [p.preference() for p in pairs], [p.reference() for p in pairs], FAMILY[name]
    )([], rows)
    assert loss.item() == pytest.approx(np.mean([FORMULAS[name](p) for p in pairs]), abs=1e-12)
    assert metrics["dpo_loss"] == pytest.approx(loss.item(), abs=1e-12)
    loss.backward()
    slopes = [side / count for p in pairs for side in GRADIENTS[name](p)]
    for row, expected in zip(rows, slopes, strict=True):
        assert row.grad is not None
        np.testing.assert_allclose(row.grad[2:].numpy(), expected, rtol=1e-9, atol=1e-12)
        assert not row.grad[:2].any()


@every
def test_the_rewards_differ_by_beta_times_the_margin_that_is_optimised(name: str) -> None:
    p = Pair(np.random.default_rng(3))
    scores = score_pairs([p.preference()], p.rows(), [p.reference()])
    metrics = preference_metrics(scores, FAMILY[name])
    assert metrics["rewards/chosen"] - metrics["rewards/rejected"] == pytest.approx(BETA * metrics["margin"])
    assert metrics["rewards/margins"] == pytest.approx(BETA * metrics["margin"])


@pytest.mark.parametrize(
    ("name", "expected"),
    {
        **dict.fromkeys(("sigmoid", "smoothed", "robust", "sigmoid_norm", "ld"), LN_2),
        **dict.fromkeys(("ipo_sum", "ipo_mean"), 1 / (4 * BETA**2)),
        "hinge": 1.0,
    }.items(),
)
def test_where_the_policy_is_the_reference_each_loss_has_its_known_value(name: str, expected: float) -> None:
    pairs = [pair(5, 2), pair(1, 4)]
    rows = logprobs_of(pairs, np.random.default_rng(0))
    loss, _ = make_pair_loss(pairs, reference_of(pairs, rows), FAMILY[name])([], rows)
    assert loss.item() == pytest.approx(expected, abs=1e-12)


def test_ld_with_a_reference_as_it_is_does_not_start_from_ln_2() -> None:
    pairs = [pair(5, 2)]
    rows = logprobs_of(pairs, np.random.default_rng(0))
    loss, _ = make_pair_loss(pairs, reference_of(pairs, rows), FAMILY["ld, reference as it is"])([], rows)
    assert abs(loss.item() - LN_2) > 0.01


def test_ld_with_alpha_1_is_sigmoid_to_the_bit() -> None:
    pairs = [pair(5, 2), pair(1, 4)]
    rng = np.random.default_rng(0)
    rows, other = logprobs_of(pairs, rng), logprobs_of(pairs, rng)
    values = [
        make_pair_loss(pairs, reference_of(pairs, other), objective)([], rows)[0].item()
        for objective in (DpoObjective(BETA), DpoObjective(BETA, loss="ld", ld_alpha=1.0))
    ]
    assert values[0] == values[1]


@pytest.mark.parametrize("name", ["ipo_sum", "ipo_mean"])
def test_ipo_has_its_optimum_at_the_margin_that_its_name_says(name: str) -> None:
    target = 1 / (2 * BETA)
    chosen, rejected = 4, 2
    # Rejected is where the reference is; chosen is above it by the target, in sum or per token.
    each = target / chosen if name == "ipo_sum" else target
    rows = [
        torch.full((2 + n,), value, dtype=torch.float64, requires_grad=True)
        for n, value in ((chosen, each), (rejected, 0.0))
    ]
    zeros = PairLogprobs(np.zeros(chosen), np.zeros(rejected))
    loss, _ = make_pair_loss([pair(chosen, rejected)], [zeros], FAMILY[name])([], rows)
    assert loss.item() == pytest.approx(0, abs=1e-15)
    assert all(np.allclose(gradient, 0, atol=1e-12) for gradient in torch.autograd.grad(loss, rows))


def test_robust_becomes_negative_and_hinge_lets_go() -> None:
    far = torch.tensor([50.0], dtype=torch.float64)
    alone = Stages(torch.tensor([0]), torch.ones(1, dtype=torch.float64))
    assert FAMILY["robust"].preference(far, alone).item() < 0
    assert FAMILY["hinge"].preference(far, alone).item() == 0


def test_simpo_reads_no_reference() -> None:
    p = Pair(np.random.default_rng(1))
    losses = [
        make_pair_loss([p.preference()], [reference], FAMILY["simpo"])([], p.rows())
        for reference in (p.reference(), PairLogprobs(p.rc - 5, p.rr + 3))
    ]
    assert losses[0][0].item() == losses[1][0].item()
    assert not FAMILY["simpo"].uses_reference
    assert not [name for name in losses[0][1] if name.startswith("delta_logp")]


@pytest.mark.parametrize("name", ["sigmoid_norm", "ipo_mean", "simpo"])
def test_a_margin_per_token_is_no_tie_where_its_sum_is_none(name: str) -> None:
    """0.2 nats over 200 tokens are 0.001 a token: small, and far from rounding."""
    long, tokens = pair(200, 200), 200
    rows = [torch.full((2 + tokens,), value, dtype=torch.float64) for value in (-1.0, -1.0009)]
    ones = PairLogprobs(np.full(tokens, -1.0), np.full(tokens, -1.0))
    metrics = preference_metrics(score_pairs([long], rows, [ones]), FAMILY[name])
    assert (metrics["accuracy"], metrics["tie_rate"]) == (1, 0)
    rows[1][:] = -1.000004
    metrics = preference_metrics(score_pairs([long], rows, [ones]), FAMILY[name])
    assert (metrics["accuracy"], metrics["tie_rate"]) == (0, 1)


@pytest.mark.parametrize("name", ["sigmoid_norm", "ipo_mean", "simpo"])
@pytest.mark.parametrize(("chosen", "rejected"), [(200, 2), (2, 200)])
def test_what_rounding_moves_a_mean_by_is_that_of_the_shorter_side(
    name: str, chosen: int, rejected: int
) -> None:
    """A sum of two tokens that is off by 0.0009 is off by 0.00045 a token, however long the other side is."""
    sides = (chosen, rejected)
    ones = PairLogprobs(*(np.full(tokens, -1.0) for tokens in sides))
    for off, tied in ((0.00045, 1), (0.00055, 0)):
        rows = [torch.full((2 + tokens,), -1.0, dtype=torch.float64) for tokens in sides]
        rows[0][:] += off
        metrics = preference_metrics(score_pairs([pair(*sides)], rows, [ones]), FAMILY[name])
        assert (metrics["tie_rate"], metrics["accuracy"]) == (tied, 1 - tied)


@pytest.mark.parametrize("weight", [0.0, -1.0, math.inf, math.nan])
def test_a_pair_that_cannot_be_weighed_cannot_be_made(weight: float) -> None:
    with pytest.raises(DataError, match="weight"):
        replace(pair(), weight=weight)


@every
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_pair_of_weight_2_counts_as_that_pair_twice(name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    one, two = Pair(rng), Pair(rng)
    given = [
        ([replace(one.preference(), weight=2.0), two.preference()], [one, two]),
        ([one.preference(), one.preference(), two.preference()], [one, one, two]),
    ]
    outcomes = []
    for pairs, values in given:
        rows = [p.rows() for p in values]
        loss, metrics = make_pair_loss(pairs, [p.reference() for p in values], FAMILY[name])(
            [], [r for rs in rows for r in rs]
        )
        loss.backward()
        of_one = sum(
            (rs[0].grad for rs, p in zip(rows, values, strict=True) if p is one), torch.zeros(one.nc + 2)
        )
        outcomes.append((loss.item(), metrics["dpo_loss"], of_one))
    assert outcomes[0][:2] == pytest.approx(outcomes[1][:2], abs=1e-12)
    torch.testing.assert_close(outcomes[0][2], outcomes[1][2], rtol=1e-10, atol=1e-12)


def test_the_sft_term_that_is_told_is_the_one_in_the_loss_whatever_the_weights() -> None:
    rng = np.random.default_rng(4)
    values = [Pair(rng), Pair(rng)]
    pairs = [replace(values[0].preference(), weight=3.0), values[1].preference()]
    told = []
    for weight in (0.5, 1.5):
        rows = [row for p in values for row in p.rows()]
        objective = DpoObjective(BETA, sft_weight=weight)
        told.append(make_pair_loss(pairs, [p.reference() for p in values], objective)([], rows)[1])
    assert told[0]["sft_loss"] == told[1]["sft_loss"]
    assert told[1]["dpo_loss"] - told[0]["dpo_loss"] == pytest.approx(told[0]["sft_loss"], abs=1e-12)
