"""One row at a time: whether it can be used, how long it is, or exactly why it cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np

from firesteel.sdk.types import IntArray
from training.utils.data_findings import DataFinding
from training.utils.jsonl import LocatedRow
from training.utils.preference_examples import ExampleError
from training.utils.rendering import RenderedAnswers, Renderer
from training.utils.row_forms import FormatTally
from training.utils.row_outcomes import Rendering, RowOutcome
from training.utils.row_records import RANKED, KeptRows, RankedAnswer, RowArray

T_co = TypeVar("T_co", covariant=True)


class RenderedRow(Protocol[T_co]):
    """A row that can be used, if it is not too long."""

    @property
    def form(self) -> str:
        """Which of the accepted forms it has."""

    @property
    def record(self) -> tuple[int, ...]:
        """What is kept of it, see `RowKind.record_type`."""

    @property
    def ranked(self) -> Sequence[RankedAnswer]:
        """What is kept of each of its answers where it ranks more than two of them, best first; or nothing."""

    def items(self, rules: Rendering) -> Sequence[T_co]:
        """What it makes; it is not longer than the rules allow, or they shorten it."""

    def outcome(self, rules: Rendering) -> RowOutcome:
        """What becomes of it if it is longer than the rules allow, and they shorten."""

    @property
    def answers(self) -> RenderedAnswers:
        """Its sequences, to be shown; of one sequence nothing stands apart as a prompt."""


class RowKind(Protocol[T_co]):
    """What the rows of a file are to a recipe: preferences, or conversations."""

    name: str
    rows: str
    """What they are, for people."""
    item: str
    """What a row makes, for people."""
    advice: str
    """What to do with a file of these where another kind is wanted, for people."""
    shapes: Sequence[str]
    """The forms that a row may have, for people."""
    record_type: np.dtype[np.void]
    """What is kept of a usable row: `row_records.PLACE`, and more."""
    code: Sequence[str]
    """Modules, beside those that all kinds use, on which it depends what a row becomes."""

    def render(self, row: LocatedRow, renderer: Renderer) -> RenderedRow[T_co]:
        """The row as tokens. Raises ExampleError."""

    def lengths(self, record: np.void) -> dict[str, int]:
        """Tokens of the row's longest sequences, by name."""

    def longest(self, records: RowArray) -> IntArray:
        """Tokens of the longest sequence of each row."""

    def counts(self, records: RowArray) -> IntArray:
        """How many items each row makes."""

    def made(self, records: RowArray, rules: Rendering) -> str:
        """What rows make, in words: `551 pairs`."""

    def in_characters(self, row: LocatedRow) -> RecordedRow:
        """The row read, and not rendered: its record, of characters in place of tokens. Raises ExampleError."""

    def parts(self, records: RowArray, longest: int | None) -> dict[str, IntArray]:
        """How long the prompts of rows are, and what follows them, by name; cut at the longest sequence."""

    def computed(self, records: RowArray, longest: int | None) -> IntArray:
        """How many tokens of each row are computed: beginnings that are shared count once."""

    def findings(self, rows: KeptRows) -> Iterator[DataFinding]:
        """What is wrong, or may be wrong, with rows that are used together."""


@dataclass(frozen=True)
class RecordedRow:
    """What is kept of a row."""

    form: str
    record: tuple[int, ...]
    ranked: Sequence[RankedAnswer] = ()
    """See `RenderedRow.ranked`."""


@dataclass(frozen=True)
class RefusedRow:
    """A row that cannot be used, whatever the limits."""

    line: int
    field: str
    reason: str


@dataclass(frozen=True)
class CheckedRows:
    """What became of some rows of a file, in order."""

    usable: RowArray
    ranked: RowArray
    """See `row_records.RANKED`."""
    refused: list[RefusedRow] = field(default_factory=list)
    formats: FormatTally = field(default_factory=FormatTally)


def check_rows(rows: Sequence[LocatedRow], renderer: Renderer, kind: RowKind[Any]) -> CheckedRows:
    """Read and render each row once. Raises ModelError where the tokenizer lacks what rows need."""
    return _checked(rows, lambda row: kind.render(row, renderer), kind)


def read_in_characters(rows: Sequence[LocatedRow], kind: RowKind[Any]) -> CheckedRows:
    """Read each row once, without a tokenizer: lengths are in characters."""
    return _checked(rows, kind.in_characters, kind)


def _checked(
    rows: Sequence[LocatedRow],
    read: Callable[[LocatedRow], RenderedRow[Any] | RecordedRow],
    kind: RowKind[Any],
) -> CheckedRows:
    usable, ranked, refused, formats = [], [], [], FormatTally()
    for row in rows:
        try:
            one = read(row)
            record = one.record
        except ExampleError as error:
            refused.append(RefusedRow(row.line, error.field, error.reason))
            continue
        formats.add(one.form, row.line)
        usable.append(record)
        ranked += [(row.line, answer.rank, answer.key, answer.length) for answer in one.ranked]
    return CheckedRows(np.array(usable, kind.record_type), np.array(ranked, RANKED), refused, formats)
