"""Reference log-probabilities on disk, keyed by content: computed once, right for ever.

An entry's key is the hash of all that decides its values: the reference's weights and numerics, tokenizer
and template, the token ids and which of them are scored. Loss, β, learning rate and row order are not in
it (values are per token). Each entry carries a checksum; a sample is recomputed whenever a run starts.

Which rows are computed together changes the last bits of their values. So what is computed together follows
from data and settings alone: fixed blocks in dataset order, or with a lazy pass the batches of the training steps.
A block is committed in one transaction, the first writer wins, and what a run uses is what it then reads back.
"""

from __future__ import annotations

import hashlib
import math
import random
import sqlite3
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol

import numpy as np

from firesteel.sdk import ConfigError, DataError, Datum, ForwardBackwardOutput, StorageError, TensorData
from firesteel.sdk.operations import ModelIdentity
from firesteel.sdk.types import FloatArray
from firesteel.store import home
from training.utils.losses import PairLogprobs
from training.utils.pairs import DistinctDatums, PreferencePair

BLOCK_PAIRS = 16
PROBE_PAIRS = 4
# Kernels, thread counts and block composition move a log-probability by some 1e-5 in float32; another model
# moves it by much more.
TOLERANCE = {"float64": 1e-3, "float32": 1e-3, "bfloat16": 0.25}
LOCK_SECONDS = 60
WRITTEN_REMEMBERED = 100_000
_EMPTY_BYTES = 3 * 4096  # header, table and index, a page each
_ENTRY_BYTES = (
    128  # of an entry, beside its values: key, row, the key once more in the index, half-filled pages
)
_ELSEWHERE = "set FIRESTEEL_HOME to a writable folder"
_SCHEMA_VERSION = 1
_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS logprobs (key BLOB PRIMARY KEY, vals BLOB NOT NULL, crc INTEGER NOT NULL)"
)


def cache_file() -> Path:
    """The one that all runs share."""
    return home() / "reference_cache.sqlite"


class Reference(Protocol):
    """What the cache asks of a reference client."""

    def forward(self, data: Sequence[Datum], *, weighted_only: bool = False) -> ForwardBackwardOutput:
        """Log-probabilities of every target, or of those whose weight is not 0."""


@dataclass(frozen=True)
class CacheStatistics:
    """What a pass over the data found and did; counts are pairs."""

    hits: int
    computed: int
    damaged: int
    """With an entry whose checksum did not match; they are among the computed."""
    probed: int
    """Cached pairs that were recomputed to compare."""
    tokens: int
    """Tokens that the reference read."""

    def __add__(self, other: CacheStatistics) -> CacheStatistics:
        return CacheStatistics(
            *(getattr(self, field.name) + getattr(other, field.name) for field in fields(CacheStatistics))
        )

    @property
    def summary(self) -> str:
        """`495 pairs, 120 from the cache, 375 computed (0 with damaged entries, 4 checked)`."""
        return (
            f"{self.hits + self.computed} pairs, {self.hits} from the cache, {self.computed} computed "
            f"({self.damaged} with damaged entries, {self.probed} checked)"
        )


class ReferenceCache:
    """One SQLite file shared by all runs, seen through one reference's identity."""

    def __init__(self, path: Path, identity: ModelIdentity, tokenizer_identity: str) -> None:
        """Open or create the file.

        Raises `DataError` if it is not a cache of this version, `ConfigError` if its folder cannot be made,
        `StorageError` (as everything here that writes) if the disk is full.
        """
        scope = f"{identity.weights} {identity.numerics} {tokenizer_identity}"
        self._scope = hashlib.sha256(scope.encode()).digest()
        self._tolerance = TOLERANCE[identity.numerics.split()[0]]
        self._path = path
        self._written: set[bytes] = (
            set()
        )  # by this run: to compare these with what it computes would show nothing
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"reference cache {path}: {error}; {_ELSEWHERE}") from error
        with self._explained():
            self._open()

    @contextmanager
    def _explained(self, bytes_needed: int = _EMPTY_BYTES) -> Iterator[None]:
        """SQLite's errors as ours: a disk without room for `bytes_needed`, a file that cannot be used now, or never."""
        try:
            yield
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
                raise StorageError(
                    f"reference cache {self._path}: {error}, about {bytes_needed:,} bytes are needed for the next "
                    "entries; make room, or set FIRESTEEL_HOME to a folder with room"
                ) from error
            raise ConfigError(f"reference cache {self._path}: {error}; {_ELSEWHERE}") from error
        except sqlite3.DatabaseError as error:
            raise DataError(
                f"reference cache {self._path}: {error}; move the file away, it will be rebuilt"
            ) from error

    def _open(self) -> None:
        # Autocommit; transactions are explicit. FULL: what a run has read back must survive a power cut.
        self._database = sqlite3.connect(self._path, timeout=LOCK_SECONDS, isolation_level=None)
        self._turn_on_write_ahead_log()
        self._database.execute("PRAGMA synchronous=FULL")
        with self._database:
            self._database.execute("BEGIN IMMEDIATE")
            version = self._database.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, _SCHEMA_VERSION):
                raise DataError(
                    f"reference cache {self._path}: version {version}; this program writes {_SCHEMA_VERSION}"
                )
            self._database.execute(_SCHEMA)
            self._database.execute(f"PRAGMA user_version={_SCHEMA_VERSION}")

    def _turn_on_write_ahead_log(self) -> None:
        # Runs that open a new file at the same moment get "locked" from this one statement at once: SQLite's
        # own waiting does not cover it.
        give_up = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                self._database.execute("PRAGMA journal_mode=WAL")
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > give_up:
                    raise
                time.sleep(0.02)

    def fill(
        self,
        blocks: Iterable[Sequence[PreferencePair]],
        reference: Reference,
        advance: Callable[[int], None] = lambda pairs: None,
        seed: int = 0,
    ) -> CacheStatistics:
        """Have the reference compute what is missing, block by block, and compare a sample of what was there.

        `advance` is told how many pairs more are done. Raises `DataError` if a cached sample differs from
        what the reference computes now.
        """
        statistics, sample = _NOTHING, _Sample(PROBE_PAIRS, seed)
        for block in blocks:
            done, cached = self._complete(block, reference)
            statistics += done
            for pair in cached:
                sample.offer(pair)
            advance(len(block))
        return statistics + self.probe(sample.kept, reference)

    def complete(
        self, block: Sequence[PreferencePair], reference: Reference, probes: int = 0
    ) -> CacheStatistics:
        """The same for one block; its first `probes` pairs that an earlier run has cached are the sample."""
        statistics, cached = self._complete(block, reference)
        earlier = [pair for pair in cached if self._written.isdisjoint(map(self._key, pair.datums))]
        return statistics + self.probe(earlier[:probes] if probes else [], reference)

    def read(self, pairs: Sequence[PreferencePair]) -> list[PairLogprobs]:
        """The values of pairs that are there. Raises `DataError` for one that is not."""
        with self._explained():
            return [self._read_back(pair) for pair in pairs]

    def probe(self, pairs: Sequence[PreferencePair], reference: Reference) -> CacheStatistics:
        """Compare cached values with what the reference computes now. Raises `DataError` if they differ."""
        with self._explained():
            self._probe(pairs, reference)
        return CacheStatistics(0, 0, 0, len(pairs), 0)

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def _complete(
        self, block: Sequence[PreferencePair], reference: Reference
    ) -> tuple[CacheStatistics, list[PreferencePair]]:
        """What was done, and the pairs that were there before."""
        # Twice: the write-ahead log holds the entries too.
        scored = (int(_scored(datum).sum()) for pair in block for datum in pair.datums)
        with self._explained(2 * sum(4 * count + _ENTRY_BYTES for count in scored)):
            cached = [pair for pair in block if self._read(pair) is not None]
            missing = len(block) - len(cached)
            if not missing:
                return CacheStatistics(len(block), 0, 0, 0, 0), cached
            damaged = self._compute(block, reference)
        tokens = sum(datum.model_input.length + 1 for datum in DistinctDatums.of(block).data)
        return CacheStatistics(len(cached), missing, damaged, 0, tokens), cached

    def _compute(self, block: Sequence[PreferencePair], reference: Reference) -> int:
        """Compute a whole block and commit it; entries that are there stay. Returns how many pairs were damaged."""
        outputs = _forward(reference, block)
        damaged: set[int] = set()
        with self._database:  # commits, or rolls back if anything in it raises
            self._database.execute("BEGIN IMMEDIATE")
            datums = ((index, datum) for index, pair in enumerate(block) for datum in pair.datums)
            for (index, datum), output in zip(datums, outputs, strict=True):
                key = self._key(datum)
                if self._lookup(key) is None and self._forget(key):
                    damaged.add(index)
                values = output["logprobs"].to_numpy()[_scored(datum)].astype("<f4").tobytes()
                row = (key, values, zlib.crc32(values))
                if len(self._written) < WRITTEN_REMEMBERED:
                    self._written.add(key)
                self._database.execute("INSERT OR IGNORE INTO logprobs VALUES (?, ?, ?)", row)
        return len(damaged)

    def _forget(self, key: bytes) -> bool:
        """Remove an entry; whether there was one."""
        return self._database.execute("DELETE FROM logprobs WHERE key=?", (key,)).rowcount > 0

    def _probe(self, pairs: Sequence[PreferencePair], reference: Reference) -> None:
        if not pairs:
            return
        outputs = _forward(reference, pairs)
        for datum, output in zip((d for p in pairs for d in p.datums), outputs, strict=True):
            cached = self._lookup(self._key(datum))
            now = output["logprobs"].to_numpy()[_scored(datum)]
            difference = math.inf if cached is None else largest_difference(cached, now)
            if difference > self._tolerance:
                raise DataError(
                    f"reference cache {self._path}: a cached log-probability differs by {difference:.3g} from what "
                    f"the reference gives now (allowed: {self._tolerance}); move the file away to rebuild it"
                )

    def _read(self, pair: PreferencePair) -> PairLogprobs | None:
        chosen, rejected = (self._lookup(self._key(datum)) for datum in pair.datums)
        return None if chosen is None or rejected is None else PairLogprobs(chosen, rejected)

    def _read_back(self, pair: PreferencePair) -> PairLogprobs:
        values = self._read(pair)
        if values is None:
            raise DataError(
                f"reference cache {self._path}: an entry vanished or was damaged while it was written"
            )
        return values

    def _lookup(self, key: bytes) -> FloatArray | None:
        row = self._database.execute("SELECT vals, crc FROM logprobs WHERE key=?", (key,)).fetchone()
        if row is None or zlib.crc32(row[0]) != row[1]:
            return None
        return np.frombuffer(row[0], dtype="<f4").astype(np.float32)

    def _key(self, datum: Datum) -> bytes:
        digest = hashlib.sha256(self._scope)
        tokens = np.asarray(datum.model_input.to_ints(), dtype="<i8")
        targets = datum.loss_fn_inputs["target_tokens"].to_numpy().astype("<i8")
        scored = np.flatnonzero(_scored(datum)).astype("<i8")
        for part in (tokens, targets, scored):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part.tobytes())
        return digest.digest()


def largest_difference(then: FloatArray, now: FloatArray) -> float:
    """Between the same log-probabilities, computed twice; infinite where one time all are finite and the other not.

    Of a row that has one that is not, which others are not either depends on how it is packed: an attention weight of 0
    times a value that is no number is none.
    """
    if not (np.isfinite(then).all() and np.isfinite(now).all()):
        return math.inf if np.isfinite(then).all() or np.isfinite(now).all() else 0.0
    return float(np.abs(then.astype(np.float64) - now).max(initial=0.0))


def reference_logprobs(reference: Reference, pairs: Sequence[PreferencePair]) -> list[PairLogprobs]:
    """What the reference says of the scored tokens of these pairs, computed together."""
    outputs = _forward(reference, pairs)
    datums = [datum for pair in pairs for datum in pair.datums]
    scored = [
        output["logprobs"].to_numpy()[_scored(datum)].astype(np.float32)
        for output, datum in zip(outputs, datums, strict=True)
    ]
    return [PairLogprobs(*scored[place : place + 2]) for place in range(0, len(scored), 2)]


def _forward(reference: Reference, pairs: Sequence[PreferencePair]) -> list[dict[str, TensorData]]:
    """The outputs of all chosen and rejected sides in turn; an answer of several pairs is computed once."""
    distinct = DistinctDatums.of(pairs)
    outputs = reference.forward(distinct.data, weighted_only=True).loss_fn_outputs
    shared = len(outputs) < len(distinct.places)
    return [outputs[place] for place in distinct.places] if shared else outputs


def _scored(datum: Datum) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    mask: np.ndarray[tuple[int], np.dtype[np.bool_]] = datum.loss_fn_inputs["weights"].to_numpy() != 0
    return mask


_NOTHING = CacheStatistics(0, 0, 0, 0, 0)


class _Sample:
    """A few of a stream of pairs, each with the same chance (reservoir sampling)."""

    def __init__(self, size: int, seed: int) -> None:
        self.kept: list[PreferencePair] = []
        self._size, self._random, self._offered = size, random.Random(seed), 0

    def offer(self, pair: PreferencePair) -> None:
        """One more of the stream."""
        self._offered += 1
        if len(self.kept) < self._size:
            self.kept.append(pair)
        elif (place := self._random.randrange(self._offered)) < self._size:
            self.kept[place] = pair
