"""FlexAttention over a tree: the same numbers as segment by segment, on any tree. It has no backward on a CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from firesteel.engine.attention import TreeMask, tree_attention
from firesteel.engine.flex import attend, tree_blocks
from firesteel.engine.packing import pack

tokens = st.lists(st.integers(0, 2), min_size=1, max_size=9)
batches = st.lists(tokens, min_size=1, max_size=6)
CPU = torch.device("cpu")


def states(rows: int, seed: int) -> list[torch.Tensor]:
    """Query, key and value of a row: four heads in two groups."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, heads, rows, 16, dtype=torch.float64, generator=generator) for heads in (4, 2, 2)]


@settings(max_examples=25, deadline=None)
@given(batches, st.integers(0, 100))
@example([[1, 2, 3], [1, 2, 4]], 0)
@example([[1, 2], [1, 2, 3, 4]], 0)  # one side a prefix of the other
@example([[1, 2, 3], [1, 2, 3]], 0)  # twins
@example([[1, 1, 1, 1], [1, 1, 1, 2], [1, 1, 2], [1, 2], [2]], 0)  # depth 4
@example([[7] * 150 + [1] * 80, [7] * 150 + [2] * 40, [8] * 60], 0)  # several blocks
def test_values_are_those_of_the_segments(batch: list[list[int]], seed: int) -> None:
    tree = pack([np.asarray(sequence, np.int64) for sequence in batch])
    query, key, value = states(len(tree.tokens), seed)
    mask = TreeMask(tree, CPU, torch.float64)
    by_segments, _ = tree_attention(torch.nn.Identity(), query, key, value, None, 0.3, tree=mask)
    by_blocks = attend(query, key, value, tree_blocks(tree, CPU), 0.3).transpose(1, 2)
    torch.testing.assert_close(by_segments, by_blocks, rtol=0, atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(1, 200), st.integers(1, 200)), min_size=1, max_size=3)
)
def test_the_blocks_are_those_that_looking_at_every_place_finds(pairs: list[tuple[int, int, int]]) -> None:
    batch = [
        np.concatenate([np.full(prompt, number), np.full(answer, 10 + side)])
        for number, (prompt, *answers) in enumerate(pairs)
        for side, answer in enumerate(answers)
    ]
    tree = pack(batch)
    ours = tree_blocks(tree, CPU)
    length = len(tree.tokens)
    theirs = create_block_mask(ours.mask_mod, None, None, length, length, device="cpu")
    for counts, keys in (("kv_num_blocks", "kv_indices"), ("full_kv_num_blocks", "full_kv_indices")):
        for one, other in zip(listed(ours, counts, keys), listed(theirs, counts, keys), strict=True):
            assert one == other


def listed(blocks: BlockMask, counts: str, keys: str) -> list[set[int]]:
    """For each block of queries, the blocks of keys."""
    return [
        set(row[:count].tolist())
        for count, row in zip(getattr(blocks, counts)[0, 0], getattr(blocks, keys)[0, 0], strict=True)
    ]


def test_blocks_without_anything_visible_are_skipped() -> None:
    shared = np.full(256, 7)
    tree = pack([np.append(shared, np.full(256, side)) for side in (1, 2)])
    computed = tree_blocks(tree, CPU).to_dense()[0, 0]
    expected = np.array(
        [
            [1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0],
            [1, 1, 1, 1, 0, 0],
            [1, 1, 0, 0, 1, 0],  # the second answer sees nothing of the first
            [1, 1, 0, 0, 1, 1],
        ]
    )
    assert (computed.numpy() == expected).all()


def test_a_cpu_float64_and_narrow_heads_go_segment_by_segment() -> None:
    tree, gpu = pack([np.arange(3)]), torch.device("cuda")
    assert not TreeMask(tree, CPU, torch.float32).by_blocks(64)
    assert not TreeMask(tree, gpu, torch.float64).by_blocks(64)
    assert not TreeMask(tree, gpu, torch.bfloat16).by_blocks(8)
    assert TreeMask(tree, gpu, torch.bfloat16).by_blocks(16)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_one_compiled_kernel_serves_rows_of_any_length_with_the_gradients_of_the_segments() -> None:
    rng = np.random.default_rng(0)
    for lengths in ((40, 9, 7), (300, 80, 33), (131, 64, 1)):
        prompt, one, two = (rng.integers(0, 50, n) for n in lengths)
        tree = pack([np.concatenate([prompt, one]), np.concatenate([prompt, two])])
        ours = [x.float().cuda().requires_grad_() for x in states(len(tree.tokens), 0)]
        theirs = [x.requires_grad_() for x in states(len(tree.tokens), 0)]
        blocks = tree_blocks(tree, ours[0].device)
        output = attend(ours[0], ours[1], ours[2], blocks, None).transpose(1, 2)
        mask = TreeMask(tree, CPU, torch.float64)
        expected, _ = tree_attention(torch.nn.Identity(), theirs[0], theirs[1], theirs[2], None, tree=mask)
        torch.testing.assert_close(output.double().cpu(), expected, rtol=0, atol=1e-4)
        gradients = torch.autograd.grad(output.square().sum(), ours)
        for one_grad, other in zip(
            gradients, torch.autograd.grad(expected.square().sum(), theirs), strict=True
        ):
            torch.testing.assert_close(one_grad.double().cpu(), other, rtol=0, atol=1e-3)
