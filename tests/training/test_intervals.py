"""Between what the truth lies. Wilson's interval: `test_accuracy`."""

from __future__ import annotations

import math

import numpy as np
import pytest

from training.utils.intervals import Z_95, of_mean, student_t, student_within


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [
        (1, 12.706205),
        (2, 4.302653),
        (3, 3.182446),
        (4, 2.776445),
        (5, 2.570582),
        (9, 2.262157),
        (10, 2.228139),
        (29, 2.045230),
        (30, 2.042272),
        (120, 1.979930),
        (100_000, 1.959988),
    ],
)
def test_quantiles_are_those_of_the_tables(freedom: int, quantile: float) -> None:
    assert student_t(freedom) == pytest.approx(quantile, abs=1e-6)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 12, 51, 300])
def test_95_percent_of_the_density_lie_within_the_quantile(freedom: int) -> None:
    constant = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(
        freedom * math.pi
    )
    values = np.linspace(0, student_t(freedom), 20_001)
    density = constant * (1 + values**2 / freedom) ** (-(freedom + 1) / 2)
    assert 2 * np.trapezoid(density, values) == pytest.approx(0.95, abs=1e-6)


@pytest.mark.parametrize("t", [0.3, 1.0, Z_95, 9.0])
def test_of_one_and_two_degrees_it_is_a_formula_of_its_own(t: float) -> None:
    assert student_within(t, 1) == pytest.approx(2 / math.pi * math.atan(t))
    assert student_within(t, 2) == pytest.approx(t / math.sqrt(2 + t**2))


def test_quantiles_fall_to_that_of_the_normal_distribution() -> None:
    quantiles = [student_t(freedom) for freedom in (*range(1, 60), 1000, 10**6)]
    assert quantiles == sorted(quantiles, reverse=True)
    assert quantiles[-1] == pytest.approx(Z_95, abs=1e-5)


@pytest.mark.parametrize("count", [2, 3, 5, 20])
def test_the_mean_lies_within_the_interval_of_a_sample_in_95_of_100_cases(count: int) -> None:
    """With 1.96 instead of Student's t it would in 70, 81, 88 and 93: of 4,000 samples, 1 % is three errors."""
    samples = np.random.default_rng(count).normal(3.0, 2.0, (4000, count)).tolist()
    found = [interval for sample in samples if (interval := of_mean(sample))]
    assert np.mean([i.low <= 3.0 <= i.high for i in found]) == pytest.approx(0.95, abs=0.0105)


def test_one_value_has_no_interval_and_equal_ones_have_none_around_them() -> None:
    assert of_mean([1.0]) is None
    assert of_mean([]) is None
    same = of_mean([2.0, 2.0])
    assert same is not None
    assert (same.low, same.high) == (2.0, 2.0)
