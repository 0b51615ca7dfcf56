"""What the frozen reference says of pairs: asked once for all of them before training, or as they come up."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np

from firesteel.sdk import ServiceClient
from training.utils.checkpoints import ReferenceRecord
from training.utils.client import ReconnectableClient
from training.utils.losses import PairLogprobs
from training.utils.pairs import PreferencePair
from training.utils.progress import Display, Stage
from training.utils.reference_cache import (
    BLOCK_PAIRS,
    PROBE_PAIRS,
    TOLERANCE,
    CacheStatistics,
    ReferenceCache,
    cache_file,
    reference_logprobs,
)
from training.utils.rendering import Renderer
from training.utils.row_sets import RowSet
from training.utils.training_settings import ReferenceMode

RECORDED_PAIRS = 8
"""Of how many pairs a checkpoint keeps what the reference says."""
SAME_NUMERICS = 1e-5
"""Nats. The same pairs computed together on the same versions are equal to the bit; threads move them by less."""


class References:
    """The reference's log-probabilities, most of them perhaps in the cache of earlier runs."""

    def __init__(
        self,
        service: ServiceClient,
        renderer: Renderer,
        mode: ReferenceMode,
        start: str | None = None,
        cache: Path | None = None,
    ) -> None:
        """`start` is the folder of the reference's weights, see `create_reference_client`; None = the base model.

        `cache` is where values are kept, if not in the file that all runs share.
        """
        self._mode = mode
        self.start = start
        self._statistics = CacheStatistics(0, 0, 0, 0, 0)
        self.seconds = 0.0
        """For what was computed or looked up; the load of a separate reference is not in it."""
        self._service = service
        self._client = ReconnectableClient.from_training_client(service.create_reference_client(start=start))
        self.job_id = service.reference_trainer_job_id
        """None where the reference shares the policy's base."""
        self._identity = self._client.identify()
        self._cache = ReferenceCache(cache or cache_file(), self._identity, renderer.identity)

    def record(self, pairs: Sequence[PreferencePair]) -> ReferenceRecord:
        """What the reference is, and what it says of these pairs now, computed together."""
        values = self.asked_now(pairs) if pairs else []
        said = [side for value in values for side in (value.chosen, value.rejected)]
        # What is not finite is none here: it is kept as JSON.
        probes = [[value if math.isfinite(value) else None for value in side.tolist()] for side in said]
        return ReferenceRecord(self._identity.weights, self._identity.numerics, self.start, probes)

    def tolerance(self, before: ReferenceRecord) -> float:
        """Nats by which one token's log-probability may differ from what was recorded: rounding, where it can."""
        same = before.numerics == self._identity.numerics
        return SAME_NUMERICS if same else TOLERANCE[self._identity.numerics.split()[0]]

    def prepare(
        self,
        sets: Sequence[RowSet[PreferencePair]],
        display: Display,
        seed: int,
        after_block: Callable[[], None] = lambda: None,
    ) -> None:
        """Upfront: complete the cache, all pairs in blocks in the order of their files, and let the reference go.

        `after_block` is called when one is on the disk; what it raises ends the pass.

        Lazy: nothing yet. A reference of its own is then kept until the service closes.
        """
        if self._mode == "lazy":
            return
        started = time.monotonic()
        total = sum(int(pairs.records["pairs"].sum()) for pairs in sets)
        stage = Stage("reference", total, seconds_between_lines=10)
        with display.bar(stage) as bar:
            blocks = (block for pairs in sets for block in pairs.blocks(BLOCK_PAIRS))

            def advance(pairs: int) -> None:
                bar.advance(pairs)
                after_block()

            self._statistics = self._cache.fill(blocks, self._client, advance, seed)
        self.seconds = time.monotonic() - started
        display.say(self.summary)
        self._service.release_references()

    def of(self, pairs: Sequence[PreferencePair]) -> list[PairLogprobs]:
        """The values of these pairs, in order. Lazy: what is missing is computed, all of these pairs together."""
        if self._mode == "lazy":
            started = time.monotonic()
            probes = PROBE_PAIRS - self._statistics.probed
            self._statistics += self._cache.complete(pairs, self._client, max(probes, 0))
            self.seconds += time.monotonic() - started
        return self._cache.read(pairs)

    def asked_now(self, pairs: Sequence[PreferencePair]) -> list[PairLogprobs]:
        """The values of these pairs as the reference computes them now; no cache is read or written."""
        return reference_logprobs(self._client, pairs)

    def finish(self, display: Display) -> None:
        """Say what a lazy reference came to."""
        if self._mode == "lazy":
            display.say(self.summary)

    @property
    def counts(self) -> dict[str, float]:
        """Pairs so far whose values were in the cache, those whose values were computed, and the tokens read for it."""
        return {
            "reference/cache_hits": self._statistics.hits,
            "reference/computed": self._statistics.computed,
            "reference/tokens": self._statistics.tokens,
        }

    @property
    def summary(self) -> str:
        """For people."""
        return f"reference: {self._statistics.summary} in {self.seconds:.1f} s"

    def close(self) -> None:
        """Close the cache."""
        self._cache.close()


class NoReferences:
    """For a loss that reads no reference: one that says 0 of every token, and is never loaded."""

    start: str | None = None
    job_id: str | None = None
    seconds = 0.0
    counts: Mapping[str, float] = MappingProxyType({})

    def record(self, pairs: Sequence[object]) -> ReferenceRecord:
        """That there is none."""
        return ReferenceRecord(weights="none", numerics="none", path=None, probes=[])

    def tolerance(self, before: ReferenceRecord) -> float:
        """Nothing is compared."""
        return 0.0

    def prepare(
        self,
        sets: Sequence[RowSet[PreferencePair]],
        display: Display,
        seed: int,
        after_block: Callable[[], None] = lambda: None,
    ) -> None:
        """Nothing to ask."""

    def of(self, pairs: Sequence[PreferencePair]) -> list[PairLogprobs]:
        """Zeros, one for each scored token."""
        scored = [
            [int(np.count_nonzero(datum.loss_fn_inputs["weights"].to_numpy())) for datum in pair.datums]
            for pair in pairs
        ]
        return [PairLogprobs(*(np.zeros(tokens, np.float32) for tokens in sides)) for sides in scored]

    asked_now = of

    def finish(self, display: Display) -> None:
        """Nothing to say."""

    def close(self) -> None:
        """Nothing to close."""


AnyReferences = References | NoReferences
