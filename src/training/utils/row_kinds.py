"""The kinds of rows that there are, by name, and which of them a file looks like."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from firesteel.sdk.errors import DataError
from training.utils.jsonl import located_rows, parse_row
from training.utils.preference_data import OF_SFT
from training.utils.preference_examples import ExampleError
from training.utils.preference_rows import PREFERENCES
from training.utils.row_check import RowKind
from training.utils.sft_data import OF_PREFERENCES
from training.utils.sft_rows import SFT

KINDS: dict[str, RowKind[Any]] = {kind.name: kind for kind in (PREFERENCES, SFT)}
"""A process that checks rows is told which by its name."""
_ROWS_LOOKED_AT = 20


def kind_of(paths: Sequence[str | Path]) -> RowKind[Any]:
    """What the first row that is JSON looks like: supervised, or else a preference."""
    for path in paths:
        for kind in _kinds_of_rows(path):
            return kind or PREFERENCES
    return PREFERENCES


def another_kind(path: str | Path, kind: RowKind[Any]) -> RowKind[Any] | None:
    """Of which kind the first rows of a file are, where all of them are of one that is not this."""
    found = set(islice(_kinds_of_rows(path), _ROWS_LOOKED_AT))
    other = found.pop() if len(found) == 1 else None
    return None if other is kind else other


def refuse_another_kind(path: str, kind: RowKind[Any]) -> None:
    """Raise DataError, once for all its rows, for a file of another kind than this."""
    if (other := another_kind(path, kind)) is not None:
        raise DataError(f"{path}: holds {other.rows}, and {kind.rows} are trained on here; {other.advice}")


def _kinds_of_rows(path: str | Path) -> Iterator[RowKind[Any] | None]:
    """What the rows that are JSON look like, None where that is neither."""
    with suppress(DataError):  # what is wrong with a file is told when it is read
        for row in located_rows(str(path)):
            with suppress(ExampleError):
                keys = parse_row(row.raw).keys()
                supervised = keys & (OF_SFT | {"text", "instruction"})
                yield PREFERENCES if keys & OF_PREFERENCES else SFT if supervised else None
