"""Token sequences → prefix trees: what several sequences share is computed once. Pure numpy.

A tree is one row of tokens without padding. Each segment of it is a run of tokens that belongs to the same
sequences; it follows its parent in position, attends to its ancestors and causally to itself, and sees
nothing else. The answers of a pair, of a ranked list, of a GRPO group hang on one prompt segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from firesteel.sdk.types import IntArray


@dataclass(frozen=True)
class Segment:
    """Tokens ``[start, start + length)`` of the row; the first stands at `position` of its sequences."""

    start: int
    length: int
    position: int
    parent: int | None
    """Index of the segment before it, None at a root."""

    @property
    def end(self) -> int:
        """One past its last token."""
        return self.start + self.length


@dataclass(frozen=True)
class Tree:
    """Several sequences in one row, shared prefixes once."""

    tokens: IntArray
    """The row, ``[T]``."""
    positions: IntArray
    """Position of each token in its sequences, ``[T]``: restarts at every branch."""
    segments: tuple[Segment, ...]
    """Parents before children, in row order."""
    rows: tuple[IntArray, ...]
    """For each sequence, where in the row its tokens stand."""

    @cached_property
    def paths(self) -> tuple[tuple[int, ...], ...]:
        """For each segment, its ancestors from the root down, itself excluded."""
        paths: list[tuple[int, ...]] = []
        for segment in self.segments:
            paths.append(() if segment.parent is None else (*paths[segment.parent], segment.parent))
        return tuple(paths)


def pack(sequences: Sequence[IntArray]) -> Tree:
    """Build the prefix tree of non-empty token sequences.

    Children keep the order in which their sequences come, so the same list always gives the same row.
    """
    segments: list[Segment] = []
    tokens: list[IntArray] = []
    path_of: list[list[int]] = [[] for _ in sequences]
    # (sequences that agree so far, tokens they agree on, segment that ends there); last in, first out.
    open_groups: list[tuple[list[int], int, int | None]] = [(list(range(len(sequences))), 0, None)]
    start = 0
    while open_groups:
        group, depth, parent = open_groups.pop()
        for members in reversed(_by_next_token(sequences, group, depth)):
            if len(members) < len(group):
                open_groups.append((members, depth, parent))
                continue
            end = _common_length(sequences, members)
            segments.append(Segment(start, end - depth, depth, parent))
            tokens.append(sequences[members[0]][depth:end])
            for member in members:
                path_of[member].append(len(segments) - 1)
            open_groups.append((members, end, len(segments) - 1))
            start += end - depth
    return Tree(
        tokens=np.concatenate(tokens).astype(np.int64),
        positions=np.concatenate([np.arange(s.position, s.position + s.length) for s in segments]),
        segments=tuple(segments),
        rows=tuple(
            np.concatenate([np.arange(segments[i].start, segments[i].end) for i in p]) for p in path_of
        ),
    )


def _by_next_token(sequences: Sequence[IntArray], group: list[int], depth: int) -> list[list[int]]:
    """Split a group by the token at `depth`; sequences that end there leave."""
    branches: dict[int, list[int]] = {}
    for member in group:
        if len(sequences[member]) > depth:
            branches.setdefault(int(sequences[member][depth]), []).append(member)
    return list(branches.values())


def _common_length(sequences: Sequence[IntArray], group: list[int]) -> int:
    first = sequences[group[0]]
    return min(common_prefix(first, sequences[member]) for member in group)


def common_prefix(one: IntArray, other: IntArray) -> int:
    """Number of leading tokens that two sequences share."""
    shorter = min(len(one), len(other))
    differing = np.flatnonzero(one[:shorter] != other[:shorter])
    return int(differing[0]) if len(differing) else shorter


@dataclass(frozen=True)
class MicroBatch:
    """Sequences computed in one pass: their places in the call, and their tree."""

    members: tuple[int, ...]
    tree: Tree


def plan(sequences: Sequence[IntArray], token_budget: int) -> tuple[MicroBatch, ...]:
    """Cut a call into micro-batches of at most `token_budget` tokens after sharing, in order.

    A cut is made where neighbours share nothing, or no more than the neighbours on either side do: a pair that
    shares its prompt is never split, and a long run of answers to one prompt may be. What cannot be cut
    further may exceed the budget.
    """
    shared = [common_prefix(a, b) for a, b in pairwise(sequences)]
    batches: list[MicroBatch] = []
    start = 0
    while start < len(sequences):
        end = _next_cut(sequences, shared, start, token_budget)
        batches.append(MicroBatch(tuple(range(start, end)), pack(sequences[start:end])))
        start = end
    return tuple(batches)


def _next_cut(sequences: Sequence[IntArray], shared: list[int], start: int, token_budget: int) -> int:
    tokens = len(sequences[start])
    last_allowed = None
    for index in range(start + 1, len(sequences)):
        if _may_cut(shared, index):
            last_allowed = index
        # Sharing with the sequence before is a lower bound on what the whole tree shares.
        tokens += len(sequences[index]) - shared[index - 1]
        if tokens > token_budget and last_allowed is not None:
            return last_allowed
    return len(sequences)


def _may_cut(shared: list[int], index: int) -> bool:
    here = shared[index - 1]
    if here == 0:
        return True
    before = shared[index - 2] if index >= 2 else -1
    after = shared[index] if index < len(shared) else -1
    return before >= here <= after
