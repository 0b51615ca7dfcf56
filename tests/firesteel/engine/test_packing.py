"""Packing, on any set of sequences: nothing is lost, nothing is stored twice, no pair is torn apart."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from firesteel.engine.packing import Tree, common_prefix, pack, plan

# Few different tokens and short sequences: shared prefixes, prefixes of each other and twins are the rule.
tokens = st.lists(st.integers(0, 2), min_size=1, max_size=8)
batches = st.lists(tokens, min_size=1, max_size=7)
corners = [
    [[1]],
    [[1], [1]],
    [[1, 2, 3], [4, 5, 6]],  # nothing shared
    [[1, 2], [1, 2, 3, 4]],  # one side a prefix of the other
    [[1, 2, 3, 4], [1, 2]],
    [[1, 2, 3], [1, 2, 3], [1, 2, 3]],
    [[1, 1, 1, 1], [1, 1, 1, 2], [1, 1, 2], [1, 2], [2]],  # depth 4
    [[1], [1, 2], [1, 2, 3], [1, 2, 3, 4]],  # a chain
]


def with_corners(test):  # type: ignore[no-untyped-def]
    for corner in corners:
        test = example(corner)(test)
    return settings(max_examples=150, deadline=None)(given(batches)(test))


def arrays(batch: list[list[int]]) -> list[np.ndarray]:
    return [np.asarray(sequence, np.int64) for sequence in batch]


def prefixes(batch: list[list[int]]) -> set[tuple[int, ...]]:
    return {tuple(sequence[:end]) for sequence in batch for end in range(1, len(sequence) + 1)}


def span(tree: Tree, index: int) -> np.ndarray:
    return np.arange(tree.segments[index].start, tree.segments[index].end)


def path_tokens(tree: Tree, index: int) -> list[int]:
    rows = np.concatenate([span(tree, i) for i in (*tree.paths[index], index)])
    return tree.tokens[rows].tolist()


@with_corners
def test_every_sequence_is_read_back_through_its_row(batch: list[list[int]]) -> None:
    tree = pack(arrays(batch))
    assert [tree.tokens[row].tolist() for row in tree.rows] == batch


@with_corners
def test_positions_count_from_zero_along_every_sequence(batch: list[list[int]]) -> None:
    tree = pack(arrays(batch))
    for sequence, row in zip(batch, tree.rows, strict=True):
        assert tree.positions[row].tolist() == list(range(len(sequence)))


@with_corners
def test_the_row_holds_each_distinct_prefix_once(batch: list[list[int]]) -> None:
    tree = pack(arrays(batch))
    assert len(tree.tokens) == len(tree.positions) == len(prefixes(batch))


@with_corners
def test_what_a_token_can_see_is_the_prefix_it_stands_for(batch: list[list[int]]) -> None:
    tree = pack(arrays(batch))
    for sequence, row in zip(batch, tree.rows, strict=True):
        for position, place in enumerate(row):
            segment = next(i for i, s in enumerate(tree.segments) if s.start <= place < s.end)
            seen = path_tokens(tree, segment)[: position + 1]
            assert seen == sequence[: position + 1]


@with_corners
def test_segments_cover_the_row_in_order_and_follow_their_parents(batch: list[list[int]]) -> None:
    tree = pack(arrays(batch))
    assert np.concatenate([span(tree, i) for i in range(len(tree.segments))]).tolist() == list(
        range(len(tree.tokens))
    )
    for index, segment in enumerate(tree.segments):
        assert segment.length > 0
        if segment.parent is None:
            assert segment.position == 0
        else:
            assert segment.parent < index
            parent = tree.segments[segment.parent]
            assert segment.position == parent.position + parent.length


@with_corners
def test_no_two_children_of_a_parent_start_with_the_same_token(batch: list[list[int]]) -> None:
    tree = pack(arrays(batch))
    starts = [(segment.parent, int(tree.tokens[segment.start])) for segment in tree.segments]
    assert len(starts) == len(set(starts))


@with_corners
def test_a_segment_is_as_long_as_its_sequences_agree(batch: list[list[int]]) -> None:
    # An only child that no sequence ends before would be a segment cut in two: right, but slower.
    tree = pack(arrays(batch))
    for index in range(len(tree.segments)):
        children = [child for child in tree.segments if child.parent == index]
        assert len(children) != 1 or path_tokens(tree, index) in batch


@with_corners
def test_the_row_depends_on_the_order_of_the_sequences_alone(batch: list[list[int]]) -> None:
    one, two = pack(arrays(batch)), pack(arrays(batch))
    assert one.tokens.tolist() == two.tokens.tolist()
    assert one.segments == two.segments
    # Branches come in the order in which their sequences do.
    firsts = [int(row[0]) for row in one.rows]
    assert [f for i, f in enumerate(firsts) if f not in firsts[:i]] == sorted(set(firsts))
    assert one.rows[0].tolist() == list(range(len(batch[0])))


def test_a_pair_shares_its_prompt_and_each_answer_starts_behind_it() -> None:
    tree = pack(arrays([[7, 8, 9, 1, 2], [7, 8, 9, 3]]))
    assert tree.tokens.tolist() == [7, 8, 9, 1, 2, 3]
    assert tree.positions.tolist() == [0, 1, 2, 3, 4, 3]
    assert [(s.start, s.length, s.position, s.parent) for s in tree.segments] == [
        (0, 3, 0, None),
        (3, 2, 3, 0),
        (5, 1, 3, 0),
    ]


def test_packing_leaves_its_input_alone() -> None:
    batch = arrays([[1, 2, 3], [1, 2, 4]])
    tree = pack(batch)
    tree.tokens[:] = 0
    assert [a.tolist() for a in batch] == [[1, 2, 3], [1, 2, 4]]


@settings(max_examples=150, deadline=None)
@given(batches, st.integers(1, 30))
def test_a_plan_holds_every_sequence_once_and_in_order(batch: list[list[int]], budget: int) -> None:
    cut = plan(arrays(batch), budget)
    assert [member for part in cut for member in part.members] == list(range(len(batch)))
    for part in cut:
        alone = pack(arrays([batch[member] for member in part.members]))
        assert part.tree.tokens.tolist() == alone.tokens.tolist()
        assert part.tree.segments == alone.segments


pairs = st.lists(
    st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=6), tokens, tokens), min_size=1, max_size=6
)


@settings(max_examples=150, deadline=None)
@given(pairs, st.integers(1, 40), st.lists(st.integers(0, 2), max_size=4))
def test_a_pair_that_shares_its_prompt_is_never_split(
    pairs: list[tuple[list[int], list[int], list[int]]], budget: int, template: list[int]
) -> None:
    # Prompts differ in their first own token, behind what a chat template puts before all of them.
    batch = [
        [*template, 10 + number, *prompt, *answer]
        for number, (prompt, chosen, rejected) in enumerate(pairs)
        for answer in (chosen, rejected)
    ]
    for part in plan(arrays(batch), budget):
        assert len(part.members) % 2 == 0
        assert part.members[0] % 2 == 0


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=8), st.integers(1, 60))
def test_pairs_fill_a_batch_up_to_the_budget_and_no_further(answers: list[int], budget: int) -> None:
    batch = [
        [pair, *range(100, 105), side, *range(200, 200 + n)]
        for pair, n in enumerate(answers)
        for side in (98, 99)
    ]
    cut = plan(arrays(batch), budget)
    for part in cut:
        assert len(part.members) == 2 or len(part.tree.tokens) <= budget
    for part, following in itertools.pairwise(cut):
        next_pair = batch[following.members[0] : following.members[0] + 2]
        together = len(part.tree.tokens) + len(prefixes(next_pair))
        assert together > budget, "a batch was closed although the next pair had fitted in"


@settings(max_examples=150, deadline=None)
@given(batches, st.integers(1, 30))
def test_a_batch_over_the_budget_has_no_place_to_cut(batch: list[list[int]], budget: int) -> None:
    sequences = arrays(batch)
    shared = [common_prefix(a, b) for a, b in itertools.pairwise(sequences)]
    for part in plan(sequences, budget):
        if len(part.tree.tokens) <= budget:
            continue
        for left in part.members[:-1]:
            assert shared[left] > 0
            has_both_neighbours = 0 < left < len(shared) - 1
            assert not has_both_neighbours or shared[left] > min(shared[left - 1], shared[left + 1])


def test_sequences_that_share_nothing_are_never_held_together() -> None:
    cut = plan(arrays([[1] * 9, [2] * 9, [3] * 9]), 10)
    assert [part.members for part in cut] == [(0,), (1,), (2,)]


def test_a_long_group_of_answers_to_one_prompt_may_be_split() -> None:
    group = arrays([[1, 2, 3, 10 + answer, *range(50, 60)] for answer in range(12)])
    cut = plan(group, 40)
    assert len(cut) > 1
    assert all(len(part.members) > 1 and len(part.tree.tokens) <= 40 for part in cut)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [([1, 2, 3], [1, 2, 4], 2), ([1, 2], [1, 2, 3], 2), ([1], [2], 0), ([1, 2], [1, 2], 2)],
)
def test_common_prefix_counts_what_both_start_with(one: list[int], other: list[int], expected: int) -> None:
    assert common_prefix(np.asarray(one), np.asarray(other)) == expected
