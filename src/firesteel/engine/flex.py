"""Attention over a prefix tree as one FlexAttention call: what CUDA runs.

One kernel for the whole row, however many segments it has, and no wait of the host for the device in between: the
tree reaches the kernel as two small tables, and as blocks of 128 × 128 that hold nothing visible and are skipped.
Numbers as in `attention`, where the CPU computes one segment at a time.
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


def tree_blocks(tree: Tree, device: torch.device) -> BlockMask:
    """Which places of the row each place sees: itself and what stands before it in its own sequences.

    Rows are in depth-first order, so that "before" is "at a smaller place", and what remains to be told is whose
    segment is an ancestor. The blocks are found from pieces of segments; no mask of the row is made.
    """
    sees = _visible_segments(tree)
    length = len(tree.tokens)
    segment_of = np.repeat(np.arange(len(tree.segments)), [segment.length for segment in tree.segments])
    visible_segments, segments = torch.from_numpy(sees).to(device), torch.from_numpy(segment_of).to(device)

    def visible(
        batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        return visible_segments[segments[query], segments[key]] & (key <= query)

    whole, some = _blocks(tree, sees)
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
        seq_lengths=(length, length),
    )


def _visible_segments(tree: Tree) -> BoolArray:
    """``[S, S]``: the segments on each segment's path, itself included."""
    sees = np.zeros((len(tree.segments), len(tree.segments)), dtype=bool)
    for index, path in enumerate(tree.paths):
        sees[index, [*path, index]] = True
    return sees


def _blocks(tree: Tree, sees: BoolArray) -> tuple[BoolArray, BoolArray]:
    """Which blocks of queries and keys are visible as a whole, and which in some place."""
    length = len(tree.tokens)
    # Pieces: the row cut at the edges of blocks and of segments, so that each lies in one of both.
    block_edges = np.arange(0, length, BLOCK)
    starts = np.union1d(block_edges, [segment.start for segment in tree.segments])
    ends = np.append(starts[1:], length)
    segment_of = np.searchsorted([segment.start for segment in tree.segments], starts, side="right") - 1
    related = sees[segment_of[:, None], segment_of]
    some = related & (starts <= ends[:, None] - 1)
    whole = related & (ends - 1 <= starts[:, None])
    edges = np.searchsorted(starts, block_edges)
    some = np.logical_or.reduceat(np.logical_or.reduceat(some, edges, axis=0), edges, axis=1)
    whole = np.logical_and.reduceat(np.logical_and.reduceat(whole, edges, axis=0), edges, axis=1)
    if length % BLOCK:  # the last block reaches behind the row
        whole[-1], whole[:, -1] = False, False
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
    output: torch.Tensor = kernel(query, key, value, block_mask=blocks, scale=scale, enable_gqa=grouped)
    return output


@functools.cache
def _kernel(device: str) -> Any:
    # Compiled for any row length at once: every new one would otherwise take many seconds. A CPU has only the
    # uncompiled form, for comparison.
    return torch.compile(flex_attention, dynamic=True) if device == "cuda" else flex_attention
