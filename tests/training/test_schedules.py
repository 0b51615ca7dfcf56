from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from firesteel.sdk import ConfigError
from training.utils.schedules import Epochs, Schedule, epoch_order

BASE, TOTAL = 3e-5, 40


def rates(total: int = TOTAL, **settings: Any) -> list[float]:
    """The rates of steps 1 to `total`."""
    schedule = Schedule(**settings)
    return [schedule.learning_rate(BASE, step, total) for step in range(1, total + 1)]


def test_a_constant_rate_is_the_base_rate_to_the_bit() -> None:
    assert rates() == [BASE] * TOTAL


@pytest.mark.parametrize("lowest", [0.0, 0.1, 0.3, 0.7, 1.0])
def test_linear_decay(lowest: float) -> None:
    expected = [BASE * (1 - s / TOTAL * (1 - lowest)) for s in range(1, TOTAL + 1)]
    assert rates(type="linear", min_lr_ratio=lowest) == pytest.approx(expected)


@pytest.mark.parametrize("lowest", [0.0, 0.1, 0.3])
def test_cosine_decay(lowest: float) -> None:
    expected = [
        BASE * (lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * s / TOTAL)))
        for s in range(1, TOTAL + 1)
    ]
    assert rates(type="cosine", min_lr_ratio=lowest) == pytest.approx(expected, abs=1e-20)


@pytest.mark.parametrize(
    ("shape", "formula"),
    [
        (None, lambda p, m: 1 - p * (1 - m)),
        ("linear", lambda p, m: 1 - p * (1 - m)),
        ("cosine", lambda p, m: m + (1 - m) * 0.5 * (1 + math.cos(math.pi * p))),
        ("sqrt", lambda p, m: max(m, 1 - math.sqrt(p) * (1 - m))),
    ],
)
@pytest.mark.parametrize(("share", "last_steps"), [(None, 4), (0.25, 10), (1.0, 40), (0.26, 11)])
@pytest.mark.parametrize("lowest", [0.0, 0.3])
def test_warm_up_stable_decay_decays_over_its_last_part_only(
    shape, formula, share, last_steps, lowest
) -> None:
    got = rates(type="wsd", decay_type=shape, decay_ratio=share, min_lr_ratio=lowest)
    stable = TOTAL - last_steps
    assert got[:stable] == [BASE] * stable
    expected = [BASE * formula(n / last_steps, lowest) for n in range(1, last_steps + 1)]
    assert got[stable:] == pytest.approx(expected, abs=1e-20)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_any_decay_may_be_limited_to_the_last_part(kind: str) -> None:
    got = rates(type=kind, decay_ratio=0.5)
    assert got[:20] == [BASE] * 20
    assert got[20:] == pytest.approx(rates(total=20, type=kind), abs=1e-20)


@pytest.mark.parametrize("settings", [{"warmup_steps": 10}, {"warmup_ratio": 0.25}, {"warmup_ratio": 0.226}])
@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "wsd"])
def test_the_rate_rises_linearly_to_the_base_rate_and_then_does_what_its_type_says(
    kind: str, settings
) -> None:
    got = rates(type=kind, **settings)
    assert got[:10] == pytest.approx([BASE * s / 10 for s in range(1, 11)])
    if kind == "wsd":
        assert got[10:36] == [BASE] * 26
    else:
        assert got[10:] == pytest.approx(rates(total=30, type=kind), abs=1e-20)


@given(
    kind=st.sampled_from(["linear", "cosine", "wsd"]),
    shape=st.sampled_from([None, "linear", "cosine", "sqrt"]),
    lowest=st.floats(0, 1),
    base=st.floats(1e-8, 1.0),
    total=st.integers(1, 10_000),
    share=st.none() | st.floats(1e-3, 1.0),
    warmup=st.integers(0, 50),
)
def test_the_last_step_has_exactly_the_lowest_rate_and_none_leaves_its_bounds(
    kind, shape, lowest, base, total, share, warmup
) -> None:
    schedule = Schedule(
        type=kind,
        decay_type=shape if kind == "wsd" else None,
        decay_ratio=share,
        min_lr_ratio=lowest,
        warmup_steps=min(warmup, total - 1),
    )
    assert schedule.learning_rate(base, total, total) == base * lowest
    for step in {1, (total + 1) // 2, total}:
        assert 0 <= schedule.learning_rate(base, step, total) <= base


def test_a_warm_up_longer_than_the_run_only_rises() -> None:
    assert rates(total=5, type="linear", warmup_steps=10) == [BASE * s / 10 for s in range(1, 6)]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"warmup_steps": 1, "warmup_ratio": 0.1}, "warmup_steps or warmup_ratio, not both"),
        ({"type": "linear", "decay_type": "sqrt"}, "decay_type applies to wsd, not to linear"),
        ({"min_lr_ratio": 0.1}, "constant schedule reads neither"),
        ({"decay_ratio": 0.1}, "constant schedule reads neither"),
        ({"type": "exponential"}, "type: .*'exponential'"),
        ({"warmup_steps": -1}, r"warmup_steps: .*got -1"),
        ({"warmup_ratio": 1.5}, r"warmup_ratio: .*got 1\.5"),
        ({"type": "linear", "min_lr_ratio": 2}, r"min_lr_ratio: .*got 2"),
        ({"type": "linear", "decay_ratio": 0}, r"decay_ratio: .*got 0"),
        ({"warmup": 3}, "warmup: Schedule has no such setting"),
    ],
)
def test_settings_that_contradict_or_leave_their_range_are_refused(settings, said) -> None:
    with pytest.raises(ConfigError, match=said):
        Schedule(**settings)


# Row order


@given(st.integers(0, 300), st.integers(0, 2**32), st.integers(0, 100), st.booleans())
def test_an_epoch_visits_every_row_once_in_an_order_that_its_numbers_decide(
    count, seed, epoch, shuffle
) -> None:
    order = epoch_order(count, seed, epoch, shuffle)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(count))
    np.random.seed(5)  # nobody else's random numbers matter
    assert np.array_equal(epoch_order(count, seed, epoch, shuffle), order)


def test_without_shuffling_rows_come_as_they_are() -> None:
    assert epoch_order(5, 3, 2, shuffle=False).tolist() == [0, 1, 2, 3, 4]


def test_every_seed_and_every_epoch_has_its_own_order() -> None:
    orders = {tuple(epoch_order(50, seed, epoch, shuffle=True)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_the_order_of_a_seed_never_changes() -> None:
    # Runs are resumed by seed: another order here would make them visit rows twice.
    assert epoch_order(8, 0, 0, shuffle=True).tolist() == [2, 4, 3, 6, 5, 0, 1, 7]
    assert epoch_order(8, 0, 1, shuffle=True).tolist() == [1, 3, 7, 6, 0, 4, 2, 5]


def test_batches_visit_every_row_once_an_epoch_in_its_order() -> None:
    epochs = Epochs(count=5, batch_size=2, epochs=3, seed=1, shuffle=True)
    batches = list(epochs.batches())
    assert [batch.step for batch in batches] == list(range(1, epochs.total_steps + 1)) == list(range(1, 10))
    assert [len(batch.rows) for batch in batches] == [2, 2, 1] * 3
    for epoch in (1, 2, 3):
        rows = [row for batch in batches if batch.epoch == epoch for row in batch.rows]
        assert rows == epoch_order(5, 1, epoch - 1, shuffle=True).tolist()
