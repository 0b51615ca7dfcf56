"""Rules for rows, and what became of those that are not used as they stand."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from numbers import Integral
from pathlib import Path
from typing import Literal

from firesteel.sdk.errors import ConfigError, DataError
from firesteel.sealed import storage_errors
from training.utils.words import counted

OnBadRow = Literal["fail", "skip"]
Truncate = Literal["drop", "response_end"]
Outcome = Literal["refused", "dropped", "shortened"]

REASONS_SHOWN = 5


@dataclass(frozen=True)
class RowOutcome:
    """What became of a row that is not used as it stands.

    It was `refused` (something is wrong with it), `dropped` (it is too long) or `shortened` (and is used).
    """

    line: int
    outcome: Outcome
    reason: str


@dataclass(frozen=True)
class Rendering:
    """How rows become data: the longest sequence in tokens, and what is done with longer and with bad rows.

    Raises ConfigError for anything else.
    """

    max_seq_len: int | None = None
    truncate: Truncate = "drop"
    on_bad_row: OnBadRow = "fail"

    def __post_init__(self) -> None:
        if self.truncate not in ("drop", "response_end"):
            raise ConfigError(f"truncate: {self.truncate!r} is neither 'drop' nor 'response_end'")
        refuse_limit(self.max_seq_len)

    def too_long(self, lengths: Mapping[str, int]) -> str:
        """Which sequences, by name, have more tokens than allowed, or nothing."""
        over = [
            f"{name} has {tokens:,} tokens"
            for name, tokens in lengths.items()
            if tokens > (self.max_seq_len or tokens)
        ]
        return f"{' and '.join(over)}, more than max_seq_len {self.max_seq_len:,}" if over else ""


@dataclass(frozen=True)
class RowCounts:
    """How many rows a file has, and what became of those that are not used as they stand."""

    rows: int
    lost: Mapping[Outcome, int]
    not_used: int
    """Left over once as many were found as are wanted."""
    item: str = "pair"
    """What a row makes."""

    def summary(self, path: str, form: str, made: str) -> str:
        """`pairs.jsonl: 592 rows of the form messages: 551 pairs; 3 dropped, 38 refused`."""
        lost = [f"{count:,} {outcome}" for outcome, count in sorted(self.lost.items()) if count]
        lost += [f"{self.not_used:,} not used (max_{self.item}s)"] if self.not_used else []
        read = f"{path}: {counted(self.rows, 'row')} of the form {form}"
        return f"{read}: {made}" + (f"; {', '.join(lost)}" if lost else "")

    def nothing_left(self, path: str, outcomes: Iterable[RowOutcome]) -> DataError:
        """The error of a file of which nothing is left, with the first reasons."""
        lost_as = ", ".join(
            f"{self.lost[kind]} {kind}" for kind in ("refused", "dropped") if self.lost.get(kind)
        )
        lost = sum(self.lost.values())
        reasons = "".join(f"\n  line {row.line}: {row.reason}" for row in islice(outcomes, REASONS_SHOWN))
        more = f"\n  and {lost - REASONS_SHOWN} more" if lost > REASONS_SHOWN else ""
        return DataError(
            f"{path}: no {self.item} is left of {counted(self.rows, 'row')}: {lost_as}{reasons}{more}"
        )


def write_row_outcomes(path: str | Path, source: str, outcomes: Iterable[RowOutcome]) -> None:
    """Append one JSON object per row that was refused, dropped or shortened: file, line, outcome, reason.

    `source` is the data file they are from. A file that stays empty says that nothing was lost.
    """
    rows = (
        {"file": source, "line": row.line, "outcome": row.outcome, "reason": row.reason} for row in outcomes
    )
    with storage_errors(Path(path), 0), Path(path).open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def refuse_limit(max_seq_len: int | None) -> None:
    """Raise ConfigError for what is no limit that leaves room for a prompt and a response."""
    if max_seq_len is not None and not (isinstance(max_seq_len, Integral) and max_seq_len >= 2):
        raise ConfigError(
            f"max_seq_len: {max_seq_len!r}; expected a whole number of tokens, at least 2 (prompt and response)"
        )


def refuse_most(most: int | None, item: str) -> None:
    """Raise ConfigError for what is no number of items."""
    if most is not None and not (isinstance(most, Integral) and most >= 1):
        raise ConfigError(f"max_{item}s: {most!r} is not a number of {item}s above 0")
