"""Attention over a prefix tree, as a function registered with transformers' attention interface.

Each segment of the tree attends to its ancestors and causally to itself: one scaled-dot-product call per
segment over the concatenated keys of its path. The tree reaches the layers as a keyword argument of the
model call, so any causal model whose layers pass their keyword arguments on runs on it unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, PreTrainedModel

from firesteel.engine.packing import Segment, Tree

TREE_ATTENTION = "firesteel_tree"


class TreeNotPassedOn(TypeError):
    """The model's layers did not hand the tree to the attention function, or asked it for something else."""


class TreeMask:
    """A tree as the attention function reads it; built once per micro-batch, used by every layer."""

    def __init__(self, tree: Tree, device: torch.device) -> None:
        self.segments = tree.segments
        self.reached_attention = False
        self.lengths = [segment.length for segment in tree.segments]
        self.paths = [(*path, index) for index, path in enumerate(tree.paths)]
        """For each segment, the segments it attends to, from the root to itself."""
        self._device = device

    @cached_property
    def masks(self) -> list[torch.Tensor | None]:
        """For each segment, ``[length, position + length]`` of what may be seen; None = plainly causal."""
        return [None if not segment.position else self._mask(segment) for segment in self.segments]

    def _mask(self, segment: Segment) -> torch.Tensor:
        width = segment.position + segment.length
        return torch.ones(segment.length, width, dtype=torch.bool, device=self._device).tril(segment.position)


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
    grouped = query.shape[1] != key.shape[1]
    # Split once and join along paths: the gradient of a slice would be as long as the whole row.
    queries, keys, values = (torch.split(states, tree.lengths, dim=2) for states in (query, key, value))
    outputs = [
        F.scaled_dot_product_attention(
            own,
            torch.cat([keys[i] for i in path], dim=2),
            torch.cat([values[i] for i in path], dim=2),
            attn_mask=mask,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=grouped,
        )
        for own, path, mask in zip(queries, tree.paths, tree.masks, strict=True)
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


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
