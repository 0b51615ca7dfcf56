"""What is wrong, or may be wrong, with the rows of a file as a whole: said by the data check and by every run.

All is found in the index of the file: no row is read again. Whether a row is usable at all is decided
in `row_check`; nothing here drops one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from firesteel.sdk.types import BoolArray
from training.utils.data_figures import Share
from training.utils.row_comparison import contradicting, lists_in_parts, ranked_twos, repeated, row_keys
from training.utils.row_records import KeptRows, RowArray
from training.utils.row_signs import Sign

Level = Literal["error", "warning", "note"]
LINES_SHOWN = 5
REFUSALS_TOLD = 10
"""So many pairs in which one side refuses to answer are worth a word."""
PAIRS_TOLD = 20
"""Of fewer pairs, nothing is said about lengths."""
BIASED = 0.65
"""Where the longer side is surely preferred more often than this, or as seldom, length itself is learned."""


@dataclass(frozen=True)
class DataFinding:
    """One thing: an error stops a run, a warning may spoil it, a note is only told."""

    level: Level
    name: str
    text: str
    rows: int = 0
    lines: tuple[int, ...] = ()
    """Of the first few of these rows."""
    counterparts: tuple[Counterpart, ...] = ()
    """Of the same few, where it is about rows of two files."""

    def __str__(self) -> str:
        there = ", ".join(str(row.other_line) for row in self.counterparts)
        return f"{self.text}{lines_told(self.lines, self.rows, there)}"


@dataclass(frozen=True)
class Counterpart:
    """A row of another file: what a row of this one says too, or contradicts."""

    line: int
    path: str
    """Of the other file."""
    other_line: int


def lines_told(lines: tuple[int, ...], rows: int, there: str = "") -> str:
    """` (lines 3, 8, 10 and 4 more)`, with those of another file; nothing where no line is known."""
    if not lines:
        return ""
    more = f" and {rows - len(lines):,} more" if rows > len(lines) else ""
    also = f"; there {there}" if there else ""
    return f" (line{'s' if rows > 1 else ''} {', '.join(map(str, lines))}{more}{also})"


def findings_of(rows: KeptRows) -> Iterator[DataFinding]:
    """Findings about rows of any kind that are used together."""
    records = rows.records
    text = "rows have been there before, token for token"
    yield from _about(repeated(row_keys(records, "content")), records, "warning", "duplicates", text)
    for sign, (level, name, text) in _OF_SIGNS.items():
        yield from _about(_with(records, sign), records, level, name, text)


def findings_of_preferences(rows: KeptRows) -> Iterator[DataFinding]:
    """The same, and those about what is preferred to what."""
    yield from findings_of(rows)
    text = "rows contradict another: the same prompt and answers, preferred the other way round"
    yield from _about(contradicting(rows), rows.records, "warning", "contradictions", text)
    yield from _about_length(rows)
    yield from _about_refusals(rows.records)


@dataclass(frozen=True)
class LengthPreference:
    """How often the longer of two answers is the better one. Answers of one length say nothing."""

    share: Share
    """Of rows: a ranked list is one, for its answers are no independent observations. It counts by the share of its
    pairs."""
    pairs: int
    """Those of the lists among them."""


def length_preference(rows: KeptRows) -> LengthPreference:
    """That of some preferences."""
    of_two = rows.records[rows.records["pairs"] + rows.records["ties"] == 1]
    of_two = of_two[of_two["chosen"] != of_two["rejected"]]
    lists = np.concatenate([_longer_in_lists(some) for some in lists_in_parts(rows.ranked)])
    longer = int((of_two["chosen"] > of_two["rejected"]).sum())
    in_part = float((lists["longer"] / lists["pairs"]).sum())
    share = Share.of(longer + in_part, len(of_two) + len(lists))
    return LengthPreference(share, len(of_two) + int(lists["pairs"].sum()))


_LIST = np.dtype([("pairs", "<i8"), ("longer", "<i8")])


def _longer_in_lists(ranked: RowArray) -> RowArray:
    """Of each list: its pairs of two lengths, if it has any, and in how many of them the longer one is the better."""
    better, worse = ranked_twos(ranked)
    unlike = better["length"] != worse["length"]
    longer = better["length"][unlike] > worse["length"][unlike]
    _, list_of, pairs = np.unique(better["line"][unlike], return_inverse=True, return_counts=True)
    lists = np.empty(len(pairs), _LIST)
    lists["pairs"], lists["longer"] = pairs, np.bincount(list_of[longer], minlength=len(pairs))
    return lists


_OF_SIGNS: dict[Sign, tuple[Level, str, str]] = {
    Sign.SCORES_SWAPPED: (
        "warning",
        "scores-contradict",
        "rows have scores that say the rejected side is the better one: are the sides swapped?",
    ),
    Sign.SPECIAL_TEXT: (
        "warning",
        "special-tokens-in-text",
        "rows have the text of a special token in a message, and the model reads that token: was a template "
        "applied before?",
    ),
    Sign.DOUBLED_START: ("warning", "doubled-start", "rows begin with two beginning-of-sequence tokens"),
    Sign.DOUBLED_END: ("warning", "doubled-end", "rows end with two end-of-sequence tokens"),
    Sign.THOUGHT_LEFT_OUT: (
        "note",
        "earlier-reasoning-left-out",
        "rows have reasoning in an earlier turn that the chat template leaves out, as templates of reasoning "
        "models do",
    ),
}


_OF_ONE = {
    **{verb: f"{verb}s" for verb in ("begin", "contradict", "end", "stand")},
    "have": "has",
    "are": "is",
}


def counted(count: int, text: str) -> str:
    """`2 rows have …`, `1 row has …`; the text is that of several."""
    if count == 1:
        text = re.sub(r"rows (\w+)", lambda found: f"row {_OF_ONE[found[1]]}", text, count=1)
    return f"{count:,} {text}"


def _about(which: BoolArray, rows: RowArray, level: Level, name: str, text: str) -> Iterator[DataFinding]:
    if count := int(which.sum()):
        yield DataFinding(level, name, counted(count, text), count, _first_lines(rows, which))


def _first_lines(rows: RowArray, which: BoolArray) -> tuple[int, ...]:
    return tuple(int(line) for line in rows["line"][np.flatnonzero(which)[:LINES_SHOWN]])


def _with(rows: RowArray, sign: Sign) -> BoolArray:
    found: BoolArray = rows["signs"] & int(sign) != 0
    return found


def _about_length(rows: KeptRows) -> Iterator[DataFinding]:
    found = length_preference(rows)
    if found.pairs < PAIRS_TOLD:
        return
    share, count = found.share, f"{found.pairs:,}"
    if found.pairs > share.out_of:
        count = f"{share.out_of:,} rows with {count}"
    if share.low > BIASED:
        text = f"the longer response is the chosen one in {share} of {count} pairs: length is learned with it"
        advice = "; a loss per token (sigmoid_norm, simpo) or ld holds against that"
        yield DataFinding("warning", "length-bias", text + advice)
    if (
        share.high < 1 - BIASED
    ):  # a suspicion only, from what is usual: longer answers are preferred more often
        text = f"the longer response is the chosen one in only {share} of {count} pairs"
        yield DataFinding(
            "warning",
            "looks-swapped-by-length",
            f"{text}: unless short answers are wanted, look whether chosen and rejected are swapped",
        )


def _about_refusals(rows: RowArray) -> Iterator[DataFinding]:
    """The same suspicion: it is usual that refusals are preferred less often."""
    chosen, rejected = _with(rows, Sign.CHOSEN_REFUSES), _with(rows, Sign.REJECTED_REFUSES)
    one_refuses = chosen != rejected
    refusals = Share.of(int((chosen & one_refuses).sum()), int(one_refuses.sum()))
    if refusals.out_of >= REFUSALS_TOLD and refusals.low > BIASED:
        text = f"where one side declines to answer, it is the chosen one in {refusals} of {refusals.out_of:,} pairs"
        yield DataFinding(
            "warning",
            "looks-swapped-by-refusals",
            f"{text}: unless declining is to be learned, look whether chosen and rejected are swapped",
            int(refusals.count),
            _first_lines(rows, chosen & one_refuses),
        )
