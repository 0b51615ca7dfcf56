"""The frozen reference's log-probabilities of all pairs, once, before training starts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

from firesteel.sdk import ServiceClient
from firesteel.store import home
from training.utils.client import ReconnectableClient
from training.utils.losses import PairLogprobs
from training.utils.pairs import PreferencePair
from training.utils.progress import Display, Stage
from training.utils.reference_cache import ReferenceCache
from training.utils.rendering import Renderer


@dataclass(frozen=True)
class ReferencePass:
    """What the reference says of each pair, in order, and what that cost."""

    logprobs: list[PairLogprobs]
    job_id: str | None
    """None where the reference shared the policy's base."""
    seconds: float
    """From the cache or computed; the load of a separate reference is not in it."""


def run_reference_pass(
    pairs: Sequence[PreferencePair], service: ServiceClient, renderer: Renderer, display: Display, seed: int
) -> ReferencePass:
    """Ask the reference for all pairs, most of them perhaps in the cache of earlier runs, and release it."""
    reference = ReconnectableClient.from_training_client(service.create_reference_client())
    path = home() / "reference_cache.sqlite"
    started = time.monotonic()
    with (
        closing(ReferenceCache(path, reference.identify(), renderer.identity)) as cache,
        display.bar(Stage("reference", len(pairs), seconds_between_lines=10)) as bar,
    ):
        logprobs, statistics = cache.fill(pairs, reference, bar.advance, seed)
    seconds = time.monotonic() - started
    display.say(f"reference: {statistics.summary} in {seconds:.1f} s")
    job_id = service.reference_trainer_job_id
    service.release_references()
    return ReferencePass(logprobs, job_id, seconds)
