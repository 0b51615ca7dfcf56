"""The forms that a file's rows may have: telling which one a row is meant to be, and that all rows are of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, NoReturn, TypeVar

from firesteel.sdk.errors import DataError, RowError
from training.utils.preference_examples import ExampleError
from training.utils.row_values import Row

T = TypeVar("T")

ERRORS_SHOWN = 10
LINES_SHOWN = 3


@dataclass(frozen=True)
class RowForm(Generic[T]):
    """One accepted form. `claims` looks at keys and outer types only, `read` says what is wrong inside."""

    name: str
    shape: str
    """As it is shown to people."""
    claims: Callable[[Row], bool]
    read: Callable[[Row, int], T]


def claimed(row: Row, forms: Sequence[RowForm[T]]) -> RowForm[T] | None:
    """The one form that this row is meant to be, None if there is none. Raises ExampleError if there are several."""
    claiming = [form for form in forms if form.claims(row)]
    if len(claiming) > 1:
        fits = " and ".join(f"{form.name} {form.shape}" for form in claiming)
        raise ExampleError("row", f"fits {len(claiming)} formats: {fits}; keep the keys of one")
    return claiming[0] if claiming else None


@dataclass
class FormatTally:
    """Which formats the rows of a file have: for each, how many rows, and the lines of the first few."""

    counts: dict[str, int] = field(default_factory=dict)
    first_lines: dict[str, list[int]] = field(default_factory=dict)

    def add(self, name: str, line: int) -> None:
        """Count one row."""
        self.merge(FormatTally({name: 1}, {name: [line]}))

    def merge(self, later: FormatTally) -> None:
        """Count the rows that another tally has counted behind these."""
        for name, count in later.counts.items():
            self.counts[name] = self.counts.get(name, 0) + count
            lines = [*self.first_lines.get(name, []), *later.first_lines[name]]
            self.first_lines[name] = lines[:LINES_SHOWN]

    def only(self, path: str) -> str:
        """The one format of all rows. Raises DataError if there are several."""
        if len(self.counts) > 1:
            found = "; ".join(f"{name} in {self._lines_text(name)}" for name in self.counts)
            raise DataError(
                f"{path}: its rows are of {len(self.counts)} formats: {found}. Keep each in a file of its own."
            )
        (name,) = self.counts
        return name

    def _lines_text(self, name: str) -> str:
        lines, count = self.first_lines[name], self.counts[name]
        more = "" if count <= len(lines) else f" and {count - len(lines)} more"
        return f"line {lines[0]}" if count == 1 else f"lines {', '.join(map(str, lines))}{more}"


def refuse_rows(path: str, first: Sequence[RowError], count: int) -> None:
    """Raise one error for the bad rows of one file, of which the first few are given; return if there are none."""
    if not count:
        return
    if count == 1:
        raise first[0]
    shown_rows = first[:ERRORS_SHOWN]
    more = "" if count <= len(shown_rows) else f"\n  and {count - len(shown_rows)} more"
    listed = "".join(f"\n  {error}" for error in shown_rows)
    raise DataError(
        f"{path}: {count} rows cannot be used:{listed}{more}\n"
        'Mend or remove them, or leave them out with on_bad_row="skip".'
    )


def refuse_nothing_left(path: str, first: Sequence[RowError], count: int, shapes: Sequence[str]) -> NoReturn:
    """Raise the error of a file without a usable row; `shapes` are what could have been in it."""
    if not count:
        forms = " | ".join(shapes)
        raise DataError(f"{path}: the file is empty; expected one JSON object per line, as one of {forms}")
    listed = "".join(f"\n  {error}" for error in first[:ERRORS_SHOWN])
    none = "its only row cannot be used" if count == 1 else f"none of its {count:,} rows can be used"
    raise DataError(f"{path}: {none}:{listed}")
