"""Sigmoid DPO against its closed forms. π, r: summed log-probabilities; m: margin; N: pairs of a call."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from firesteel.sdk import Datum, ModelInput
from training.utils.losses import (
    DpoObjective,
    PairLogprobs,
    PairScores,
    SideScores,
    Stages,
    make_pair_loss,
    preference_metrics,
    score_pairs,
    sigmoid_dpo,
)
from training.utils.pairs import PreferencePair, build_dpo_datums

LN_2 = math.log(2)
PROMPT = (5, 6, 7)
finite = st.floats(-30, 30)


def pair(chosen: int = 3, rejected: int = 2) -> PreferencePair:
    """A pair with so many scored tokens on each side."""
    sides = [(*PROMPT, *range(first, first + n)) for first, n in ((10, chosen), (40, rejected))]
    return PreferencePair(*build_dpo_datums(*sides, len(PROMPT)), len(PROMPT), line=1)


def logprobs_of(pairs: list[PreferencePair], rng: np.random.Generator) -> list[torch.Tensor]:
    """One random log-probability per target, prompt targets included."""
    return [
        torch.tensor(-rng.exponential(2.0, d.model_input.length), requires_grad=True)
        for p in pairs
        for d in p.datums
    ]


def reference_of(pairs: list[PreferencePair], rows: list[torch.Tensor]) -> list[PairLogprobs]:
    """These per-token values, as a reference that agrees with them."""
    scored = [
        row.detach().numpy()[datum.loss_fn_inputs["weights"].to_numpy() != 0]
        for row, datum in zip(rows, (d for p in pairs for d in p.datums), strict=True)
    ]
    return [PairLogprobs(scored[i], scored[i + 1]) for i in range(0, len(scored), 2)]


def scores(margins: list[float]) -> PairScores:
    """Pairs with these margins, all of them on the chosen side."""
    values, zeros = torch.tensor(margins, dtype=torch.float64), torch.zeros(len(margins), dtype=torch.float64)
    chosen, rejected = (
        SideScores(values, *[zeros] * 3, zeros + 2, zeros, zeros),
        SideScores(*[zeros] * 4, zeros + 4, zeros, zeros),
    )
    return PairScores(chosen, rejected, zeros + 1, each_by_itself(len(margins)))


def each_by_itself(count: int) -> Stages:
    """Rows of two answers."""
    return Stages(torch.arange(count), torch.ones(count, dtype=torch.float64))


def margins(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_policy_equal_to_reference_gives_ln_2(smoothing: float) -> None:
    pairs = [pair(), pair(1, 5)]
    rows = logprobs_of(pairs, np.random.default_rng(0))
    objective = DpoObjective(0.3, smoothing)
    loss, metrics = make_pair_loss(pairs, reference_of(pairs, rows), objective)([], rows)
    assert loss.item() == pytest.approx(LN_2, abs=1e-12)
    assert metrics["margin"] == 0
    assert (metrics["accuracy"], metrics["tie_rate"]) == (0, 1)


@settings(deadline=None, max_examples=50)
@given(st.floats(0.01, 5), st.sampled_from([0.0, 0.1, 0.4]), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_the_gradient_of_every_token_is_that_of_the_formula(
    beta: float, smoothing: float, count: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    pairs = [pair(int(rng.integers(1, 5)), int(rng.integers(1, 5))) for _ in range(count)]
    rows, other = logprobs_of(pairs, rng), logprobs_of(pairs, rng)
    references = reference_of(pairs, other)
    loss, _ = make_pair_loss(pairs, references, DpoObjective(beta, smoothing))([], rows)
    loss.backward()
    scored = score_pairs(pairs, rows, references)
    margin = (scored.chosen.delta - scored.rejected.delta).detach().numpy()
    sigma = 1 / (1 + np.exp(beta * margin))  # σ(-βm)
    expected = -beta * (sigma - smoothing) / count
    for index, row in enumerate(rows):
        weights = [d for p in pairs for d in p.datums][index].loss_fn_inputs["weights"].to_numpy()
        side = 1 if index % 2 == 0 else -1
        assert row.grad is not None
        np.testing.assert_allclose(
            row.grad.numpy(), side * expected[index // 2] * weights, rtol=1e-9, atol=1e-12
        )


@settings(deadline=None)
@given(finite, st.floats(0.01, 2), st.floats(0, 0.49))
def test_swapping_chosen_and_rejected_changes_the_loss_by_beta_m(
    m: float, beta: float, smoothing: float
) -> None:
    there, back = sigmoid_dpo(margins([m, -m]), beta, smoothing)
    assert (there - back).item() == pytest.approx(-beta * m * (1 - 2 * smoothing), abs=1e-9)


@settings(deadline=None)
@given(st.floats(-50, 50), st.integers(0, 2**32 - 1))
def test_a_constant_on_one_token_of_both_sides_changes_nothing(constant: float, seed: int) -> None:
    pairs, rng = [pair(), pair(1, 5)], np.random.default_rng(seed)
    rows, other = logprobs_of(pairs, rng), logprobs_of(pairs, rng)
    first = len(PROMPT) - 1  # the first scored token
    shifted = [row.detach().clone() for row in rows]
    for row in shifted:
        row[first] += constant
    plain, moved = (
        make_pair_loss(pairs, reference_of(pairs, other), DpoObjective(0.1))([], values)[0]
        for values in (rows, shifted)
    )
    assert moved.item() == pytest.approx(plain.item(), abs=1e-12)


def test_responses_that_differ_in_their_first_token_only_have_a_gradient_there() -> None:
    datums = build_dpo_datums((*PROMPT, 10, 20), (*PROMPT, 11, 20), len(PROMPT))
    only = PreferencePair(*datums, len(PROMPT), line=1)
    rows = logprobs_of([only], np.random.default_rng(1))
    loss, _ = make_pair_loss([only], reference_of([only], rows), DpoObjective(0.1))([], rows)
    loss.backward()
    first = len(PROMPT) - 1
    assert [row.grad[first].item() for row in rows if row.grad is not None] == pytest.approx([-0.05, 0.05])
    assert all(not row.grad[:first].any() for row in rows if row.grad is not None)


@pytest.mark.parametrize(("beta_m", "loss"), [(1e4, 0.0), (-1e4, 1e4)])
def test_extreme_margins_stay_finite(beta_m: float, loss: float) -> None:
    extreme = margins([beta_m]).requires_grad_()
    value = sigmoid_dpo(extreme, 1.0)
    value.sum().backward()
    assert value.item() == pytest.approx(loss, abs=1e-12)
    assert extreme.grad is not None
    assert torch.isfinite(extreme.grad).all()


def test_sums_of_minus_five_thousand_keep_their_digits() -> None:
    long = pair(2000, 2000)
    rng = np.random.default_rng(2)
    values = [-rng.exponential(2.5, d.model_input.length).astype(np.float32) for d in long.datums]
    rows = [torch.tensor(v) for v in values]
    summed = score_pairs([long], rows, reference_of([long], rows)).chosen.policy.item()
    assert summed < -4500
    assert summed == pytest.approx(math.fsum(values[0][len(PROMPT) - 1 :].tolist()), abs=1e-9)


def test_label_smoothing_changes_the_loss_where_the_margin_is_not_0() -> None:
    assert sigmoid_dpo(margins([2.0]), 1.0, 0.3).item() == pytest.approx(
        -0.7 * math.log(1 / (1 + math.exp(-2))) - 0.3 * math.log(1 / (1 + math.exp(2)))
    )
    assert sigmoid_dpo(margins([2.0]), 1.0, 0.3).item() != sigmoid_dpo(margins([2.0]), 1.0).item()


def test_the_loss_is_the_mean_over_the_pairs_of_its_call() -> None:
    pairs = [pair(n, 2) for n in range(1, 9)]
    rng = np.random.default_rng(3)
    rows, references = logprobs_of(pairs, rng), reference_of(pairs, logprobs_of(pairs, rng))
    whole, _ = make_pair_loss(pairs, references, DpoObjective(0.1))([], rows)
    parts = [
        make_pair_loss(pairs[i : i + 2], references[i : i + 2], DpoObjective(0.1))(
            [], rows[2 * i : 2 * i + 4]
        )[0]
        for i in range(0, 8, 2)
    ]
    assert whole.item() == pytest.approx(sum(part.item() for part in parts) * 2 / 8, abs=1e-12)
    gradient = torch.autograd.grad(whole, rows)
    added = torch.autograd.grad(sum((part * 2 / 8 for part in parts), torch.zeros(())), rows)
    torch.testing.assert_close(added, gradient, rtol=1e-12, atol=0)
    assert all(values.any() for values in gradient)


def masked_pair(mask: list[int]) -> PreferencePair:
    """A pair of which the chosen response has this mask, and the rejected is one scored token."""
    tokens = (*PROMPT, *range(10, 10 + len(mask)))
    weights = np.array([0] * (len(PROMPT) - 1) + mask, np.float32)
    chosen = Datum(
        ModelInput.from_ints(tokens[:-1]),
        {"target_tokens": np.array(tokens[1:]), "weights": weights},
    )
    _, rejected = build_dpo_datums((*PROMPT, 10), (*PROMPT, 40), len(PROMPT))
    return PreferencePair(chosen, rejected, len(PROMPT), line=1)


def test_tokens_that_are_not_scored_weigh_nothing() -> None:
    references = [
        PairLogprobs(np.array([-1.0, -2.0]), np.array([-3.0])),
        PairLogprobs(np.full(4, -1.5), np.full(4, -2.5)),
    ]
    gradients = []
    for mask in ([1, 1], [1, 1, *[0] * 30]):
        pairs = [masked_pair(mask), pair(4, 4)]
        values = torch.linspace(-1, -3, 50, dtype=torch.float64)  # the same at the same place in both
        rows = [values[: d.model_input.length].clone().requires_grad_() for p in pairs for d in p.datums]
        loss, _ = make_pair_loss(pairs, references, DpoObjective(0.1))([], rows)
        gradients.append(torch.autograd.grad(loss, rows))
    for short, long in zip(*gradients, strict=True):
        assert torch.equal(long[: len(short)], short)
        assert not long[len(short) :].any()


def test_per_token_means_divide_by_the_scored_tokens_alone() -> None:
    gaps = masked_pair([1, 0, 0, 1, 0])
    rows = [
        torch.full((d.model_input.length,), value) for d, value in zip(gaps.datums, (-2.0, -3.0), strict=True)
    ]
    scored = score_pairs([gaps], rows, [PairLogprobs(np.full(2, -2.0), np.full(1, -3.0))])
    assert (scored.chosen.tokens.item(), scored.rejected.tokens.item()) == (2, 1)
    # -4 over 2 tokens is better than -3 over 1; over all 5 or 7 tokens it would be too, over 1 it would not.
    assert preference_metrics(scored, DpoObjective(0.1))["policy_preference"] == 1
    worse = [torch.full_like(row, value) for row, value in zip(rows, (-2.0, -1.5), strict=True)]
    again = score_pairs([gaps], worse, [PairLogprobs(np.full(2, -2.0), np.full(1, -3.0))])
    # -4 over 2 tokens is worse than -1.5 over 1; over 3 tokens or more it would be better.
    assert preference_metrics(again, DpoObjective(0.1))["policy_preference"] == 0


def test_gradients_are_right_to_a_millionth_in_the_precision_that_a_trainer_sends() -> None:
    pairs, rng = [pair(4, 3), pair(2, 5)], np.random.default_rng(7)
    exact, references = logprobs_of(pairs, rng), reference_of(pairs, logprobs_of(pairs, rng))
    single = [row.detach().float().requires_grad_(True) for row in exact]
    gradients = [
        torch.autograd.grad(make_pair_loss(pairs, references, DpoObjective(0.5, 0.1))([], rows)[0], rows)
        for rows in (exact, single)
    ]
    for here, there in zip(*gradients, strict=True):
        torch.testing.assert_close(there.double(), here, rtol=0, atol=1e-6)
        assert there.dtype == torch.float32


def test_metrics_of_a_table_worked_out_by_hand() -> None:
    zeros = margins([0.0] * 3)
    table = PairScores(
        SideScores(
            margins([-2, -6, -3]), margins([-3, -5, -3]), zeros, zeros, margins([2, 2, 3]), zeros, zeros
        ),
        SideScores(
            margins([-8, -4, -9]), margins([-7, -6, -9]), zeros, zeros, margins([4, 4, 4.5]), zeros, zeros
        ),
        zeros + 1,
        each_by_itself(3),
    )
    metrics = preference_metrics(table, DpoObjective(0.5))
    expected = {
        "dpo_loss": sum(math.log1p(math.exp(-0.5 * m)) for m in (2.0, -3.0, 0.0)) / 3,
        "margin": -1 / 3,
        "accuracy": 1 / 3,
        "tie_rate": 1 / 3,
        "rewards/chosen": 0.5 * (1 - 1 + 0) / 3,
        "rewards/rejected": 0.5 * (-1 + 2 + 0) / 3,
        "rewards/margins": -0.5 / 3,
        "rewards/accuracies": 1 / 3,
        "logps/chosen": -11 / 3,
        "logps/rejected": -7.0,
        "delta_logp/chosen": 0.0,
        "delta_logp/rejected": 1 / 3,
        # Per token: -1 > -2, -3 < -1, -1 > -2.
        "policy_preference": 2 / 3,
    }
    assert metrics == pytest.approx(expected, abs=1e-12)


def test_a_margin_of_rounding_size_is_a_tie_and_neither_right_nor_wrong() -> None:
    metrics = preference_metrics(scores([5e-4, -5e-4, 2e-3, -2e-3]), DpoObjective(0.1))
    assert (metrics["accuracy"], metrics["tie_rate"]) == (0.25, 0.5)


def test_counts_that_do_not_match_are_refused() -> None:
    rows = logprobs_of([pair()], np.random.default_rng(4))
    with pytest.raises(ValueError, match="1 pairs, 1 log-probability rows, 1 references"):
        score_pairs([pair()], rows[:1], reference_of([pair()], rows))
    with pytest.raises(ValueError, match="1 pairs, 2 log-probability rows, 0 references"):
        score_pairs([pair()], rows, [])


@pytest.mark.parametrize("length", [0, 1, 2, 4])
def test_a_reference_of_another_length_is_refused_and_never_stretched(length: int) -> None:
    rows = logprobs_of([pair(3, 2)], np.random.default_rng(8))
    right = reference_of([pair(3, 2)], rows)[0]
    wrong = PairLogprobs(np.full(length, -1.0), right.rejected)
    with pytest.raises(ValueError, match=f"3 scored tokens, {length} reference log-probabilities"):
        score_pairs([pair(3, 2)], rows, [wrong])
