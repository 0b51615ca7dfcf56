"""Rows that are preferences: a row makes a pair, or where it ranks more answers than two, several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from firesteel.sdk.types import IntArray
from training.utils.jsonl import LocatedRow
from training.utils.pairs import PreferencePair, pairs_of, render_usable, shortened_or_dropped
from training.utils.preference_data import FORMATS, read_row
from training.utils.preference_examples import PreferenceExample
from training.utils.rendering import RenderedAnswers, Renderer
from training.utils.row_check import PLACE, RowArray, prompt_key
from training.utils.row_outcomes import Rendering, RowOutcome


@dataclass(frozen=True)
class RenderedPreferences:
    """See `row_check.RenderedRow`."""

    form: str
    offset: int
    example: PreferenceExample
    rendered: RenderedAnswers

    @property
    def record(self) -> tuple[int, ...]:
        """See `PreferenceRows.record_type`."""
        (best, *others), prompt_len = self.rendered.sides.values(), self.rendered.prompt_len
        place = (self.offset, prompt_key(best.tokens[:prompt_len]), self.example.line, prompt_len)
        lengths = len(best.tokens), max(len(other.tokens) for other in others)
        return (*place, *lengths, len(self.rendered.preferences), self.rendered.ties)

    def items(self, rules: Rendering) -> list[PreferencePair]:
        """Its pairs."""
        rendered = self.rendered
        if rules.too_long(rendered.lengths):
            fitted, _ = shortened_or_dropped(rendered, rules, self.example.line)
            assert fitted is not None, "rows that cannot be shortened are in no set"
            rendered = fitted
        return pairs_of(rendered, self.example, self.rendered)

    def outcome(self, rules: Rendering) -> RowOutcome:
        """See `row_check.RenderedRow`."""
        return shortened_or_dropped(self.rendered, rules, self.example.line)[1]


class PreferenceRows:
    """See `row_check.RowKind`."""

    name = "preferences"
    item = "pair"
    shapes: Sequence[str] = tuple(form.shape for form in FORMATS)
    record_type: np.dtype[np.void] = np.dtype(
        [
            *PLACE,
            ("chosen", "<u4"),  # tokens of the whole side; of a list, its best answer
            ("rejected", "<u4"),  # of a list, the longest of the others
            ("pairs", "<u2"),  # that the row makes
            ("ties", "<u2"),  # twos of its answers between which nothing is preferred
        ]
    )
    code: Sequence[str] = ("plain_texts", "ranked_rows", "preference_data", "pairs", "preference_rows")

    def render(self, row: LocatedRow, renderer: Renderer) -> RenderedPreferences:
        """See `row_check.RowKind`."""
        form, example = read_row(row.raw, row.line)
        return RenderedPreferences(form, row.offset, example, render_usable(renderer, example))

    def lengths(self, record: np.void) -> dict[str, int]:
        """See `row_check.RowKind`."""
        return {name: int(record[name]) for name in ("chosen", "rejected")}

    def longest(self, records: RowArray) -> IntArray:
        """See `row_check.RowKind`."""
        longest: IntArray = np.maximum(records["chosen"], records["rejected"]).astype(np.int64)
        return longest

    def made(self, records: RowArray) -> str:
        """See `row_check.RowKind`."""
        pairs, ties = int(records["pairs"].sum()), int(records["ties"].sum())
        lists = int((records["pairs"] + records["ties"] > 1).sum())
        among = f" (of {lists:,} ranked lists; {ties:,} ties dropped)" if lists else ""
        return f"{pairs:,} pairs{among}"


PREFERENCES = PreferenceRows()
