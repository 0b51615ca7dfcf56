"""The built-in losses: sums over tokens and data, divided by nothing. Whoever wants a mean scales the weights.

With l the log-probability of a target, q that of the sampler, A its advantage, r = exp(l - q):

    cross_entropy        -Σ w l
    importance_sampling  -Σ r A
    ppo                  -Σ min(r A, clip(r, lo, hi) A)
    cispo                -Σ stopgrad(clip(r, lo, hi)) l A
    dro                  -Σ (l A - ½ β (l - q)²)

Definitions: Tinker API; PPO arXiv 1707.06347, CISPO arXiv 2506.13585, DRO arXiv 2405.19107.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from firesteel.sdk.types import Datum
from firesteel.sdk.validation import LOSS_SETTINGS


def datum_loss(
    name: str, logprobs: torch.Tensor, datum: Datum, settings: Mapping[str, float] | None = None
) -> torch.Tensor:
    """One datum's share of a built-in loss, a scalar. `logprobs` has the shape of the targets."""
    if name == "cross_entropy":
        if "weights" not in datum.loss_fn_inputs:
            return -logprobs.sum()
        return -(logprobs * _input(datum, "weights", logprobs)).sum()
    setting = {**LOSS_SETTINGS[name], **(settings or {})}
    sampler, advantages = _input(datum, "logprobs", logprobs), _input(datum, "advantages", logprobs)
    log_ratio = logprobs - sampler
    if name == "dro":
        return -(logprobs * advantages - 0.5 * setting["beta"] * log_ratio.square()).sum()  # type: ignore[operator]
    ratio = log_ratio.exp()
    if name == "importance_sampling":
        return -(ratio * advantages).sum()
    clipped = ratio.clamp(setting["clip_low_threshold"], setting["clip_high_threshold"])
    if name == "ppo":
        return -torch.minimum(ratio * advantages, clipped * advantages).sum()
    if name == "cispo":
        return -(clipped.detach() * logprobs * advantages).sum()
    raise ValueError(f"no built-in loss {name!r}")


def _input(datum: Datum, name: str, like: torch.Tensor) -> torch.Tensor:
    return datum.loss_fn_inputs[name].to_torch().to(like.device, like.dtype)
