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
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from firesteel.engine.packing import Tree


def tree_blocks(tree: Tree, device: torch.device) -> BlockMask:
    """Which places of the row each place sees: itself and what stands before it in its own sequences.

    Rows are in depth-first order, so that "before" is "at a smaller place", and what remains to be told is whose
    segment is an ancestor. Making the blocks takes T² bytes for a moment.
    """
    count, length = len(tree.segments), len(tree.tokens)
    sees = np.zeros((count, count), dtype=bool)
    for index, path in enumerate(tree.paths):
        sees[index, [*path, index]] = True
    segment_of = np.repeat(np.arange(count), [segment.length for segment in tree.segments])
    visible_segments, segments = torch.from_numpy(sees).to(device), torch.from_numpy(segment_of).to(device)

    def visible(
        batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        return visible_segments[segments[query], segments[key]] & (key <= query)

    return create_block_mask(visible, None, None, length, length, device=device)


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
