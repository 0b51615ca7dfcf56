"""The built-in losses, in numbers worked out by hand: sums, and the gradient each formula has."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from firesteel.engine.losses import datum_loss
from firesteel.sdk import Datum, ModelInput

LOG2 = math.log(2)

# Ratios r = exp(l - q) of ½, 1, 2, 8 with advantages of both signs.
POLICY = [-2.0 - LOG2, -1.0, -3.0 + LOG2, -4.0 + 3 * LOG2]
SAMPLER = [-2.0, -1.0, -3.0, -4.0]
ADVANTAGES = [1.0, -2.0, 0.5, -1.0]


def rollout(advantages: list[float] = ADVANTAGES, sampler: list[float] = SAMPLER) -> Datum:
    length = len(advantages)
    return Datum(
        ModelInput.from_ints(range(length)),
        {
            "target_tokens": list(range(length)),
            "logprobs": np.asarray(sampler, np.float32),
            "advantages": np.asarray(advantages, np.float32),
        },
    )


def value_and_gradient(
    name: str, datum: Datum, policy: list[float], settings: dict[str, float] | None = None
) -> tuple[float, list[float]]:
    logprobs = torch.tensor(policy, dtype=torch.float64, requires_grad=True)
    loss = datum_loss(name, logprobs, datum, settings)
    assert loss.shape == ()
    (gradient,) = torch.autograd.grad(loss, logprobs)
    return loss.item(), gradient.tolist()


def test_cross_entropy_is_minus_the_weighted_sum() -> None:
    datum = Datum(
        ModelInput.from_ints([1, 2, 3]),
        {"target_tokens": [2, 3, 4], "weights": np.asarray([0.0, 1.0, -0.5], np.float32)},
    )
    value, gradient = value_and_gradient("cross_entropy", datum, [-7.0, -2.0, -3.0])
    assert value == pytest.approx(2.0 - 1.5)
    assert gradient == [0.0, -1.0, 0.5]


def test_cross_entropy_without_weights_counts_every_target_once() -> None:
    datum = Datum(ModelInput.from_ints([1, 2, 3]), {"target_tokens": [2, 3, 4]})
    value, gradient = value_and_gradient("cross_entropy", datum, [-7.0, -2.0, -3.0])
    assert value == pytest.approx(12.0)
    assert gradient == [-1.0, -1.0, -1.0]


def test_importance_sampling_weighs_advantages_with_the_ratio() -> None:
    # -(½·1 + 1·(-2) + 2·½ + 8·(-1)), and d/dl of -rA is -rA itself.
    value, gradient = value_and_gradient("importance_sampling", rollout(), POLICY)
    assert value == pytest.approx(8.5, rel=1e-6)
    assert gradient == pytest.approx([-0.5, 2.0, -1.0, 8.0], rel=1e-6)


def test_ppo_is_clipped_where_clipping_is_the_worse_side() -> None:
    # r: ½      1      2       8       clipped to [0.8, 1.2]: 0.8, 1, 1.2, 1.2
    # A: 1     -2      ½      -1
    # min(rA, clip A): ½, -2, 0.6, -8: the third is clipped, the first and the last are not.
    value, gradient = value_and_gradient("ppo", rollout(), POLICY)
    assert value == pytest.approx(-(0.5 - 2 + 0.6 - 8), rel=1e-6)
    assert gradient == pytest.approx([-0.5, 2.0, 0.0, 8.0], rel=1e-6)


def test_ppo_is_clipped_from_below_for_a_negative_advantage() -> None:
    # A = -1 at r = ½: rA = -½, clip A = -0.8, the smaller one is clipped and has no gradient.
    value, gradient = value_and_gradient("ppo", rollout([-1.0], [-2.0]), [-2.0 - LOG2])
    assert value == pytest.approx(0.8, rel=1e-6)
    assert gradient == [0.0]


def test_ppo_takes_its_thresholds_from_the_settings() -> None:
    wide = {"clip_low_threshold": 0.1, "clip_high_threshold": 1.5}
    value, gradient = value_and_gradient("ppo", rollout([0.5], [-3.0]), [-3.0 + LOG2], wide)
    assert value == pytest.approx(-0.75, rel=1e-6)
    assert gradient == [0.0]


def test_cispo_clips_the_weight_and_lets_no_gradient_through_it() -> None:
    # clip(r, 0, 4): ½, 1, 2, 4. Value -Σ clip(r) l A; d/dl of it is -clip(r) A and nothing more.
    value, gradient = value_and_gradient("cispo", rollout(), POLICY)
    expected = -(0.5 * POLICY[0] * 1 + 1 * POLICY[1] * -2 + 2 * POLICY[2] * 0.5 + 4 * POLICY[3] * -1)
    assert value == pytest.approx(expected, rel=1e-6)
    assert gradient == pytest.approx([-0.5, 2.0, -1.0, 4.0], rel=1e-6)


def test_cispo_keeps_a_gradient_where_the_ratio_is_clipped() -> None:
    settings = {"clip_low_threshold": 0.9, "clip_high_threshold": 1.5}
    _, gradient = value_and_gradient("cispo", rollout(), POLICY, settings)
    assert gradient == pytest.approx([-0.9, 2.0, -0.75, 1.5], rel=1e-6)


def test_dro_is_the_advantage_less_a_quadratic_penalty() -> None:
    # -Σ (l A - ½ β d²) with d = l - q: (-ln 2, 0, ln 2, 3 ln 2); derivative -A + β d.
    beta = 0.4
    value, gradient = value_and_gradient("dro", rollout(), POLICY, {"beta": beta})
    distances = [-LOG2, 0.0, LOG2, 3 * LOG2]
    expected = -sum(p * a - 0.5 * beta * d * d for p, a, d in zip(POLICY, ADVANTAGES, distances, strict=True))
    assert value == pytest.approx(expected, rel=1e-6)
    assert gradient == pytest.approx(
        [beta * d - a for d, a in zip(distances, ADVANTAGES, strict=True)], rel=1e-6
    )


@pytest.mark.parametrize(
    ("name", "settings"),
    [("importance_sampling", None), ("ppo", None), ("cispo", None), ("dro", {"beta": 0.4})],
)
def test_a_loss_is_a_sum_over_tokens(name: str, settings: dict[str, float] | None) -> None:
    value, gradient = value_and_gradient(name, rollout(), POLICY, settings)
    twice = rollout(ADVANTAGES * 2, SAMPLER * 2)
    doubled, repeated = value_and_gradient(name, twice, POLICY * 2, settings)
    assert doubled == pytest.approx(2 * value, rel=1e-12)
    assert repeated == pytest.approx(gradient * 2, rel=1e-12)


@pytest.mark.parametrize("name", ["importance_sampling", "ppo", "cispo"])
def test_on_policy_every_ratio_loss_has_the_policy_gradient(name: str) -> None:
    _, gradient = value_and_gradient(name, rollout(), SAMPLER)
    assert gradient == pytest.approx([-a for a in ADVANTAGES], rel=1e-6)


def test_several_targets_at_a_position_are_summed_too() -> None:
    weights = np.asarray([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]], np.float32)
    datum = Datum(
        ModelInput.from_ints([1, 2]), {"target_tokens": np.zeros((2, 3), np.int64), "weights": weights}
    )
    logprobs = -torch.arange(1.0, 7.0, dtype=torch.float64).reshape(2, 3)
    assert datum_loss("cross_entropy", logprobs, datum).item() == pytest.approx(0.5 + 0.5 + 0.75 + 4)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("cross_entropy", None),
        ("importance_sampling", None),
        ("ppo", None),
        ("cispo", None),
        ("dro", {"beta": 0.4}),
    ],
)
def test_float32_losses_are_close_to_float64(name: str, settings: dict[str, float] | None) -> None:
    rng = np.random.default_rng(0)
    sampler = rng.normal(-4, 1, 200)
    datum = rollout(rng.normal(size=200).tolist(), sampler.tolist())
    policy = torch.from_numpy(sampler + rng.normal(0, 0.3, 200))
    exact, single = (
        datum_loss(name, policy.to(t), datum, settings).item() for t in (torch.float64, torch.float32)
    )
    assert single == pytest.approx(exact, rel=1e-5, abs=1e-3)
