"""Attention over a prefix tree, as a function registered with transformers' attention interface.

Each segment of the tree attends to its ancestors and causally to itself. On a CPU that is one scaled-dot-product
call per segment over the concatenated keys of its path, on CUDA one FlexAttention call for the row (`flex`). The
tree reaches the layers as a keyword argument of the model call, so any causal model whose layers pass their
keyword arguments on runs on it unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, PreTrainedModel

from firesteel.engine.flex import SMALLEST_WIDTH, attend, tree_blocks
from firesteel.engine.packing import Segment, Tree

TREE_ATTENTION = "firesteel_tree"


class TreeNotPassedOn(TypeError):
    """The model's layers did not hand the tree to the attention function, or asked it for something else."""


class TreeMask:
    """A tree as the attention function reads it; built once per micro-batch, used by every layer."""

    def __init__(self, tree: Tree, device: torch.device, dtype: torch.dtype) -> None:
        self.segments = tree.segments
        self.reached_attention = False
        self.lengths = [segment.length for segment in tree.segments]
        self.paths = [(*path, index) for index, path in enumerate(tree.paths)]
        """For each segment, the segments it attends to, from the root to itself."""
        self._tree, self._device, self._dtype = tree, device, dtype

    def by_blocks(self, width: int) -> bool:
        """Whether FlexAttention computes heads of this width here: its kernels have no float64, and none below 16."""
        return self._device.type == "cuda" and self._dtype is not torch.float64 and width >= SMALLEST_WIDTH

    @cached_property
    def blocks(self) -> BlockMask:
        """The whole tree, for FlexAttention."""
        return tree_blocks(self._tree, self._device)

    @cached_property
    def masks(self) -> list[torch.Tensor | None]:
        """For each segment, ``[length, position + length]`` to add to its scores; None = plainly causal."""
        return [None if not segment.position else self._mask(segment) for segment in self.segments]

    def _mask(self, segment: Segment) -> torch.Tensor:
        # As numbers: from a mask of yes and no every layer would make these again.
        shape = (segment.length, segment.position + segment.length)
        return torch.full(shape, -torch.inf, dtype=self._dtype, device=self._device).triu(
            segment.position + 1
        )


def tree_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    tree: TreeMask | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Query ``[1, heads, T, d]``, key and value ``[1, kv_heads, T, d]`` → output ``[1, T, heads, d]``."""
    if tree is None:
        raise TreeNotPassedOn(f"{type(module).__name__} does not pass keyword arguments on to its attention")
    if dropout or attention_mask is not None or kwargs.get("softcap") or kwargs.get("s_aux") is not None:
        raise TreeNotPassedOn(f"{type(module).__name__} needs a mask, dropout, soft-capping or sinks")
    tree.reached_attention = True
    if tree.by_blocks(query.shape[-1]):
        return attend(query, key, value, tree.blocks, scaling).transpose(1, 2), None
    return _by_segments(query, key, value, tree, scaling).transpose(1, 2), None


def _by_segments(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tree: TreeMask, scale: float | None
) -> torch.Tensor:
    grouped = query.shape[1] != key.shape[1]
    # Split once and join along paths: the gradient of a slice would be as long as the whole row.
    queries, keys, values = (torch.split(states, tree.lengths, dim=2) for states in (query, key, value))
    outputs = [
        F.scaled_dot_product_attention(
            own,
            _joined(keys, path),
            _joined(values, path),
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=grouped,
        )
        for own, path, mask in zip(queries, tree.paths, tree.masks, strict=True)
    ]
    return torch.cat(outputs, dim=2)


def _joined(parts: Sequence[torch.Tensor], path: Sequence[int]) -> torch.Tensor:
    return parts[path[0]] if len(path) == 1 else torch.cat([parts[i] for i in path], dim=2)


AttentionInterface.register(TREE_ATTENTION, tree_attention)


@contextmanager
def using_attention(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """Run the model with another attention implementation for a while."""
    config = model.config
    before = config._attn_implementation
    config._attn_implementation = implementation
    try:
        yield
    finally:
        config._attn_implementation = before
