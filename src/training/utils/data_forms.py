"""A row of one form as a row of another, where nothing gets lost and nothing is added.

What a row says is read by the reader of its form and written in the other; the new row is read back, and must say the
same. Keys that no form reads (`id`, `source`, …) and a `weight` go along. Texts are not made into messages or messages
into texts: the chat template would then stand in one and not in the other.

Of a preference, one side can be had as a supervised row. Nothing makes preferences of those: an answer is missing.
"""

from __future__ import annotations

import gzip
import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from firesteel.sdk.errors import ConfigError, RowError
from firesteel.sealed import storage_errors
from training.utils.jsonl import LocatedRow, located_rows, parse_row
from training.utils.preference_data import read_row
from training.utils.preference_examples import ExampleError, PreferenceExample, RankedExample
from training.utils.preference_sides import Side, side_of
from training.utils.preference_writers import LIST_FORMS, PREFERENCE_FORMS, as_pair, write_preference
from training.utils.row_check import RowKind
from training.utils.row_extras import (
    NewRow,
    extras_of_preference,
    extras_of_supervised,
    says_ranks,
    scores_beside,
    scores_of_list,
    with_extras,
)
from training.utils.row_forms import ERRORS_SHOWN, refuse_nothing_left, refuse_rows
from training.utils.row_kinds import kind_of
from training.utils.row_outcomes import OnBadRow
from training.utils.row_values import Row
from training.utils.sft_data import read_sft_row
from training.utils.sft_examples import SftExample
from training.utils.sft_rows import SFT
from training.utils.sft_writers import SFT_FORMS, write_supervised


@dataclass(frozen=True)
class Target:
    """What rows are to become."""

    form: str
    side: Side | None = None
    """Of preferences: supervised rows of this side. Forms of both kinds have the same names, so it must be said."""

    @property
    def remark(self) -> str:
        """What is not seen in the rows; empty if there is nothing."""
        if self.side and self.form == "text":
            return "of whole texts all is learned, with what the two sides share"
        return ""


@dataclass(frozen=True)
class Conversion:
    """How many rows were converted, and which could not be."""

    rows: int
    refused: tuple[RowError, ...]
    """The first few."""
    refused_count: int


def convert_file(
    path: str, target: Target, out: Path | None, on_bad_row: OnBadRow, say: Callable[[str], None]
) -> Conversion:
    """Write all rows in another form to `out`, which is there whole or not at all, or `say` each.

    With `"fail"` rows that cannot be converted are refused all at once, at the end.
    """
    kind = kind_of([path])
    _refuse_unknown_form(path, target, kind)
    if out is None:
        done = _convert_rows(path, target, kind, say)
        if on_bad_row == "fail":
            refuse_rows(path, done.refused, done.refused_count)
        return done
    partial = out.with_name(f".partial-{secrets.token_hex(4)}-{out.name}")
    try:
        with storage_errors(out, 0), _opened(partial) as file:
            done = _convert_rows(path, target, kind, lambda line: print(line, file=file))
        if on_bad_row == "fail":
            refuse_rows(path, done.refused, done.refused_count)
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    return done


def _refuse_unknown_form(path: str, target: Target, kind: RowKind[Any]) -> None:
    form, side = target.form, target.side
    if kind is SFT and side:
        raise ConfigError(
            f"--side {side}: the rows of {path} are supervised, each with one answer; leave it out"
        )
    forms = SFT_FORMS if kind is SFT or side else PREFERENCE_FORMS
    if form in forms:
        return
    if kind is SFT and form in PREFERENCE_FORMS:
        raise ConfigError(
            f"--to {form}: a form of preferences, and the rows of {path} have one answer each, none that is rejected. "
            "Find a worse answer for each, and write both beside their prompt, as "
            '{"prompt": […], "chosen": […], "rejected": […]}'
        )
    if not side and form in SFT_FORMS:
        raise ConfigError(
            f"--to {form}: a form of supervised rows, and those of {path} are preferences; "
            "with --side chosen their chosen answers are written"
        )
    these = f"with --side {side} rows" if side else "rows of this kind"
    raise ConfigError(f"--to {form}: {these} are written as {', '.join(forms)}")


def _opened(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "wt", encoding="utf-8")
    return path.open("w", encoding="utf-8")


def _convert_rows(path: str, target: Target, kind: RowKind[Any], say: Callable[[str], None]) -> Conversion:
    rows, refused = 0, 0
    first: list[RowError] = []
    for row in located_rows(path):
        try:
            say(json.dumps(convert(row, target, kind), ensure_ascii=False))
            rows += 1
        except ExampleError as error:
            refused += 1
            first += [error.at(path, row.line)] if refused <= ERRORS_SHOWN else []
    if not rows:
        refuse_nothing_left(path, first, refused, kind.shapes)
    return Conversion(rows, tuple(first), refused)


def convert(row: LocatedRow, target: Target, kind: RowKind[Any]) -> NewRow:
    """The same row in another form. Raises ExampleError for one that is unusable, or cannot be said in that form."""
    old = parse_row(row.raw)
    if kind is SFT:
        supervised = read_sft_row(row.raw, row.line)[1]
        return _supervised_row(supervised, target.form, extras_of_supervised(old))
    form, example = read_row(row.raw, row.line)
    extras = extras_of_preference(old, form, target.side)  # first: it refuses a list without one best answer
    if not target.side:
        return _preference_row(old, example, target.form, extras)
    beside = with_extras({} if says_ranks(old) else scores_of_list(old), extras)
    return _supervised_row(side_of(example, target.side), target.form, beside)


def _supervised_row(example: SftExample, form: str, extras: Row) -> NewRow:
    new = with_extras(write_supervised(example, form), extras)
    _refuse_another_meaning(example, form, lambda: read_sft_row(_as_line(new), example.line)[1])
    return new


def _preference_row(old: Row, example: PreferenceExample, form: str, extras: Row) -> NewRow:
    scores = scores_of_list(old)
    if form in LIST_FORMS and not scores:
        scores = scores_beside(old)
        extras = {key: value for key, value in extras.items() if key not in scores}  # the list tells them
    new = with_extras(write_preference(example, form, scores), extras)
    line = example.line
    _refuse_another_meaning(
        _without_ranks(example), form, lambda: _without_ranks(read_row(_as_line(new), line)[1])
    )
    return new


def _as_line(new: NewRow) -> bytes:
    return json.dumps(new).encode()


def _refuse_another_meaning(meant: object, form: str, read: Callable[[], object]) -> None:
    """Read back, the new row must say what the old one does.

    Then it is of that form too: what goes along can make it one of another form only by adding to what it says.
    """
    try:
        said = read()
    except ExampleError as error:
        raise ExampleError(error.field, f"as {form}: {error.reason}") from None
    if said != meant:
        raise ExampleError("row", f"as {form} it would say something else")


def _without_ranks(example: PreferenceExample) -> PreferenceExample:
    """What is the same in all forms: of two answers only which is the better one."""
    if isinstance(example, RankedExample) and len(example.answers) == 2:
        return replace(as_pair(example), weight=example.weight, source=example.source)
    return example
