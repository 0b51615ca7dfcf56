"""What rows of one file have to do with those of another: the same row, or one that says the opposite."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from firesteel.sdk.types import IntArray
from training.utils.data_findings import LINES_SHOWN, Counterpart, DataFinding, counted
from training.utils.doubts import LEAKED_ROWS
from training.utils.row_comparison import (
    asked_again,
    first_places,
    preferences_of,
    repeated,
    row_keys,
)
from training.utils.row_records import KeptRows, RowArray

# A row of one of several files; and another such row that it has to do with.
_ROW = np.dtype([("file", "<u4"), ("line", "<u4")])
_MATCH = np.dtype([*_ROW.descr, ("other", "<u4"), ("other_line", "<u4")])


def across_files(files: Sequence[KeptRows]) -> list[list[DataFinding]]:
    """Findings for each of several files of one kind: what its rows have to do with those of the files before it.

    What is found inside one file is not told again: a row that is there twice in a file counts once here.
    """
    same = _Told("duplicates-across-files", "rows stand in {} too, token for token")
    matches = [(same, _same_rows(files))]
    if _are_preferences(files[0]):
        opposite = "rows contradict {}: the same prompt and answers, preferred the other way round"
        matches.append((_Told("contradictions-across-files", opposite), _opposite_rows(files)))
    paths = [rows.path for rows in files]
    return [
        [finding for told, found in matches for finding in told.findings(found[found["file"] == file], paths)]
        for file in range(len(files))
    ]


def leakage(heldout: KeptRows, train: KeptRows) -> Iterator[DataFinding]:
    """Held-out rows whose prompt is trained on, or that are trained on themselves; lines are those held out."""
    here, there, paths = _rows([heldout]), _rows([train]), [train.path]
    prompts = first_places(heldout.records["prompt"], train.records["prompt"])
    same_prompt = _Told("held-out-prompts", "held-out rows have a prompt that is trained on, in {}")
    yield from same_prompt.findings(_matches(here, prompts, there), paths)
    trained = row_keys(train.records, "content")
    places = first_places(row_keys(heldout.records, "content"), trained)
    if _are_preferences(heldout):
        turned = first_places(row_keys(heldout.records, "turned"), trained)
        places = np.where(places < 0, turned, places)
    text = "held-out rows are among the training rows of {} too"
    if _are_preferences(heldout):
        text += ", or there the other way round"
    yield from _Told(LEAKED_ROWS, text).findings(_matches(here, places, there), paths)


@dataclass(frozen=True)
class _Told:
    """How a warning about rows of two files is told; the text has a place for the other file."""

    name: str
    text: str

    def findings(self, matches: RowArray, paths: Sequence[str]) -> Iterator[DataFinding]:
        """Of matches of one file, by line: one for each other file."""
        for other in np.unique(matches["other"]):
            found = matches[matches["other"] == other]
            path = paths[int(other)]
            first = tuple(
                Counterpart(int(match["line"]), path, int(match["other_line"]))
                for match in found[:LINES_SHOWN]
            )
            yield DataFinding(
                "warning",
                self.name,
                counted(len(found), self.text.format(path)),
                len(found),
                tuple(row.line for row in first),
                first,
            )


def _same_rows(files: Sequence[KeptRows]) -> RowArray:
    keys = [row_keys(rows.records, "content") for rows in files]
    again = np.concatenate([repeated(of_file) for of_file in keys])
    joined = np.concatenate(keys)
    return _with_earlier(_rows(files), np.where(again, -1, first_places(joined, joined)))


def _opposite_rows(files: Sequence[KeptRows]) -> RowArray:
    found = []
    for parts in asked_again(files):
        told = [preferences_of(rows) for rows in parts]
        joined = np.concatenate(told)
        places = first_places(joined["turned"], joined["key"])
        found.append(_with_earlier(_numbered([some["line"] for some in told]), places))
    matches = np.sort(np.concatenate(found), order=["file", "line", "other", "other_line"])
    return matches[np.unique(matches[["file", "line"]], return_index=True)[1]]  # of what a list says, one


def _with_earlier(rows: RowArray, places: IntArray) -> RowArray:
    found = _matches(rows, places, rows)
    return found[found["other"] < found["file"]]


def _matches(rows: RowArray, places: IntArray, others: RowArray) -> RowArray:
    """The rows that have a place among the others, -1 is none."""
    matched = np.flatnonzero(places >= 0)
    here, there = rows[matched], others[places[matched]]
    made = np.empty(len(matched), _MATCH)
    made["file"], made["line"], made["other"] = here["file"], here["line"], there["file"]
    made["other_line"] = there["line"]
    return made


def _rows(files: Sequence[KeptRows]) -> RowArray:
    return _numbered([rows.records["line"] for rows in files])


def _numbered(lines: Sequence[IntArray]) -> RowArray:
    """Lines of several files, one file after the other."""
    made = np.empty(sum(map(len, lines)), _ROW)
    made["file"] = np.repeat(np.arange(len(lines)), [len(some) for some in lines])
    made["line"] = np.concatenate(lines)
    return made


def _are_preferences(rows: KeptRows) -> bool:
    return "turned" in (rows.records.dtype.names or ())
