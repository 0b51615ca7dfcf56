"""The data check: what a run on these files would refuse, drop, cut or stumble over, before any model is loaded.

Rows are read and rendered by what runs use (`row_index`, `row_sets`), and findings are those that a run says
(`data_findings`), so that the two cannot disagree. Without a tokenizer rows are read only, and counted in characters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from firesteel.sdk.errors import DataError
from training.utils.data_comparison import across_files, leakage
from training.utils.data_figures import Lengths, Share
from training.utils.data_findings import LINES_SHOWN, DataFinding, Level, length_preference, lines_told
from training.utils.preference_examples import ExampleError
from training.utils.preference_rows import PREFERENCES
from training.utils.rendering import Renderer
from training.utils.row_check import RowKind, read_in_characters
from training.utils.row_forms import FormatTally, refuse_nothing_left
from training.utils.row_index import Progress, index_rows, row_chunks
from training.utils.row_kinds import another_kind
from training.utils.row_outcomes import Outcome, Rendering, RowCounts, RowOutcome
from training.utils.row_records import RANKED, KeptRows
from training.utils.row_sets import select_rows

Unit = Literal["tokens", "characters"]
LISTED = 10
REASONS_TOLD = 50


@dataclass(frozen=True)
class Loss:
    """Rows that are lost, or shortened, for one reason: the numbers and quotations in which they differ left out."""

    outcome: Outcome
    reason: str
    rows: int
    lines: tuple[int, ...]
    """Of the first few."""

    def __str__(self) -> str:
        return f"{self.rows:,} {self.outcome}: {self.reason}{lines_told(self.lines, self.rows)}"


@dataclass(frozen=True)
class Figures:
    """What the usable rows of a file look like."""

    unit: Unit
    lengths: dict[str, Lengths]
    """See `RowKind.parts`."""
    prompts: int
    """Different ones."""
    saved_by_sharing: float
    """Share of the tokens that need not be computed, since several answers of a row begin with them."""
    longer_is_chosen: Share | None
    """None where nothing is chosen."""


@dataclass(frozen=True)
class FileReport:
    """What the check says of one file."""

    path: str
    summary: str
    form: str = ""
    rows: int = 0
    usable: int = 0
    figures: Figures | None = None
    """None where no pair is left."""
    findings: tuple[DataFinding, ...] = ()
    losses: tuple[Loss, ...] = ()
    listed: tuple[RowOutcome, ...] = ()
    """Rows that are refused, dropped or shortened: the first few, or all if that was asked for."""
    lost: int = 0
    """How many there are in all."""

    def of_level(self, level: Level) -> list[DataFinding]:
        """Its findings of one level."""
        return [finding for finding in self.findings if finding.level == level]


@dataclass(frozen=True)
class Check:
    """How files are checked: as a run with these rules would read them."""

    renderer: Renderer | None
    """None: rows are read, and not rendered."""
    kind: RowKind[Any] = PREFERENCES
    rules: Rendering = field(default_factory=Rendering)
    list_all: bool = False
    reading: Callable[[str], Progress] = lambda path: lambda rows, offset: None

    def files(self, paths: Sequence[str], heldout: str | None = None) -> list[FileReport]:
        """A report for each file, that of the held-out one last; files are compared with those before them."""
        checked = [self._file(path) for path in paths]
        compared = across_files([rows for _, rows in checked])
        reports = [_with_findings(report, more) for (report, _), more in zip(checked, compared, strict=True)]
        if heldout is None:
            return reports
        report, rows = self._file(heldout)
        leaked = [finding for _, trained in checked for finding in leakage(rows, trained)]
        return [*reports, _with_findings(report, leaked)]

    def _file(self, path: str) -> tuple[FileReport, KeptRows]:
        try:
            return self._in_characters(path) if self.renderer is None else self._in_tokens(path)
        except DataError as error:
            unusable = self._of_another_kind(path) or DataFinding("error", error.code, str(error))
            nothing = KeptRows(path, np.empty(0, self.kind.record_type), np.empty(0, RANKED))
            return FileReport(path, f"{path}: cannot be used", findings=(unusable,)), nothing

    def _of_another_kind(self, path: str) -> DataFinding | None:
        """Why no row of a file can be used, said once, where its first rows tell."""
        if (kind := another_kind(path, self.kind)) is None:
            return None
        text = (
            f"{path}: holds {kind.rows}, but is checked as {self.kind.rows}, as the first file is, or as the run "
            "to estimate takes them; check it by itself"
        )
        return DataFinding("error", "another-kind", text)

    def _in_tokens(self, path: str) -> tuple[FileReport, KeptRows]:
        assert self.renderer is not None
        index = index_rows(path, self.renderer, self.kind, "skip", self.reading(path))
        with closing(select_rows(index, self.renderer, self.rules)) as selected:
            rows = selected.rows.kept
            listing = _Listing(None if self.list_all else LISTED)
            listing.add(selected.outcomes())
            report = self._report(index.format, rows, listing, selected.summary)
        return report, rows

    def _in_characters(self, path: str) -> tuple[FileReport, KeptRows]:
        formats, listing = FormatTally(), _Listing(None if self.list_all else LISTED)
        parts = [read_in_characters([], self.kind)]
        for chunk in row_chunks(path, self.reading(path)):
            parts.append(read_in_characters(chunk, self.kind))
            formats.merge(parts[-1].formats)
            listing.add(
                RowOutcome(row.line, "refused", f"{row.field}: {row.reason}") for row in parts[-1].refused
            )
        rows = KeptRows(
            path,
            np.concatenate([part.usable for part in parts]),
            np.concatenate([part.ranked for part in parts]),
        )
        if not len(rows.records):
            first = [ExampleError(*row.reason.split(": ", 1)).at(path, row.line) for row in listing.listed]
            refuse_nothing_left(path, first, listing.rows, self.kind.shapes)
        form = formats.only(path)
        counts = RowCounts(len(rows.records) + listing.rows, {"refused": listing.rows}, 0)
        made = self.kind.made(rows.records, Rendering()).replace("tokens", "characters")
        return self._report(form, rows, listing, counts.summary(path, form, made)), rows

    def _report(self, form: str, kept: KeptRows, listing: _Listing, summary: str) -> FileReport:
        rows = kept.records
        lost = listing.findings("error" if self.rules.on_bad_row == "fail" else "warning")
        return FileReport(
            path=kept.path,
            summary=summary,
            form=form,
            rows=len(rows) + listing.rows - listing.count("shortened"),
            usable=len(rows),
            figures=self._figures(kept),
            findings=(*lost, *self.kind.findings(kept)),
            losses=tuple(listing.losses),
            listed=tuple(listing.listed),
            lost=listing.rows,
        )

    def _figures(self, kept: KeptRows) -> Figures:
        rows = kept.records
        longest = self.rules.max_seq_len
        parts = self.kind.parts(rows, longest)
        computed = self.kind.computed(rows, longest).sum()
        tokens = computed + rows["saved"].sum()
        return Figures(
            unit="tokens" if self.renderer else "characters",
            lengths={name: Lengths.of(lengths) for name, lengths in parts.items()},
            prompts=len(np.unique(rows["prompt"])),
            saved_by_sharing=float(1 - computed / tokens),
            longer_is_chosen=length_preference(kept).share if self.kind is PREFERENCES else None,
        )


class _Listing:
    """Rows that are refused, dropped or shortened: some of them, and all of them counted by reason."""

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._lines: dict[tuple[Outcome, str], list[int]] = {}
        self._counts: dict[tuple[Outcome, str], int] = {}
        self._reasons: dict[tuple[Outcome, str], _Reason] = {}
        self.listed: list[RowOutcome] = []

    def add(self, outcomes: Iterable[RowOutcome]) -> None:
        for row in outcomes:
            if self._limit is None or len(self.listed) < self._limit:
                self.listed.append(row)
            reason = _Reason.of(row.reason)
            key = row.outcome, reason.kind
            if key not in self._counts and len(self._counts) >= REASONS_TOLD:
                reason = _Reason("other reasons", ("other reasons",))
                key = row.outcome, reason.kind
            self._counts[key] = self._counts.get(key, 0) + 1
            self._reasons[key] = self._reasons.get(key, reason).shared(reason)
            lines = self._lines.setdefault(key, [])
            if len(lines) < LINES_SHOWN:
                lines.append(row.line)

    @property
    def rows(self) -> int:
        return sum(self._counts.values())

    def count(self, outcome: Outcome) -> int:
        return sum(count for (kind, _), count in self._counts.items() if kind == outcome)

    @property
    def losses(self) -> list[Loss]:
        found = [
            Loss(key[0], str(self._reasons[key]), count, tuple(self._lines[key]))
            for key, count in self._counts.items()
        ]
        return sorted(found, key=lambda loss: -loss.rows)

    def findings(self, refused: Level) -> list[DataFinding]:
        told: list[tuple[Outcome, Level, str]] = [
            ("refused", refused, "cannot be used"),
            ("dropped", "warning", "too long, and dropped"),
            ("shortened", "warning", "too long, and lose the end of their responses"),
        ]
        found = []
        for outcome, level, what in told:
            if count := self.count(outcome):
                verb = "" if outcome == "refused" else "is " if count == 1 else "are "
                rows = "row" if count == 1 else "rows"
                lines = sorted(
                    line for (kind, _), some in self._lines.items() if kind == outcome for line in some
                )
                found.append(
                    DataFinding(
                        level, outcome, f"{count:,} {rows} {verb}{what}", count, tuple(lines[:LINES_SHOWN])
                    )
                )
        return found


_LEFT_OUT = "…"
# A quotation, or a number; what is said between them is the same for all rows that are lost for one reason.
_VARYING = re.compile(r'("(?:[^"\\]|\\.)*"|-?\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?)')


@dataclass(frozen=True)
class _Reason:
    """Why rows are lost: what is said of all of them."""

    kind: str
    """Without any number or quotation."""
    parts: tuple[str, ...]
    """Every second one is a number or a quotation, or left out where the rows differ in it."""

    @classmethod
    def of(cls, reason: str) -> _Reason:
        """Of one row."""
        parts = tuple(_VARYING.split(reason))
        return cls("".join(_left_out(part) if place % 2 else part for place, part in enumerate(parts)), parts)

    def shared(self, other: _Reason) -> _Reason:
        """What is the same in another one of this kind."""
        both = zip(self.parts, other.parts, strict=True)
        return replace(self, parts=tuple(one if one == two else _left_out(one) for one, two in both))

    def __str__(self) -> str:
        return "".join(self.parts)


def _left_out(part: str) -> str:
    return f'"{_LEFT_OUT}"' if part.startswith('"') else _LEFT_OUT


def _with_findings(report: FileReport, more: Iterable[DataFinding]) -> FileReport:
    return replace(report, findings=(*report.findings, *more))
