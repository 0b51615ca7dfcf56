from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.ticker import MaxNLocator

from training.utils.charts import BINS, Bars, Binned, Curve, draw_curves, draw_histogram, tick_labels


def curve(values: list[float], **given: object) -> Curve:
    return Curve("x", np.arange(1, len(values) + 1.0), np.array(values), 0, **given)  # type: ignore[arg-type]


def paths(svg: str) -> list[str]:
    """Of the lines that are drawn in the first colour."""
    found = re.findall(r'<path d="([^"]*)"[^>]*style="([^"]*)"', svg)
    return [path for path, style in found if "stroke: var(--c0)" in style and "fill: none" in style]


@given(st.floats(-1e6, 1e6), st.floats(1e-9, 1e6))
@settings(deadline=None, max_examples=300)
def test_no_two_ticks_read_the_same_and_each_is_the_number_that_it_stands_for(
    low: float, width: float
) -> None:
    if width < abs(low) * 1e-9:
        return
    ticks = [float(tick) for tick in MaxNLocator(5).tick_values(low, low + width)]
    labels = tick_labels(ticks)
    assert len(set(labels)) == len(ticks)
    read = [float(label.replace(",", "").replace("\N{MINUS SIGN}", "-")) for label in labels]
    apart = min(np.diff(ticks))
    assert read == pytest.approx(ticks, abs=apart / 50)


def test_huge_numbers_have_powers_of_ten() -> None:
    assert tick_labels([0.0, 2e30, 4e30]) == ["0", "2e30", "4e30"]
    assert tick_labels([0.0, 2e6, 4e6]) == ["0", "2,000,000", "4,000,000"]


@pytest.mark.parametrize("steps", [1, 2, 3, 40, 41, 2 * BINS])
def test_every_step_of_a_short_series_is_on_the_line(steps: int) -> None:
    svg = draw_curves("a", [curve([float(i % 3) for i in range(steps)])])
    if steps > 1:
        (path,) = paths(svg)
        assert len(re.findall("[ML]", path)) == steps
    assert ('aria-hidden="true"') in svg


def test_one_step_in_thirty_thousand_is_seen() -> None:
    values = [0.0] * 30_000
    values[12_345] = 1000.0
    long = curve(values)
    assert long.is_binned
    binned = Binned.of(long)
    assert binned.highs.max() == 1000
    assert binned.means.mean() == pytest.approx(np.mean(values))
    assert len(draw_curves("a", [long])) < 40_000


def test_steps_without_a_number_are_left_out() -> None:
    assert list(curve([1.0, np.nan, 3.0, np.inf]).finite.steps) == [1, 3]
    draw_curves("a", [curve([np.nan, np.nan])])


def test_a_histogram_of_equal_values_and_of_far_outliers() -> None:
    same = draw_histogram("h", [Bars("a", np.zeros(5), 0)])
    wild = draw_histogram("h", [Bars("a", np.append(np.random.default_rng(0).normal(size=2000), 1e9), 0)])
    assert same.count("<svg") == wild.count("<svg") == 1
    assert "1,000,000" not in wild


def test_a_chart_takes_text_and_colours_from_its_page() -> None:
    svg = draw_curves("name", [curve([1.0, 2.0])])
    assert "<text" in svg
    assert "font-family" not in svg
    assert not re.search(r"#[0-9a-f]{6}\b", svg)
    assert all(name.startswith("name-") for name in re.findall(r'\bid="([^"]*)"', svg))
