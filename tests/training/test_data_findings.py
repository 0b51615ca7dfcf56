"""What is said of preferences as a whole: from how many rows on, and how sure of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import pytest
from data_files import pair
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_tokenizers import byte_tokenizer

from training.utils import row_comparison
from training.utils.data_figures import Share
from training.utils.data_findings import (
    BIASED,
    PAIRS_TOLD,
    REFUSALS_TOLD,
    DataFinding,
    findings_of_preferences,
    length_preference,
)
from training.utils.jsonl import LocatedRow
from training.utils.preference_rows import PREFERENCES
from training.utils.rendering import Renderer
from training.utils.row_check import check_rows, read_in_characters
from training.utils.row_records import KeptRows

RENDERER = Renderer(byte_tokenizer())
Rows = list[dict[str, Any]]


def kept(rows: Rows, renderer: Renderer | None = None) -> KeptRows:
    located = [LocatedRow(line, 0, json.dumps(row).encode()) for line, row in enumerate(rows, start=1)]
    read = (
        check_rows(located, renderer, PREFERENCES) if renderer else read_in_characters(located, PREFERENCES)
    )
    assert not read.refused
    return KeptRows("rows.jsonl", read.usable, read.ranked)


def told(rows: Rows) -> dict[str, DataFinding]:
    return {finding.name: finding for finding in findings_of_preferences(kept(rows))}


# Length


def by_length(longer: int, out_of: int) -> Rows:
    """So many pairs, of which so many prefer the longer answer."""
    sides = [("a long answer", "short"), ("short", "a long answer")]
    return [pair(f"q{index}", *sides[index >= longer]) for index in range(out_of)]


def ranked(number: int, *lengths: int, ranks: tuple[int, ...] | None = None) -> dict[str, Any]:
    """A list of answers of these lengths, the best first unless ranks are given."""
    answers = [chr(ord("a") + place) * length for place, length in enumerate(lengths)]
    return {"prompt": f"q{number}:", "completions": answers, "ranks": list(ranks or range(len(answers)))}


@pytest.mark.parametrize("count", range(PAIRS_TOLD + 1))
def test_a_preference_for_length_is_told_where_the_whole_interval_is_beyond_the_border(count: int) -> None:
    found = told(by_length(count, PAIRS_TOLD))
    share = Share.of(count, PAIRS_TOLD)
    assert ("length-bias" in found) == (share.low > BIASED)
    assert ("looks-swapped-by-length" in found) == (share.high < 1 - BIASED)


def test_some_shares_are_beyond_the_border_and_not_sure() -> None:
    """Without them the test above would not tell the share from its interval."""
    shares = [Share.of(count, PAIRS_TOLD) for count in range(PAIRS_TOLD + 1)]
    assert [share for share in shares if share.share > BIASED > share.low]
    assert [share for share in shares if share.share < 1 - BIASED < share.high]


@pytest.mark.parametrize("longer", [0, 1], ids=["the shorter", "the longer"])
def test_of_one_pair_fewer_nothing_is_told_however_clear_it_is(longer: int) -> None:
    assert told(by_length(longer * PAIRS_TOLD, PAIRS_TOLD))
    assert not told(by_length(longer * (PAIRS_TOLD - 1), PAIRS_TOLD - 1))


def test_pairs_of_equal_length_are_not_among_them() -> None:
    rows = [*by_length(PAIRS_TOLD - 1, PAIRS_TOLD - 1), *(pair(f"e{n}", "one", "two") for n in range(9))]
    assert length_preference(kept(rows)).share == Share.of(PAIRS_TOLD - 1, PAIRS_TOLD - 1)
    assert not told(rows)


@pytest.mark.parametrize(
    ("lengths", "name"),
    [(range(1, 9), "looks-swapped-by-length"), (range(8, 0, -1), "length-bias")],
    ids=["the best is the shortest", "the best is the longest"],
)
def test_a_ranked_list_counts_once_however_many_pairs_it_has(lengths: range, name: str) -> None:
    """Seven rows that all say the same are not sure enough, and eight are."""
    eight = [ranked(number, *lengths) for number in range(8)]
    assert list(told(eight)) == [name]
    assert "of 8 rows with 224 pairs" in told(eight)[name].text
    assert not told(eight[:7])


def test_lists_of_few_pairs_are_counted_by_those() -> None:
    """Rows of three answers, of which two are tied: each has two pairs of two lengths."""
    lists = [ranked(number, 5, 2, 3, ranks=(1, 2, 2)) for number in range(PAIRS_TOLD // 2)]
    assert list(told(lists)) == ["length-bias"]
    assert not told(lists[1:])


@st.composite
def rows_of_lengths(draw: st.DrawFn) -> Iterator[tuple[dict[str, Any], list[tuple[int, int]]]]:
    """Rows, and of each the lengths of every better and worse answer."""
    rows = []
    for number in range(draw(st.integers(1, 6))):
        lengths = draw(st.lists(st.integers(1, 4), min_size=2, max_size=5))
        ranks = sorted(draw(st.integers(0, 3)) for _ in lengths)
        ranks[-1] += ranks[0] == ranks[-1]
        places = combinations(range(len(lengths)), 2)
        pairs = [(lengths[one], lengths[two]) for one, two in places if ranks[one] < ranks[two]]
        rows.append((ranked(number, *lengths, ranks=tuple(ranks)), pairs))
    return rows  # type: ignore[return-value]


@settings(deadline=None, max_examples=80)
@given(rows_of_lengths(), st.sampled_from([RENDERER, None]), st.sampled_from([1, 5, 2**20]))
def test_a_row_counts_by_the_share_of_its_pairs(
    rows: list[tuple[dict[str, Any], list[tuple[int, int]]]], renderer: Renderer | None, at_once: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_comparison, "_PREFERENCES_AT_ONCE", at_once)
        found = length_preference(kept([row for row, _ in rows], renderer))
    unlike = [[better > worse for better, worse in pairs if better != worse] for _, pairs in rows]
    shares = [sum(pairs) / len(pairs) for pairs in unlike if pairs]
    assert found.pairs == sum(map(len, unlike))
    assert (found.share.count, found.share.out_of) == (pytest.approx(sum(shares)), len(shares))


# Refusals

NO, YES = "I'm sorry, but I cannot.", "Of course: yes, sir, at once!!"


def refusing(chosen: int, rejected: int, both: int = 0) -> Rows:
    """So many pairs of which the chosen side declines, the rejected one, or both."""
    sides = [(NO, YES)] * chosen + [(YES, NO)] * rejected + [(NO, f"{NO} Never!")] * both
    return [pair(f"q{index}", *answers) for index, answers in enumerate(sides)]


def refusals_told(rows: Rows) -> DataFinding | None:
    return told(rows).get("looks-swapped-by-refusals")


def test_declining_is_told_from_so_many_pairs_on() -> None:
    assert refusals_told(refusing(REFUSALS_TOLD, 0)) is not None
    assert refusals_told(refusing(REFUSALS_TOLD - 1, 0)) is None


def test_pairs_of_which_both_sides_decline_say_nothing_about_it() -> None:
    assert refusals_told(refusing(REFUSALS_TOLD - 1, 0, both=9)) is None
    finding = refusals_told(refusing(REFUSALS_TOLD, 0, both=40))
    assert finding is not None
    assert (finding.rows, f"of {REFUSALS_TOLD} pairs" in finding.text) == (REFUSALS_TOLD, True)


@pytest.mark.parametrize("count", range(REFUSALS_TOLD, 21))
def test_declining_is_told_where_it_is_surely_preferred(count: int) -> None:
    finding = refusals_told(refusing(count, 20 - count))
    assert (finding is not None) == (Share.of(count, 20).low > BIASED)
