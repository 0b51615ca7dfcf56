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
from training.utils.row_signs import Sign

RowArray = np.ndarray[tuple[int], np.dtype[np.void]]
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

    def __str__(self) -> str:
        return f"{self.text}{lines_told(self.lines, self.rows)}"


def lines_told(lines: tuple[int, ...], rows: int) -> str:
    """` (lines 3, 8, 10 and 4 more)`; nothing where no line is known."""
    if not lines:
        return ""
    more = f" and {rows - len(lines):,} more" if rows > len(lines) else ""
    return f" (line{'s' if rows > 1 else ''} {', '.join(map(str, lines))}{more})"


def findings_of(rows: RowArray) -> Iterator[DataFinding]:
    """Findings about rows of any kind that are used together."""
    yield from _repeated(rows)
    for sign, (level, name, text) in _OF_SIGNS.items():
        yield from _about(_with(rows, sign), rows, level, name, text)


def findings_of_preferences(rows: RowArray) -> Iterator[DataFinding]:
    """The same, and those about what is preferred to what."""
    yield from findings_of(rows)
    yield from _contradictory(rows)
    yield from _length_bias(rows)
    yield from _looks_swapped(rows)


def leakage(heldout: RowArray, train: RowArray) -> Iterator[DataFinding]:
    """Held-out rows whose prompt is trained on, or that are trained on themselves; lines are those held out."""
    same_prompt = np.isin(heldout["prompt"], train["prompt"])
    yield from _about(
        same_prompt, heldout, "warning", "held-out-prompts", "held-out rows have a prompt that is trained on"
    )
    trained = _row_keys(train, "content")
    same_row = np.isin(_row_keys(heldout, "content"), trained)
    if "turned" in (heldout.dtype.names or ()):  # preferences
        same_row |= np.isin(_row_keys(heldout, "turned"), trained)
    text = "held-out rows are among the training rows too, or there the other way round"
    yield from _about(same_row, heldout, "warning", "held-out-rows", text)


def longer_is_chosen(rows: RowArray) -> Share:
    """In how many of the rows with two answers of two lengths the longer one is the chosen one."""
    rows = rows[rows["pairs"] + rows["ties"] == 1]
    longer = int((rows["chosen"] > rows["rejected"]).sum())
    return Share.of(longer, int((rows["chosen"] != rows["rejected"]).sum()))


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


_OF_ONE = {"have": "has", "are": "is", "begin": "begins", "end": "ends", "contradict": "contradicts"}


def _about(which: BoolArray, rows: RowArray, level: Level, name: str, text: str) -> Iterator[DataFinding]:
    count = int(which.sum())
    if count == 1:
        text = re.sub(r"rows (\w+)", lambda found: f"row {_OF_ONE[found[1]]}", text, count=1)
    if count:
        yield DataFinding(level, name, f"{count:,} {text}", count, _first_lines(rows, which))


def _first_lines(rows: RowArray, which: BoolArray) -> tuple[int, ...]:
    return tuple(int(line) for line in rows["line"][np.flatnonzero(which)[:LINES_SHOWN]])


def _with(rows: RowArray, sign: Sign) -> BoolArray:
    found: BoolArray = rows["signs"] & int(sign) != 0
    return found


def _row_keys(
    rows: RowArray, order: Literal["content", "turned"]
) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """64 bits that stand for a row's prompt and answers, in their order or the opposite one."""
    # An odd factor: the sum modulo 2^64 differs wherever one of the two hashes does.
    keys: np.ndarray[tuple[int], np.dtype[np.uint64]] = rows["prompt"] * _FACTOR + rows[order]
    return keys


_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def _repeated(rows: RowArray) -> Iterator[DataFinding]:
    repeated = np.ones(len(rows), dtype=np.bool_)
    repeated[np.unique(_row_keys(rows, "content"), return_index=True)[1]] = False
    yield from _about(repeated, rows, "warning", "duplicates", "rows have been there before, token for token")


def _contradictory(rows: RowArray) -> Iterator[DataFinding]:
    against = np.isin(_row_keys(rows, "turned"), _row_keys(rows, "content"))
    text = "rows contradict another: the same prompt and answers, preferred the other way round"
    yield from _about(against, rows, "warning", "contradictions", text)


def _length_bias(rows: RowArray) -> Iterator[DataFinding]:
    share = longer_is_chosen(rows)
    if share.low > BIASED and share.out_of >= PAIRS_TOLD:
        text = f"the longer response is the chosen one in {share} of {share.out_of:,} pairs: length is learned with it"
        advice = "; a loss per token (sigmoid_norm, simpo) or ld holds against that"
        yield DataFinding("warning", "length-bias", text + advice)


def _looks_swapped(rows: RowArray) -> Iterator[DataFinding]:
    """Suspicions only, from what is usual: longer answers are preferred more often, refusals less often."""
    share = longer_is_chosen(rows)
    if share.high < 1 - BIASED and share.out_of >= PAIRS_TOLD:
        text = f"the longer response is the chosen one in only {share} of {share.out_of:,} pairs"
        yield DataFinding(
            "warning",
            "looks-swapped-by-length",
            f"{text}: unless short answers are wanted, look whether chosen and rejected are swapped",
        )
    chosen, rejected = _with(rows, Sign.CHOSEN_REFUSES), _with(rows, Sign.REJECTED_REFUSES)
    one_refuses = chosen != rejected
    refusals = Share.of(int((chosen & one_refuses).sum()), int(one_refuses.sum()))
    if refusals.out_of >= REFUSALS_TOLD and refusals.low > BIASED:
        text = f"where one side declines to answer, it is the chosen one in {refusals} of {refusals.out_of:,} pairs"
        yield DataFinding(
            "warning",
            "looks-swapped-by-refusals",
            f"{text}: unless declining is to be learned, look whether chosen and rejected are swapped",
            refusals.count,
            _first_lines(rows, chosen & one_refuses),
        )
