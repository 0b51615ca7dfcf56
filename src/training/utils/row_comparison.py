"""Which rows say the same, and which the opposite: by the hashes that are kept of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from firesteel.sdk.types import BoolArray, IntArray
from training.utils.row_records import KeptRows, KeyArray, RowArray, ordered_keys

# One answer preferred to another, under a prompt.
PREFERENCE = np.dtype(
    [
        ("line", "<u4"),  # of the row that says so
        ("key", "<u8"),  # of prompt, better answer, worse answer
        ("turned", "<u8"),  # the key of the opposite
    ]
)
_PREFERENCES_AT_ONCE = 2**20
# Another one than `ordered_key` has: a prompt and an answer that change places are no row that was there before.
_FACTOR = np.uint64(0xD6E8FEB86659FD93)


def row_keys(rows: RowArray, order: Literal["content", "turned"]) -> KeyArray:
    """64 bits that stand for a row's prompt and answers, in their order or the opposite one."""
    keys: KeyArray = rows["prompt"] * _FACTOR + rows[order]
    return keys


def first_places(wanted: KeyArray, among: KeyArray) -> IntArray:
    """Where each key stands first among the others, -1 where it does not."""
    known, first = np.unique(among, return_index=True)
    if not len(known):
        return np.full(len(wanted), -1, np.int64)
    place = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    return np.where(known[place] == wanted, first[place], -1)


def repeated(keys: KeyArray) -> BoolArray:
    """Which of them have been there before."""
    again = np.ones(len(keys), dtype=np.bool_)
    again[np.unique(keys, return_index=True)[1]] = False
    return again


def preferences_of(rows: KeptRows) -> RowArray:
    """All that some rows of preferences say, as `PREFERENCE`; a ranked list says something of every two answers."""
    records = rows.records
    of_two = records[records["pairs"] + records["ties"] == 1]
    from_pairs = _preferences(of_two["line"], row_keys(of_two, "content"), row_keys(of_two, "turned"))
    better, worse = ranked_twos(rows.ranked)
    prompts = records["prompt"][np.searchsorted(records["line"], better["line"])] * _FACTOR
    keys = [
        prompts + ordered_keys(one["answer"], other["answer"])
        for one, other in ((better, worse), (worse, better))
    ]
    return np.concatenate([from_pairs, _preferences(better["line"], *keys)])


def asked_again(files: Sequence[KeptRows]) -> Iterator[list[KeptRows]]:
    """Of each file the rows whose prompt is there more than once: nothing can contradict others.

    In parts, so that not all that they say is in memory at once; the rows of a prompt are in one.
    """
    prompts = np.concatenate([rows.records["prompt"] for rows in files])
    _, inverse, counts = np.unique(prompts, return_inverse=True, return_counts=True)
    ends = np.cumsum([len(rows.records) for rows in files])
    several = np.split(counts[inverse] > 1, ends[:-1])
    again = [rows.at(which) for rows, which in zip(files, several, strict=True)]
    parts = 1 + sum(int(rows.records["pairs"].sum()) for rows in again) // _PREFERENCES_AT_ONCE
    for part in range(parts):
        yield [rows.at(rows.records["prompt"] % np.uint64(parts) == part) for rows in again]


def contradicting(rows: KeptRows) -> BoolArray:
    """Which rows prefer an answer to another that a row with the same prompt prefers to it."""
    against = []
    for (some,) in asked_again([rows]):
        told = preferences_of(some)
        against.append(told["line"][first_places(told["turned"], told["key"]) >= 0])
    return np.isin(rows.records["line"], np.concatenate(against))


def lists_in_parts(ranked: RowArray) -> Iterator[RowArray]:
    """Ranked lists, whole ones, so many at once that not every two answers of all of them are in memory."""
    _, starts, sizes = np.unique(ranked["line"], return_index=True, return_counts=True)
    part = np.cumsum(sizes * (sizes - 1) // 2) // _PREFERENCES_AT_ONCE
    yield from np.split(ranked, starts[1:][np.diff(part) > 0])


def ranked_twos(ranked: RowArray) -> tuple[RowArray, RowArray]:
    """Of ranked lists, every two answers of which the first is better: the better ones, and the worse ones."""
    place = np.arange(len(ranked))
    last = np.searchsorted(ranked["line"], ranked["line"], side="right")
    behind = last - place - 1
    better = np.repeat(place, behind)
    worse = np.arange(len(better)) - np.repeat(np.cumsum(behind) - behind, behind) + better + 1
    unlike = ranked["rank"][better] < ranked["rank"][worse]
    return ranked[better[unlike]], ranked[worse[unlike]]


def _preferences(lines: IntArray, keys: KeyArray, turned: KeyArray) -> RowArray:
    made = np.empty(len(lines), PREFERENCE)
    made["line"], made["key"], made["turned"] = lines, keys, turned
    return made
