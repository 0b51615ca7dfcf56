"""Hidden states and head → log-probabilities of targets.

The model's own head runs, so logit scaling, soft-capping, a bias or an adapter on the head all count. A
position that several sequences share has one row of logits.
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
    mask = TreeMask(tree, device)
    logits = model(
        input_ids=torch.from_numpy(tree.tokens)[None].to(device),
        position_ids=torch.from_numpy(tree.positions)[None].to(device),
        tree=mask,
        use_cache=False,
    ).logits[0]
    if not mask.reached_attention:
        raise TreeNotPassedOn(f"{type(model).__name__} computes its attention by itself")
    return _scores(logits, tree.rows, targets)


def plain_logprobs(model: PreTrainedModel, tokens: IntArray, targets: IntArray) -> torch.Tensor:
    """The same for one sequence by itself, through the model's own attention: for models a tree cannot serve."""
    logits = model(input_ids=torch.from_numpy(tokens)[None].to(model.device), use_cache=False).logits[0]
    return _scores(logits, [np.arange(len(tokens))], [targets])[0]


def _scores(
    logits: torch.Tensor, rows: Sequence[IntArray], targets: Sequence[IntArray]
) -> list[torch.Tensor]:
    """``logits[row, target] - logsumexp(logits[row])`` for every target of every sequence.

    One gather for all of them: the gradient of a gather is as large as the logits, whatever it picks.
    """
    per_target = [
        np.broadcast_to(r.reshape(-1, *[1] * (t.ndim - 1)), t.shape)
        for r, t in zip(rows, targets, strict=True)
    ]
    index = torch.from_numpy(np.concatenate([row.ravel() for row in per_target])).to(logits.device)
    chosen = torch.from_numpy(np.concatenate([target.ravel() for target in targets])).to(logits.device)
    normalizer = torch.logsumexp(_widened(logits), dim=-1)
    scores = _widened(logits[index, chosen]) - normalizer[index]
    parts = torch.split(scores, [target.size for target in targets])
    return [part.reshape(target.shape) for part, target in zip(parts, targets, strict=True)]


def _widened(values: torch.Tensor) -> torch.Tensor:
    return values if values.dtype is torch.float64 else values.float()
