"""Hidden states and head → log-probabilities of targets.

The model's own head runs on the positions that somebody asks for, so logit scaling, soft-capping, a bias or
an adapter on the head all count. A position that several sequences share has one row of logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from firesteel.engine.attention import TreeMask, TreeNotPassedOn
from firesteel.engine.packing import Tree
from firesteel.sdk.types import IntArray


def tree_logprobs(model: PreTrainedModel, tree: Tree, targets: Sequence[IntArray]) -> list[torch.Tensor]:
    """Log-probabilities of each sequence's targets, ``[n]`` or ``[n, K]`` each, with a graph if gradients are on.

    `targets[i][j]` is scored at token j of sequence i. Reductions are fp32, or fp64 in an fp64 model.
    """
    device = model.device
    positions = np.unique(np.concatenate(tree.rows))
    mask = TreeMask(tree, device)
    logits = model(
        input_ids=torch.from_numpy(tree.tokens)[None].to(device),
        position_ids=torch.from_numpy(tree.positions)[None].to(device),
        logits_to_keep=torch.from_numpy(positions).to(device),
        tree=mask,
        use_cache=False,
    ).logits[0]
    if not mask.reached_attention:
        raise TreeNotPassedOn(f"{type(model).__name__} computes its attention by itself")
    normalizer = _log_normalizer(logits)
    return [
        _pick(logits, normalizer, np.searchsorted(positions, row), target)
        for row, target in zip(tree.rows, targets, strict=True)
    ]


def plain_logprobs(model: PreTrainedModel, tokens: IntArray, targets: IntArray) -> torch.Tensor:
    """The same for one sequence by itself, through the model's own attention: for models a tree cannot serve."""
    logits = model(input_ids=torch.from_numpy(tokens)[None].to(model.device), use_cache=False).logits[0]
    return _pick(logits, _log_normalizer(logits), np.arange(len(tokens)), targets)


def _log_normalizer(logits: torch.Tensor) -> torch.Tensor:
    return torch.logsumexp(_widened(logits), dim=-1)


def _pick(logits: torch.Tensor, normalizer: torch.Tensor, rows: IntArray, targets: IntArray) -> torch.Tensor:
    # [n, 1] for plain targets, [n, K] for several targets at one position.
    wide = torch.from_numpy(targets.reshape(len(targets), -1)).to(logits.device)
    index = torch.from_numpy(rows).to(logits.device)[:, None]
    return (_widened(logits[index, wide]) - normalizer[index]).reshape(targets.shape)


def _widened(values: torch.Tensor) -> torch.Tensor:
    return values if values.dtype is torch.float64 else values.float()
