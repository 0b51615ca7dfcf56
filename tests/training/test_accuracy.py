from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.utils.accuracy import (
    Traits,
    accuracy_metrics,
    length_controlled,
    pair_shares,
    rows_of,
    source_metrics,
)
from training.utils.intervals import wilson
from training.utils.losses import Margins
from training.utils.pairs import PreferencePair, build_dpo_datums
from training.utils.sources import LONGEST_NAME, MOST_SOURCES, sources_left_out

counts = st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
lengths = st.lists(st.integers(-3, 3), min_size=1, max_size=30)


def traits(*longer: int, source: str | None = None, truncated: bool = False) -> list[Traits]:
    return [Traits(tokens, truncated, source) for tokens in longer]


def margins(*values: float) -> Margins:
    return Margins(torch.tensor(values, dtype=torch.float64), tie=0.001)


# Its interval


@settings(deadline=None)
@given(counts)
def test_the_interval_ends_where_the_observed_share_is_1_96_standard_errors_away(
    pair: tuple[int, int],
) -> None:
    right, count = pair
    share, interval = right / count, wilson(right / count, count)
    for end in (interval.low, interval.high):
        distance = 1.959964 * math.sqrt(end * (1 - end) / count)
        if 0 < end < 1 - 1e-9:
            assert abs(end - share) == pytest.approx(distance, rel=1e-6)
    assert 0 <= interval.low <= share + 1e-12
    assert share - 1e-12 <= interval.high <= 1


def test_the_interval_of_known_tables() -> None:
    """Newcombe 1998 (10.1002/(SICI)1097-0258(19980430)17:8<857::AID-SIM777>3.0.CO;2-E), table I, method 3."""
    for right, count, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)):
        interval = wilson(right / count, count)
        assert (round(interval.low, 4), round(interval.high, 4)) == (low, high)


def test_ties_count_as_wrong_in_it_as_in_the_accuracy() -> None:
    found = accuracy_metrics(margins(1, 1, 0, -1), traits(0, 0, 0, 0))
    assert (found["accuracy_low"], found["accuracy_high"]) == (wilson(0.5, 4).low, wilson(0.5, 4).high)


def test_pairs_of_one_ranked_list_are_one_observation() -> None:
    lists = [Traits(0, row_pairs=3)] * 6 + [Traits(0)] * 2
    assert rows_of(lists) == 4
    found = accuracy_metrics(margins(1, 1, 1, 1, 1, 1, -1, -1), lists)
    assert (found["accuracy_low"], found["accuracy_high"]) == (wilson(0.75, 4).low, wilson(0.75, 4).high)


# What length alone would give


@settings(deadline=None)
@given(lengths, st.sampled_from([1, -1]))
def test_who_goes_by_length_alone_has_half_however_the_lengths_are_spread(
    longer: list[int], sign: int
) -> None:
    right = np.array([sign * tokens > 0 for tokens in longer])
    assert length_controlled(right, traits(*longer)) == (0.5 if max(longer) > 0 > min(longer) else None)


def test_both_kinds_of_pair_count_the_same_and_equal_lengths_do_not() -> None:
    right = np.array([True, True, False, False, True, True, True])
    longer = [5, 1, 1, 2, -7, 0, 0]  # right in 2 of 4 where chosen is longer, in 1 of 1 where it is shorter
    assert length_controlled(right, traits(*longer)) == (2 / 4 + 1 / 1) / 2


def test_there_is_no_such_metric_where_one_kind_is_missing() -> None:
    assert "accuracy_length_controlled" not in accuracy_metrics(margins(1, 1), traits(2, 0))
    assert accuracy_metrics(margins(1, 1), traits(2, -1))["accuracy_length_controlled"] == 1


def test_length_is_that_of_the_scored_tokens() -> None:
    datums = build_dpo_datums([1, 2, 3, 4, 5], [1, 2, 9], 2)
    assert Traits.of(PreferencePair(*datums, 2, line=1)) == Traits(2, False, None, line=1)
    told = PreferencePair(*reversed(datums), 2, line=1, source="forum", truncated=True)
    assert Traits.of(told) == Traits(-2, True, "forum", line=1)


def test_shares_are_of_pairs() -> None:
    pairs = [*traits(1, 0, -1), *traits(4, truncated=True)]
    assert pair_shares(pairs) == {"chosen_longer": 0.5, "truncated": 0.25}


# Sources


def test_each_source_has_its_accuracy_margin_and_count() -> None:
    pairs = [*traits(0, 0, source="forum"), *traits(0), *traits(0, source="lab")]
    found = source_metrics(np.array([True, False, True, False]), np.array([3.0, -1.0, 2.0, 0.0]), pairs)
    forum = {"source/forum/accuracy": 0.5, "source/forum/margin": 1.0, "source/forum/count": 2}
    lab = {"source/lab/accuracy": 0.0, "source/lab/margin": 0.0, "source/lab/count": 1}
    none = {"source/(none)/accuracy": 1.0, "source/(none)/margin": 2.0, "source/(none)/count": 1}
    assert found == {"sources": 3, **forum, **lab, **none}


def test_sources_that_are_called_other_or_none_are_not_mixed_with_those_left_out() -> None:
    names = [*(f"s{number:02}" for number in range(MOST_SOURCES + 5)), "other", "none", "other", "none"]
    pairs = [*(pair for name in names for pair in traits(0, source=name)), *traits(0, 0)]
    found = source_metrics(np.ones(len(pairs), bool), np.ones(len(pairs)), pairs)
    counts = {name: found[f"source/{name}/count"] for name in ("other", "none", "(none)", "(others)")}
    assert counts == {"other": 2, "none": 2, "(none)": 2, "(others)": 8}


def test_rows_without_a_source_have_none_of_these() -> None:
    assert source_metrics(np.array([True]), np.array([1.0]), traits(0)) == {}


@settings(deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=120))
def test_the_metrics_of_sources_are_bounded_and_no_pair_is_lost(numbers: list[int]) -> None:
    pairs = [pair for number in numbers for pair in traits(0, source=f"s{number}")]
    found = source_metrics(np.ones(len(pairs), bool), np.ones(len(pairs)), pairs)
    counted = {name: value for name, value in found.items() if name.endswith("/count")}
    assert sum(counted.values()) == len(pairs)
    assert len(counted) <= MOST_SOURCES + 1
    assert found["sources"] == len(set(numbers))
    assert (
        ("source/(others)/count" in found)
        == (len(set(numbers)) > MOST_SOURCES)
        == bool(sources_left_out(found))
    )


def test_the_most_frequent_sources_are_told_apart_and_of_equal_ones_the_first_by_name() -> None:
    names = [f"s{number:02}" for number in range(MOST_SOURCES + 2)]
    pairs = [pair for name in ("s21", *names) for pair in traits(0, source=name)]
    found = source_metrics(np.ones(len(pairs), bool), np.ones(len(pairs)), pairs)
    assert found["source/s21/count"] == 2
    assert "source/s18/count" in found
    assert found["source/(others)/count"] == 2  # s19 and s20
    assert "22 sources; the 20 most frequent" in str(sources_left_out(found))


def test_a_text_in_place_of_a_name_is_cut_and_its_blanks_are_one() -> None:
    pairs = traits(0, source="a  long\nstory " * 20)
    (name,) = [key for key in source_metrics(np.ones(1, bool), np.ones(1), pairs) if key.endswith("/count")]
    assert name.startswith("source/a long story a long")
    assert len(name) == LONGEST_NAME + len("source//count")


def test_long_names_that_begin_and_end_alike_stay_sources_of_their_own() -> None:
    names = [f"https://forum.example/{'a' * 50}/{middle}/{'z' * 50}" for middle in ("cooking", "physics")]
    pairs = [pair for name in (*names, names[0]) for pair in traits(0, source=name)]
    found = source_metrics(np.array([True, False, True]), np.array([3.0, -1.0, 1.0]), pairs)
    counts = {name: value for name, value in found.items() if name.endswith("/count")}
    assert found["sources"] == 2
    assert sorted(counts.values()) == [1, 2]
    assert {len(name) for name in counts} == {LONGEST_NAME + len("source//count")}
    again = source_metrics(np.array([False]), np.array([0.0]), traits(0, source=names[1]))
    assert [name for name in again if name.endswith("/count")] == [n for n, v in counts.items() if v == 1]


@settings(deadline=None)
@given(st.sets(st.text("ab /", min_size=58, max_size=64), max_size=MOST_SOURCES))
def test_there_are_as_many_sources_with_metrics_as_there_are_sources(names: set[str]) -> None:
    pairs = [pair for name in names for pair in traits(0, source=name)]
    found = source_metrics(np.ones(len(pairs), bool), np.ones(len(pairs)), pairs)
    counts = [value for name, value in found.items() if name.endswith("/count")]
    assert len(counts) == found.get("sources", 0) == len({" ".join(name.split()) for name in names})
