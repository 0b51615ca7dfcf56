"""Where rows are from: the `source` that a row may name, and held-out rows told apart by it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from firesteel.sdk.types import BoolArray

MOST_SOURCES = 20
"""Sources with metrics of their own: the most frequent ones."""
LONGEST_NAME = 60
"""Of a source, in letters: some data keep an address or a text in that field."""
REST, UNNAMED = "(others)", "(none)"
"""In brackets: data name sources `other` and `none`."""


def by_source(sources: Sequence[str | None]) -> Iterator[tuple[str, BoolArray]]:
    """Which rows are of each source, by its name in metrics; nothing where no row names one.

    Only the `MOST_SOURCES` most frequent are told apart, of equal ones the first by name.
    """
    if all(source is None for source in sources):
        return
    names = [_whole_name(source) for source in sources]
    counts = Counter(names)
    kept = sorted(counts, key=lambda name: (-counts[name], name))[:MOST_SOURCES]
    shown = {name: _shown(name) for name in kept}
    groups = np.array([shown.get(name, REST) for name in names])
    for name in sorted(set(groups.tolist())):
        yield name, groups == name


def count_sources(sources: Sequence[str | None]) -> dict[str, float]:
    """How many there are, those left out too; empty where no row names one."""
    return (
        {"sources": len(set(map(_whole_name, sources)))}
        if any(source is not None for source in sources)
        else {}
    )


def sources_left_out(metrics: Mapping[str, float]) -> str | None:
    """What people should know of held-out metrics that do not tell all sources apart."""
    found = int(metrics.get("sources", 0))
    if found <= MOST_SOURCES:
        return None
    return (
        f"held out: {found} sources; the {MOST_SOURCES} most frequent have metrics of their own, the others are "
        f"counted together as {REST}"
    )


def _whole_name(source: str | None) -> str:
    """What tells it from others: rows that differ in their blanks are of one source."""
    return " ".join((source or UNNAMED).split()) or UNNAMED


def _shown(name: str) -> str:
    """As it stands in the name of a metric: a long one by its ends, and a hash, since others may have these ends."""
    if len(name) <= LONGEST_NAME:
        return name
    told = hashlib.blake2b(name.encode(), digest_size=4).hexdigest()
    left = LONGEST_NAME - len(told) - len("… #")
    return f"{name[: left - left // 2]}…{name[-(left // 2) :]} #{told}"
