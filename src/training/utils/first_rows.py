"""The first rows of a data file, read as a recipe reads them: would a run stop at them? Takes no tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from firesteel.sdk.errors import RowError
from training.utils.jsonl import LocatedRow, located_rows
from training.utils.row_check import RowKind, read_in_characters
from training.utils.row_forms import refuse_nothing_left
from training.utils.row_outcomes import OnBadRow

FIRST_ROWS, FIRST_BYTES = 100, 10_000_000
"""As many as are read, or fewer where they are long."""


@dataclass(frozen=True)
class FirstRows:
    """What there is to be said of them."""

    path: str
    count: int
    whole: bool
    """The file has no others."""
    form: str
    """Empty where none can be used."""
    refused: list[RowError]

    @classmethod
    def of(cls, path: str, kind: RowKind[Any]) -> FirstRows:
        """Read them. Raises DataError for a file that cannot be read, is empty, or is of several forms so far."""
        rows, later = list[LocatedRow](), located_rows(path)
        for row in later:
            rows.append(row)
            if len(rows) == FIRST_ROWS or row.offset + len(row.raw) >= FIRST_BYTES:
                break
        if not rows:
            refuse_nothing_left(path, [], 0, kind.shapes)
        checked = read_in_characters(rows, kind)
        form = checked.formats.only(path) if checked.formats.counts else ""
        refused = [RowError(path, row.line, row.field, row.reason) for row in checked.refused]
        return cls(path, len(rows), next(later, None) is None, form, refused)

    @property
    def named(self) -> str:
        """`its 6 rows`, or `the first 100 rows`."""
        return f"{'its' if self.whole else 'the first'} {self.count} row{'s' if self.count > 1 else ''}"

    def stop(self, on_bad_row: OnBadRow) -> bool:
        """Whether a run would stop, by these rows alone."""
        nothing_left = self.whole and not self.form
        return bool(self.refused) and (on_bad_row == "fail" or nothing_left)
