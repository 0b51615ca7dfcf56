"""A pass of the model → log-probabilities of the targets that are asked for.

A position that several sequences share is scored from one row of hidden states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from firesteel.engine.adapters import output_head
from firesteel.engine.attention import TreeMask, TreeNotPassedOn
from firesteel.engine.head import HeadForm, Targets, target_logprobs, wide
from firesteel.engine.packing import Tree
from firesteel.sdk.types import BoolArray, IntArray


@dataclass(frozen=True)
class Asked:
    """The targets of one sequence: `targets[j]`, or each of the row `targets[j]`, is scored at token j."""

    targets: IntArray
    """``[n]`` or ``[n, K]``."""
    scored: BoolArray | None = None
    """Of the same shape: which of them to score, None = all. The others read 0.0."""

    @property
    def places(self) -> IntArray:
        """Indices of the targets to score, in the flattened targets."""
        return np.arange(self.targets.size) if self.scored is None else np.flatnonzero(self.scored)


def tree_logprobs(
    model: PreTrainedModel, tree: Tree, asked: Sequence[Asked], form: HeadForm | None
) -> list[torch.Tensor]:
    """Log-probabilities of each sequence's targets, in their shape, with a graph if gradients are on.

    Without a form the model's own head makes all logits. Reductions are fp32, or fp64 in an fp64 model.
    """
    if not any(a.places.size for a in asked):
        return _in_shape(torch.zeros(0, dtype=wide(model.dtype), device=model.device), asked)
    mask = TreeMask(tree, model.device, model.dtype)
    inputs = {
        "input_ids": torch.from_numpy(tree.tokens)[None].to(model.device),
        "position_ids": torch.from_numpy(tree.positions)[None].to(model.device),
        "tree": mask,
    }
    scores = _logprobs(model, inputs, tree.rows, asked, form)
    if not mask.reached_attention:
        raise TreeNotPassedOn(f"{type(model).__name__} computes its attention by itself")
    return scores


def plain_logprobs(
    model: PreTrainedModel, tokens: IntArray, asked: Asked, form: HeadForm | None
) -> torch.Tensor:
    """The same for one sequence by itself, through the model's own attention: for models a tree cannot serve."""
    if not asked.places.size:
        return _in_shape(torch.zeros(0, dtype=wide(model.dtype), device=model.device), [asked])[0]
    inputs = {"input_ids": torch.from_numpy(tokens)[None].to(model.device)}
    return _logprobs(model, inputs, [np.arange(len(tokens))], [asked], form)[0]


def _logprobs(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    rows: Sequence[IntArray],
    asked: Sequence[Asked],
    form: HeadForm | None,
) -> list[torch.Tensor]:
    targets = Targets(
        np.concatenate([r[a.places // (a.targets.size // len(r))] for r, a in zip(rows, asked, strict=True)]),
        np.concatenate([a.targets.ravel()[a.places] for a in asked]),
    )
    if form is None:
        logits = model(**inputs, use_cache=False).logits[0]
        scores = _from_logits(logits, targets)
    else:
        states = model.base_model(**inputs, use_cache=False).last_hidden_state[0]
        used, local = np.unique(targets.rows, return_inverse=True)
        if len(used) < len(states):
            states = states.index_select(0, torch.from_numpy(used).to(states.device))
        scores = target_logprobs(output_head(model, form), states, Targets(local, targets.ids))
    return _in_shape(scores, asked)


def _from_logits(logits: torch.Tensor, targets: Targets) -> torch.Tensor:
    """``logits[row, target] - logsumexp(logits[row])``.

    One gather for all targets: the gradient of a gather is as large as the logits, whatever it picks.
    """
    index, chosen = (torch.from_numpy(part).to(logits.device) for part in (targets.rows, targets.ids))
    normalizer = torch.logsumexp(logits.to(wide(logits.dtype)), dim=-1)
    return logits[index, chosen].to(normalizer.dtype) - normalizer[index]


def _in_shape(scores: torch.Tensor, asked: Sequence[Asked]) -> list[torch.Tensor]:
    """One tensor per sequence, shaped like its targets, with 0.0 at what was not asked for."""
    sizes = [a.targets.size for a in asked]
    if len(scores) < sum(sizes):
        starts = np.cumsum([0, *sizes[:-1]])
        places = np.concatenate([start + a.places for start, a in zip(starts, asked, strict=True)])
        zeros = scores.new_zeros(sum(sizes))
        scores = zeros.index_copy(0, torch.from_numpy(places).to(scores.device), scores)
    parts = torch.split(scores, sizes)
    return [part.reshape(a.targets.shape) for part, a in zip(parts, asked, strict=True)]
