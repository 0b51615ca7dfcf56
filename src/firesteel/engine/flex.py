"""Attention over a prefix tree as one FlexAttention call: what CUDA runs.

One kernel for the whole row, however many segments it has, and no wait of the host for the device in between: the
tree reaches the kernel as one number for each place, and as a list of the blocks of 128 × 128 that hold anything
visible. Numbers as in `attention`, where the CPU computes one segment at a time.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from firesteel.engine.packing import Tree
from firesteel.sdk.types import BoolArray, IntArray

BLOCK = 128  # FlexAttention's own default, for which its kernels are tuned
SMALLEST_WIDTH = 16  # of a head: the least that a product in a Triton kernel takes
KERNELS = 64  # of one process, see `_kernel`


def tree_blocks(tree: Tree, device: torch.device) -> BlockMask:
    """Which places of the row each place sees: itself and what stands before it in its own sequences.

    Rows are in depth-first order, so that all who see a place stand in one run: from itself to the end of what its
    segment branches into. One number for each place tells the whole mask.
    """
    ends = _ends(tree)
    ends_there = torch.from_numpy(ends.astype(np.int32)).to(device)

    def visible(
        batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        return (key <= query) & (query < ends_there[key])

    whole, some = _blocks(ends)
    partial_count, partial_keys, whole_count, whole_keys = (
        torch.from_numpy(table[None, None].astype(np.int32)).to(device)
        for table in (*_listed(some & ~whole), *_listed(whole))
    )
    return BlockMask.from_kv_blocks(
        partial_count,
        partial_keys,
        whole_count,
        whole_keys,
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(len(ends), len(ends)),
    )


def _ends(tree: Tree) -> IntArray:
    """For each place, one past the last that sees it."""
    subtree_ends = np.array([segment.end for segment in tree.segments])
    for index in reversed(range(len(tree.segments))):  # children stand after their parents
        parent = tree.segments[index].parent
        if parent is not None:
            subtree_ends[parent] = max(subtree_ends[parent], subtree_ends[index])
    return np.repeat(subtree_ends, [segment.length for segment in tree.segments])


def _blocks(ends: IntArray) -> tuple[BoolArray, BoolArray]:
    """Which blocks of queries and keys are visible as a whole, and which in some place."""
    starts = np.arange(0, len(ends), BLOCK)
    earliest, latest = np.minimum.reduceat(ends, starts), np.maximum.reduceat(ends, starts)
    before = starts < starts[:, None]
    some = (starts == starts[:, None]) | (before & (latest > starts[:, None]))
    whole = before & (earliest >= starts[:, None] + BLOCK)
    return whole, some


def _listed(blocks: BoolArray) -> tuple[IntArray, IntArray]:
    """For each block of queries: how many blocks of keys, and which, these first."""
    return blocks.sum(axis=1), np.argsort(~blocks, axis=1, kind="stable")


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, blocks: BlockMask, scale: float | None
) -> torch.Tensor:
    """Query ``[1, heads, T, d]``, key and value ``[1, kv_heads, T, d]`` → ``[1, heads, T, d]``; sums in float32."""
    kernel = _kernel(query.device.type)
    grouped = query.shape[1] != key.shape[1]
    output: torch.Tensor = kernel(
        query, key, value, block_mask=blocks, scale=scale, enable_gqa=grouped, kernel_options=_OPTIONS
    )
    return output


# A row shorter than a block is no decoding step: the kernel meant for those does not compile for any length.
_OPTIONS = {"FORCE_USE_FLEX_ATTENTION": True}


@functools.cache
def _kernel(device: str) -> Any:
    if device != "cuda":
        return flex_attention  # the uncompiled form, for comparison
    # One kernel for any row length (every new one would otherwise take many seconds), but one for each number of
    # heads, width, dtype, scale, and for a row of one block. dynamo would stop at 8 of them and go on uncompiled,
    # which is a row of scores for every token: raise the limit, and make passing it an error (`fullgraph`).
    torch._dynamo.config.recompile_limit = max(KERNELS, torch._dynamo.config.recompile_limit)
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)
