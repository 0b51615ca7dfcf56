"""What is kept of the rows of a file: some bytes each, and hashes by which what they say is compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from firesteel.sdk.types import BoolArray, IntArray

RowArray = np.ndarray[tuple[int], np.dtype[np.void]]
KeyArray = np.ndarray[tuple[int], np.dtype[np.uint64]]

# What is kept of every usable row; a kind of row adds lengths of its own.
PLACE = [
    ("offset", "<u8"),  # where it starts in the file
    ("prompt", "<u8"),  # hash of the prompt's tokens: equal prompts are held out together
    ("line", "<u4"),
    ("prompt_len", "<u4"),  # tokens
]
# What the data check knows rows by (`data_findings`), for kinds that it looks at.
CHECKED = [
    ("content", "<u8"),  # of the tokens behind the prompt, of all answers in their order: their `ordered_key`
    ("tokens", "<u4"),  # of all whole sequences
    ("saved", "<u4"),  # of these, how many others begin with too: they need not be computed
    ("signs", "<u4"),  # `row_signs.Sign`
]
# Kept beside the rows, of each answer of a list of more than two: a row's own bytes have no room for them.
RANKED = np.dtype(
    [
        ("line", "<u4"),  # of the row
        ("rank", "<u2"),  # 0 is the best; tied answers have one
        ("answer", "<u8"),  # hash of its tokens behind the prompt
        ("length", "<u4"),  # tokens of the whole sequence
    ]
)


@dataclass(frozen=True)
class RankedAnswer:
    """What is kept of one answer of a ranked list, see `RANKED`."""

    rank: int
    key: int
    length: int


@dataclass(frozen=True, eq=False)
class KeptRows:
    """What is kept of some rows of a file, by line."""

    path: str
    records: RowArray
    """See `RowKind.record_type`."""
    ranked: RowArray
    """See `RANKED`: of the ranked lists among the rows, by line."""

    def at(self, places: BoolArray | IntArray) -> KeptRows:
        """Those of the rows."""
        records = self.records[places]
        return KeptRows(self.path, records, self.ranked[np.isin(self.ranked["line"], records["line"])])


def tokens_key(tokens: Sequence[int]) -> int:
    """64 bits that stand for what a sequence says."""
    return _key_of(np.asarray(tokens, dtype="<i8").tobytes())


def json_key(content: object) -> int:
    """The same for a text, messages, or whatever else is JSON."""
    return _key_of(json.dumps(content, sort_keys=True).encode())


def ordered_key(keys: Sequence[int]) -> int:
    """64 bits that stand for some keys and their order."""
    # An odd factor: the sum modulo 2^64 differs wherever one of the keys does.
    key, *others = keys
    for other in others:
        key = (key * _FACTOR + other) % 2**64
    return key


def ordered_keys(first: KeyArray, second: KeyArray) -> KeyArray:
    """`ordered_key` of many twos."""
    keys: KeyArray = first * np.uint64(_FACTOR) + second
    return keys


_FACTOR = 0x9E3779B97F4A7C15


def _key_of(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
