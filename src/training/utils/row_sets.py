"""The rows of a file that are trained on or held out: some bytes each until they are asked for, then rendered.

A set knows lengths and prompts of its rows and reads a row's text only when its turn comes, in a thread that runs
ahead of the trainer. `pairs.render_pairs` gives the same pairs all at once, in memory.
"""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np

from firesteel.sdk.errors import DataError
from firesteel.sdk.types import BoolArray, IntArray
from training.utils.jsonl import LocatedRow, RowsFile
from training.utils.rendering import Renderer
from training.utils.row_check import RenderedRow
from training.utils.row_index import RowIndex
from training.utils.row_outcomes import Outcome, Rendering, RowCounts, RowOutcome, refuse_most
from training.utils.row_records import KeptRows, KeyArray, RowArray

T = TypeVar("T")

BATCHES_AHEAD = 4


class RowSource(Generic[T]):
    """The rows of one file, rendered by the place they have in its index."""

    def __init__(self, index: RowIndex[T], renderer: Renderer, rules: Rendering) -> None:
        self.index = index
        self.rules = rules
        self._renderer = renderer
        self._file = RowsFile(index.path, index.state)

    def items(self, place: int) -> Sequence[T]:
        """What a row makes. Raises DataError if the row is not what it was when the index was made."""
        return self._rendered(place).items(self.rules)

    def outcome(self, place: int) -> RowOutcome:
        """What becomes of a row over the limit."""
        if self.rules.truncate == "response_end":
            return self._rendered(place).outcome(self.rules)
        record = self.index.rows[place]
        return RowOutcome(
            int(record["line"]), "dropped", self.rules.too_long(self.index.kind.lengths(record))
        )

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _rendered(self, place: int) -> RenderedRow[T]:
        record = self.index.rows[place]
        offset, line = int(record["offset"]), int(record["line"])
        row = LocatedRow(line, offset, self._file.row_at(offset))
        rendered = self.index.kind.render(row, self._renderer)
        if rendered.record != record.item():
            raise DataError(f"{self.index.path}:{line}: the row is another one than when it was checked")
        return rendered


@dataclass(frozen=True, eq=False)
class RowSet(Generic[T]):
    """Some rows of a source, in order."""

    source: RowSource[T]
    places: IntArray
    """In the source's index."""

    def __len__(self) -> int:
        return len(self.places)

    @property
    def records(self) -> RowArray:
        """What is kept of each row."""
        return self.source.index.rows[self.places]

    @property
    def kept(self) -> KeptRows:
        """The same, and what is kept of their answers where they are ranked lists."""
        return self.source.index.kept.at(self.places)

    @property
    def prompts(self) -> KeyArray:
        """For each row, a hash of its prompt."""
        prompts: KeyArray = self.records["prompt"]
        return prompts

    def where(self, chosen: BoolArray) -> RowSet[T]:
        """Those of the rows."""
        return replace(self, places=self.places[chosen])

    def take(self, numbers: Iterable[int]) -> list[T]:
        """What the rows with these numbers, from 0, make."""
        return [item for number in numbers for item in self.source.items(int(self.places[number]))]

    def blocks(self, size: int) -> Iterator[list[T]]:
        """What all rows make, in order, so many rows at a time, rendered ahead."""
        starts = range(0, len(self), size)
        numbers = (range(start, min(start + size, len(self))) for start in starts)
        return (taken.items for taken in self.taken_ahead(numbers))

    def taken_ahead(self, batches: Iterable[Sequence[int]]) -> Generator[TakenBatch[T]]:
        """What the rows of each batch make, rendered by a thread while the batches before it are worked on."""
        pending: deque[Future[list[T]]] = deque()
        numbers = iter(batches)
        with ThreadPoolExecutor(1, "rows") as thread:
            try:
                for batch in numbers:
                    pending.append(thread.submit(self.take, batch))
                    if len(pending) > BATCHES_AHEAD:
                        yield _waited_for(pending.popleft())
                while pending:
                    yield _waited_for(pending.popleft())
            finally:
                thread.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class TakenBatch(Generic[T]):
    """What the rows of a batch make, and the seconds that were spent waiting for it."""

    items: list[T]
    waited: float


@dataclass(frozen=True, eq=False)
class SelectedRows(Generic[T]):
    """The rows of a file that are used, and what became of all its others."""

    rows: RowSet[T]
    counts: RowCounts
    _over_limit: IntArray
    """Places of the rows over the limit; what became of each is found again when it is asked for."""

    @property
    def path(self) -> str:
        """Of the data file."""
        return self.rows.source.index.path

    @property
    def summary(self) -> str:
        """See `RowCounts.summary`."""
        index = self.rows.source.index
        return self.counts.summary(
            self.path, index.format, index.kind.made(self.rows.records, self.rows.source.rules)
        )

    @property
    def lost(self) -> int:
        """Rows that were refused, dropped or shortened."""
        return sum(self.counts.lost.values())

    def outcomes(self) -> Iterator[RowOutcome]:
        """Every row that was refused, dropped or shortened, by line; made one at a time."""
        source = self.rows.source
        refused = (
            RowOutcome(row.line, "refused", f"{row.field}: {row.reason}") for row in source.index.refused()
        )
        over_limit = (source.outcome(int(place)) for place in self._over_limit)
        return heapq.merge(refused, over_limit, key=lambda outcome: outcome.line)

    def close(self) -> None:
        """Close the file; its rows can no longer be taken."""
        self.rows.source.close()


def select_rows(
    index: RowIndex[T], renderer: Renderer, rules: Rendering, most: int | None = None
) -> SelectedRows[T]:
    """The first `most` rows that the rules allow. Raises DataError if there is none."""
    refuse_most(most, index.kind.item)
    source = RowSource(index, renderer, rules)
    try:
        return _selected(source, most)
    except BaseException:
        source.close()
        raise


def _selected(source: RowSource[T], most: int | None) -> SelectedRows[T]:
    index, rules = source.index, source.rules
    limit = rules.max_seq_len or np.iinfo(np.int64).max
    over = index.kind.longest(index.rows) > limit
    usable = ~over
    if rules.truncate == "response_end":
        _try_to_shorten(source, over, usable, most)
    places = np.flatnonzero(usable)[:most]
    # What lies behind the last row that is used is not used, whatever it is.
    end = int(places[-1]) + 1 if len(places) == most else len(index.rows)
    over_limit = np.flatnonzero(over[:end])
    shortened = int(usable[over_limit].sum())
    lost: dict[Outcome, int] = {
        "shortened": shortened,
        "dropped": len(over_limit) - shortened,
        "refused": index.refused_count,
    }
    counts = RowCounts(index.total, lost, len(index.rows) - end, index.kind.item)
    selected = SelectedRows(RowSet(source, places), counts, over_limit)
    if not len(places):
        raise counts.nothing_left(index.path, selected.outcomes())
    return selected


def _try_to_shorten(source: RowSource[T], over: BoolArray, usable: BoolArray, most: int | None) -> None:
    """Mark the rows over the limit of which something is left, up to the last that is needed; each is rendered."""
    found = 0
    for place in range(len(over)) if most else np.flatnonzero(over):
        if over[place]:
            usable[place] = source.outcome(int(place)).outcome == "shortened"
        found += bool(usable[place])
        if found == most:
            return


def _waited_for(batch: Future[list[T]]) -> TakenBatch[T]:
    started = time.monotonic()
    return TakenBatch(batch.result(), time.monotonic() - started)
