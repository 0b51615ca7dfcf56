"""The pairs of a file that are trained on or held out: 32 bytes each until they are asked for, then rendered.

A set knows lengths and prompts of its pairs and reads a row's text only when its turn comes, in a thread that runs
ahead of the trainer. `pairs.render_pairs` gives the same pairs all at once, in memory.
"""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from firesteel.sdk.errors import DataError
from firesteel.sdk.types import BoolArray, IntArray
from training.utils.jsonl import RowsFile
from training.utils.pairs import (
    Outcome,
    PreferencePair,
    Rendering,
    RowCounts,
    RowOutcome,
    pair_of,
    refuse_max_pairs,
    render_usable,
    shortened_or_dropped,
)
from training.utils.preference_data import read_row
from training.utils.preference_examples import PreferenceExample
from training.utils.rendering import RenderedPair, Renderer
from training.utils.row_index import RowIndex

BATCHES_AHEAD = 4


class PairSource:
    """The rows of one file, rendered by the place they have in its index."""

    def __init__(self, index: RowIndex, renderer: Renderer, rules: Rendering) -> None:
        self.index = index
        self.rules = rules
        self._renderer = renderer
        self._file = RowsFile(index.path, index.state)

    def pair(self, place: int) -> PreferencePair:
        """Raises DataError if the row is not what it was when the index was made."""
        rendered, example = self._rendered(place)
        if self.rules.too_long(len(rendered.chosen_tokens), len(rendered.rejected_tokens)):
            fitted, _ = shortened_or_dropped(rendered, self.rules, example.line)
            assert fitted is not None, "rows that cannot be shortened are in no set"
            rendered = fitted
        return pair_of(rendered, example)

    def outcome(self, place: int) -> RowOutcome:
        """What becomes of a row over the limit."""
        row = self.index.rows[place]
        if self.rules.truncate == "response_end":
            return shortened_or_dropped(self._rendered(place)[0], self.rules, int(row["line"]))[1]
        too_long = self.rules.too_long(int(row["chosen"]), int(row["rejected"]))
        return RowOutcome(int(row["line"]), "dropped", too_long)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _rendered(self, place: int) -> tuple[RenderedPair, PreferenceExample]:
        row = self.index.rows[place]
        _, example = read_row(self._file.row_at(int(row["offset"])), int(row["line"]))
        rendered = render_usable(self._renderer, example)
        lengths = rendered.prompt_len, len(rendered.chosen_tokens), len(rendered.rejected_tokens)
        if lengths != (row["prompt_len"], row["chosen"], row["rejected"]):
            raise DataError(
                f"{self.index.path}:{row['line']}: the row is another one than when it was checked"
            )
        return rendered, example


@dataclass(frozen=True, eq=False)
class PairSet:
    """Some pairs of a source, in order."""

    source: PairSource
    places: IntArray
    """In the source's index."""

    def __len__(self) -> int:
        return len(self.places)

    @property
    def prompts(self) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
        """For each pair, a hash of its prompt."""
        prompts: np.ndarray[tuple[int], np.dtype[np.uint64]] = self.source.index.rows["prompt"][self.places]
        return prompts

    def where(self, chosen: BoolArray) -> PairSet:
        """Those of the pairs."""
        return replace(self, places=self.places[chosen])

    def take(self, numbers: Iterable[int]) -> list[PreferencePair]:
        """The pairs with these numbers, from 0."""
        return [self.source.pair(int(self.places[number])) for number in numbers]

    def blocks(self, size: int) -> Iterator[list[PreferencePair]]:
        """All pairs in order, so many at a time, rendered ahead."""
        starts = range(0, len(self), size)
        numbers = (range(start, min(start + size, len(self))) for start in starts)
        return (taken.pairs for taken in self.taken_ahead(numbers))

    def taken_ahead(self, batches: Iterable[Sequence[int]]) -> Generator[TakenBatch]:
        """The pairs of each batch, rendered by a thread while the batches before it are worked on."""
        pending: deque[Future[list[PreferencePair]]] = deque()
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
class TakenBatch:
    """The pairs of a batch, and the seconds that were spent waiting for them."""

    pairs: list[PreferencePair]
    waited: float


@dataclass(frozen=True, eq=False)
class SelectedPairs:
    """The usable pairs of a file, and what became of all its other rows."""

    pairs: PairSet
    counts: RowCounts
    _over_limit: IntArray
    """Places of the rows over the limit; what became of each is found again when it is asked for."""

    @property
    def path(self) -> str:
        """Of the data file."""
        return self.pairs.source.index.path

    @property
    def summary(self) -> str:
        """See `RowCounts.summary`."""
        return self.counts.summary(self.path, self.pairs.source.index.format, len(self.pairs))

    @property
    def lost(self) -> int:
        """Rows that were refused, dropped or shortened."""
        return sum(self.counts.lost.values())

    def outcomes(self) -> Iterator[RowOutcome]:
        """Every row that was refused, dropped or shortened, by line; made one at a time."""
        source = self.pairs.source
        refused = (
            RowOutcome(row.line, "refused", f"{row.field}: {row.reason}") for row in source.index.refused()
        )
        over_limit = (source.outcome(int(place)) for place in self._over_limit)
        return heapq.merge(refused, over_limit, key=lambda outcome: outcome.line)

    def close(self) -> None:
        """Close the file; its pairs can no longer be taken."""
        self.pairs.source.close()


def select_pairs(
    index: RowIndex, renderer: Renderer, rules: Rendering, max_pairs: int | None = None
) -> SelectedPairs:
    """The first `max_pairs` pairs that the rules allow. Raises DataError if there is none."""
    refuse_max_pairs(max_pairs)
    source = PairSource(index, renderer, rules)
    try:
        return _selected(source, max_pairs)
    except BaseException:
        source.close()
        raise


def _selected(source: PairSource, max_pairs: int | None) -> SelectedPairs:
    index, rules = source.index, source.rules
    limit = rules.max_seq_len or np.iinfo(np.int64).max
    over = np.maximum(index.rows["chosen"], index.rows["rejected"]) > limit
    usable = ~over
    if rules.truncate == "response_end":
        _try_to_shorten(source, over, usable, max_pairs)
    places = np.flatnonzero(usable)[:max_pairs]
    # What lies behind the last pair that is used is not used, whatever it is.
    end = int(places[-1]) + 1 if len(places) == max_pairs else len(index.rows)
    over_limit = np.flatnonzero(over[:end])
    shortened = int(usable[over_limit].sum())
    lost: dict[Outcome, int] = {
        "shortened": shortened,
        "dropped": len(over_limit) - shortened,
        "refused": index.refused_count,
    }
    counts = RowCounts(index.total, lost, len(index.rows) - end)
    selected = SelectedPairs(PairSet(source, places), counts, over_limit)
    if not len(places):
        raise counts.nothing_left(index.path, selected.outcomes())
    return selected


def _try_to_shorten(source: PairSource, over: BoolArray, usable: BoolArray, max_pairs: int | None) -> None:
    """Mark the rows over the limit of which a pair is left, up to the last that is needed; each is rendered."""
    found = 0
    for place in range(len(over)) if max_pairs else np.flatnonzero(over):
        if over[place]:
            usable[place] = source.outcome(int(place)).outcome == "shortened"
        found += bool(usable[place])
        if found == max_pairs:
            return


def _waited_for(batch: Future[list[PreferencePair]]) -> TakenBatch:
    started = time.monotonic()
    return TakenBatch(batch.result(), time.monotonic() - started)
